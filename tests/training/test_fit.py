"""Calls of `fit` and changes of the optimizer while `fit` runs."""

import numpy as np
import pytest

import mlpcore as mc


def test_fit_inside_fit_is_refused_and_the_outer_one_unharmed():
    X, Y, seen = np.ones((8, 2)), np.ones(8), []

    def again(trainer, entry):
        with pytest.raises(RuntimeError, match="fit is running"):
            trainer.fit(X, Y, epochs=1, progress=False)
        seen.append(entry)

    trainer = mc.Trainer(mc.MLP([2, 1]), "squared_error", mc.SGD(mc.Cosine(0.1)))
    trainer.fit(X, Y, epochs=3, callbacks=[again], progress=False)
    assert len(seen) == 3


def test_an_adaptive_schedule_set_during_fit_counts_from_then_on():
    trainer = mc.Trainer(mc.MLP([2, 1]), "squared_error", mc.SGD(1e-9))

    def change(trainer, entry):
        if trainer.progress.step == 2:
            trainer.optimizer.learning_rate = mc.Adaptive(
                1e-9, patience=1, tolerance=1.0, minimum=1e-12
            )

    trainer.fit(np.ones((4, 2)), np.ones(4), epochs=6, callbacks=[change], progress=False)
    assert trainer.progress.reductions >= 2
