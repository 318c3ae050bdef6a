"""Training on the device: NumPy's losses, faults, memory, and other work of the user meanwhile."""

import dataclasses
from functools import partial

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.cuda.eager import CupyReference
from mlpcore.core import losses as loss_sheet
from mlpcore.core.schedules import Progress
from mlpcore.engine.cpu_step import CpuStep
from mlpcore.engine.problem import Problem

ROWS, SIZES = 61, [7, 17, 12, 5]
PAIRS = {
    "softmax": ("cross_entropy", "softmax"),
    "sigmoid": ("binary_cross_entropy", "sigmoid"),
    "not matched": (("huber", 0.3), "tanh"),
}


def data(pair="softmax", dtype="float32", rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, SIZES[0])).astype(dtype)
    Y = (
        rng.integers(0, SIZES[-1], rows)
        if pair == "softmax"
        else rng.random((rows, SIZES[-1])).astype(dtype)
    )
    return X, Y, rng.random(rows).astype(dtype) + 0.1


def trainer(
    where, pair="softmax", dtype="float32", optimizer=None, hidden=("relu", "gelu"), **settings
):
    loss, output = PAIRS[pair]
    net = mc.MLP(SIZES, list(hidden), output, dtype=dtype, device=where, seed=1)
    return mc.Trainer(net, loss, optimizer or mc.AdamW(1e-2), **settings)


def host(device, array):
    return device.to_host(array)


def near(one, other, bound):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert np.isfinite(one).all()
    assert np.abs(one - other).max() <= bound * np.abs(one).max(), (one, other)


OPTIONS = {  # of a loss: the pair, and whether the targets are distributions
    "smoothed classes": ({"label_smoothing": 0.1}, "softmax", False),
    "smoothed distributions": ({"label_smoothing": 0.1}, "softmax", True),
    "smoothed and weighed": (
        {"class_weight": [0.5, 0.1, 2, 1, 3], "label_smoothing": 0.2},
        "softmax",
        False,
    ),
    "weighed distributions": ({"class_weight": [0.5, 0, 2, 1, 3]}, "softmax", True),
    "weighed classes": ({"class_weight": [0.5, 0, 2, 1, 3]}, "softmax", False),
    "positives": ({"pos_weight": 3.0}, "sigmoid", False),
    "positives of each output": (
        {"pos_weight": [0.5, 3, 1, 0, 2], "label_smoothing": 0.1},
        "sigmoid",
        False,
    ),
}


@pytest.mark.parametrize("chunk_rows", ["auto", 7], ids=["whole", "a chunk's graph replayed"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_loss_count_as_numpys(device, put, name, chunk_rows):
    options, pair, soft = OPTIONS[name]
    X, Y, w = data(pair, "float64")
    Y = np.random.default_rng(3).dirichlet(np.ones(SIZES[-1]), ROWS) if soft else Y
    here, there = (
        trainer(where, pair, "float64", mc.SGD(0.3), chunk_rows=chunk_rows, **options)
        for where in ("cpu", "cuda")
    )
    eager, _ = reference_losses(device, there, *put(X, Y, w), 3)
    expected = [here.step(X, Y, w) for _ in range(3)]
    near(expected, eager, 1e-12)
    near(expected, [float(there.step(*put(X, Y, w))) for _ in range(3)], 1e-12)
    near(here.step(X, Y), float(there.step(X, Y)), 1e-12)  # from the host
    (J, g), (K, h) = here.gradient(X, Y, w), there.gradient(*put(X, Y, w))
    near([J], [K], 1e-12)
    near(g, host(device, h), 1e-11)
    v = np.linspace(-1, 1, g.size)
    near(
        here.net.hvp(X, Y, v, here.loss),
        host(device, there.net.hvp(*put(X, Y, v), there.loss)),
        1e-11,
    )
    fit = {"epochs": 2, "batch_size": 16, "progress": False}
    near(here.fit(X, Y, w, **fit)["loss"], there.fit(*put(X, Y, w), **fit)["loss"], 1e-12)
    near([*here.evaluate(X, Y, w).values()], [*there.evaluate(*put(X, Y, w)).values()], 1e-12)


# -- ten losses ------------------------------------------------------------------------------------


def reference_losses(device, like, X, Y, w, count):
    """The losses of `like`'s training by CuPy operations, one after the other."""
    net = like.net.copy()
    objective = loss_sheet.pair(like.loss, net.activations[-1])
    new_ops = partial(CupyReference, device.xp)
    settings = like._step.problem.settings
    problem = Problem(
        net.layout, net.store, net.activations, objective, like.optimizer, settings, new_ops
    )
    step = CpuStep(problem)
    given, progress, found = like._intake.as_data(X, Y, w), Progress(), []
    for _ in range(count):
        found.append(
            step.run(given.batch(None), step.prepare(len(given.X), given.inputs), progress)
        )
    return found, net.parameters


BOUNDS = {"float64": 1e-12, "float32": 3e-5, "tf32": 3e-3, "bfloat16": 3e-2, "float16": 3e-3}


@pytest.mark.parametrize(
    "chunk_rows", ["auto", 20, 7], ids=["whole", "chunks in one graph", "a chunk's graph replayed"]
)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("precision", BOUNDS)
def test_ten_losses_are_those_of_numpy_of_eager_cupy_and_of_the_graph(
    device, put, precision, pair, chunk_rows
):
    wide = precision if precision.startswith("float") and precision != "float16" else "float32"
    X, Y, w = data(pair, wide)
    low = {} if precision == wide else {"precision": precision}
    optimizer = partial(mc.SGD, 0.3, momentum=0.5)
    here = trainer("cpu", pair, wide, optimizer())
    there = trainer("cuda", pair, wide, optimizer(), chunk_rows=chunk_rows, **low)
    eager, parameters = reference_losses(
        device, trainer("cuda", pair, wide, optimizer()), *put(X, Y, w), 10
    )
    expected = [here.step(X, Y, w) for _ in range(10)]
    found = [float(J) for J in [there.step(*put(X, Y, w)) for _ in range(10)]]
    assert expected[9] < expected[0]
    near(expected, found, BOUNDS[precision])
    near(expected, eager, BOUNDS[wide])
    near(here.net.parameters, host(device, there.net.parameters), 5 * BOUNDS[precision])
    near(here.net.parameters, host(device, parameters), 5 * BOUNDS[wide])


@pytest.mark.parametrize(
    "chunk_rows", ["auto", 20, 7], ids=["whole", "chunks in one graph", "a chunk's graph replayed"]
)
@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("precision", BOUNDS)
def test_learned_slopes_are_those_of_numpy_and_of_eager_cupy(
    device, put, precision, dropout, chunk_rows
):
    wide = precision if precision.startswith("float") and precision != "float16" else "float32"
    X, Y, w = data(dtype=wide)
    low = {} if precision == wide else {"precision": precision}
    settings = {
        "optimizer": mc.SGD(0.1),
        "hidden": (("prelu", 0.4, "per output"), "prelu"),
        "dropout": dropout,
        "seed": 3,
    }
    here, like = (trainer(where, dtype=wide, **settings) for where in ("cpu", "cuda"))
    there = trainer("cuda", dtype=wide, chunk_rows=chunk_rows, **low, **settings)
    eager, parameters = reference_losses(device, like, *put(X, Y, w), 5)
    expected = [here.step(X, Y, w) for _ in range(5)]
    near(expected, [float(there.step(*put(X, Y, w))) for _ in range(5)], BOUNDS[precision])
    near(expected, eager, BOUNDS[wide])
    near(here.net.parameters, host(device, parameters), 5 * BOUNDS[wide])
    for l in (1, 2):
        near(here.net.a[l], host(device, there.net.a[l]), 5 * BOUNDS[precision])
        assert np.abs(here.net.a[l] - (0.4, 0.25)[l - 1]).min() > 0


@pytest.mark.parametrize(
    "chunk_rows", ["auto", 20, 7], ids=["whole", "chunks in one graph", "a chunk's graph replayed"]
)
@pytest.mark.parametrize("precision", BOUNDS)
def test_dropout_has_the_masks_of_numpy_and_of_eager_cupy(device, put, precision, chunk_rows):
    wide = precision if precision.startswith("float") and precision != "float16" else "float32"
    X, Y, w = data(dtype=wide)
    low = {} if precision == wide else {"precision": precision}
    hidden = ("hard_tanh", "gelu") if wide == precision else ("relu", "tanh")
    settings = {"optimizer": mc.SGD(0.1), "hidden": hidden, "dropout": [0.2, 0.5], "seed": 3}
    here, like = (trainer(where, dtype=wide, **settings) for where in ("cpu", "cuda"))
    there = trainer("cuda", dtype=wide, chunk_rows=chunk_rows, **low, **settings)
    eager, parameters = reference_losses(device, like, *put(X, Y, w), 5)
    expected = [here.step(X, Y, w) for _ in range(5)]
    near(expected, [float(there.step(*put(X, Y, w))) for _ in range(5)], BOUNDS[precision])
    near(expected, eager, BOUNDS[wide])
    near(here.net.parameters, host(device, there.net.parameters), 5 * BOUNDS[precision])
    near(here.net.parameters, host(device, parameters), 5 * BOUNDS[wide])


OPTIMIZERS = [
    mc.SGD(0.1), mc.SGD(0.1, momentum=0.9, nesterov=True),
    mc.SGD(0.1, momentum=0.9, velocity="gradients"),
    mc.Adam(1e-2), mc.AdamW(1e-2, weight_decay=0.1),
    mc.RMSprop(1e-2), mc.Lion(1e-3, weight_decay=0.1),
]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda x: x.row)
def test_every_optimizer_penalised_and_clipped_takes_numpys_steps(device, put, optimizer):
    X, Y, w = data("sigmoid", "float64")
    one, other = (
        trainer(
            where,
            "sigmoid",
            "float64",
            optimizer,
            hidden=("tanh", "silu"),
            l1=1e-3,
            l2=1e-2,
            clip_norm=0.5,
        )
        for where in ("cpu", "cuda")
    )
    near(
        [one.step(X, Y, w) for _ in range(5)],
        [float(other.step(*put(X, Y, w))) for _ in range(5)],
        1e-11,
    )
    near(one.net.parameters, host(device, other.net.parameters), 1e-11)


CHANGES = {
    "adamw": (lambda: mc.AdamW(1e-2), [{"beta1": 0.99}, {"beta2": 0.9, "weight_decay": 0.5}]),
    "adam": (lambda: mc.Adam(1e-2), [{"epsilon_hat": True}, {"epsilon": 1e-3}]),
    "sgd": (
        lambda: mc.SGD(0.1),
        [{"momentum": 0.9}, {"velocity": "gradients"}, {"learning_rate": 0.01, "nesterov": True}],
    ),
    "layers": (
        lambda: mc.AdamW(1e-2),
        [{"layers": {1: mc.Layer(frozen=True), 2: mc.Layer(0.1, 0.5)}}, {"layers": {}}],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_changed_in_the_middle_do_what_they_do_in_numpy(device, put, name):
    make, changes = CHANGES[name]
    X, Y, w = data("sigmoid", "float64")
    one, other = (
        trainer(
            where, "sigmoid", "float64", make(), hidden=("tanh", "silu"), l2=1e-2, clip_norm=0.5
        )
        for where in ("cpu", "cuda")
    )
    for change in ({}, *changes):
        for setting, value in change.items():
            setattr(one.optimizer, setting, value)
            setattr(other.optimizer, setting, value)
        near(
            [one.step(X, Y, w) for _ in range(3)],
            [float(other.step(*put(X, Y, w))) for _ in range(3)],
            1e-11,
        )
    near(one.net.parameters, host(device, other.net.parameters), 1e-11)


@pytest.mark.parametrize(
    "optimizer",
    [mc.SGD(0.1, momentum=0.9), mc.AdamW(1e-2, layers={2: mc.Layer(rate=0.1)})],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"l1": 1e-3, "l2": 1e-2, "clip_norm": 0.05}],
    ids=["plain", "penalised, clipped"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradient_and_apply_are_step_to_the_bit(device, put, optimizer, settings, dtype):
    X, Y, w = put(*data(dtype=dtype))
    one, other = (
        trainer("cuda", dtype=dtype, optimizer=optimizer, deterministic=True, **settings)
        for _ in range(2)
    )
    for _ in range(3):
        one.apply(one.gradient(X, Y, w)[1])
        float(other.step(X, Y, w))
        np.testing.assert_array_equal(
            host(device, one.net.parameters), host(device, other.net.parameters)
        )
    with pytest.raises(mc.NonFiniteLoss, match="step 4"):
        one.apply(np.full(one.net.layout.size, np.nan))
    assert one.progress.step == 3


@pytest.mark.parametrize("how", ["raise", "skip"])
@pytest.mark.parametrize(
    "optimizer", [mc.SGD(1e38, momentum=0.9), mc.Adam(1e39), mc.Lion(1e39)], ids=lambda x: x.row
)
def test_an_update_that_overflows_changes_nothing(device, put, optimizer, how):
    X, Y, w = put(*data())
    one = trainer(
        "cuda", optimizer=dataclasses.replace(optimizer, learning_rate=1e-3), on_non_finite=how
    )
    float(one.step(X, Y, w))
    state = [one.net.parameters, *one._step.state.vectors.values()]
    before = [host(device, x).copy() for x in state]
    one.optimizer.learning_rate = optimizer.learning_rate
    size = one.net.layout.size
    if how == "raise":
        with pytest.raises(mc.NonFiniteLoss, match="step 2"):
            one.apply(np.full(size, 5.0))
    else:
        one.apply(np.full(size, 5.0))
        assert one.skipped == 1
    for x, was in zip(state, before, strict=True):
        np.testing.assert_array_equal(host(device, x), was)
    one.optimizer.learning_rate = 1e-3
    one.apply(np.full(size, 1e19))  # whose squares overflow
    assert np.isfinite(host(device, one.net.parameters)).all()
    assert (host(device, one.net.parameters) != before[0]).any()


def test_a_run_goes_the_way_of_numpys_with_data_on_the_device_or_on_the_host(device, put):
    X, Y, w = data(dtype="float64")
    found = []
    for where, arrays in (("cpu", (X, Y, w)), ("cuda", (X, Y, w)), ("cuda", put(X, Y, w))):
        one = trainer(where, dtype="float64", optimizer=mc.SGD(mc.Cosine(0.2), momentum=0.9))
        validation = (arrays[0][:20], arrays[1][:20], arrays[2][:20])
        stopping = mc.EarlyStopping(patience=2)
        history = one.fit(
            *arrays,
            epochs=3,
            batch_size=16,
            validation=validation,
            early_stopping=stopping,
            progress=False,
        )
        found.append(
            [
                history[key]
                for key in ("loss", "validation_loss", "validation_accuracy", "learning_rate")
            ]
        )
        found[-1].append(one.net.parameters if where == "cpu" else host(device, one.net.parameters))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            near(a, b, 1e-11)


@pytest.mark.parametrize("pair", PAIRS)
def test_evaluation_takes_arrays_of_the_device_and_of_the_host(device, put, pair):
    X, Y, w = data(pair)
    expected = trainer("cpu", pair).evaluate(X, Y, w)
    for arrays in ((X, Y, w), put(X, Y, w)):
        for settings in ({}, {"chunk_rows": 4}):
            figures = trainer("cuda", pair, **settings).evaluate(*arrays)
            assert figures.keys() == expected.keys()
            for key, value in figures.items():
                assert value == pytest.approx(expected[key], rel=1e-4, abs=1e-5)


# -- inputs ----------------------------------------------------------------------------------------


def layouts(X, Y, w):
    """The same numbers, laid out and typed in other ways; exact in float32."""
    wide = np.zeros((len(X), 2 * X.shape[1]), X.dtype)
    wide[:, ::2] = X
    yield "Fortran", (np.asfortranarray(X), Y, w)
    yield "every other column", (wide[:, ::2], Y, w)
    yield "backwards", (np.ascontiguousarray(X[::-1])[::-1], np.ascontiguousarray(Y[::-1])[::-1], w)
    yield "float64", (X.astype(np.float64), Y.astype(np.int32), w.astype(np.float64))
    yield "short labels", (X, Y.astype(np.uint8), w)


def placed(device, array):
    """A device's array of the strides of a host's."""
    base = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    start = (
        array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    ) // array.itemsize
    flat = device.xp.array(base.ravel(order="K"))
    if hasattr(flat, "array"):
        from tests.gpu.strict import DeviceArray

        return DeviceArray(
            np.lib.stride_tricks.as_strided(flat.array[start:], array.shape, array.strides)
        )
    pointer = flat.data + start * array.itemsize
    return device.xp.ndarray(array.shape, array.dtype, pointer, strides=array.strides)


def test_rows_are_read_from_any_layout_and_dtype(device, put):
    X, Y, w = data()
    expected = trainer("cuda").step(*put(X, Y, w))
    for name, arrays in layouts(X, Y, w):
        for there in (arrays, [placed(device, x) for x in arrays]):
            assert float(trainer("cuda").step(*there)) == float(expected), name


def test_rows_are_picked_by_numbers_of_the_host_and_of_the_device(device, put):
    X, Y, w = data()
    rows = np.array([3, 3, 60, 0, 17, 5, 8])
    expected = trainer("cpu").step(X[rows], Y[rows], w[rows])
    spread = np.zeros(2 * len(rows), np.int64)
    spread[::2] = rows
    for numbers in (rows, rows.astype(np.int32), spread[::2]):
        for arrays in ((X, Y, w), put(X, Y, w)):
            for there in (numbers, placed(device, numbers)):
                assert float(trainer("cuda").step(*arrays, rows=there)) == pytest.approx(
                    expected, rel=1e-5
                )


def test_x_on_the_device_and_the_rest_on_the_host_meet_there(device, put):
    X, Y, w = data()
    there = put(X, Y, w)
    expected = float(trainer("cuda").step(*there))
    for mixed in ((there[0], Y, w), (X, there[1], w), (there[0], there[1], w), (X, Y, there[2])):
        assert float(trainer("cuda").step(*mixed)) == expected


def test_the_callers_arrays_are_read_where_they_lie_and_left_as_they_are(device, put):
    X, Y, w = data()
    there = put(X, Y, w)
    one, addresses, taken = trainer("cuda"), [], []
    step = one._step
    float(one.step(*there))  # allocates
    set_slot = step.kernels.set_slot
    step.kernels.set_slot = lambda sources, *rest: (
        addresses.append(sources) or set_slot(sources, *rest)
    )
    empty = device.empty
    device.empty = lambda nbytes: taken.append(nbytes) or empty(nbytes)
    try:
        float(one.step(*there))
    finally:
        del device.empty
    (sources,) = addresses
    assert [device.address(x) for x in sources] == [device.address(x) for x in there]
    assert not taken
    for array, was in zip(there, (X, Y, w), strict=True):
        np.testing.assert_array_equal(host(device, array), was)


# -- between the steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_what_a_user_writes_into_the_weights_counts_from_the_next_step(device, put, precision):
    arrays = put(*data())
    one, fresh = (trainer("cuda", precision=precision, optimizer=mc.SGD(0.1)) for _ in range(2))
    float(one.step(*arrays))
    one.net.W[2][...] *= 3
    one.net.b[1][...] = 0.5
    fresh.net.parameters[...] = one.net.parameters
    assert float(one.step(*arrays)) == float(fresh.step(*arrays))


def test_a_shape_is_captured_once_whatever_else_changes(device, put):
    X, Y, w = put(*data())
    one = trainer("cuda", optimizer=mc.AdamW(mc.StepDecay(1e-2, 3)))
    count, record = [], one._step.ops.record
    one._step.ops.record = lambda run: count.append(run) or record(run)
    for i in range(6):
        float(one.step(X, Y, w, rows=np.arange(40) + i))
        one.optimizer.beta1 = 0.8 + i / 100
        one.optimizer.learning_rate = 1e-2 / (i + 1)
    assert len(count) == 1
    one.fit(X, Y, w, epochs=3, batch_size=25, progress=False)
    assert len(count) == 3  # two batches of 25 together, and one of 11
    float(one.step(X, Y, w, rows=np.arange(40)))
    assert len(count) == 3


class AtEachStep(mc.Callback):
    """A callback that looks at each step, so that each is launched by itself."""

    def step_end(self, trainer, J):
        pass


@pytest.mark.parametrize(
    "settings", [{}, {"dropout": 0.3}, {"chunk_rows": 5, "l2": 0.1, "clip_norm": 0.1}], ids=str
)
@pytest.mark.parametrize("precision", BOUNDS)
def test_steps_launched_together_have_the_bits_of_steps_launched_one_by_one(
    device, put, precision, settings
):
    wide = precision if precision.startswith("float") and precision != "float16" else "float32"
    X, Y, w = put(*data(dtype=wide))
    low, found = ({} if precision == wide else {"precision": precision}), []
    for callbacks in ([], [AtEachStep()]):
        one = trainer("cuda", dtype=wide, optimizer=mc.AdamW(mc.Cosine(1e-2)), **low, **settings)
        history = one.fit(X, Y, w, epochs=3, batch_size=9, callbacks=callbacks, progress=False)
        unweighted = one.fit(X, Y, epochs=2, batch_size=9, callbacks=callbacks, progress=False)
        state = [
            host(device, x).tobytes()
            for x in (one.net.parameters, *one._step.state.vectors.values())
        ]
        found.append((history["loss"], unweighted["loss"], history["learning_rate"], state))
    assert found[0] == found[1]
    assert found[0][0][2] < found[0][0][0]


def test_a_fault_inside_a_launch_names_its_step_and_leaves_the_steps_after_it_undone(device, put):
    X, Y, _ = data("not matched")
    X[37] = np.nan  # step 4 of 6
    one, other = (trainer("cuda", "not matched", optimizer=mc.SGD(1e-3)) for _ in range(2))
    held = one.prepare(*put(np.nan_to_num(X), Y))
    held = held._replace(X=put(X))  # nobody has looked at it
    with pytest.raises(ValueError, match="X"):  # the explanation: X is to blame
        one.fit(held, epochs=1, batch_size=10, shuffle=False, progress=False)
    assert one.progress.step == 3
    for start in (0, 10, 20):
        float(other.step(*put(X[start : start + 10], Y[start : start + 10])))
    np.testing.assert_array_equal(
        host(device, one.net.parameters), host(device, other.net.parameters)
    )


def test_float16_recovers_from_an_overflow(device, put):
    X, Y, _ = put(*data("not matched"))
    one = trainer("cuda", "not matched", optimizer=mc.SGD(1e-2), precision="float16")
    float(one.step(X, Y))
    kernels = one._step.kernels
    control = kernels.read_control()
    updates = int(control["updates"])
    control["loss_scale"] = 2.0**40  # G overflows
    kernels.write_control(control)
    before = host(device, one.net.parameters).copy()
    assert np.isfinite(float(one.step(X, Y)))
    np.testing.assert_array_equal(host(device, one.net.parameters), before)
    assert kernels.read_control()["loss_scale"] == 2.0**39
    for _ in range(40):
        one.step(X, Y)
    assert float(one.step(X, Y)) < 10
    assert kernels.read_control()["updates"] > updates
    assert np.abs(host(device, one.net.parameters) - before).max() > 0


@pytest.mark.parametrize(
    ("argument", "value", "error", "words"),
    [
        ("Y", 5, ValueError, "classes 0 … 4"),
        ("w", -1.0, ValueError, "sample_weight must be finite, not negative"),
        ("w", np.nan, ValueError, "sample_weight must be finite, not negative"),
        ("rows", ROWS, ValueError, "rows must be row numbers"),
        ("X", np.nan, mc.NonFiniteLoss, "step 3.*not finite at learning rate 0.01"),
    ],
)
def test_a_fault_is_raised_when_j_is_read_and_leaves_everything_as_before(
    device, put, argument, value, error, words
):
    good = put(*data())
    one = trainer("cuda")
    for _ in range(2):
        one.step(*good)
    before = [
        host(device, x).copy() for x in (one.net.parameters, *one._step.state.vectors.values())
    ]
    arrays = {**dict(zip("XYw", data(), strict=True)), "rows": np.arange(ROWS)}
    arrays[argument][17] = value
    X, Y, w, rows = put(*arrays.values())
    J = one.step(X, Y, w, rows=rows)
    one.step(*good)  # nothing happens any more
    with pytest.raises(error, match=words):
        float(J)
    for x, was in zip((one.net.parameters, *one._step.state.vectors.values()), before, strict=True):
        np.testing.assert_array_equal(host(device, x), was)
    assert one.progress.step == 2
    assert np.isfinite(float(one.step(*good)))
    assert one.progress.step == 3


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["softmax", "log_softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_forward_backward_and_predict_are_numpys(device, put, dtype, output):
    X, _, _ = data(dtype=dtype)
    found = []
    for where in ("cpu", "cuda"):
        net = mc.MLP(
            SIZES, ["gelu", ("leaky_relu", 0.2)], output, dtype=dtype, device=where, seed=3
        )
        there = X if where == "cpu" else put(X)
        cache = net.forward(there)
        G = np.cos(X[:, : SIZES[-1]])
        gradient = net.backward(
            cache, G if where == "cpu" else put(G), input_gradient=True, keep=True
        )
        found.append(
            (
                cache.output,
                gradient.flat,
                gradient.X,
                gradient.D[2],
                net.predict(there, chunk_rows=11),
            )
        )
        if where == "cuda":
            assert device.holds(found[-1][-1])
            assert isinstance(net.predict(X), np.ndarray)
    for here, there in zip(*found, strict=True):
        near(here, host(device, there), 2e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", ("huber", 0.5)])
def test_a_loss_by_itself_is_numpys(device, put, loss):
    rng = np.random.default_rng(0)
    Z, w = rng.random((9, 4)).astype(np.float32), rng.random(9)
    Y = rng.integers(0, 4, 9) if loss == "cross_entropy" else rng.random((9, 4)).astype(np.float32)
    J, G = mc.loss(loss)(Z, Y, w)
    J_there, G_there = mc.loss(loss)(*put(Z, Y, w))
    near(J, J_there, 1e-5)
    near(G, host(device, G_there), 1e-5)


def test_the_gradient_check_takes_the_devices_arrays_and_gradients(device, put):
    X, Y, w = data(dtype="float64")
    net = mc.MLP(SIZES, "tanh", "softmax", dtype="float64", device="cuda")
    there = put(X, Y, w)
    assert mc.check_gradients(net, *there[:2], sample_weight=there[2]).ok
    _, G = mc.loss("cross_entropy")(net.forward(there[0]).output, there[1])
    gradient = net.backward(net.forward(there[0]), G)
    for given in (gradient, gradient.flat):
        assert mc.check_gradients(net, *there[:2], gradient=given).ok
    gradient.flat[3:4] *= 2
    assert not mc.check_gradients(net, *there[:2], gradient=gradient).ok


@pytest.mark.parametrize("pair", PAIRS)
def test_logits_losses_of_rows_and_metrics_are_numpys(device, put, pair):
    X, Y, w = data(pair, "float64")
    metrics = {
        "largest": lambda y, z, sample_weight: float(
            (sample_weight * z.max(axis=1)).max() + y.max()
        )
    }
    expected = trainer("cpu", pair, "float64")
    figures = expected.evaluate(X, Y, w, metrics=metrics)
    for arrays in ((X, Y, w), put(X, Y, w)):
        one = trainer("cuda", pair, "float64", chunk_rows=13)
        near(expected.net.logits(X), host(device, one.net.logits(arrays[0], chunk_rows=11)), 1e-12)
        losses = one.losses(*arrays[:2])
        assert isinstance(losses, np.ndarray)
        near(expected.losses(X, Y), losses, 1e-11)
        found = one.evaluate(*arrays, metrics=metrics)
        near(list(figures.values()), list(found.values()), 1e-11)
        assert found["loss"] == pytest.approx(np.average(losses, weights=w), rel=1e-12)


def test_a_network_moves_between_devices_files_and_pickles(device, tmp_path):
    import pickle

    X, _, _ = data()
    there = mc.MLP(SIZES, device="cuda", seed=3)
    there.save(tmp_path / "net.safetensors")
    copies = [
        there.to("cpu"),
        mc.MLP.load(tmp_path / "net.safetensors", "cpu"),
        there.copy(),
        there.to("cpu").to("cuda"),
    ]
    copies += [mc.MLP.load(tmp_path / "net.safetensors", "cuda"), pickle.loads(pickle.dumps(there))]
    for net in copies:
        parameters = net.parameters if net.device == "cpu" else host(device, net.parameters)
        np.testing.assert_array_equal(parameters, host(device, there.parameters))
        near(net.predict(X), there.predict(X), 1e-5)
        assert net.parameters is not there.parameters
    np.testing.assert_array_equal(
        host(device, there.parameters), mc.MLP(SIZES, device="cpu", seed=3).parameters
    )


def test_without_cublaslt_a_trainer_runs_cupys_operations_one_by_one(device, put, monkeypatch):
    monkeypatch.setattr(device, "captures", False)
    X, Y, w = data(dtype="float64")
    expected = trainer("cpu", dtype="float64")
    rows = np.array([3, 3, 60, 0, 17])
    losses = [expected.step(X, Y, w), expected.step(X, Y), expected.step(X, Y, w, rows=rows)]
    history = expected.fit(X, Y, w, epochs=2, batch_size=20, validation=(X, Y), progress=False)
    for arrays in ((X, Y, w), put(X, Y, w)):
        one = trainer("cuda", dtype="float64")
        assert isinstance(one._step, CpuStep)
        near(
            losses,
            [
                float(one.step(*arrays)),
                float(one.step(*arrays[:2])),
                float(one.step(*arrays, rows=rows)),
            ],
            1e-11,
        )
        found = one.fit(*arrays, epochs=2, batch_size=20, validation=arrays[:2], progress=False)
        for figure in ("loss", "validation_loss", "validation_accuracy"):
            near(history[figure], found[figure], 1e-11)
        near(expected.net.predict(X), host(device, one.net.predict(arrays[0])), 1e-11)
    assert mc.check_gradients(one.net, *arrays[:2]).ok
