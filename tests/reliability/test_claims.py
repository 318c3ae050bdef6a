"""Two trainings and one checkpoint: the second is refused, and neither loses anything."""

import os

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.io import claims, kinds
from tests.io.test_atomic import ended, forked

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
    monkeypatch.setattr(claims, "PATIENCE", 0.1)
    path, whole = tmp_path / "run", make()
    whole.fit(X, Y, **FIT)

    def others(trainer):
        trainer.save(path)  # a file is there from now on
        refused(path)
        assert ended(forked(lambda: refused(path))) == 0
        # a reader sees no lock
        assert mc.Trainer.load(path, "cpu").progress.step == trainer.progress.step

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
    told = os.pipe()
    child = forked(lambda: (os.read(told[0], 1), make(2).fit(X, Y, checkpoint=path, **FIT)))

    def another(trainer):
        os.write(told[1], b"x")
        assert ended(child) == 0

    one = make()
    with pytest.raises(
        OSError, match="run' cannot be written: another training or program has written it"
    ):
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


@pytest.mark.parametrize("step", [2, 8])
def test_nobody_but_the_trainer_saves_into_its_checkpoint(step, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PATIENCE", 0.1)
    path, copy = tmp_path / "run", tmp_path / "copy"
    one = make()
    one.save(copy)
    twin = mc.Trainer.load(copy, "cpu")

    def others(trainer):
        for other in (make(2), make(2).net, trainer.net, twin):
            with pytest.raises(OSError, match="run' cannot be written"):
                other.save(path)
        with kinds.overwriting(), pytest.raises(OSError, match="another training"):
            trainer.net.save(path)

        def child():
            for other in (trainer, twin):
                with pytest.raises(OSError, match="another training"):
                    other.save(path)

        assert ended(forked(child)) == 0
        trainer.save(path)

    one.fit(X, Y, checkpoint=path, callbacks=[At(step, others)], **FIT)
    assert mc.Trainer.load(path, "cpu").progress.step == 18
    assert sorted(os.listdir(tmp_path)) == ["copy", "run"]


def to_elsewhere(folder):
    os.chdir(folder / "else")


def to_another_file(folder):
    (folder / "link").unlink()
    (folder / "link").symlink_to("else/run")


def to_a_link(folder):
    (folder / "run").unlink(missing_ok=True)
    (folder / "run").symlink_to("else/run")


@pytest.mark.parametrize("name", ["run", "link"])
@pytest.mark.parametrize("change", [to_elsewhere, to_another_file, to_a_link])
def test_a_run_writes_the_file_that_it_has_claimed_or_none(change, name, tmp_path, monkeypatch):
    (tmp_path / "else").mkdir()
    make(2).save(tmp_path / "else/run")
    theirs = (tmp_path / "else/run").read_bytes()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    one = make()
    call = {"checkpoint": name, "callbacks": [At(8, lambda trainer: change(tmp_path))], **FIT}
    if change is to_a_link:
        with pytest.raises(OSError, match="run' cannot be written: another training or program"):
            one.fit(X, Y, **call)
        assert one.unfinished == "in epoch 3 of 3, after 0 of its batches"
    else:
        one.fit(X, Y, **call)
        assert mc.Trainer.load(tmp_path / "run", "cpu").progress.step == 18
    assert (tmp_path / "else/run").read_bytes() == theirs
    assert os.listdir(tmp_path / "else") == ["run"]


def test_a_file_that_a_training_writes_is_no_version_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PATIENCE", 0.1)
    path = tmp_path / "m.x"
    make(3).save(path)
    other = make(2)

    def others():
        for attempt in (
            lambda: other.fit(X, Y, checkpoint=path, keep=2, **FIT),
            lambda: other.save(path, keep=3),
        ):
            with pytest.raises(OSError, match=r"m\.x' cannot be written: another training"):
                attempt()

    def both(trainer):
        others()
        trainer.save(tmp_path / "m.1.x")
        others()
        assert ended(forked(others)) == 0

    make().fit(X, Y, checkpoint=tmp_path / "m.1.x", callbacks=[At(2, both)], **FIT)
    assert mc.Trainer.load(tmp_path / "m.1.x", "cpu").progress.step == 18
    assert sorted(os.listdir(tmp_path)) == ["m.1.x", "m.x"]
