"""Targets and rows that a loss or a dtype cannot take are refused."""

import numpy as np
import pytest

import mlpcore as mc


@pytest.mark.parametrize(
    ("loss", "output", "Y"),
    [
        ("binary_cross_entropy", "sigmoid", [1, -1]),
        ("poisson", "exp", [2, -3]),
        ("poisson", "softplus", [2, -3]),
    ],
)
def test_targets_outside_the_range_of_a_loss_are_refused_by_row(loss, output, Y):
    trainer = mc.Trainer(mc.MLP([2, 1], output=output), loss)
    for call in (trainer.evaluate, lambda X, Y: trainer.fit(X, Y, progress=False)):
        with pytest.raises(ValueError, match=f"Y: {loss} takes 0 .*row 1"):
            call(np.ones((2, 2)), Y)


def test_masked_entries_and_numbers_beyond_the_dtype_are_refused():
    trainer = mc.Trainer(mc.MLP([2, 1]), "squared_error")
    with pytest.raises(TypeError, match="masked"):
        trainer.step(np.ma.array([[1, 2], [3, 1e9]], mask=[[0, 0], [0, 1]]), [0, 1])
    with pytest.raises(ValueError, match="row 1, column 0"):
        trainer.evaluate([[1.0, 2.0], [1e300, 0.0]], [0, 1])
    for weights in ([1e300, 1e300], [1e40, 1e40]):
        with pytest.raises(ValueError, match="sample_weight sums to"):
            trainer.step(np.ones((2, 2)), [0, 1], weights)
