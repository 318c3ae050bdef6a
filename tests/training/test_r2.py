"""R² of predictions, without the rows that weigh nothing."""

import numpy as np
import pytest

import mlpcore as mc

RNG = np.random.default_rng(0)


def test_r2_behind_an_exponential_output_is_that_of_the_predictions():
    X = RNG.standard_normal((700, 3))
    Y = RNG.poisson(np.exp(X[:, :1])).astype(float)
    trainer = mc.Trainer(
        mc.MLP([3, 8, 1], "tanh", "exp", dtype="float64"), "poisson", mc.Adam(1e-2)
    )
    trainer.fit(X, Y, epochs=20, progress=False)
    Z = trainer.net.predict(X)
    assert trainer.evaluate(X, Y)["r2"] == pytest.approx(
        1 - np.sum((Y - Z) ** 2) / np.sum((Y - Y.mean()) ** 2)
    )


def test_r2_takes_no_notice_of_rows_that_weigh_nothing():
    X, Y, w = RNG.standard_normal((50, 2)), RNG.standard_normal(50), np.ones(50)
    trainer = mc.Trainer(mc.MLP([2, 1], dtype="float64"), "squared_error")
    without = trainer.evaluate(X[1:], Y[1:])["r2"]
    Y[0], w[0] = 1e12, 0
    assert trainer.evaluate(X, Y, w)["r2"] == pytest.approx(without)
