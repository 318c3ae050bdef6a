"""`trainer.apply`: an update by a gradient that the caller hands back, on the CPU and on the device
that the CPU plays.
"""

import os
import shutil

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends import devices
from tests.backends.cuda.emulator.device import CpuDevice

CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        shutil.which("g++") is None and "CI" not in os.environ, reason="needs g++"
    ),
)
RNG = np.random.default_rng(0)
X, Y, W = RNG.standard_normal((24, 5)), RNG.integers(0, 3, 24), RNG.random(24) + 0.1
OPTIMIZERS = {
    "sgd": lambda: mc.SGD(mc.StepDecay(0.1, 2)),
    "momentum": lambda: mc.SGD(0.1, 0.9, nesterov=True),
    "adamw": lambda: mc.AdamW(0.01, 0.1),
    "lion": lambda: mc.Lion(0.01, 0.1),
}
SETTINGS = {
    "plain": {},
    "l2": {"l2": 0.1},
    "l1, l2, clipped": {"l1": 0.01, "l2": 0.1, "clip_norm": 0.1},
    "dropout": {"dropout": 0.3},
}


@pytest.fixture
def device(request, monkeypatch):
    """ "cpu", or "cuda" on a device that is none."""
    if request.param == "cuda":
        monkeypatch.setitem(devices._opened, "cuda:0", CpuDevice())
    return request.param


def make(device, optimizer=None, dtype="float32", loss="cross_entropy", **settings):
    net = mc.MLP([5, 8, 8, 3], "tanh", "softmax", dtype=dtype, device=device, seed=1)
    return mc.Trainer(net, loss, optimizer or mc.AdamW(0.01), **settings)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_gradient_and_apply_are_step_to_the_bit(device, dtype, name, settings):
    one, other = (make(device, OPTIMIZERS[name](), dtype, **SETTINGS[settings]) for _ in range(2))
    for i in range(4):
        if i == 2:
            float(one.step(X, Y, W)), float(other.step(X, Y, W))
            continue
        J, gradient = one.gradient(X, Y, W)
        one.apply(gradient)
        assert float(other.step(X, Y, W)) == pytest.approx(J, rel=1e-6)
        np.testing.assert_array_equal(one.net.parameters, other.net.parameters)
    assert one.progress == other.progress
    for key, vector in one._step.state.vectors.items():
        np.testing.assert_array_equal(vector, other._step.state.vectors[key])


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_the_gradients_of_two_halves_can_be_averaged(device):
    whole, halves = make(device, dtype="float64", l2=0.1), make(device, dtype="float64", l2=0.1)
    for _ in range(3):
        first = halves.gradient(X[:12], Y[:12])[1].copy()
        halves.apply((first + halves.gradient(X[12:], Y[12:])[1]) / 2)
        float(whole.step(X, Y))
    np.testing.assert_allclose(halves.net.parameters, whole.net.parameters, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_what_backward_returned_is_applied_without_penalties(device):
    one, other = make(device, mc.SGD(0.5), l1=0.1, l2=0.3), make(device, mc.SGD(0.5))
    cache = one.net.forward(X)
    _, G = mc.loss("cross_entropy")(cache.output, Y)
    one.apply(one.net.backward(cache, G))
    float(other.step(X, Y))
    np.testing.assert_allclose(one.net.parameters, other.net.parameters, rtol=1e-5, atol=1e-7)
    float(one.step(X, Y))  # whose penalties are those that they were
    other.l1, other.l2 = 0.1, 0.3
    float(other.step(X, Y))
    np.testing.assert_allclose(one.net.parameters, other.net.parameters, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, list])
def test_a_gradient_of_any_number_type_is_read_and_left_alone_before_the_first_step_too(
    device, kind
):
    one = make(device, mc.SGD(0.5, momentum=0.9), clip_norm=1.0)
    size, before = one.net.layout.size, one.net.parameters.copy()
    values = np.arange(size) % 7 - 3
    gradient = values.tolist() if kind is list else values.astype(kind)
    one.apply(gradient)
    np.testing.assert_array_equal(np.asarray(gradient), values)
    length = np.linalg.norm(values)
    np.testing.assert_allclose(
        one.net.parameters, before - 0.5 * values / length, rtol=1e-5, atol=1e-6
    )
    assert one.progress.step == 1
    assert one.optimizer.momentum == 0.9


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_tied_weights_and_a_resumed_run(device, tmp_path):
    def tied():
        net = mc.MLP([5, 4, 5], "tanh", tied={2: "1.T"}, device=device, seed=2)
        return mc.Trainer(net, "squared_error", mc.Adam(0.01))

    one, other = tied(), tied()
    for i in range(4):
        if i == 2:
            one.save(tmp_path / "run")
            one = mc.Trainer.load(tmp_path / "run", device)
        one.apply(one.gradient(X, X)[1])
        float(other.step(X, X))
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)
    assert one.progress == other.progress


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_gradient_that_is_not_finite_or_overflows_changes_nothing(device, bad):
    one, tolerant = (make(device, on_non_finite=how) for how in ("raise", "skip"))
    gradient = np.zeros(one.net.layout.size)
    gradient[17] = bad
    for trainer in (one, tolerant):
        trainer.apply(np.ones(gradient.size))
    state = [one.net.parameters, *one._step.state.vectors.values()]
    before = [x.copy() for x in state]
    with pytest.raises(mc.NonFiniteLoss, match=r"step 2: .* not finite"):
        one.apply(gradient)
    tolerant.apply(gradient)
    for x, y, was in zip(
        state,
        [tolerant.net.parameters, *tolerant._step.state.vectors.values()],
        before,
        strict=True,
    ):
        np.testing.assert_array_equal(x, was)
        np.testing.assert_array_equal(y, was)
    assert (one.progress.step, tolerant.progress.step, tolerant.skipped) == (1, 2, 1)
    one.apply(np.ones(gradient.size))
    assert one.progress.step == 2
    assert np.abs(one.net.parameters - before[0]).max() > 0


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (
            np.zeros(3),
            ValueError,
            r"gradient must be laid out as net.parameters, \(147,\); got \(3,\)",
        ),
        (np.zeros((1, 147)), ValueError, r"got \(1, 147\)"),
        (0.5, ValueError, r"got \(\)"),
        ("no", TypeError, "gradient"),
        (None, TypeError, "gradient"),
        (np.zeros(147, complex), TypeError, "gradient"),
        (
            (1.0, np.zeros(147)),
            TypeError,
            "got a tuple: trainer.gradient returns J and the gradient",
        ),
    ],
)
def test_what_is_no_gradient_is_refused_by_name(device, bad, error, words):
    one = make(device)
    before = one.net.parameters.copy()
    with pytest.raises(error, match=words):
        one.apply(bad)
    np.testing.assert_array_equal(one.net.parameters, before)
    assert one.progress.step == 0


@pytest.mark.slow
@pytest.mark.parametrize("device", [CUDA], indirect=True)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_low_precision_gradients_come_unscaled_and_the_copy_of_the_parameters_follows(
    device, precision
):
    one, other = (make(device, mc.SGD(0.1), precision=precision) for _ in range(2))
    for _ in range(3):
        one.apply(one.gradient(X, Y)[1])
        float(other.step(X, Y))
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)
    np.testing.assert_array_equal(one._step.capture.low, other._step.capture.low)
    assert (
        one._step.kernels.read_control()["loss_scale"]
        == other._step.kernels.read_control()["loss_scale"]
    )
    gradient = np.full(one.net.layout.size, np.inf)
    scale = one._step.kernels.read_control()["loss_scale"]
    with pytest.raises(mc.NonFiniteLoss):
        one.apply(gradient)
    assert one._step.kernels.read_control()["loss_scale"] == scale
