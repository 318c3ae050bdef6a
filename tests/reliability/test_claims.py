"""Two trainings and one checkpoint: the second is refused, and neither loses anything."""

import os

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.formats import atomic
from tests.formats.test_atomic import ended, forked

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((60, 3)), RNG.standard_normal((60, 1))
FIT = {"epochs": 3, "batch_size": 10, "progress": False}


def make(seed=1):
    return mc.Trainer(mc.MLP([3, 4, 1], device="cpu", seed=seed), "squared_error", mc.AdamW(1e-2))


class At(mc.Callback):
    """Does something after so many steps."""

    def __init__(self, step, work):
        self.step, self.work = step, work

    def step_end(self, trainer, J):
        if trainer.progress.step == self.step:
            self.work(trainer)


def refused(path):
    """A training that begins now is refused, and has changed nothing."""
    other = make(2)
    before = other.net.parameters.copy()
    with pytest.raises(OSError, match="run' cannot be written: another training is writing it"):
        other.fit(X, Y, checkpoint=path, **FIT)
    assert (other.unfinished, other.progress.step) == (None, 0)
    np.testing.assert_array_equal(other.net.parameters, before)


@pytest.mark.parametrize("step", [2, 8])
def test_a_second_training_into_one_checkpoint_is_refused_at_its_start(step, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    path, whole = tmp_path / "run", make()
    whole.fit(X, Y, **FIT)

    def others(trainer):
        trainer.save(path)  # a file is there from now on
        refused(path)
        assert ended(forked(lambda: refused(path))) == 0
        assert mc.Trainer.load(path, "cpu").progress.step == trainer.progress.step  # a reader sees no lock

    one = make()
    one.fit(X, Y, checkpoint=path, keep=2, callbacks=[At(step, others)], **FIT)
    np.testing.assert_array_equal(one.net.parameters, whole.net.parameters)
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1"]
    make().fit(X, Y, checkpoint=path, **FIT)  # the claim has ended with the fit


def test_of_two_trainings_that_begin_at_once_both_runs_can_go_on(tmp_path):
    path, elsewhere, whole = tmp_path / "run", tmp_path / "elsewhere", make()
    whole.fit(X, Y, **FIT)
    faster = make(2)
    faster.fit(X, Y, **FIT)

    def another(trainer):
        assert ended(forked(lambda: make(2).fit(X, Y, checkpoint=path, **FIT))) == 0

    one = make()
    with pytest.raises(OSError, match="run' cannot be written: another training, or a program, has written it"):
        one.fit(X, Y, checkpoint=path, callbacks=[At(3, another)], **FIT)
    assert one.unfinished == "in epoch 2 of 3, after 0 of its batches"
    one.save(elsewhere)
    for trainer in (one, mc.Trainer.load(elsewhere, "cpu")):
        trainer.fit(X, Y, **FIT)
        np.testing.assert_array_equal(trainer.net.parameters, whole.net.parameters)
    np.testing.assert_array_equal(mc.MLP.load(path, "cpu").parameters, faster.net.parameters)


def test_a_fit_that_fails_leaves_no_claim(tmp_path):
    def fail(trainer):
        raise ZeroDivisionError

    path = tmp_path / "run"
    with pytest.raises(ZeroDivisionError) as caught:
        make().fit(X, Y, checkpoint=path, callbacks=[At(3, fail)], **FIT)
    make().fit(X, Y, checkpoint=path, **FIT)
    assert caught.tb is not None  # its frames are still there
