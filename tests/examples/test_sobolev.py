"""examples/sobolev.py: the potential's gradient and that of the loss are right, and forces help."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mlpcore as mc

example = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "examples" / "sobolev.py"))
)


def points(count):
    return np.random.default_rng(3).uniform(*example.BOX.T, (count, 2))


def test_the_forces_are_the_slopes_of_the_energy():
    X, h = points(50), 1e-6
    _, F = example.potential(X)
    for i, unit in enumerate(np.eye(2)):
        numeric = (example.potential(X + h * unit)[0] - example.potential(X - h * unit)[0])[
            :, 0
        ] / (2 * h)
        np.testing.assert_allclose(F[:, i], numeric, rtol=1e-5, atol=1e-6)


def test_the_potential_has_its_three_known_minima():
    minima = [(-0.558, 1.442, -146.7), (0.623, 0.028, -108.2), (-0.050, 0.467, -80.77)]
    for x, y, energy in minima:
        E, F = example.potential(np.array([[x, y]]))
        assert 100 * E[0, 0] == pytest.approx(energy, abs=0.1)
        assert np.abs(F).max() < 0.05


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_the_gradient_of_the_loss_with_forces_is_right(weight):
    X = points(20)
    E, F = example.potential(X)
    net = mc.MLP([2, 8, 6, 1], "tanh", dtype="float64", seed=1)
    v = np.random.default_rng(0).standard_normal(net.layout.size)
    theta, h = net.parameters.copy(), 1e-6
    _, gradient = example.J_and_gradient(net, X, E, F, weight)
    J = []
    for sign in (1, -1):
        net.parameters[...] = theta + sign * h * v
        J.append(example.J_and_gradient(net, X, E, F, weight)[0])
    assert gradient @ v == pytest.approx((J[0] - J[1]) / (2 * h), rel=1e-6)


@pytest.mark.slow
def test_forces_help():
    X = points(300)
    X = X[example.potential(X)[0][:, 0] < 1][:40]
    E, F = example.potential(X)
    alone, together = (
        example.errors(example.fit(X, E, F, weight, 150), 500) for weight in (0.0, 0.1)
    )
    assert together[0] < 0.7 * alone[0]
    assert together[1] < 0.7 * alone[1]
