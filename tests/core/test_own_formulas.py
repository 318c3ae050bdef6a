"""Activations and losses of a user's own, their slopes derived: in training, checks, files, ONNX
and second derivatives.
"""

import numpy as np
import onnxruntime
import pytest

import mlpcore as mc

WAVE = mc.Activation("wave", "s + sin(a * s) ** 2 / a", parameter=2.0)
BELL = mc.Activation("bell", "s * normcdf(s) + 0.1 * cos(s) * normpdf(s)")
CUBIC = mc.Activation("cubic", "s ** 3 / (1 + s ** 2)")
ERROR = mc.Activation("error", "erf(s) - 0.1 * erfc(s) ** 2")
FOURTH = mc.Loss("fourth", "(z - y) ** 4 + q * (z - y) ** 2", parameter=0.5)
rng = np.random.default_rng(0)
X, Y = rng.standard_normal((40, 3)), rng.standard_normal((40, 2))


def net(dtype="float64"):
    return mc.MLP([3, 6, 5, 4, 2], [WAVE, BELL, ERROR], CUBIC, dtype=dtype, seed=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_are_right_and_training_gets_on(dtype):
    network = net(dtype)
    assert mc.check_gradients(network, X, Y, FOURTH).ok
    history = mc.Trainer(network, FOURTH, mc.Adam(1e-2)).fit(
        X, Y, epochs=40, batch_size=8, progress=False
    )
    assert history["loss"][-1] < 0.7 * history["loss"][0]


def test_a_hessian_product_is_the_gradients_derivative():
    network, v, h = net(), rng.standard_normal(net().layout.size), 1e-5
    trainer = mc.Trainer(network, FOURTH)
    start, sides = network.parameters.copy(), []
    for t in (h, -h):
        network.parameters[...] = start + t * v
        sides.append(trainer.gradient(X, Y)[1].copy())
    network.parameters[...] = start
    np.testing.assert_allclose(
        network.hvp(X, Y, v, FOURTH), (sides[0] - sides[1]) / (2 * h), rtol=1e-6, atol=1e-7
    )


def test_files_keep_formulas_and_slopes_and_a_run_goes_on_to_the_bit(tmp_path):
    trainer = mc.Trainer(net(), FOURTH, mc.Adam(1e-2), seed=3)
    trainer.fit(X, Y, epochs=2, batch_size=8, progress=False)
    trainer.save(tmp_path / "run.safetensors")
    again = mc.Trainer.load(tmp_path / "run.safetensors")
    assert (again.net.activations, again.loss) == (trainer.net.activations, FOURTH)
    for one in (trainer, again):
        one.step(X, Y)
    np.testing.assert_array_equal(again.net.parameters, trainer.net.parameters)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_onnx_computes_the_same(dtype, tmp_path):
    network = net(dtype)
    network.to_onnx(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"]
    )
    (Z,) = session.run(["Z"], {"X": X.astype(dtype)})
    np.testing.assert_allclose(
        Z, network.predict(X), rtol=200 * np.finfo(dtype).eps, atol=20 * np.finfo(dtype).eps
    )
