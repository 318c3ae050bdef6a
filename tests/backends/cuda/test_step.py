"""The whole CUDA step on a CPU: the same trainer, plan, kernels and products as on a GPU, against
the NumPy backend.
"""

import copy
import itertools
import os
import queue
import shutil
import threading
import time

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.backends.cuda import slot as cuda_slot
from mlpcore.backends.cuda import step_kernels
from mlpcore.data import epochs as sources
from mlpcore.data.epochs import Rows
from mlpcore.engine import capture, graph_step
from mlpcore.engine.graph_step import GraphStep
from tests.backends.cuda.emulator.device import CpuDevice, algorithm

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CI" not in os.environ, reason="needs g++"
)
ROWS = 60


@pytest.fixture
def device(monkeypatch):
    """A CUDA device that is none, whose graphs hold 8 chunks; algorithms are chosen anew."""
    opened = CpuDevice()
    monkeypatch.setattr(capture, "UNROLLED", 8)
    monkeypatch.setitem(devices._opened, "cuda:0", opened)
    return opened


def data(output="softmax", dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((ROWS, 7)).astype(dtype)
    Y = rng.integers(0, 5, ROWS) if output == "softmax" else rng.random((ROWS, 5)).astype(dtype)
    return X, Y, rng.random(ROWS).astype(dtype)


def trainer(
    where,
    loss="cross_entropy",
    output="softmax",
    dtype="float32",
    optimizer=None,
    hidden=("relu", "gelu"),
    **settings,
):
    net = mc.MLP([7, 16, 12, 5], list(hidden), output, dtype=dtype, device=where, seed=1)
    return mc.Trainer(net, loss, optimizer or mc.AdamW(1e-2), **settings)


def close(one, other, bound):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert np.abs(one - other).max() <= bound * np.abs(one).max(), (one, other)


OPTIMIZERS = {
    "sgd": lambda: mc.SGD(0.1),
    "momentum": lambda: mc.SGD(0.1, momentum=0.9),
    "nesterov": lambda: mc.SGD(0.1, momentum=0.9, nesterov=True),
    "gradients": lambda: mc.SGD(0.1, momentum=0.9, velocity="gradients"),
    "nesterov, gradients": lambda: mc.SGD(0.1, momentum=0.9, nesterov=True, velocity="gradients"),
    "adam": lambda: mc.Adam(1e-2),
    "adamw": lambda: mc.AdamW(1e-2, weight_decay=0.1),
    "rmsprop": lambda: mc.RMSprop(1e-2),
    "lion": lambda: mc.Lion(1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_numpys_steps(device, name):
    found = []
    for where in ("cpu", "cuda"):
        one = trainer(where, dtype="float64", optimizer=OPTIMIZERS[name]())
        found.append(
            ([float(one.step(*data(dtype="float64"))) for _ in range(4)], one.net.parameters)
        )
    (losses, parameters), (there, there_parameters) = found
    close(losses, there, 1e-14)
    close(parameters, there_parameters, 1e-13)
    assert len(set(losses)) == 4


CHANGES = {
    "betas": (
        lambda: mc.AdamW(1e-2),
        [{"beta1": 0.99}, {"beta2": 0.9, "weight_decay": 0.5}, {"beta1": 0.0}],
    ),
    "epsilon_hat": (
        lambda: mc.Adam(1e-2),
        [{"epsilon_hat": True}, {"epsilon": 1e-3}, {"epsilon_hat": False}],
    ),
    "momentum": (
        lambda: mc.SGD(0.1),
        [{"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.5, "nesterov": True}],
    ),
    "velocity": (
        lambda: mc.SGD(0.1, 0.9),
        [{"velocity": "gradients"}, {"learning_rate": 0.01}, {"velocity": "steps"}],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_changed_in_the_middle_do_what_they_do_in_numpy(device, name):
    make, changes = CHANGES[name]
    here, there = (trainer(where, dtype="float64", optimizer=make()) for where in ("cpu", "cuda"))
    for change in ({}, *changes):
        for one in (here, there):
            for setting, value in change.items():
                setattr(one.optimizer, setting, value)
            for _ in range(3):
                float(one.step(*data(dtype="float64")))
        close(here.net.parameters, there.net.parameters, 1e-12)
        assert here._step.state.vectors.keys() == there._step.state.vectors.keys()


PULL = mc.Loss("pull", "0 * z", "y + 0 * z")  # whatever gradient the targets say
HUGE = {
    "v of adamw": (mc.AdamW(0.01), 6e20),
    "m and v of adam_hat": (mc.Adam(0.01, epsilon_hat=True), 3e38),
    "v of rmsprop": (mc.RMSprop(0.01), 3e38),
    "parameters": (mc.SGD(1e38), 5.0),
    "velocity": (mc.SGD(1e38, 0.9), 5.0),
    "a rate that is no float32": (mc.SGD(1e39), 1.0),
    "decay": (mc.AdamW(1e38, 100.0), 1.0),
    "sign": (mc.Lion(1e39), 1.0),
}


def pulled(where, optimizer, **settings):
    net = mc.MLP([1, 700], bias=False, device=where)
    net.parameters[...] = 1
    return mc.Trainer(net, PULL, optimizer, **settings)


@pytest.mark.parametrize("name", HUGE)
def test_an_update_that_overflows_is_left_out_on_the_device(device, name):
    optimizer, large = HUGE[name]
    wild, X, ordinary = optimizer.learning_rate, [[1.0]], np.linspace(-1, 1, 700)[None]
    bad = np.where(np.arange(700) == 699, large, ordinary)
    for how in ("raise", "skip"):
        one, plain = (pulled("cuda", copy.deepcopy(optimizer), on_non_finite=how) for _ in range(2))
        for step, rate, Y in ((1, 1e-3, ordinary), (2, wild, bad), (3, 1e-3, ordinary)):
            one.optimizer.learning_rate = plain.optimizer.learning_rate = rate
            for setting in ("weight_decay",):
                if hasattr(optimizer, setting):
                    setattr(
                        one.optimizer, setting, getattr(optimizer, setting) if step == 2 else 0.0
                    )
                    setattr(plain.optimizer, setting, 0.0)
            if step != 2:
                float(plain.step(X, Y))
            if step == 2 and how == "raise":
                with pytest.raises(mc.NonFiniteLoss, match="step 2"):
                    float(one.step(X, Y))
            else:
                float(one.step(X, Y))
            for a, b in zip(
                (one.net.parameters, *one._step.state.vectors.values()),
                (plain.net.parameters, *plain._step.state.vectors.values()),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b)
        assert one.skipped == (how == "skip")
        assert one._step.kernels.read_control()["updates"] == 2


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("size", [1e17, 1e19, 3e20])
@pytest.mark.parametrize(
    "optimizer",
    [mc.Adam(0.01), mc.RMSprop(0.01, 0.999), mc.SGD(1e-20, 0.9)],
    ids=["adam", "rms", "sgd"],
)
def test_gradients_whose_squares_overflow_float32_are_taken_as_numpy_takes_them(
    device, optimizer, size, clip_norm
):
    found = []
    for where in ("cpu", "cuda"):
        one = pulled(where, copy.deepcopy(optimizer), clip_norm=clip_norm)
        for scale in (1.0, -0.5, 0.25):
            float(one.step([[1.0]], size * scale * np.linspace(0.1, 1, 700)[None]))
        found.append(one.net.parameters)
    close(*found, 1e-5)
    assert not (found[0] == 1).any() or isinstance(optimizer, mc.SGD)


def test_an_overflow_in_the_middle_of_a_launch_of_many_steps_is_left_out(device):
    found = []
    for where in ("cpu", "cuda"):
        one = pulled(where, mc.Adam(0.01), on_non_finite="skip")
        X, Y = np.ones((12, 1), np.float32), np.full((12, 700), 0.5, np.float32)
        Y[5] = 1e30
        assert where == "cpu" or one._step.together(2, one.prepare(X, Y).inputs, 64) > 4
        history = one.fit(X, Y, epochs=2, batch_size=2, shuffle=False, progress=False)
        found.append((one.net.parameters, history["skipped"]))
    close(found[0][0], found[1][0], 1e-5)
    assert found[0][1] == found[1][1] == [1, 2]


class OwnRate(mc.SGD):
    """A user's optimizer whose learning rate depends on the step."""

    def rate(self, progress):
        return 0.1 / (1 + progress.step)


class OwnMomentum(mc.SGD):
    """A user's optimizer whose other scalars do."""

    def scalars(self, progress):
        return {**super().scalars(progress), "momentum": 0.9 if progress.step % 2 else 0.5}


@pytest.mark.parametrize(
    "optimizer", [OwnRate(0.1), OwnMomentum(0.1, momentum=0.9)], ids=["rate", "momentum"]
)
def test_a_users_optimizer_is_asked_at_each_step(device, optimizer):
    X, Y, w = data(dtype="float64")
    here, there = (
        trainer(where, dtype="float64", optimizer=optimizer) for where in ("cpu", "cuda")
    )
    for one in (here, there):
        one.fit(X, Y, w, epochs=2, batch_size=10, progress=False)
    close(here.net.parameters, there.net.parameters, 1e-13)


SETTINGS = {
    "plain": {},
    "penalties": {"l1": 0.01, "l2": 0.1},
    "clipped": {"clip_norm": 0.05},
    "penalties, clipped": {"l1": 0.01, "l2": 0.1, "clip_norm": 0.05},
    "chunks in one graph": {"chunk_rows": 13},
    "a chunk's graph again and again": {"chunk_rows": 7, "l2": 0.1},
    "a row at a time": {"chunk_rows": 1},
}
PAIRS = {
    "softmax": ("cross_entropy", "softmax"),
    "sigmoid": ("binary_cross_entropy", "sigmoid"),
    "identity": ("squared_error", "identity"),
    "not matched": (("huber", 0.3), "tanh"),
    "exp": ("poisson", "exp"),
}


@pytest.mark.parametrize("staged", [False, True], ids=["on the device", "from the host"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_ten_losses_are_numpys(device, settings, pair, staged):
    device.host_inputs = staged
    loss, output = PAIRS[pair]
    X, Y, w = data(output)
    found = []
    for where in ("cpu", "cuda"):
        one = trainer(where, loss, output, **SETTINGS[settings])
        losses = [one.step(X, Y, w) for _ in range(3)]
        # other sizes, without weights
        losses += [one.step(X, Y, rows=np.arange(5 + i, 50)) for i in range(3)]
        losses += [one.step(X[::-1], Y[::-1], w[::-1], rows=[3, 3, 59]) for _ in range(4)]
        found.append(
            (
                [float(J) for J in losses],
                one.net.parameters,
                one.evaluate(X, Y, w),
                one.net.predict(X),
            )
        )
    close(found[0][0], found[1][0], 2e-5)
    close(found[0][1], found[1][1], 2e-4)
    close(found[0][3], found[1][3], 2e-4)
    for figure, value in found[0][2].items():
        assert value == pytest.approx(found[1][2][figure], abs=2e-4)


BINARY = np.random.default_rng(5).integers(0, 2, (ROWS, 5))
OPTIONS = {  # of a loss: the network's output and the targets
    "smoothed classes": ({"label_smoothing": 0.1}, "softmax", None),
    "smoothed distributions": (
        {"label_smoothing": 0.1},
        "softmax",
        np.random.default_rng(6).dirichlet(np.ones(5), ROWS),
    ),
    "weighed classes": ({"class_weight": [0.5, 0, 2, 1, 3]}, "softmax", None),
    "weighed one-hot rows": (
        {"class_weight": [0.5, 0, 2, 1, 3]},
        "softmax",
        np.eye(5)[np.arange(ROWS) % 5],
    ),
    "smoothed and weighed": (
        {"class_weight": {0: 0.5, 2: 2.0}, "label_smoothing": 0.2},
        "softmax",
        None,
    ),
    "positives": ({"pos_weight": 3.0}, "sigmoid", BINARY),
    "positives of each output": (
        {"pos_weight": [0.5, 3, 1, 0, 2], "label_smoothing": 0.1},
        "sigmoid",
        BINARY,
    ),
}


@pytest.mark.parametrize(
    "chunk_rows", ["auto", 7], ids=["whole", "a chunk's graph again and again"]
)
@pytest.mark.parametrize("staged", [False, True], ids=["on the device", "from the host"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_loss_count_as_numpys(device, name, staged, chunk_rows):
    device.host_inputs = staged
    (options, output, given), (X, Y, w) = OPTIONS[name], data(dtype="float64")
    Y, loss, found = Y if given is None else given, PAIRS[output][0], []
    for where in ("cpu", "cuda"):
        one = trainer(where, loss, output, "float64", mc.SGD(0.3), chunk_rows=chunk_rows, **options)
        J, gradient = one.gradient(X, Y, w)
        figures = [
            J,
            *(float(one.step(X, Y)) for _ in range(2)),
            float(one.step(one.prepare(X, Y, w), rows=[3, 3, 59, 8])),
        ]
        history = one.fit(
            X, Y, w, epochs=2, batch_size=16, validation=(X[:20], Y[:20]), progress=False
        )
        figures += [*one.evaluate(X, Y, w).values(), *history["loss"], *history["validation_loss"]]
        second = one.net.hvp(X, Y, gradient, one.loss, sample_weight=w)
        found.append(
            (
                figures,
                gradient.copy(),
                one.net.parameters,
                second,
                mc.loss(one.loss)(one.net.predict(X), Y)[1],
            )
        )
    for here, there in zip(*found, strict=True):
        close(here, there, 1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_loss_are_saved_and_gone_on_with(device, name, tmp_path):
    (options, output, given), (X, Y, _) = OPTIONS[name], data()
    Y = Y if given is None else given
    one = trainer("cuda", PAIRS[output][0], output, **options)
    float(one.step(X, Y))
    one.save(tmp_path / "it")
    there = mc.Trainer.load(tmp_path / "it", device="cuda")
    assert there.loss == one.loss
    assert [float(there.step(X, Y)) for _ in range(3)] == [float(one.step(X, Y)) for _ in range(3)]


def test_a_label_that_is_no_class_is_a_fault_with_class_weights_too(device):
    X, Y, _ = data()
    one = trainer("cuda", class_weight=[1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="Y must hold classes 0 … 4"):
        float(one.step(device.to_device(X), device.to_device(np.where(np.arange(ROWS) == 7, 5, Y))))


@pytest.mark.parametrize("staged", [False, True], ids=["on the device", "from the host"])
@pytest.mark.parametrize("pair", PAIRS)
def test_logits_losses_of_rows_and_metrics_are_numpys(device, pair, staged):
    device.host_inputs = staged
    loss, output = PAIRS[pair]
    X, Y, w = data(output, "float64")
    found = []
    for where in ("cpu", "cuda"):
        one = trainer(where, loss, output, dtype="float64", chunk_rows=13)
        metrics = {
            "largest": lambda y, z, sample_weight: float(
                (sample_weight * z.max(axis=1)).max() + y.max()
            )
        }
        history = one.fit(
            X, Y, epochs=2, batch_size=16, validation=(X, Y, w), metrics=metrics, progress=False
        )
        losses = one.losses(X, Y)
        assert np.average(losses, weights=w) == pytest.approx(
            one.evaluate(X, Y, w)["loss"], rel=1e-12
        )
        found.append((losses, one.net.logits(X, chunk_rows=11), history["validation_largest"]))
        assert isinstance(found[-1][1], np.ndarray)
    for here, there in zip(*found, strict=True):
        close(here, there, 1e-11)


def test_predictions_of_a_1_d_y_are_1_d_there_too(device):
    X, Y, _ = data("identity")
    one = mc.Trainer(mc.MLP([7, 16, 1], device="cuda"))
    one.step(X, Y[:, 0])
    for net in (one.net, one.net.to("cpu"), one.net.to("cpu").to("cuda")):
        assert net.predict(X).shape == net.logits(X).shape == (ROWS,)


@pytest.mark.parametrize(
    "chunk_rows",
    ["auto", 13, 7],
    ids=["whole", "chunks in one graph", "a chunk's graph again and again"],
)
@pytest.mark.parametrize("staged", [False, True], ids=["on the device", "from the host"])
@pytest.mark.parametrize(
    "hidden", [("relu", "gelu"), ("tanh", "hard_tanh"), ("silu", "identity")], ids=str
)
def test_dropout_has_numpys_masks_whatever_the_chunks(device, hidden, staged, chunk_rows):
    device.host_inputs = staged
    X, Y, w = data(dtype="float64")
    found = []
    for where in ("cpu", "cuda"):
        cut = {"chunk_rows": chunk_rows} if where == "cuda" else {"chunk_rows": 23}
        one = trainer(
            where,
            dtype="float64",
            hidden=hidden,
            optimizer=mc.SGD(0.2),
            dropout=[0.2, 0.6],
            seed=3,
            **cut,
        )
        J, gradient = one.gradient(X, Y, w)
        gradient = gradient.copy()
        losses = [one.step(X, Y, w) for _ in range(2)]
        losses += [one.step(X, Y, rows=np.arange(50, 5 + i, -1)) for i in range(2)]
        losses += [one.step(X, Y, w)]
        found.append(
            (
                [float(J), *map(float, losses)],
                gradient,
                one.net.parameters,
                [*one.evaluate(X, Y).values()],
            )
        )
    assert found[1][0][0] == found[1][0][1]  # one step's masks
    for here, there in zip(*found, strict=True):
        close(here, there, 1e-12)


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 3e-2), ("float16", 3e-3)])
def test_dropout_has_the_same_masks_in_low_precision(device, precision, bound):
    X, Y, w = data()
    exact = trainer("cpu", optimizer=mc.SGD(0.2), dropout=0.4)
    low = trainer("cuda", precision=precision, optimizer=mc.SGD(0.2), dropout=0.4, chunk_rows=13)
    close(
        *zip(
            *[(float(exact.step(X, Y, w)), float(low.step(X, Y, w))) for _ in range(6)], strict=True
        ),
        bound,
    )
    close(exact.net.parameters, low.net.parameters, bound)


LEARNED = {
    "prelu": ("prelu", ("prelu", -0.4, "per output")),
    "dropped": (("prelu", 0.6, "per output"), "prelu"),
}


@pytest.mark.parametrize(
    "chunk_rows",
    ["auto", 13, 7],
    ids=["whole", "chunks in one graph", "a chunk's graph again and again"],
)
@pytest.mark.parametrize("case", LEARNED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_learned_parameters_go_the_way_of_numpys(device, dtype, case, chunk_rows):
    X, Y, w = data("identity", dtype)
    more = {"dropout": 0.3} if case == "dropped" else {"l2": 0.1}
    found = []
    for where in ("cpu", "cuda"):
        one = trainer(
            where,
            "huber",
            ("prelu", 0.1),
            dtype,
            hidden=LEARNED[case],
            chunk_rows=chunk_rows,
            **more,
        )
        gradient = one.gradient(X, Y, w)[1].copy()
        losses = [float(one.step(X, Y, w)) for _ in range(4)]
        losses += [float(one.step(X, Y, rows=np.arange(50, 5 + i, -1))) for i in range(2)]
        found.append(
            (losses, gradient, one.net.parameters, *(a for a in one.net.a if a is not None))
        )
        assert all(np.ptp(a) > 0 for a in one.net.a if a is not None and a.size > 1)
    for here, there in zip(*found, strict=True):
        close(here, there, 1e-12 if dtype == "float64" else 2e-4)


@pytest.mark.parametrize(
    ("precision", "bound"), [("tf32", 3e-3), ("bfloat16", 4e-2), ("float16", 4e-3)]
)
def test_learned_parameters_stay_float32_in_low_precision(device, precision, bound):
    X, Y, w = data("identity")
    exact, low = (
        trainer(
            where,
            "squared_error",
            "identity",
            hidden=LEARNED["prelu"],
            optimizer=mc.SGD(0.3),
            **more,
        )
        for where, more in (("cpu", {}), ("cuda", {"precision": precision, "chunk_rows": 13}))
    )
    for _ in range(10):
        close(float(exact.step(X, Y, w)), float(low.step(X, Y, w)), bound)
    for one, other, l in zip(exact.net.a[1:3], low.net.a[1:3], (1, 2), strict=True):
        assert other.dtype == np.float32
        close(one, other, bound)
        assert np.abs(other - (0.25, -0.4)[l - 1]).max() > 1e-3


def test_derivatives_by_learned_parameters_are_numpys(device):
    X, Y, _ = data("identity", "float64")
    v = np.random.default_rng(5).standard_normal(
        trainer("cpu", hidden=LEARNED["prelu"]).net.layout.size
    )
    found = []
    for where in ("cpu", "cuda"):
        net = trainer(
            where, "squared_error", ("prelu", 0.1), "float64", hidden=("gelu", LEARNED["prelu"][1])
        ).net
        u = np.resize(v, net.layout.size)
        products = (
            net.jvp(X, X, u).tangent,
            net.vjp(X, Y, dX=X, dV=Y),
            net.hvp(X, Y, u),
            net.gnvp(X, Y, u),
        )
        found.append((products[0], *products[1], *products[2:]))
        assert mc.check_gradients(net, X, Y, "squared_error").ok
    for here, there in zip(*found, strict=True):
        close(here, there, 1e-12)


def test_a_run_with_learned_parameters_resumes_to_the_bit(device, tmp_path):
    X, Y, _ = data("identity")
    whole, half = (
        trainer("cuda", "squared_error", "identity", hidden=LEARNED["dropped"], dropout=0.2, seed=4)
        for _ in range(2)
    )
    whole.fit(X, Y, epochs=4, batch_size=16, progress=False)
    half.fit(X, Y, epochs=2, batch_size=16, progress=False)
    half.save(tmp_path / "half")
    again = mc.Trainer.load(tmp_path / "half", device="cuda")
    again.fit(X, Y, epochs=2, batch_size=16, progress=False)
    np.testing.assert_array_equal(again.net.parameters, whole.net.parameters)
    assert np.ptp(again.net.a[1]) > 0


@pytest.mark.parametrize("staged", [False, True], ids=["on the device", "from the host"])
def test_fit_goes_the_way_of_numpys(device, staged):
    device.host_inputs = staged
    X, Y, w = data(dtype="float64")
    found = []
    for where in ("cpu", "cuda"):
        one = trainer(where, dtype="float64", optimizer=mc.SGD(mc.Cosine(0.2), momentum=0.9))
        stopping = mc.EarlyStopping(patience=2, monitor="validation_loss")
        history = one.fit(
            X,
            Y,
            w,
            epochs=4,
            batch_size=16,
            validation=(X[:20], Y[:20]),
            early_stopping=stopping,
            progress=False,
        )
        found.append(({k: v for k, v in history.items() if k != "seconds"}, one.net.parameters))
    assert found[0][0].keys() == found[1][0].keys()
    for figure in found[0][0]:
        close(found[0][0][figure], found[1][0][figure], 1e-12)
    close(found[0][1], found[1][1], 1e-12)


@pytest.mark.parametrize(
    ("precision", "bound"), [("tf32", 3e-3), ("bfloat16", 3e-2), ("float16", 3e-3)]
)
@pytest.mark.parametrize("chunk_rows", ["auto", 7])
def test_low_precision_stays_near_float32_and_trains_float32_parameters(
    device, precision, bound, chunk_rows
):
    X, Y, w = data()
    exact, low = (
        trainer("cpu", optimizer=mc.SGD(0.5)),
        trainer("cuda", precision=precision, optimizer=mc.SGD(0.5), chunk_rows=chunk_rows),
    )
    before = low.net.parameters.copy()
    losses = [(float(exact.step(X, Y, w)), float(low.step(X, Y, w))) for _ in range(10)]
    close(*zip(*losses, strict=True), bound)
    assert losses[-1][1] < losses[0][1]
    assert low.net.parameters.dtype == np.float32
    step = low._step
    if step.capture.low is not None:  # the copy that the products read is the parameters, rounded
        copy = (
            step.capture.low
            if precision == "float16"
            else (step.capture.low.astype(np.uint32) << 16).view(np.float32)
        )
        np.testing.assert_allclose(copy, low.net.parameters, rtol=2**-8, atol=1e-7)
    assert np.abs(low.net.parameters - before).max() > 1e-3
    assert low.evaluate(X, Y, w)["loss"] == pytest.approx(losses[-1][1], rel=0.2)


def test_float16_recovers_from_an_overflow_by_a_smaller_loss_scale(device):
    X, Y, _ = data("identity")
    one = trainer("cuda", "squared_error", "identity", precision="float16", optimizer=mc.SGD(1e-3))
    float(one.step(X, Y))
    kernels = one._step.kernels
    control = kernels.read_control()
    control["loss_scale"] = 2.0**24  # far too large: D overflows
    kernels.write_control(control)
    updates, before = int(control["updates"]), one.net.parameters.copy()
    assert np.isfinite(float(one.step(X, Y)))
    np.testing.assert_array_equal(one.net.parameters, before)
    assert kernels.read_control()["loss_scale"] == 2.0**23
    assert kernels.read_control()["updates"] == updates
    for _ in range(20):
        float(one.step(X, Y))
    assert kernels.read_control()["updates"] > updates
    assert np.abs(one.net.parameters - before).max() > 0


def test_the_loss_scale_grows_after_enough_good_steps(device, monkeypatch):
    monkeypatch.setattr(step_kernels, "GROWTH", 3)
    X, Y, _ = data("identity")
    one = trainer("cuda", "squared_error", "identity", precision="float16", optimizer=mc.SGD(1e-4))
    first = None
    for _ in range(4):
        float(one.step(X * 0.01, Y * 0.01))
        first = first or float(one._step.kernels.read_control()["loss_scale"])
    assert float(one._step.kernels.read_control()["loss_scale"]) == 2 * first


# -- faults ----------------------------------------------------------------------------------------


def faulty(one, X, Y, w=None, rows=None):
    """A step whose arrays nobody has looked at, as on a GPU."""
    data = one._intake.as_data(X, np.zeros_like(Y), None)
    data = type(data).of(data.X, Y, w, data.inputs.classes, staged=False)
    return one._learner.update(data, data.batch(rows))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"Y": 5}, ValueError, "classes 0 … 4"),
        ({"Y": -1}, ValueError, "classes 0 … 4"),
        ({"w": -1.0}, ValueError, "sample_weight must be finite, not negative"),
        ({"w": np.nan}, ValueError, "sample_weight must be finite, not negative"),
        ({"rows": ROWS}, ValueError, "rows must be row numbers"),
        ({"rows": -1}, ValueError, "rows must be row numbers"),
        ({"X": np.nan}, mc.NonFiniteLoss, "step 3.*not finite at learning rate 0.01"),
    ],
)
def test_a_fault_is_raised_when_j_is_read_and_leaves_everything_as_before(
    device, change, error, words
):
    X, Y, w = data()
    one = trainer("cuda")
    for _ in range(2):
        float(one.step(X, Y, w))
    state = [one.net.parameters, *one._step.state.vectors.values()]
    before = [x.copy() for x in state]
    X, Y, w, rows = X.copy(), Y.copy(), w.copy(), np.arange(ROWS)
    {"X": X[:, 3], "Y": Y, "w": w, "rows": rows}[next(iter(change))][17] = next(
        iter(change.values())
    )
    J = faulty(one, X, Y, w, rows)
    later = [one.step(*data()) for _ in range(2)]  # nothing happens any more
    for x, was in zip(state, before, strict=True):
        np.testing.assert_array_equal(x, was)
    assert one.progress.step == 5
    with pytest.raises(error, match=words) as caught:
        float(J)
    if error is mc.NonFiniteLoss:
        assert (caught.value.step, caught.value.learning_rate) == (3, 0.01)
    assert one.progress.step == 2
    with pytest.raises(error):
        float(later[-1])
    assert np.isfinite(float(one.step(*data())))  # and on it goes
    assert one.progress.step == 3
    assert np.abs(one.net.parameters - before[0]).max() > 0


def test_a_fault_that_is_read_again_takes_back_none_of_the_steps_since(device):
    X, Y, _ = data()
    one = trainer("cuda")
    losses = [one.step(np.where(X > 0, 1e38, X), Y), one.step(X, Y)]
    with pytest.raises(mc.NonFiniteLoss, match="step 1"):
        float(losses[0])
    for _ in range(3):
        float(one.step(X, Y))
    for J in losses:
        with pytest.raises(mc.NonFiniteLoss, match="step 1"):
            float(J)
    assert (one.progress.step, one._step.kernels.read_control()["updates"]) == (3, 3)


def test_a_fault_that_an_evaluation_finds_takes_its_steps_back(device):
    X, Y, _ = data()
    one = trainer("cuda")
    one.step(X, Y)
    one.step(np.where(X > 0, 1e38, X), Y)
    with pytest.raises(mc.NonFiniteLoss, match="step 2"):
        one.evaluate(X, Y)
    assert one.progress.step == 1


def test_faults_and_skipped_steps_outlast_a_change_of_the_rule(device):
    X, Y, _ = data()
    bad = np.where(X > 0, 1e38, X)
    one = trainer("cuda", optimizer=mc.Adam(1e-2))
    J, before = one.step(bad, Y), one.net.parameters.copy()
    one.optimizer.epsilon_hat = True
    one.step(X, Y)
    with pytest.raises(mc.NonFiniteLoss, match="step 1"):
        float(J)
    np.testing.assert_array_equal(one.net.parameters, before)
    one = trainer("cuda", optimizer=mc.Adam(1e-2), on_non_finite="skip")
    one.step(bad, Y)
    one.optimizer.epsilon_hat = True
    one.step(X, Y)
    assert (one.skipped, one.progress.step, one._step.kernels.read_control()["updates"]) == (
        1,
        2,
        1,
    )


def test_a_copy_knows_the_skipped_steps_though_the_rule_has_changed(device):
    X, Y, _ = data()
    one = trainer("cuda", optimizer=mc.Adam(1e-2), on_non_finite="skip")
    one.step(np.where(X > 0, 1e38, X), Y)
    one.optimizer.epsilon_hat = True
    assert copy.deepcopy(one).skipped == 1


def test_a_fault_during_fit_comes_at_the_end_of_the_epoch(device):
    X, Y, _ = data("identity")
    one = trainer("cuda", "squared_error", "identity", optimizer=mc.SGD(1e30))
    with pytest.raises(mc.NonFiniteLoss):
        one.fit(X, Y, epochs=3, batch_size=20, progress=False)
    assert np.isfinite(one.net.parameters).all()


def test_a_batch_that_weighs_nothing_changes_nothing(device):
    X, Y, w = data()
    one = trainer("cuda")
    float(one.step(X, Y, w))
    before = one.net.parameters.copy()
    assert float(faulty(one, X, Y, w * 0)) == 0
    np.testing.assert_array_equal(one.net.parameters, before)
    assert one._step.kernels.read_control()["updates"] == 1


# -- recordings ------------------------------------------------------------------------------------


def test_a_shape_is_recorded_once_whatever_else_changes(device):
    X, Y, w = data()
    one = trainer("cuda", optimizer=mc.AdamW(mc.StepDecay(1e-2, 3)))
    recorded, record = [], device.record
    device.record = lambda run: recorded.append(run) or record(run)
    for i in range(6):
        float(one.step(X + i, Y, w * (i + 1), rows=np.arange(40) + i))
        one.optimizer.beta1 = 0.8 + i / 100
    assert len(recorded) == 1
    for _ in range(3):
        float(one.step(X[:11], Y[:11], w[:11]))
    assert len(recorded) == 2
    float(one.step(X, Y, w, rows=np.arange(40)))
    assert len(recorded) == 2
    one.fit(X, Y, w, epochs=3, batch_size=25, progress=False)
    assert len(recorded) == 4  # batches of 25 and 10


def test_what_a_user_writes_into_the_weights_counts_from_the_next_step(device):
    X, Y, w = data()
    for precision in (None, "bfloat16"):
        one, fresh = (trainer("cuda", precision=precision, optimizer=mc.SGD(0.1)) for _ in range(2))
        float(one.step(X, Y, w))
        one.net.W[2][...] *= 3
        one.net.b[1][...] = 0.5
        fresh.net.parameters[...] = one.net.parameters
        assert float(one.step(X, Y, w)) == float(fresh.step(X, Y, w))


def test_weights_written_after_an_interrupted_fit_count(device):
    X, Y, _ = data()
    one, fresh = (trainer("cuda", precision="bfloat16", optimizer=mc.SGD(0.1)) for _ in range(2))
    run, launches = one._step.run, []

    def interrupted(*arguments):
        if len(launches) == 2:
            raise KeyboardInterrupt
        launches.append(1)
        return run(*arguments)

    one._step.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        one.fit(X, Y, epochs=2, batch_size=10, progress=False)
    one._step.run = run
    one.net.W[2][...] *= 3
    fresh.net.parameters[...] = one.net.parameters
    assert float(one.step(X, Y)) == float(fresh.step(X, Y))


def test_callbacks_may_write_weights_between_the_steps_of_fit(device):
    X, Y, _ = data()

    class Double(mc.Callback):
        def step_end(self, trainer, J):
            trainer.net.b[3][...] = 0

    one = trainer("cuda", precision="bfloat16", optimizer=mc.SGD(0.1))
    one.fit(X, Y, epochs=1, batch_size=20, callbacks=[Double()], progress=False)
    assert not one.net.b[3].any()


def test_the_plan_is_what_is_allocated_and_a_step_allocates_nothing(device):
    taken = []
    empty = device.empty
    device.empty = lambda nbytes: taken.append(nbytes) or empty(nbytes)
    device.host_inputs = True
    X, Y, w = data()
    one = trainer("cuda", precision="float16", chunk_rows=7, l2=0.1)
    given = one._intake.as_data(X, Y, w).inputs
    plan = one._step.workspace.make_plan(ROWS, given)
    taken.clear()
    float(one.step(X, Y, w))
    # room for 2,048 answers; a control block on its way
    beside = [32 * 2048, cuda_slot.CONTROL.itemsize]
    # which are there
    assert sum(n for n in taken if n not in beside) == plan.total_bytes - 4 * one.net.layout.size
    taken.clear()
    for _ in range(3):
        float(one.step(X, Y, w))
    assert not taken


def test_memory_does_not_grow_with_the_batch(device):
    one = mc.Trainer(mc.MLP([64, 64, 10], output="softmax", device="cuda"))
    totals = {size: one.plan(size).total_bytes for size in (1 << 18, 1 << 20, 1 << 22)}
    assert len(set(totals.values())) == 1
    limited = mc.Trainer(one.net, memory_limit="4 MiB").plan(1048576)
    assert limited.total_bytes <= 4 << 20
    assert limited.rows > 100


def test_the_slowest_candidate_is_not_taken_and_a_deterministic_trainer_times_nothing(device):
    X, Y, w = data()
    timed = []
    # each candidate faster than the one before
    device.seconds = lambda run: run() or timed.append(run) or 100.0 - len(timed)
    one = trainer("cuda", deterministic=True)
    float(one.step(X, Y, w))
    assert not timed
    chosen = device.choices[True].chosen
    assert chosen
    assert all(chosen[p] == algorithm(p, 0) for p in chosen)
    other = trainer("cuda")
    float(other.step(X, Y, w))
    assert timed
    chosen = device.choices[False].chosen
    assert [
        p for p in chosen if chosen[p] != algorithm(p, 1)
    ] == []  # the last candidate is the fastest there


# -- several steps in one launch -------------------------------------------------------------------


class AtEachStep(mc.Callback):
    """A callback that looks at each step, so that each is launched by itself."""

    def __init__(self):
        self.steps, self.losses = [], []

    def step_end(self, trainer, J):
        self.steps.append(trainer.progress.step)
        self.losses.append(J)


def counted(device):
    """The launches of graphs from here on."""
    replays, record = [], device.record

    def recorded(run):
        recording = record(run)
        replay = recording.replay
        recording.replay = lambda: replays.append(1) or replay()
        return recording

    device.record = recorded
    return replays


RUNS = {
    "plain": {},
    "penalties, clipped": {"l1": 0.01, "l2": 0.1, "clip_norm": 0.05},
    "dropout": {"dropout": [0.2, 0.4], "seed": 3},
    "chunks": {"chunk_rows": 2},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("settings", RUNS)
def test_steps_launched_together_have_the_bits_of_steps_launched_one_by_one(
    device, settings, weighted
):
    X, Y, w = data()
    replays, found = counted(device), []
    for callbacks in ([], [AtEachStep()]):
        one = trainer("cuda", optimizer=mc.AdamW(mc.Cosine(1e-2, warmup=3)), **RUNS[settings])
        replays.clear()
        history = one.fit(
            X,
            Y,
            w if weighted else None,
            epochs=3,
            batch_size=8,
            callbacks=callbacks,
            progress=False,
        )
        arrays = [one.net.parameters, *one._step.state.vectors.values()]
        control = one._step.kernels.read_control()
        found.append(
            (
                len(replays),
                history["loss"],
                history["learning_rate"],
                [x.tobytes() for x in arrays],
                control,
            )
        )
    together, alone = found
    assert (together[0], alone[0]) == (3 * 4, 3 * 8)  # 4, 2, 1 whole batches and 4 rows
    assert together[1:] == alone[1:]


def test_callbacks_see_every_step_and_its_loss(device):
    X, Y, _ = data()
    seen = AtEachStep()
    history = trainer("cuda").fit(X, Y, epochs=2, batch_size=20, callbacks=[seen], progress=False)
    assert seen.steps == [1, 2, 3, 4, 5, 6]
    losses = [float(J) for J in seen.losses]
    np.testing.assert_allclose(
        history["loss"], [np.mean(losses[:3]), np.mean(losses[3:])], rtol=1e-12
    )


def test_a_step_end_that_one_callback_alone_has_is_called(device):
    X, Y, _ = data()
    seen, callback = [], mc.Callback()
    callback.step_end = lambda trainer, J: seen.append(trainer.progress.step)
    trainer("cuda").fit(X, Y, epochs=1, batch_size=20, callbacks=[callback], progress=False)
    assert seen == [1, 2, 3]


def test_a_callback_at_the_end_of_an_epoch_leaves_steps_together(device):
    X, Y, _ = data()
    replays = counted(device)
    trainer("cuda").fit(
        X, Y, epochs=2, batch_size=15, callbacks=[lambda trainer, entry: False], progress=False
    )
    assert len(replays) == 2


def test_a_run_of_more_steps_than_one_launch_holds_is_cut(device, monkeypatch):
    monkeypatch.setattr(cuda_slot, "TOGETHER", 4)
    X, Y, _ = data()
    replays = counted(device)
    one = trainer("cuda")
    one.fit(X, Y, epochs=1, batch_size=5, progress=False)
    assert (len(replays), one.progress.step) == (3, 12)
    monkeypatch.setattr(graph_step, "NODES", 1)
    replays.clear()
    one.fit(X, Y, epochs=1, batch_size=5, progress=False)
    assert len(replays) == 12


def test_steps_of_more_chunks_than_one_graph_holds_are_launched_one_by_one(device, monkeypatch):
    monkeypatch.setattr(capture, "UNROLLED", 64)
    X, Y, _ = data()
    X, Y, found = np.tile(X, (3, 1))[:130], np.tile(Y, 3)[:130], []
    for callbacks in ([], [AtEachStep()]):
        one = mc.Trainer(mc.MLP([7, 5], [], "softmax", device="cuda"), chunk_rows=1)
        history = one.fit(X, Y, epochs=1, batch_size=65, callbacks=callbacks, progress=False)
        found.append((history["loss"], one.progress.step, one.net.parameters.tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("skip", [False, True], ids=["raise", "skip"])
def test_a_fault_inside_a_launch_names_its_step_and_leaves_the_steps_after_it_undone(device, skip):
    X, Y, _ = data("identity")
    X[37] = 1e30  # step 4 of 6
    how = {"on_non_finite": "skip"} if skip else {}
    one, other = (
        trainer("cuda", "squared_error", "identity", optimizer=mc.SGD(1e-3), **how)
        for _ in range(2)
    )
    fit = {"epochs": 1, "batch_size": 10, "shuffle": False, "progress": False}
    if skip:
        history = one.fit(X, Y, **fit)
        assert (one.skipped, one.progress.step, history["skipped"]) == (1, 6, [1.0])
        parts = [slice(0, 10), slice(10, 20), slice(20, 30), slice(40, 50), slice(50, 60)]
    else:
        with pytest.raises(
            mc.NonFiniteLoss, match=r"step 4: .*; it began in layer 3 of 3"
        ) as caught:
            one.fit(X, Y, **fit)
        assert (caught.value.step, one.progress.step) == (4, 3)
        parts = [slice(0, 10), slice(10, 20), slice(20, 30)]
    for part in parts:
        float(other.step(X[part], Y[part]))
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)


def test_a_checkpoint_is_written_after_as_many_steps_as_it_was_asked_for(
    device, tmp_path, monkeypatch
):
    X, Y, w = data()
    saved, save = [], mc.Trainer.save
    monkeypatch.setattr(
        mc.Trainer, "save", lambda one, *rest: saved.append(one.progress.step) or save(one, *rest)
    )
    how = {
        "epochs": 2,
        "batch_size": 5,
        "progress": False,
        "checkpoint": tmp_path / "run",
        "every": "5 steps",
    }
    one = trainer("cuda", optimizer=mc.SGD(0.1, momentum=0.9))
    one.fit(X, Y, w, **how)
    assert saved == [5, 10, 15, 20, 24]


def test_a_run_resumes_between_two_launches_to_the_bit(device, tmp_path):
    X, Y, w = data()
    how = {"epochs": 3, "batch_size": 5, "progress": False}
    whole, left = (trainer("cuda", optimizer=mc.AdamW(mc.Cosine(1e-2))) for _ in range(2))
    history = whole.fit(X, Y, w, **how)
    save, runs = left.save, []

    def save_and_leave(*arguments):
        save(*arguments)
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt

    left.save = save_and_leave
    with pytest.raises(KeyboardInterrupt):
        left.fit(X, Y, w, **how, checkpoint=tmp_path / "run", every="6 steps")
    resumed = mc.Trainer.load(tmp_path / "run", "cuda")
    assert resumed.unfinished == "in epoch 2 of 3, after 6 of its batches"
    again = resumed.fit(X, Y, w, **how)
    assert again["loss"] == history["loss"]
    np.testing.assert_array_equal(resumed.net.parameters, whole.net.parameters)


def test_the_next_order_is_drawn_in_a_thread_while_an_epoch_is_under_way(device, monkeypatch):
    X, Y, w = data()
    drawn, draw, found = [], Rows._draw, []

    def noted(rows, seeds):
        drawn.append((seeds, threading.current_thread() is threading.main_thread()))
        draw(rows, seeds)

    monkeypatch.setattr(Rows, "_draw", noted)
    for least in (sources.AHEAD, 1):
        monkeypatch.setattr(sources, "AHEAD", least)
        drawn.clear()
        one = trainer("cuda", seed=5)
        one.fit(X, Y, w, epochs=3, batch_size=16, progress=False)
        found.append(one.net.parameters.tobytes())
        assert drawn == [([5, 1], True), ([5, 2], least > 1), ([5, 3], least > 1)]
    assert found[0] == found[1]
    drawn.clear()
    trainer("cuda").fit(X, Y, w, epochs=2, batch_size=16, shuffle=False, progress=False)
    assert drawn == [(None, True)] * 2


def test_rows_from_the_host_and_large_steps_are_launched_one_by_one(device, monkeypatch):
    X, Y, _ = data()
    one = trainer("cuda")
    given = one.prepare(X, Y).inputs
    assert one._step.together(10, given, 64) > 1
    assert one._step.together(10, given._replace(host=True), 64) == 1
    monkeypatch.setattr(graph_step, "WORTHWHILE", 6 * 9 * one.net.layout.weights)
    assert one._step.together(10, given, 64) == 1


# -- threads, and who writes -----------------------------------------------------------------------


def test_j_may_be_read_from_another_thread_while_steps_are_launched(device):
    X, Y, _ = data()
    one, taken, found = trainer("cuda", optimizer=mc.SGD(0.1)), queue.SimpleQueue(), []
    alone = trainer("cuda", optimizer=mc.SGD(0.1))
    multiply = device.multiply
    # lets the other thread in
    device.multiply = lambda *arguments: time.sleep(1e-5) or multiply(*arguments)

    def read():
        while (J := taken.get()) is not None:
            found.append(float(J))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for _ in range(60):
        taken.put(one.step(X, Y))
    taken.put(None)
    reader.join(60)
    assert found == [float(alone.step(X, Y)) for _ in range(60)]


def test_a_fault_read_in_another_thread_does_not_undo_a_step_that_is_being_launched(device):
    X, Y, _ = data("identity")
    one = trainer("cuda", "squared_error", "identity", optimizer=mc.SGD(1e30))
    losses = [one.step(X, Y) for _ in range(3)]
    reading, launching, control = [], [], one._step.kernels.read_control

    def slow():
        reading.append(time.perf_counter())
        found = control()
        time.sleep(0.05)
        reading.append(time.perf_counter())
        return found

    one._step.kernels.read_control = slow
    caught = []

    def read():
        with pytest.raises(mc.NonFiniteLoss) as error:
            float(losses[-1])
        caught.append(error.value.step)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while not reading and reader.is_alive():
        time.sleep(1e-3)
    one.step(X, Y)
    launching.append(time.perf_counter())
    reader.join(60)
    assert caught == [2]
    assert launching[0] > reading[1]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_parameters_are_cast_again_only_where_somebody_may_have_written_them(device, precision):
    X, Y, _ = data()
    cast, launch = [], device.launch
    device.launch = lambda kernel, *rest: (
        (cast.append(1) if "recast" in kernel.name else None) or launch(kernel, *rest)
    )
    one = trainer("cuda", precision=precision, optimizer=mc.SGD(0.1))
    for _ in range(3):
        float(one.step(X, Y))
    assert len(cast) == 1
    other = mc.Trainer(one.net, "cross_entropy", mc.SGD(0.1), precision=precision)
    float(other.step(X, Y))
    assert len(cast) == 2
    float(one.step(X, Y))
    float(one.step(X, Y))
    assert len(cast) == 3  # the other trainer's step counted
    one.fit(X, Y, epochs=1, batch_size=20, progress=False)
    one.evaluate(X, Y)
    assert len(cast) == 3
    one.net.W[1][...] *= 2
    float(one.step(X, Y))
    float(one.step(X, Y))
    assert len(cast) == 5  # whoever has a view may write at any time
    one.fit(X, Y, epochs=2, batch_size=20, progress=False)
    assert len(cast) == 6  # … but not while fit runs without callbacks


def test_early_stopping_puts_parameters_back_that_the_next_step_reads(device):
    X, Y, _ = data()
    one = trainer("cuda", precision="bfloat16", optimizer=mc.SGD(5.0))
    stopping = mc.EarlyStopping(patience=2, monitor="loss")
    one.fit(X, Y, epochs=6, batch_size=20, early_stopping=stopping, progress=False)
    fresh = mc.Trainer(one.net.copy(), "cross_entropy", mc.SGD(5.0), precision="bfloat16")
    assert float(one.step(X, Y)) == float(fresh.step(X, Y))


# -- networks on a device --------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["softmax", "log_softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_forward_backward_and_predict_are_numpys(device, dtype, output):
    X, _, _ = data(dtype=dtype)
    found = []
    for where in ("cpu", "cuda"):
        net = mc.MLP(
            [7, 9, 6, 5], ["gelu", ("leaky_relu", 0.2)], output, dtype=dtype, device=where, seed=3
        )
        cache = net.forward(X)
        gradient = net.backward(cache, np.cos(cache.output), input_gradient=True, keep=True)
        found.append(
            (cache.output, gradient.flat, gradient.X, gradient.D[2], net.predict(X, chunk_rows=11))
        )
    for here, there in zip(*found, strict=True):
        close(here, there, 1e-5 if dtype == "float32" else 1e-13)


def test_the_gradient_check_checks_the_devices_gradient(device):
    device.host_inputs = True
    X, Y, w = data(dtype="float64")
    net = mc.MLP([7, 9, 5], "tanh", "softmax", device="cuda")
    assert mc.check_gradients(net, X, Y, sample_weight=w).ok
    wrong = GraphStep.loss_and_gradient

    def doubled(step, batch, plan):
        J = wrong(step, batch, plan)
        step.gradient[3] *= 2
        return J

    GraphStep.loss_and_gradient = doubled
    try:
        assert not mc.check_gradients(net, X, Y, sample_weight=w).ok
    finally:
        GraphStep.loss_and_gradient = wrong


def test_a_network_moves_between_devices_files_and_pickles(device, tmp_path):
    import pickle

    X, _, _ = data()
    there = mc.MLP([7, 9, 5], device="cuda", seed=3)
    here = there.to("cpu")
    assert (here.device, there.device, here.to("cuda:0").device) == ("cpu", "cuda:0", "cuda:0")
    there.save(tmp_path / "net.safetensors")
    copies = [
        here,
        mc.MLP.load(tmp_path / "net.safetensors", "cpu"),
        mc.MLP.load(tmp_path / "net.safetensors", "cuda"),
    ]
    copies += [pickle.loads(pickle.dumps(there)), there.copy(), here.to("cuda")]
    for net in copies:
        np.testing.assert_array_equal(net.parameters, there.parameters)
        close(net.predict(X), there.predict(X), 1e-6)
        assert net.parameters is not there.parameters


@pytest.mark.parametrize("between", ["saved", "copied", "evaluated, then penalised"])
def test_a_run_that_comes_from_a_cpu_counts_its_updates_on_whatever_happens_before_the_next(
    device, tmp_path, between
):
    X, Y, _ = data()
    here = trainer("cpu", optimizer=mc.Adam(1e-2))
    for _ in range(10):
        here.step(X, Y)
    here.save(tmp_path / "run")
    there = mc.Trainer.load(tmp_path / "run", "cuda")
    if between == "saved":
        there.save(tmp_path / "run")
        there = mc.Trainer.load(tmp_path / "run", "cuda")
    elif between == "copied":
        there = copy.deepcopy(there)
    else:
        there.evaluate(X, Y)
        here.l2 = there.l2 = 0.1
    here.step(X, Y)
    float(there.step(X, Y))
    assert there._step.kernels.read_control()["updates"] == 11
    close(here.net.parameters, there.net.parameters, 1e-5)


def test_a_pickled_network_of_a_gpu_opens_where_there_is_none(device, monkeypatch, caplog):
    import pickle

    text = pickle.dumps(mc.MLP([7, 9, 5], device="cuda", seed=3))
    monkeypatch.delitem(devices._opened, "cuda:0")
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "no GPU today")
    net = pickle.loads(text)
    assert net.device == "cpu"
    assert "no GPU today" in caplog.text
    np.testing.assert_array_equal(
        net.parameters, mc.MLP([7, 9, 5], seed=3, device="cpu").parameters
    )


def test_a_low_precision_is_for_float32_networks(device):
    with pytest.raises(
        ValueError, match="precision='bfloat16' is for a float32 network; this one is float64"
    ):
        trainer("cuda", dtype="float64", precision="bfloat16")


def test_a_steps_products_alone_can_be_run_for_measurement(device):
    X, Y, _ = data()
    one = trainer("cuda", chunk_rows=25)
    float(one.step(X, Y))
    parts = one.parts(X, Y)
    multiplied, multiply = [], device.multiply
    device.multiply = lambda product, *rest: multiplied.append(product) or multiply(product, *rest)
    one.parts(X, Y)
    weights = [7 * 16, 16 * 12, 12 * 5]
    # of the recording made last: three chunks, each without the gradient of X
    products = multiplied[-3 * 8 :]
    assert sum(p.m * p.n * p.k for p in products) == ROWS * (3 * sum(weights) - weights[0])
    before = one.net.parameters.copy()
    parts.products.replay()
    np.testing.assert_array_equal(one.net.parameters, before)
    assert np.isfinite(float(one.step(X, Y)))


@pytest.mark.parametrize("staged", [False, True], ids=["on the device", "from the host"])
def test_a_step_can_be_taken_apart_and_its_graphs_do_what_it_does(device, staged):
    device.host_inputs = staged
    X, Y, w = data()
    one, other = (trainer("cuda", chunk_rows=25, optimizer=mc.SGD(0.1)) for _ in range(2))
    J, gradient = one.gradient(X, Y, w, rows=np.arange(40))
    gradient = gradient.copy()
    parts = one.parts(X, Y, w, rows=np.arange(40))
    assert (parts.chunks, parts.rows) == ([(0, 20), (20, 40)], 25)
    before = one.net.parameters.copy()
    one._step.gradient[...] = np.nan
    parts.gradient.replay()
    np.testing.assert_array_equal(one._step.gradient, gradient)
    np.testing.assert_array_equal(one.net.parameters, before)
    parts.step.replay()
    assert float(other.step(X, Y, w, rows=np.arange(40))) == J
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)
    assert one.progress.step == 0


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_epilogues_are_tried_on_parameters_before_the_first_step_too(device, precision):
    X, Y, _ = data()
    # what is timed first is the fastest: a product with its activation
    device.times = itertools.count()
    assert trainer("cuda", hidden=("relu", "tanh"), precision=precision).parts(X, Y).fused == (2, 2)


def test_row_weights_that_are_gone_are_not_taken_for_none(device):
    X, Y, w = data()
    one = trainer("cuda")
    held = one.prepare(X, Y)
    float(one.step(held._replace(weights=w, inputs=held.inputs._replace(w_dtype=w.dtype.str))))
    where = cuda_slot.WORD["source"] + 2
    assert one._step.kernels.record.words[where]
    del w
    one._learner.update(held, held.batch(None))
    assert not one._step.kernels.record.words[where]


def test_a_graph_that_is_replayed_after_steps_reads_their_rows_again_and_writes_no_further_result(
    device,
):
    X, Y, _ = data()
    one = trainer("cuda", optimizer=mc.SGD(0.0))
    held = one.prepare(X, Y)
    step = one.parts(held).step
    J = float(one.step(held))
    for _ in range(3):
        step.replay()
    assert (one._step._results.array[1:].view(np.uint8) == 0xFF).all()
    assert float(one.step(held)) == J


def test_the_parts_of_a_step_name_the_products_of_that_step_alone(device):
    X, Y, _ = data()
    # what is timed last is the fastest: a product, then the activation
    device.times = itertools.count(10, -0.01)
    apart = trainer("cuda", chunk_rows=25).parts(X, Y)
    assert apart.fused == (0, 3)
    assert not any(product.epilogue for product in apart.algorithms)
    # outputs; gradients of the weights, written and added to; of the inputs
    assert len(apart.algorithms) == 3 + 3 * 2 + 2
    device.times = itertools.count()  # what is timed first is the fastest
    device.choices.clear()
    trainer("cuda", hidden=("tanh", "tanh")).parts(X, Y)  # another step on the same device
    joined = trainer("cuda", hidden=("relu", "tanh")).parts(X, Y)
    assert joined.fused == (2, 2)
    assert sorted(product.epilogue for product in joined.algorithms) == [""] * 6 + ["bias", "relu"]
    assert len(joined.algorithms) == 3 + 3 + 2


def test_a_step_of_more_chunks_than_a_graph_holds_has_its_products_alone(device):
    X, Y, _ = data()
    one = trainer("cuda", chunk_rows=7)
    parts = one.parts(X, Y)
    assert (parts.step, parts.gradient, len(parts.chunks)) == (None, None, 9)
    parts.products.replay()
    assert np.isfinite(float(one.step(X, Y)))


def test_a_step_on_a_cpu_has_no_parts():
    with pytest.raises(
        mc.DeviceUnavailable,
        match="a step has parts only if it is captured as a graph: on a CUDA device",
    ):
        trainer("cpu").parts(*data()[:2])
