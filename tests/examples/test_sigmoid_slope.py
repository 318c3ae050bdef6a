"""examples/sigmoid_slope.py: the update by hand, and slope a at rate η as slope 1 at rate a² η."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mlpcore as mc

example = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "examples" / "sigmoid_slope.py"))
)
SIZES, x, y = [3, 5, 4, 2], [0.3, -1.2, 0.8], [0.9, 0.2]


def J(W, b, a):
    """Half the squared error of the point (x, y), with numbers only."""
    z = x
    for l in (1, 2, 3):
        s = [math.fsum(z[k] * W[l][k][j] for k in range(len(z))) + b[l][j] for j in range(SIZES[l])]
        z = [0.5 + 0.5 * math.tanh(a * number / 2) for number in s]
    return math.fsum((z[r] - y[r]) ** 2 for r in range(2)) / 2


@pytest.mark.parametrize("a", [0.5, 1.0, 3.0])
def test_the_update_by_hand_is_the_rate_times_the_slope_of_the_loss(a):
    net = example.network(SIZES, a, seed=2)
    W, b = example.as_lists(net.W), example.as_lists(net.b)
    change_W, change_b = example.by_hand(W, b, x, y, a, rate=0.7)
    h = 1e-5
    for j in range(SIZES[2]):
        for where, change in [
            *((W[2][k], change_W[k][j]) for k in range(SIZES[1])),
            (b[2], change_b[j]),
        ]:
            here = where[j]
            where[j] = here + h
            above = J(W, b, a)
            where[j] = here - h
            below = J(W, b, a)
            where[j] = here
            assert change == pytest.approx(0.7 * (above - below) / (2 * h), rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("a", [0.5, 1.0, 3.0])
def test_one_step_of_the_trainer_changes_the_second_last_layer_as_by_hand(a):
    net = example.network(SIZES, a, seed=2)
    W, b = example.as_lists(net.W), example.as_lists(net.b)
    hand_W, hand_b = example.by_hand(W, b, x, y, a, rate=0.7)
    step_W, step_b = example.by_trainer(net, x, y, 0.7)
    assert np.abs(step_W).max() > 1e-3
    np.testing.assert_allclose(step_W, hand_W, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(step_b, hand_b, rtol=1e-9, atol=1e-15)


def test_by_hand_the_factor_a_squared_is_what_distinguishes_a_slope_from_a_scale_of_the_weights():
    a, net = 3.0, example.network(SIZES, 3.0, seed=2)
    same = mc.MLP(SIZES, "sigmoid", "sigmoid", dtype="float64", init="zeros")
    same.parameters[...] = a * net.parameters
    np.testing.assert_allclose(net.predict([x]), same.predict([x]), rtol=1e-14)
    with_a = example.by_hand(example.as_lists(net.W), example.as_lists(net.b), x, y, a, 1.0)[0]
    without = example.by_trainer(same, x, y, 1.0)[0]
    np.testing.assert_allclose(a * np.array(with_a), a**2 * without, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("init", ["glorot", "auto"])
def test_slope_a_at_rate_eta_takes_the_steps_of_slope_1_at_rate_a_squared_eta(init):
    a, rate = 3.0, 0.05
    X, Y = example.quadrants(50, seed=4)
    net = example.network([2, 6, 5, 1], a, init, seed=5)
    other = mc.MLP(net.sizes, "sigmoid", "sigmoid", dtype="float64", init="zeros")
    other.parameters[...] = a * net.parameters
    start = other.parameters.copy()
    for one, eta in ((net, rate), (other, a**2 * rate)):
        mc.Trainer(one, "squared_error", mc.SGD(eta), seed=1).fit(
            X, Y, epochs=5, batch_size=1, progress=False
        )
    np.testing.assert_allclose(a * net.parameters, other.parameters, rtol=1e-9, atol=1e-12)
    assert np.abs(other.parameters - start).max() > 0.05


def test_at_rate_over_a_squared_the_curves_from_auto_weights_coincide_and_from_glorot_weights_do_not():  # noqa: E501
    rescaled = {
        (init, a): example.learning_curve(a, init, 0.3 / a**2, 4)[0]
        for init in ("auto", "glorot")
        for a in (1.0, 4.0)
    }
    assert rescaled["auto", 4.0] == rescaled["auto", 1.0]
    assert np.abs(np.subtract(rescaled["glorot", 4.0], rescaled["glorot", 1.0])).max() > 1e-4


def test_auto_weights_start_every_a_as_the_same_net_and_glorot_weights_a_small_a_as_a_flat_one():
    for a in example.SLOPES:
        auto = example.network(SIZES, a, "auto")
        np.testing.assert_allclose(
            a * auto.parameters, example.network(SIZES, 1.0, "auto").parameters, rtol=1e-14
        )
        assert example.spread_at_start(a, "auto") == pytest.approx(
            example.spread_at_start(1.0, "auto"), rel=1e-12
        )
    # a/4 in each of the three layers: half the slope, an eighth of the spread, the more exactly
    # the smaller a
    halved = example.spread_at_start(0.02, "glorot") / example.spread_at_start(0.01, "glorot")
    assert halved == pytest.approx(8, rel=0.01)
    assert example.spread_at_start(0.5, "glorot") < 0.05 * example.spread_at_start(0.5, "auto")


@pytest.mark.slow
def test_without_regard_to_a_a_small_one_stands_on_a_plateau_that_auto_weights_shorten():
    last = {
        (init, a): example.learning_curve(a, init, 0.3, 25, seed=3)[0][-1]
        for init in example.INITS
        for a in (1.0, 4.0)
    }
    start = 0.08  # half the mean of (0.5 ± 0.4 - 0.5)²: every output 0.5
    assert last["glorot", 1.0] > 0.95 * start
    assert last["glorot", 4.0] < 0.5 * start
    assert last["auto", 1.0] < 0.5 * start


def test_the_epoch_that_is_printed_is_the_first_below_the_level():
    assert example.epochs_to([0.5, 0.2, 0.3, 0.1], 0.25) == "2"
    assert example.epochs_to([0.5, 0.4], 0.4) == "> 2"
