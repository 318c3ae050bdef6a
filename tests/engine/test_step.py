"""A step's result depends on the rows and their weights alone: not on chunks, threads, dtype or
order in memory.
"""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlpcore as mc
from mlpcore.engine.chunks import cut

PAIRS = [
    ("identity", "squared_error"), ("identity", ("huber", 0.5)), ("tanh", "log_cosh"),
    ("softmax", "squared_error"),
    ("log_softmax", "huber"), ("log_softmax", "cross_entropy"),
    ("exp", "poisson"),
    ("sigmoid", "binary_cross_entropy"), (("sigmoid", 2.0), "binary_cross_entropy"),
    ("softmax", "cross_entropy"),
    ("softplus", "poisson"), ("gelu", "squared_error"),
]  # fmt: skip
HIDDEN = ["tanh", "gelu", "relu", ("sigmoid", 2.0), "mish", "identity"]


def problem(rows, n_in, n_out, loss, seed, classes=True):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, n_in))
    if loss == "cross_entropy":
        Y = rng.integers(0, n_out, rows)
        return X, Y if classes else np.eye(n_out)[Y]
    return X, rng.integers(0, 2, (rows, n_out)).astype(float)


def one_step(net, X, Y, w=None, rows=None, loss="squared_error", optimizer=None, **settings):
    """J, gradient and parameters after a step."""
    net = net.copy()
    trainer = mc.Trainer(net, loss=loss, optimizer=optimizer or mc.SGD(1.0), **settings)
    before = net.parameters.copy()
    J = trainer.step(X, Y, w, rows=rows)
    return J, trainer._step.gradient.copy(), before, net.parameters


# -- cutting ---------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 9))
def test_chunks_cover_every_row_once_in_order_none_too_long_or_empty_and_workers_share_the_rows_evenly(  # noqa: E501
    size, rows, workers
):
    shares = cut(size, rows, workers)
    chunks = [chunk for share in shares for chunk in share]
    assert chunks[0][0] == 0
    assert chunks[-1][1] == size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(chunks))
    assert all(0 < stop - start <= rows for start, stop in chunks)
    assert len(shares) == min(workers, -(-size // rows))
    of_worker = [share[-1][1] - share[0][0] for share in shares]
    assert max(of_worker) - min(of_worker) <= 1
    for share in shares:
        lengths = [stop - start for start, stop in share]
        assert max(lengths) - min(lengths) <= 1
        assert len(share) == -(-sum(lengths) // rows)
    if rows * workers >= size:  # then the plan has no arrays for a second chunk
        assert all(len(share) == 1 for share in shares)


# -- the result does not depend on the chunks ------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 45), st.integers(1, 3), st.sampled_from(PAIRS),
    st.lists(st.sampled_from(HIDDEN), max_size=3),
    st.booleans(), st.sampled_from(["float32", "float64"]),
    st.sampled_from(["none", "some zero", "integers"]), st.booleans(),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_chunking_changes_nothing_but_summation_order(
    rows, chunk_rows, workers, pair, hidden, bias, dtype, weighted, indexed, classes, seed
):
    output, loss = pair
    rng = np.random.default_rng(seed)
    sizes = [
        int(rng.integers(1, 6)),
        *[int(rng.integers(1, 7)) for _ in hidden],
        3 if output in ("softmax", "log_softmax") else int(rng.integers(1, 4)),
    ]
    net = mc.MLP(sizes, hidden, output, bias=bias, dtype=dtype, seed=seed)
    total = rows + 5 if indexed else rows
    X, Y = problem(total, sizes[0], sizes[-1], loss, seed, classes)
    X = X.astype(dtype)
    index = rng.integers(0, total, rows) if indexed else None
    w = None
    if weighted != "none":
        w = rng.uniform(0.1, 3, total) if weighted == "some zero" else rng.integers(0, 4, total)
        w[rng.random(total) < 0.4] = 0
        w[0 if index is None else index[0]] = 2
    whole = one_step(net, X, Y, w, index, loss, chunk_rows=rows, workers=1, l2=0.1)
    parts = one_step(net, X, Y, w, index, loss, chunk_rows=chunk_rows, workers=workers, l2=0.1)
    epsilon = float(np.finfo(dtype).eps)
    scale = 1 + abs(whole[1]).max() + abs(whole[3]).max()
    assert parts[0] == pytest.approx(whole[0], rel=200 * epsilon, abs=200 * epsilon)
    np.testing.assert_allclose(parts[1], whole[1], rtol=0, atol=200 * epsilon * scale)
    np.testing.assert_allclose(parts[3], whole[3], rtol=0, atol=200 * epsilon * scale)
    np.testing.assert_allclose(whole[3], whole[2] - whole[1], rtol=0, atol=4 * epsilon * scale)


@pytest.mark.parametrize(
    "settings_", [{}, {"workers": 2}, {"chunk_rows": 1}, {"chunk_rows": 333, "workers": 3}]
)
def test_a_batch_of_many_chunks_equals_a_float64_whole(settings_):
    X, Y = problem(5000, 6, 3, "cross_entropy", 1)
    wide = mc.MLP([6, 16, 3], "gelu", "softmax", dtype="float64", seed=1)
    narrow = mc.MLP([6, 16, 3], "gelu", "softmax", seed=1)
    J, g, _, _ = one_step(wide, X, Y, loss="cross_entropy", chunk_rows=5000)
    J32, g32, _, _ = one_step(narrow, X.astype(np.float32), Y, loss="cross_entropy", **settings_)
    assert pytest.approx(J, rel=1e-6) == J32
    np.testing.assert_allclose(g32, g, atol=1e-6)


def test_weights_are_divided_by_the_whole_batchs_weight_not_the_chunks():
    X, Y = problem(12, 3, 2, "squared_error", 2)
    net = mc.MLP([3, 2], dtype="float64")
    w = np.array([0.0] * 4 + [1, 2, 3, 4] + [10.0] * 4)  # the first chunk weighs nothing
    Z = net.forward(X).output
    J, g, _, _ = one_step(net, X, Y, w, chunk_rows=4)
    assert pytest.approx((w * (0.5 * (Z - Y) ** 2).sum(axis=1)).sum() / w.sum(), rel=1e-14) == J
    D = w[:, None] / w.sum() * (Z - Y)
    np.testing.assert_allclose(g, np.concatenate([(X.T @ D).ravel(), D.sum(axis=0)]), rtol=1e-13)


def test_a_weight_of_two_is_the_row_twice_and_a_weight_of_zero_is_no_row():
    X, Y = problem(9, 3, 2, "squared_error", 3)
    net = mc.MLP([3, 4, 2], "tanh", dtype="float64")
    w = np.array([1, 2, 0, 1, 3, 0, 1, 1, 2])
    by_weight = one_step(net, X, Y, w)
    by_copies = one_step(net, np.repeat(X, w, axis=0), np.repeat(Y, w, axis=0))
    assert by_weight[0] == pytest.approx(by_copies[0], rel=1e-14)
    np.testing.assert_allclose(by_weight[1], by_copies[1], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("factor", [7.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_unit_of_the_weights_does_not_matter(factor, dtype):
    X, Y = problem(9, 3, 2, "squared_error", 3)
    net, w = mc.MLP([3, 4, 2], "tanh", dtype=dtype), np.arange(1.0, 10.0)
    one, other = (one_step(net, X, Y, weights, chunk_rows=4) for weights in (w, w * factor))
    assert other[0] == pytest.approx(one[0], rel=1e-6)
    np.testing.assert_allclose(other[1], one[1], rtol=1e-4, atol=1e-7)


def test_equal_weights_are_as_good_as_none():
    X, Y = problem(20, 3, 2, "squared_error", 3)
    net = mc.MLP([3, 4, 2], "tanh", dtype="float64")
    one, other = (
        one_step(net, X, Y, None, chunk_rows=6),
        one_step(net, X, Y, np.full(20, 0.7), chunk_rows=6),
    )
    assert one[0] == pytest.approx(other[0], rel=1e-14)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-12)


# -- rows= -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("x", ["float32", "float64", "uint8"])
def test_rows_equals_slicing_to_the_bit(dtype, x):
    X, Y = problem(50, 4, 3, "cross_entropy", 4)
    X = (40 * X).astype(x) if x == "uint8" else X.astype(x)
    rows = np.array([3, 49, 3, 0, 17, 20, 8, 8], dtype)
    w = np.random.default_rng(0).uniform(0, 1, 50)
    net = mc.MLP([4, 5, 3], "relu", "softmax")
    for weights in (None, w):
        picked = one_step(
            net,
            X[rows],
            Y[rows],
            None if weights is None else w[rows],
            loss="cross_entropy",
            chunk_rows=3,
        )
        indexed = one_step(net, X, Y, weights, rows, "cross_entropy", chunk_rows=3)
        assert indexed[0] == picked[0]
        np.testing.assert_array_equal(indexed[3], picked[3])


def test_rows_may_be_a_list_and_a_view_with_strides():
    X, Y = problem(20, 3, 2, "squared_error", 5)
    net = mc.MLP([3, 2])
    expected = one_step(net, X[[1, 5, 9]], Y[[1, 5, 9]])[3]
    for rows in ([1, 5, 9], np.arange(1, 12, 4), np.array([9, 5, 1])[::-1]):
        np.testing.assert_array_equal(one_step(net, X, Y, rows=rows)[3], expected)


# -- inputs of every kind --------------------------------------------------------------------------


def _kinds(A):
    big = np.zeros((2 * len(A), 2 * A.shape[1]) if A.ndim == 2 else 2 * len(A), A.dtype)
    strided = big[::2, ::2] if A.ndim == 2 else big[::2]
    strided[...] = A
    fixed = A.copy()
    fixed.flags.writeable = False
    reverse = A[::-1].copy()[::-1]
    # not aligned
    bytes_ = np.frombuffer(b"\0" + A.tobytes(), np.uint8)[1:].view(A.dtype).reshape(A.shape)
    kinds = {
        "float64": A.astype(np.float64), "float16": A.astype(np.float16),
        "uint8": A.astype(np.uint8),
        "bool or int8": A.astype(np.int8),
        "int64": A.astype(np.int64), "Fortran order": np.asfortranarray(A), "strided": strided,
        "read-only": fixed,
        "big-endian": A.astype(A.dtype.newbyteorder(">")), "a list": A.tolist(),
        "backwards": reverse, "unaligned": bytes_,
        "long double": A.astype(np.longdouble),
        "a matrix view of one wider": np.hstack([A, A])[:, : A.shape[1]] if A.ndim == 2 else A,
    }  # fmt: skip
    return kinds


KINDS = list(_kinds(np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_x_y_and_weights_of_every_kind_equal_the_plain_case_to_the_bit_and_are_left_alone(
    kind, indexed
):
    rng = np.random.default_rng(6)
    X = rng.integers(0, 9, (30, 4)).astype(np.float32)  # numbers that each dtype holds exactly
    Y = rng.integers(0, 3, (30, 2)).astype(np.float32)
    w = rng.integers(0, 3, 30).astype(np.float32)
    rows = rng.permutation(30)[:20] if indexed else None
    net = mc.MLP([4, 5, 2], "tanh")
    expected = one_step(net, X, Y, w, rows, chunk_rows=7)
    for which in ("X", "Y", "w"):
        arrays = {"X": X, "Y": Y, "w": w}
        arrays[which] = _kinds(arrays[which])[kind]
        before = np.array(arrays[which])
        found = one_step(net, *arrays.values(), rows, chunk_rows=7)
        assert found[0] == expected[0], which
        np.testing.assert_array_equal(found[3], expected[3], err_msg=which)
        np.testing.assert_array_equal(arrays[which], before, err_msg=which)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, ">i4"])
def test_class_indices_may_be_of_any_integer_type(dtype):
    X, Y = problem(30, 4, 3, "cross_entropy", 7)
    net = mc.MLP([4, 5, 3], "tanh", "softmax")
    expected = one_step(net, X, Y, loss="cross_entropy", chunk_rows=7)[3]
    for rows in (None, np.arange(30)):
        np.testing.assert_array_equal(
            one_step(net, X, Y.astype(dtype), None, rows, "cross_entropy", chunk_rows=7)[3],
            expected,
        )


def test_y_with_one_output_may_be_one_dimensional():
    X, Y = problem(30, 4, 1, "squared_error", 8)
    net = mc.MLP([4, 5, 1], "tanh")
    np.testing.assert_array_equal(one_step(net, X, Y[:, 0])[3], one_step(net, X, Y)[3])


def test_single_columns_and_rows():
    for sizes, rows in (([1, 1], 1), ([1, 1, 1], 5), ([1, 4, 1], 1), ([3, 1, 2], 4)):
        X, Y = problem(rows, sizes[0], sizes[-1], "squared_error", 9)
        net = mc.MLP(sizes, "tanh", dtype="float64", seed=2)
        J, G = mc.loss("squared_error")(net.forward(X).output, Y)
        found = one_step(net, X, Y, chunk_rows=2)
        assert found[0] == pytest.approx(J, rel=1e-14)
        np.testing.assert_allclose(
            found[1], net.backward(net.forward(X), G).flat, rtol=1e-12, atol=1e-15
        )


# -- a loss that is not finite ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [mc.SGD(0.1, momentum=0.9), mc.AdamW(0.1), mc.Lion(0.1), mc.RMSprop(0.1)]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_not_finite_leaves_parameters_state_and_step_count_and_training_goes_on(
    optimizer, workers
):
    X, Y = problem(40, 3, 2, "squared_error", 10)
    overflow = X.copy()
    overflow[37] = 1e30  # finite itself; its square is not, in float32
    plain, hit = (
        mc.Trainer(
            mc.MLP([3, 4, 2], "relu", seed=1),
            loss="squared_error",
            optimizer=optimizer,
            workers=workers,
            chunk_rows=8,
        )
        for _ in range(2)
    )
    for trainer in (plain, hit):
        trainer.step(X, Y)
        trainer.step(X, Y)
    before = [
        hit.net.parameters.copy(),
        *[vector.copy() for vector in hit._step.state.vectors.values()],
    ]
    with pytest.raises(
        mc.NonFiniteLoss,
        match=r"step 3: the loss is (inf|nan) at learning rate 0\.1; the parameters",
    ) as caught:
        hit.step(overflow, Y)
    assert (caught.value.step, caught.value.learning_rate) == (3, 0.1)
    for array, was in zip(
        [hit.net.parameters, *hit._step.state.vectors.values()], before, strict=True
    ):
        np.testing.assert_array_equal(array, was)
    assert hit.progress.step == 2
    assert hit.step(X, Y) == plain.step(X, Y)
    np.testing.assert_array_equal(hit.net.parameters, plain.net.parameters)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_caught_too():
    pole = mc.Loss("pole", "0 * z", "1 / (z - z)")
    net = mc.MLP([2, 1])
    before = net.parameters.copy()
    with pytest.raises(mc.NonFiniteLoss, match="the gradient is not finite"):
        mc.Trainer(net, loss=pole, optimizer=mc.SGD(0.1)).step(np.ones((3, 2)), np.ones(3))
    np.testing.assert_array_equal(net.parameters, before)


def test_a_large_finite_gradient_whose_squares_overflow_is_no_error():
    net = mc.MLP([1, 1], bias=False, init="zeros")
    linear = mc.Loss("linear", "y * z", "y + 0 * z")
    mc.Trainer(net, loss=linear, optimizer=mc.SGD(1e-20)).step([[1e10]], [[1e15]])
    np.testing.assert_allclose(net.parameters, [-1e5], rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_step_names_the_culprit_only_after_a_failure(bad):
    X, Y = problem(40, 3, 2, "squared_error", 11)
    for name, array, place in (("X", X, "row 31, column 1"), ("Y", Y, "row 31, column 1")):
        kept = array.copy()
        array[31, 1] = bad
        net = mc.MLP([3, 4, 2], "relu")
        before = net.parameters.copy()
        trainer = mc.Trainer(net, loss="squared_error", chunk_rows=8)
        with pytest.raises(ValueError, match=f"{name} must be finite; {place} holds {bad}"):
            trainer.step(X, Y)
        np.testing.assert_array_equal(net.parameters, before)
        array[...] = kept
        assert math.isfinite(trainer.step(X, Y))


# -- what changes between steps counts -------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda rate: mc.SGD(rate, momentum=0.9), mc.AdamW, mc.RMSprop])
def test_a_learning_rate_changed_between_steps_counts_from_the_next_one(make):
    X, Y = problem(20, 3, 2, "squared_error", 12)
    trainer = mc.Trainer(mc.MLP([3, 2], dtype="float64"), loss="squared_error", optimizer=make(0.1))
    trainer.step(X, Y)
    trainer.optimizer.learning_rate = 0.0
    assert trainer.learning_rate == 0.0
    parameters = trainer.net.parameters.copy()
    if isinstance(trainer.optimizer, mc.SGD):
        trainer.optimizer.momentum = 1e-300  # the velocity goes on by itself
    trainer.step(X, Y)
    np.testing.assert_allclose(trainer.net.parameters, parameters, rtol=1e-15)
    trainer.optimizer.learning_rate = mc.Constant(0.2)
    assert trainer.learning_rate == 0.2
    trainer.step(X, Y)
    assert abs(trainer.net.parameters - parameters).max() > 1e-3


def test_writing_into_the_weights_between_steps_counts():
    X, Y = problem(20, 3, 2, "squared_error", 13)
    net = mc.MLP([3, 4, 2], "tanh", dtype="float64")
    trainer = mc.Trainer(net, loss="squared_error", optimizer=mc.SGD(0.1), chunk_rows=7)
    for l, letter in ((1, "W"), (2, "W"), (1, "b"), (2, "b")):
        trainer.step(X, Y)
        getattr(net, letter)[l][...] = 0.25 * l
        fresh = one_step(net, X, Y, optimizer=mc.SGD(0.1), chunk_rows=7)
        assert trainer.step(X, Y) == fresh[0]
        np.testing.assert_array_equal(net.parameters, fresh[3])


def test_the_callers_arrays_may_change_and_move_between_steps():
    X, Y = problem(20, 3, 2, "squared_error", 14)
    net = mc.MLP([3, 4, 2], "tanh", dtype="float64")
    trainer = mc.Trainer(net, loss="squared_error", optimizer=mc.SGD(0.0), chunk_rows=7)
    first = trainer.step(X, Y)
    assert trainer.step(X.copy(), Y.copy()) == first
    X *= 2
    assert trainer.step(X, Y) == one_step(net, X, Y, chunk_rows=7)[0] != first


def test_batches_of_many_sizes_one_after_the_other_on_the_same_arrays():
    """More shapes of chunk than a worker keeps recordings of, there and back."""
    X, Y = problem(80, 3, 2, "squared_error", 15)
    net = mc.MLP([3, 4, 2], "gelu", dtype="float64")
    trainer = mc.Trainer(net, loss="squared_error", optimizer=mc.SGD(0.0), chunk_rows=64)
    for n in [*range(80, 0, -1), *range(1, 81, 3)]:
        assert trainer.step(X[:n], Y[:n]) == one_step(net, X[:n], Y[:n], chunk_rows=64)[0]
    assert len(trainer._step.crew.workers[0].recordings) <= 32


def test_inputs_of_changing_kinds_one_after_the_other():
    X, Y = problem(80, 3, 2, "squared_error", 15)
    net = mc.MLP([3, 4, 2], "gelu", dtype="float64")
    trainer = mc.Trainer(net, loss="squared_error", optimizer=mc.SGD(0.0), chunk_rows=16)
    w = np.linspace(0.1, 1, 80)
    for n in range(1, 81):
        weights, x = (w[:n] if n % 3 == 0 else None), (X.astype(np.float32) if n % 5 == 0 else X)
        assert (
            trainer.step(x[:n], Y[:n], weights)
            == one_step(net, x[:n], Y[:n], weights, chunk_rows=16)[0]
        )


def test_two_trainers_of_one_network_see_each_others_updates():
    X, Y = problem(20, 3, 2, "squared_error", 16)
    one, two = mc.MLP([3, 2], dtype="float64"), mc.MLP([3, 2], dtype="float64")
    a, b = (mc.Trainer(one, loss="squared_error", optimizer=mc.SGD(0.1)) for _ in range(2))
    c = mc.Trainer(two, loss="squared_error", optimizer=mc.SGD(0.1))
    for trainer in (a, b):
        trainer.step(X, Y)
        c.step(X, Y)
    np.testing.assert_array_equal(one.parameters, two.parameters)


def test_a_step_on_several_threads_limits_blas_while_it_runs_and_puts_its_setting_back():
    code = """
import numpy as np, mlpcore as mc
from mlpcore.backends.numpy import blas
count = lambda: {pool["num_threads"] for pool in blas.describe()}
print(count())
trainer = mc.Trainer(mc.MLP([3, 8, 2]), loss="squared_error", workers=2, chunk_rows=100)
for _ in range(3):
    trainer.step(np.ones((2000, 3)), np.ones((2000, 2)))
print(count())
with blas.limited(1):
    with blas.limited(1):
        print(count())
    print(count())
print(count())
"""
    env = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    before, after_steps, inner, outer, after = out
    assert before == after_steps == after
    assert inner == outer == "{1}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "sizes", "threads"),
    [(64, [784, 128, 10], 1), (300, [784, 128, 10], 2), (32, [784, 512, 10], 2)],
)
def test_blas_gets_one_thread_where_a_cache_holds_the_parameters_and_rows_are_few(
    rows, sizes, threads
):
    code = f"""
import numpy as np, mlpcore as mc
from mlpcore.backends.numpy import blas
from mlpcore.engine import cpu_step
cpu_step.CpuStep._stretch = lambda *_: None  # the calls of a step are made one by one
trainer = mc.Trainer(mc.MLP({sizes}, output="softmax"), optimizer=mc.SGD(0.1), workers=1)
seen, update = [], trainer._step.lanes.update
def look(*arguments):
    seen.extend(library.get_num_threads() for library in blas._libraries())
    update(*arguments)
trainer._step.lanes.update = look
X, Y = np.ones(({rows}, {sizes[0]}), np.float32), np.zeros({rows}, int)
trainer.step(X, Y)
print(*seen, blas.threads())
"""
    env = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    ).stdout.split()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert out[-1] == str(min(2, cpus))
    assert out[:-1] == [str(min(threads, cpus))]


@pytest.mark.slow
def test_reductions_penalties_and_clipping_go_lane_by_lane_and_count_every_entry():
    """Two workers and two lanes against one of each: sums in another order, nothing left out."""
    rng = np.random.default_rng(3)
    X, Y = rng.standard_normal((600, 513)), rng.standard_normal((600, 513))
    found = []
    for lanes, workers in ((1, 1), (2, 2)):
        net = mc.MLP([513, 513], dtype="float64", seed=1)
        trainer = mc.Trainer(
            net,
            "squared_error",
            mc.SGD(0.1),
            l1=1e-3,
            l2=1e-2,
            clip_norm=0.5,
            workers=workers,
            chunk_rows=100,
        )
        passes = trainer._step.lanes
        passes.count, passes.ops = lanes, [passes.problem.new_ops() for _ in range(lanes)]
        losses = [trainer.step(X, Y) for _ in range(3)]
        found.append((losses, net.parameters.copy()))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-12)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)


def test_a_penalty_that_is_set_counts_from_the_next_step_on():
    rng = np.random.default_rng(4)
    X, Y = rng.standard_normal((2, 40, 3))
    for first, then in ((0.5, 0.25), (0.0, 0.25), (0.5, 0.0)):
        changed, fresh = (
            mc.Trainer(mc.MLP([3, 5, 3], dtype="float64"), "squared_error", mc.SGD(0.1), l1=x)
            for x in (first, 0.1)
        )
        changed.step(X, Y)
        fresh.net.parameters[...] = changed.net.parameters
        fresh.l1, fresh.l2 = changed.l1, changed.l2 = 0.01, then
        assert changed.step(X, Y) == fresh.step(X, Y)
        assert changed.net.parameters.tobytes() == fresh.net.parameters.tobytes()
        W = changed.net.parameters[: changed.net.layout.weights].copy()
        J, g = changed.gradient(X, Y)
        g, changed.l1, changed.l2 = g.copy(), 0, 0
        plain, without = changed.gradient(X, Y)
        np.testing.assert_allclose(
            J - plain, 0.01 * abs(W).sum() + 0.5 * then * (W @ W), rtol=1e-10
        )
        np.testing.assert_allclose(
            (g - without)[: len(W)], 0.01 * np.sign(W) + then * W, rtol=1e-10, atol=1e-14
        )


def test_prepared_arrays_are_checked_once_and_give_the_same_steps():
    rng = np.random.default_rng(5)
    X, Y, w = rng.standard_normal((20, 3)), rng.standard_normal((20, 2)), rng.uniform(0, 1, 20)
    one, other = (mc.Trainer(mc.MLP([3, 4, 2]), "squared_error") for _ in range(2))
    data = one.prepare(X, Y, w)
    for rows in (None, [3, 1, 4], [1]):
        assert one.step(data, rows=rows) == other.step(X, Y, w, rows=rows)
    assert one.evaluate(data) == other.evaluate(X, Y, w)
    assert one.gradient(data, rows=[0, 2])[0] == other.gradient(X[[0, 2]], Y[[0, 2]], w[[0, 2]])[0]
    with pytest.raises(TypeError, match="Y and sample_weight must be left out"):
        one.step(data, Y)
    with pytest.raises(ValueError, match="row 1, column 2 holds nan"):
        one.prepare(np.where(np.arange(60).reshape(20, 3) == 5, np.nan, X), Y)
