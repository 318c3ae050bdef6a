"""The gradient check passes what is right and exposes what is wrong: each misprint in a net that
hides it, and in one that does not."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mlpcore as mc
from mlpcore import gradcheck
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core.running_errors import Numbers, RunningErrors


def problem(sizes, hidden, output="identity", loss="squared_error", rows=6, bias=True, seed=0):
    rng = np.random.default_rng(seed)
    net = mc.MLP(sizes, hidden, output, bias=bias, dtype="float64", init="glorot", seed=seed)
    net.parameters[...] += 0.3 * rng.standard_normal(net.layout.size)
    X, Y = rng.standard_normal((rows, sizes[0])), rng.standard_normal((rows, sizes[-1]))
    if loss == "cross_entropy":
        Y = rng.integers(0, sizes[-1], rows)
    return net, X, Y


def slope(activation, s, z):
    return {
        "identity": lambda: np.ones_like(s),
        "tanh": lambda: 1 - np.tanh(s) ** 2,
        "relu": lambda: (s > 0) * 1.0,
        "exp": lambda: np.exp(s),
        "sigmoid": lambda: activation.parameter * z * (1 - z),
    }[activation.name]()


def plain_gradient(net, X, Y, make_D=None, make_dW=None, share=None):
    """Backpropagation by the book for squared error, with the lines to misprint as arguments."""
    make_D = make_D or (lambda G, S, Z, l: G * slope(net.activations[l], S, Z))
    make_dW = make_dW or (lambda Z, D: Z.T @ D)
    Z, S = [X], [None]
    for l in range(1, net.layout.layers + 1):
        b = net.b[l]
        S.append(Z[-1] @ net.W[l] + (0 if b is None else b))
        Z.append(net.forward(X).Z[l])
    G = (Z[-1] - Y) / (len(X) if share is None else share)
    dW, db = {}, {}
    for l in range(net.layout.layers, 0, -1):
        D = make_D(G, S[l], Z[l], l)
        dW[l], db[l] = make_dW(Z[l - 1], D), D.sum(axis=0)
        assert dW[l].shape == net.W[l].shape
        G = D @ net.W[l].T
    L = range(1, net.layout.layers + 1)
    return np.concatenate(
        [dW[l].ravel() for l in L] + ([db[l] for l in L] if net.layout.bias else [])
    )


def check(net, X, Y, gradient=None, **settings):
    return mc.check_gradients(net, X, Y, loss="squared_error", gradient=gradient, **settings)


# -- right ones pass -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("entries", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_right_gradients_pass_the_engines_and_by_the_book(seed, entries):
    net, X, Y = problem([3, 5, 4, 2], ["tanh", ("sigmoid", 2.0)], seed=seed)
    for gradient in (None, plain_gradient(net, X, Y),
        net.backward(net.forward(X), mc.loss("squared_error")(
            net.forward(X).output, Y)[1])):  # fmt: skip
        result = check(net, X, Y, gradient, entries=entries)
        assert result.ok
        assert result.conclusive
        assert set(result.verdicts.values()) == {"right"}
        assert result.max_relative_error < 1e-6
        assert list(result.errors) == ["W[1]", "W[2]", "W[3]", "b[1]", "b[2]", "b[3]"]
        assert result.max_relative_error == max(result.errors.values())
        assert "gradient right" in str(result)


def test_the_network_its_data_and_its_dtype_are_left_as_they_were():
    net, X, Y = problem([3, 5, 2], "relu")
    narrow = mc.MLP([3, 5, 2], "relu", seed=3)
    for n in (net, narrow):
        before = [n.parameters.copy(), X.copy(), Y.copy()]
        assert check(n, X, Y).ok
        for array, was in zip((n.parameters, X, Y), before, strict=True):
            np.testing.assert_array_equal(array, was)
    assert narrow.parameters.dtype == np.float32


def test_a_gradient_computed_in_float32_passes_at_a_thousandth_and_not_at_a_millionth_of_a_millionth():  # noqa: E501
    net, X, Y = problem([3, 5, 2], "tanh")
    narrow = mc.MLP([3, 5, 2], "tanh", init="zeros")
    narrow.parameters[...] = net.parameters
    cache = narrow.forward(X)
    flat = narrow.backward(cache, mc.loss("squared_error")(cache.output, Y)[1]).flat
    assert check(narrow, X, Y, flat, tolerance=1e-3).ok
    assert not check(narrow, X, Y, flat, tolerance=1e-12).ok


@pytest.mark.slow
def test_a_relu_net_with_65536_rows_passes_and_the_rows_at_kinks_are_reported():
    net, X, Y = problem([4, 8, 8, 1], "relu", rows=65536, seed=1)
    begin = time.process_time()
    result = check(net, X, Y)
    assert result.ok, str(result)
    assert 0 < result.rows_left_out < 2000
    assert f"{result.rows_left_out} row(s) at a kink" in str(result)
    assert time.process_time() - begin < 60


@pytest.mark.slow
def test_rows_at_kinks_do_not_hide_a_wrong_gradient():
    net, X, Y = problem([4, 8, 8, 1], "relu", rows=65536, seed=1)
    wrong = plain_gradient(net, X, Y)
    net.layout.views(wrong)[0][2][...] *= 1 + 1e-4
    result = check(net, X, Y, wrong)
    assert result.rows_left_out > 0
    assert not result.ok
    assert result.worst == "W[2]"


@pytest.mark.parametrize("loss", ["absolute_error", ("huber", 0.5), ("quantile", 0.3)])
def test_rows_at_the_kink_of_a_loss_are_left_out_too(loss):
    net, X, Y = problem([2, 1], [], rows=5000, seed=2)
    result = mc.check_gradients(net, 10 * X, 10 * Y, loss)
    assert result.ok, str(result)
    Y[:3] = net.forward(10 * X).output[:3] / 10  # right on the kink of |z - y|
    result = mc.check_gradients(net, 10 * X, 10 * Y, loss)
    assert result.ok, str(result)
    if loss != ("huber", 0.5):
        assert result.rows_left_out >= 1


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["softplus", "mish", "gelu", "tanh", "silu", "exp"])
def test_hardly_a_row_is_left_out_where_the_activation_is_smooth(hidden):
    """softplus and mish are written with |s|, though their slope does not jump."""
    net, X, Y = problem([2, 6, 1], hidden, rows=20000, seed=2)
    result = check(net, 0.3 * X, Y)
    assert result.ok, str(result)
    assert result.rows_left_out <= (20 if hidden in ("softplus", "mish") else 0)


def test_row_weights_are_part_of_what_is_checked():
    net, X, Y = problem([3, 5, 2], "tanh")
    w = np.array([0.0, 1, 2, 0, 3, 0.5])
    assert check(net, X, Y, sample_weight=w).ok
    assert not check(net, X, Y, plain_gradient(net, X, Y), sample_weight=w).ok


def test_a_gradient_of_zero_where_it_should_be_zero_passes():
    net, X, _ = problem([3, 5, 2], "tanh")
    result = check(net, X, net.forward(X).output)
    assert result.ok, str(result)


def test_the_same_seed_checks_along_the_same_directions():
    net, X, Y = problem([3, 5, 2], "tanh")
    wrong = plain_gradient(net, X, Y) * 1.01
    assert check(net, X, Y, wrong, seed=3) == check(net, X, Y, wrong, seed=3)
    assert (
        check(net, X, Y, wrong, seed=3).max_relative_error
        != check(net, X, Y, wrong, seed=4).max_relative_error
    )


# -- wrong ones fail, and are named ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("entries", [False, True])
@pytest.mark.parametrize("block", ["W[1]", "W[2]", "W[3]", "b[1]", "b[2]", "b[3]"])
def test_an_error_of_a_ten_thousandth_in_one_block_is_caught_and_named(block, entries):
    net, X, Y = problem([3, 5, 4, 2], "tanh")
    wrong = plain_gradient(net, X, Y)
    W, b = net.layout.views(wrong)
    eval(block, {"W": W, "b": b})[...] *= 1 + 1e-4
    result = check(net, X, Y, wrong, entries=entries)
    assert not result.ok
    assert result.worst.startswith(block)
    assert [name for name, error in result.errors.items() if error > result.tolerance] == [block]
    assert f"gradient WRONG, worst in {block}" in str(result)


def test_entries_name_the_very_entry():
    net, X, Y = problem([3, 5, 2], "tanh")
    for entry in ("W[1][2, 3]", "W[2][0, 1]", "b[1][4]", "b[2][0]"):
        wrong = plain_gradient(net, X, Y)
        W, b = net.layout.views(wrong)
        view, index = entry[:4], eval(f"np.s_{entry[4:]}", {"np": np})
        eval(view, {"W": W, "b": b})[index] += 1e-3
        result = check(net, X, Y, wrong, entries=True)
        assert not result.ok
        assert result.worst == entry


def misprint(number, net):
    """Return arguments of `plain_gradient` for a book with this misprint."""
    act = net.activations

    def own(l, s, z):
        return slope(act[l], s, z)

    return {
        1: {"make_D": lambda G, S, Z, l: G * Z},  # σ for σ'
        2: {"make_D": lambda G, S, Z, l: G * own(l, Z, _value(act[l], Z))},  # σ' at the output
        3: {"make_dW": lambda Z, D: Z.T @ D.T},  # D transposed
        # σ_{l+1}
        4: {
            "make_D": lambda G, S, Z, l: (
                G * own(m := min(l + 1, len(act) - 1), S, _value(act[m], S))
            )
        },
        5: {"make_D": lambda G, S, Z, l: G * own(l, S, Z) / (act[l].parameter or 1)},  # no a
    }[number]


def _value(activation, s):
    return {
        "identity": lambda: s,
        "tanh": lambda: np.tanh(s),
        "relu": lambda: np.maximum(s, 0),
        "exp": lambda: np.exp(s),
        "sigmoid": lambda: 1 / (1 + np.exp(-(activation.parameter or 1) * s)),
    }[activation.name]()


A, B = [3, 4, 2], [3, 4, 4, 2]
# number, the net that hides it, the one that exposes it, the blocks that come out wrong
MISPRINTS = [
    (1, (A, ["exp"], "exp", 5), (A, ["tanh"], "tanh", 5), ["W[1]", "W[2]", "b[1]", "b[2]"]),
    (2, (A, ["relu"], "relu", 5), (A, ["tanh"], "tanh", 5), ["W[1]", "W[2]", "b[1]", "b[2]"]),
    (3, ([3, 1, 1], ["tanh"], "identity", 1), ([3, 4, 4], ["tanh"], "identity", 4),
        ["W[1]", "W[2]"]),
    (4, (B, ["tanh", "tanh"], "tanh", 5), (B, ["tanh", "sigmoid"], "identity", 5),
        ["W[1]", "W[2]", "b[1]", "b[2]"]),
    (4, (B, ["tanh", "tanh"], "tanh", 5), (B, ["tanh", "tanh"], "identity", 5),
        ["W[1]", "W[2]", "b[1]", "b[2]"]),
    (5, (B, [("sigmoid", 1.0)] * 2, "identity", 5), (B, [("sigmoid", 2.0)] * 2, "identity", 5),
        ["W[1]", "W[2]", "b[1]", "b[2]"]),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("number", "hides", "exposes", "wrong"), MISPRINTS)
def test_a_misprint_passes_on_the_net_that_hides_it_and_fails_on_the_one_that_exposes_it(
    number, hides, exposes, wrong
):
    for (sizes, hidden, output, rows), exposed in ((hides, False), (exposes, True)):
        net, X, Y = problem(sizes, hidden, output, rows=rows, seed=4)
        assert check(net, X, Y, plain_gradient(net, X, Y)).ok
        for entries in (False, True):
            result = check(
                net, X, Y, plain_gradient(net, X, Y, **misprint(number, net)), entries=entries
            )
            assert result.ok == (not exposed), str(result)
            bad = [name for name, error in result.errors.items() if error > result.tolerance]
            assert bad == (wrong if exposed else [])
            assert not exposed or result.worst.split("][")[0].rstrip("]") + "]" in wrong


def test_the_transposed_d_clashes_where_batch_and_width_differ():
    net, X, Y = problem(A, ["tanh"], rows=5)
    with pytest.raises(ValueError, match="matmul"):
        plain_gradient(net, X, Y, **misprint(3, net))


def test_the_missing_slope_of_the_sigmoid_costs_each_layer_that_it_passes_a_factor():
    net, X, Y = problem(B, [("sigmoid", 2.0)] * 2, rows=5, seed=4)
    result = check(net, X, Y, plain_gradient(net, X, Y, **misprint(5, net)), entries=True)
    assert result.errors["W[1]"] == pytest.approx(0.75)  # a quarter of the right one
    assert result.errors["W[2]"] == pytest.approx(0.5)
    assert result.errors["W[3]"] < 1e-6


def test_a_gradient_divided_by_the_chunks_rows_instead_of_the_batchs_is_wrong_everywhere():
    net, X, Y = problem([3, 5, 2], "tanh", rows=8)
    parts = [slice(0, 3), slice(3, 6), slice(6, 8)]
    wrong = sum(plain_gradient(net, X[part], Y[part]) for part in parts)
    result = check(net, X, Y, wrong)
    assert not result.ok
    assert all(error > 0.01 for error in result.errors.values())
    right = sum(plain_gradient(net, X[part], Y[part], share=8) for part in parts)
    assert check(net, X, Y, right).ok


def test_a_missing_bias_gradient_is_named():
    net, X, Y = problem([3, 5, 2], "tanh")
    wrong = plain_gradient(net, X, Y)
    net.layout.views(wrong)[1][1][...] = 0
    result = check(net, X, Y, wrong)
    assert not result.ok
    assert result.worst == "b[1]"
    assert [name for name, error in result.errors.items() if error > result.tolerance] == ["b[1]"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_wrong(bad):
    net, X, Y = problem([3, 5, 2], "tanh")
    wrong = plain_gradient(net, X, Y)
    wrong[4] = bad
    with np.errstate(invalid="ignore"):
        assert not check(net, X, Y, wrong).ok


def test_the_engine_itself_is_checked_a_wrong_slope_in_a_formula_fails():
    wrong = mc.Activation("wrong", "s * s", "s")
    net, X, Y = problem([3, 5, 2], wrong)
    result = check(net, X, Y)
    assert not result.ok
    assert [name for name, error in result.errors.items() if error > result.tolerance] == [
        "W[1]",
        "b[1]",
    ]


def test_a_gradient_of_another_shape_is_refused():
    net, X, Y = problem([3, 5, 2], "tanh")
    with pytest.raises(ValueError, match=r"gradient must be flat, shape \(32,\)"):
        check(net, X, Y, np.zeros(31))


def test_a_check_is_a_record_of_plain_values_that_cannot_be_changed():
    net, X, Y = problem([3, 5, 2], "tanh")
    result = check(net, X, Y)
    assert result.ok is True
    assert type(result.max_relative_error) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.ok = False


def test_a_right_gradient_of_a_nearly_perfect_classifier_is_not_called_wrong():
    """J is far below the pre-activations, in whose last bits it is computed."""
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.standard_normal((20, 2)) + 6, rng.standard_normal((20, 2)) - 6])
    Y = np.repeat([0, 1], 20)
    net = mc.MLP([2, 8, 2], "tanh", "softmax", dtype="float64", seed=0)
    trainer = mc.Trainer(net, "cross_entropy", mc.AdamW(0.05))
    for _ in range(200):
        trainer.step(X, Y)
    assert mc.check_gradients(net, X, Y).ok


def test_saturation_and_large_inputs_are_no_faults_of_the_products():
    net = mc.MLP([1, 1], output="softplus", init="zeros", dtype="float64")
    net.b[1][...] = -30
    assert mc.check_gradients(net, [[1.0]], [[1.0]], "poisson").ok
    X = 1000 * np.random.default_rng(0).standard_normal((20, 5))
    found = mc.check_gradients(
        mc.MLP([5, 8, 1], "tanh", init="zeros"), X, X[:, :1] / 1000, "squared_error"
    )
    assert found.ok
    assert len(found.products) == 3


@pytest.mark.parametrize(
    ("method", "check"), [("jvp", "<V, J u> = <J' V, u>"), ("hvp", "H v by differences")]
)
def test_a_wrong_product_is_found_out(monkeypatch, method, check):
    right = getattr(mc.MLP, method)

    def wrong(net, X, *arguments, **settings):
        found = right(net, X, *arguments, **settings)
        return found._replace(tangent=found.tangent * 1.01) if method == "jvp" else found * 1.01

    monkeypatch.setattr(mc.MLP, method, wrong)
    rng = np.random.default_rng(0)
    found = mc.check_gradients(
        mc.MLP([3, 5, 2], "tanh"), rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    )
    assert not found.ok
    assert found.worst == check
    assert "<- wrong" in str(found)


# -- any scale -------------------------------------------------------------------------------------


def by_the_engine(net, X, Y, loss="squared_error"):
    """The gradient in float64 through the public doors."""
    cache = net.forward(X)
    return net.backward(cache, mc.loss(loss)(cache.output, Y)[1]).flat.copy()


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e-2, 30.0])
def test_a_doubled_gradient_is_found_whatever_the_size_of_the_weights_and_the_right_one_passes(
    scale,
):
    net, X, Y = problem([3, 5, 2], "tanh", rows=20)
    net.parameters[...] *= scale
    g = by_the_engine(net, X, Y)
    right = check(net, X, Y, g)
    assert right.ok, str(right)
    assert right.conclusive, str(right)
    for block in ("W[1]", "W[2]", "b[1]", "b[2]"):
        wrong = g.copy()
        W, b = net.layout.views(wrong)
        eval(block, {"W": W, "b": b})[...] *= 2
        result = check(net, X, Y, wrong)
        assert [name for name, verdict in result.verdicts.items() if verdict == "wrong"] == [
            block
        ], str(result)
        assert result.errors[block] == pytest.approx(0.5, rel=1e-3)


def test_a_bias_gradient_of_zero_is_found_where_the_biases_are_tiny():
    net, X, Y = problem([3, 5, 2], "tanh", rows=20)
    net.parameters[net.layout.weights :] = 1e-9
    wrong = by_the_engine(net, X, Y)
    wrong[net.layout.weights :] = 0
    result = check(net, X, Y, wrong)
    assert result.verdicts == {"W[1]": "right", "W[2]": "right", "b[1]": "wrong", "b[2]": "wrong"}
    assert result.errors["b[1]"] == pytest.approx(1, rel=1e-6)


def test_a_right_gradient_of_a_regression_that_has_converged_passes_and_a_wrong_one_is_found_as_long_as_there_is_one():  # noqa: E501
    net, X, Y = problem([3, 2], [], rows=50)
    X1 = np.c_[X, np.ones(50)]
    solution = np.linalg.lstsq(X1, Y, rcond=None)[0]
    for distance, told in ((1e-6, True), (0.0, False)):
        net.parameters[...] = (solution + distance).ravel()
        assert check(net, X, Y).ok
        result = check(net, X, Y, 2 * by_the_engine(net, X, Y))
        assert result.ok != told, str(result)
        assert result.conclusive == told
    assert "nothing wrong, but cannot tell about 2 of 2" in str(result)
    assert all(seen > 1 for seen in result.resolution.values())


@pytest.mark.parametrize(
    ("nats", "told"), [(1, True), (20, True), (25, True), (60, False), (800, False)]
)
def test_a_classifier_that_is_sure_of_every_row_passes_and_is_told_as_long_as_float64_can(
    nats, told
):
    net = mc.MLP([1, 2], output="softmax", bias=False, dtype="float64")
    net.W[1][...] = [[nats / 2, -nats / 2]]
    X, Y = np.array([[1.0], [1.1], [-1.0]]), np.array([0, 0, 1])
    assert mc.check_gradients(net, X, Y).ok
    p = net.predict(X)
    g = (X.T @ (p - np.eye(2)[Y]) / 3).ravel()
    assert mc.check_gradients(net, X, Y, gradient=g).ok
    assert (mc.check_gradients(net, X, Y, gradient=2 * g).verdicts["W[1]"] == "wrong") == told


def test_where_j_overflows_the_check_cannot_tell():
    net, X, Y = problem([3, 5, 2], "exp")
    net.parameters[...] *= 1e3
    result = check(net, X, Y)
    assert result.ok
    assert not result.conclusive
    assert set(result.resolution.values()) == {np.inf}


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_a_gradient_whose_square_overflows_or_is_0_is_checked_all_the_same(scale):
    net, X, Y = problem([3, 2], [], loss="absolute_error")
    loss = mc.Loss("scaled", f"{scale} * (z - y)", f"{scale}")
    g = gradcheck._Checker(net, X, Y, loss, None, 1e-6).gradient()
    for factor, verdict in ((1, "right"), (1 + 1e-5, "wrong")):
        assert set(mc.check_gradients(net, X, Y, loss, factor * g).verdicts.values()) == {verdict}


def test_a_dead_layer_is_neither_right_nor_wrong_until_its_gradient_is_made_up():
    net, X, Y = problem([3, 5, 2], "relu")
    net.b[1][...] = -100
    result = check(net, X, Y)
    assert result.ok, str(result)
    assert {result.verdicts[name] for name in ("W[1]", "W[2]", "b[1]")} == {"cannot tell"}
    assert result.verdicts["b[2]"] == "right"
    wrong = by_the_engine(net, X, Y)
    net.layout.views(wrong)[0][1][...] = 1e-3
    assert check(net, X, Y, wrong).verdicts["W[1]"] == "wrong"


def test_a_feature_narrower_than_the_first_step_does_not_make_a_right_gradient_wrong():
    for sharp in (1e2, 1e4):
        bump = mc.Activation("bump", "exp(-a * a * s * s)", "-2 * a * a * s * z", sharp)
        net, X, Y = problem([2, 4, 1], bump, rows=10)
        net.W[1][...] /= sharp
        net.b[1][...] /= sharp
        result = check(net, X, Y)
        assert result.ok, str(result)
        wrong = by_the_engine(net, X, Y)
        wrong[:8] = 0
        assert not check(net, X, Y, wrong).ok


@pytest.mark.parametrize("rows", [1, 7])
def test_a_square_matrix_whose_gradient_is_transposed_is_found(rows):
    net, X, Y = problem([4, 4, 4], "tanh", rows=rows)
    wrong = by_the_engine(net, X, Y)
    W = net.layout.views(wrong)[0]
    W[2][...] = W[2].T.copy()
    assert check(net, X, Y, wrong).verdicts["W[2]"] == "wrong"


def test_an_error_in_one_entry_of_a_big_block_is_found():
    net, X, Y = problem([100, 80, 3], "tanh", rows=10)
    g = by_the_engine(net, X, Y)
    typical = np.linalg.norm(g[:8000]) / np.sqrt(8000)
    for at in (0, 4321, 7999):
        wrong = g.copy()
        wrong[at] += typical / 10
        assert check(net, X, Y, wrong).verdicts["W[1]"] == "wrong"


NETS = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 8), min_size=2, max_size=4),
        "hidden": st.sampled_from(
            ["tanh", "relu", "gelu", ("sigmoid", 3.0), "softplus", "exp", "leaky_relu"]
        ),
        "output": st.sampled_from(["identity", "softmax", "tanh"]),
        "rows": st.integers(1, 20),
        "weights": st.floats(-6, 1.5),
        "inputs": st.floats(-4, 3),
        "seed": st.integers(0, 10**6),
    }
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=NETS, factor=st.floats(-3, 2), sign=st.sampled_from([1, -1]), data=st.data())
def test_right_gradients_are_never_wrong_and_errors_above_the_resolution_are_always_found(
    case, factor, sign, data
):
    loss = "cross_entropy" if case["output"] == "softmax" else "squared_error"
    net, X, Y = problem(
        case["sizes"], case["hidden"], case["output"], loss, case["rows"], seed=case["seed"]
    )
    net.parameters[...] *= 10 ** case["weights"]
    X *= 10 ** case["inputs"]
    right = mc.check_gradients(net, X, Y, loss)
    assert right.ok, str(right)
    with np.errstate(over="ignore", invalid="ignore"):
        g = gradcheck._Checker(net, X, Y, loss, None, 1e-6).gradient()
    assume(np.isfinite(g).all())
    name, start, stop = data.draw(st.sampled_from(list(gradcheck._blocks(net))))
    assume(g[start:stop].any())
    g[start:stop] *= 1 + sign * 10**factor
    result = mc.check_gradients(net, X, Y, loss, g)
    relative = 10**factor / max(1, abs(1 + sign * 10**factor))
    assert result.verdicts[name] == "wrong" or relative <= result.resolution[name], str(result)
    assert [
        other for other, verdict in result.verdicts.items() if verdict == "wrong" and other != name
    ] == []


FORMULAS = [
    "exp(u) - 1",
    "u * u - 2 * u * v + v * v",
    "abs(u - v) + log1p(exp(-2 * abs(u - v))) - 0.6931471805599453",
    "0.5 * tanh(0.5 * u) + 0.5",
    "1 - tanh(u) * tanh(u)",
    "maximum(u, 0) + 2 * expm1(minimum(u, 0))",
    "sqrt(u * u + 0.25) / (1 + exp(v))",
]


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_running_error_bounds_what_60_digits_say(formula):
    mpmath = pytest.importorskip("mpmath")
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((2, 200)) * 10.0 ** rng.integers(-9, 2, (2, 200))
    v[:50] = u[:50] * (1 + 1e-12)
    off = 1e-14 * np.abs(u)
    moved = u + off * rng.uniform(-0.9, 0.9, 200)
    numbers = RunningErrors(NumpyOps())
    found = numbers.formula(formula, {}, u=Numbers(u, off), v=Numbers(v, np.zeros(200)))
    mpmath.mp.dps = 60
    names = {name: getattr(mpmath, name) for name in ("exp", "log1p", "tanh", "expm1", "sqrt")}
    names |= {"abs": abs, "maximum": max, "minimum": min, "T": mpmath.mpf}
    exact = [
        eval(formula, names | {"u": mpmath.mpf(float(x)), "v": mpmath.mpf(float(y))})
        for x, y in zip(moved, v, strict=True)
    ]
    errors = np.array(
        [
            float(abs(mpmath.mpf(float(value)) - right))
            for value, right in zip(found.value, exact, strict=True)
        ]
    )
    assert (errors <= found.error).all()
    assert np.median(found.error / (np.abs(found.value) + 1e-300)) < 1e-2


def test_the_gradient_checks_where_outputs_have_rounded_to_0_or_1():
    net = mc.MLP([1, 1], output="sigmoid", dtype="float64")
    net.W[1][...] = 1
    assert mc.check_gradients(net, [[50.0], [1.0]], [0, 1]).ok
    net = mc.MLP([1, 2], output="softmax", dtype="float64")
    net.W[1][...] = [[1, -1]]
    assert mc.check_gradients(net, [[500.0], [0.3]], [1, 0]).ok


def test_the_bound_of_a_layers_sums_holds_in_exact_arithmetic():
    mpmath = pytest.importorskip("mpmath")
    rng = np.random.default_rng(0)
    A, W, b = rng.standard_normal((5, 300)), rng.standard_normal((300, 4)), rng.standard_normal(4)
    S, Z = Numbers(), Numbers()
    identity = mc.MLP([1, 1]).activations[1]
    RunningErrors(NumpyOps()).layer(Numbers(A, np.zeros_like(A)), W, b, identity, S, Z)
    mpmath.mp.dps = 60
    for i, j in itertools.product(range(5), range(4)):
        exact = mpmath.fsum(
            [
                mpmath.mpf(x) * mpmath.mpf(y)
                for x, y in zip(A[i].tolist(), W[:, j].tolist(), strict=True)
            ],
        )
        error = abs(mpmath.mpf(float(S.value[i, j])) - exact - mpmath.mpf(float(b[j])))
        assert error <= S.error[i, j] < 1e-10
