"""A user's own activation is not the built-in one of its name, and may lack a slope at 0."""

import numpy as np
import pytest

import mlpcore as mc


def test_a_name_alone_does_not_make_a_softmax():
    own = mc.Activation("softmax", "s", "1")
    with pytest.raises(ValueError, match="needs output 'softmax'"):
        mc.Trainer(mc.MLP([3, 2], output=own), "cross_entropy")
    with pytest.raises(ValueError, match="needs output 'softmax'"):
        mc.Trainer(mc.MLP([3, 2]), mc.Loss("cross_entropy", "", ""))
    with pytest.raises(ValueError, match="output layer only"):
        mc.MLP([3, 4, 2], activations=mc.Activation("softmax", "", ""))


@pytest.mark.parametrize(
    ("value", "slope"), [("s * s * s", "3 * s * s"), ("1 / s", "-1 / (s * s)"), ("log(s)", "1 / s")]
)
def test_an_activation_without_a_slope_at_zero_starts_as_plain_glorot(value, slope):
    own = mc.Activation("own", value, slope)
    expected = mc.MLP([4, 8, 1], "identity").parameters
    np.testing.assert_array_equal(mc.MLP([4, 8, 1], own, own).parameters, expected)
