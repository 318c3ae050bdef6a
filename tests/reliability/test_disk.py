"""A disk that is full, a folder that is gone or cannot be written: the checkpoint before is intact,
the run is not lost.
"""

import contextlib
import copy
import errno
import os
import resource
import shutil
import signal

import numpy as np
import pytest

import mlpcore as mc

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((103, 4)), RNG.standard_normal((103, 2))
FIT = {
    "epochs": 4,
    "batch_size": 10,
    "progress": False,
    "validation": (X[:20], Y[:20]),
    "every": "5 steps",
}


@contextlib.contextmanager
def full(path):
    """Every byte that is written to a new file is one too many: Linux has a device for it."""
    opened = os.open

    def open_on_a_full_disk(name, flags, *mode, **settings):
        handle = opened(name, flags, *mode, **settings)
        if not flags & os.O_EXCL:
            return handle
        os.close(handle)
        return opened("/dev/full", os.O_WRONLY)

    os.open = open_on_a_full_disk
    try:
        yield
    finally:
        os.open = opened


@contextlib.contextmanager
def quota(path):
    """The file ends in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only(path):
    user = os.geteuid()
    os.chmod(".", 0o555)
    if user == 0:  # whom no permission binds
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        os.chmod(".", 0o755)


@contextlib.contextmanager
def gone(path):
    shutil.rmtree(os.path.abspath("."))
    yield


@contextlib.contextmanager
def folder(path):
    os.remove(path)
    os.mkdir(path)
    yield


FAULTS = {
    "full": (full, OSError, errno.ENOSPC),
    "quota": (quota, OSError, errno.EFBIG),
    "read-only": (read_only, PermissionError, errno.EACCES),
    "gone": (gone, FileNotFoundError, None),
    "a folder": (folder, IsADirectoryError, None),
}


def make():
    net = mc.MLP([4, 6, 2], "tanh", device="cpu", seed=3)
    return mc.Trainer(net, "squared_error", mc.AdamW(mc.Cosine(1e-2)), dropout=0.1, seed=5)


class Begin(mc.Callback):
    """Lets a fault begin after so many steps."""

    def __init__(self, steps, stack, fault):
        self.steps, self.stack, self.fault = steps, stack, fault

    def step_end(self, trainer, J):
        self.steps -= 1
        if self.steps == 0:
            self.stack.enter_context(self.fault)


def interrupted(fault, kind, number, path="run.safetensors"):
    """A trainer whose `fit` ended because of the fault, which is over; and the call of `fit`."""
    fit = {**FIT, "early_stopping": mc.EarlyStopping(30), "checkpoint": path}
    trainer = make()
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(kind, match=r"run\.safetensors' cannot be written: ") as caught,
    ):
        trainer.fit(X, Y, callbacks=[Begin(17, stack, fault(path))], **fit)
    assert number is None or caught.value.errno == number
    assert trainer.progress.step == 20
    return trainer, fit


@pytest.mark.parametrize("name", FAULTS)
def test_a_checkpoint_that_cannot_be_written_costs_nothing_but_itself(name, tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    fault, kind, number = FAULTS[name]
    trainer, fit = interrupted(fault, kind, number)
    if name in ("full", "quota", "read-only"):
        assert os.listdir(place) == ["run.safetensors"], "no litter"
        assert mc.Trainer.load("run.safetensors", "cpu").progress.step == 15
    monkeypatch.chdir(tmp_path)
    whole = make()
    history = whole.fit(X, Y, **{**fit, "checkpoint": None})
    trainer.save("elsewhere")
    for other in (mc.Trainer.load("elsewhere", "cpu"), trainer):
        assert other.unfinished == "in epoch 2 of 4, after 9 of its batches"
        found = other.fit(X, Y, **{**fit, "checkpoint": "run again"})
        assert found["validation_loss"] == history["validation_loss"]
        assert found["learning_rate"] == history["learning_rate"]
        np.testing.assert_array_equal(other.net.parameters, whole.net.parameters)


class Ends(mc.Callback):
    """Lets a fault begin when the run ends, and counts how often it is told of begin and end."""

    def __init__(self, stack=None, fault=None):
        self.stack, self.fault, self.told = stack, fault, []

    def fit_begin(self, trainer):
        self.told.append("begin")

    def fit_end(self, trainer, history):
        self.told.append("end")
        if self.stack is not None:
            self.stack.enter_context(self.fault)


@pytest.mark.parametrize("patience", [1, 30])
@pytest.mark.parametrize("name", ["full", "quota", "read-only"])
def test_a_last_save_that_fails_loses_nothing_and_nothing_is_trained_twice(
    name, patience, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fault, kind, number = FAULTS[name]
    stopping = mc.EarlyStopping(patience, minimum_change=1 if patience == 1 else 0)
    fit = {**FIT, "early_stopping": stopping, "checkpoint": "run.safetensors", "every": "1 h"}
    whole, trainer = make(), make()
    history = whole.fit(X, Y, **{**fit, "checkpoint": None})
    epochs = len(history["loss"])
    assert epochs == (2 if patience == 1 else 4)
    with contextlib.ExitStack() as stack, pytest.raises(kind) as caught:
        trainer.fit(X, Y, callbacks=[Ends(stack, fault("run.safetensors"))], **fit)
    assert caught.value.errno == number
    where = "at its end, after 2 of 4 epochs" if patience == 1 else "after the last of 4 epochs"
    trainer.save("elsewhere")
    for other in (mc.Trainer.load("elsewhere", "cpu"), copy.deepcopy(trainer), trainer):
        assert other.unfinished == where
        assert other.history == {}
        np.testing.assert_array_equal(other.net.parameters, whole.net.parameters)
        with pytest.raises(
            ValueError, match=f"epochs: the unfinished run is {where}; got 5. Pass 4, or call"
        ):
            other.fit(X, Y, **{**fit, "epochs": 5})
        last = Ends()
        found = other.fit(X, Y, callbacks=[last], **{**fit, "checkpoint": "run again"})
        assert last.told == [], "they have been told"
        for key in ("loss", "validation_loss", "learning_rate"):
            assert found[key] == history[key]
        assert other.progress.step == whole.progress.step == 11 * epochs
        assert other.progress.total is None
        np.testing.assert_array_equal(other.net.parameters, whole.net.parameters)
        assert other.unfinished is mc.Trainer.load("run again", "cpu").unfinished is None
        assert mc.Trainer.load("run again", "cpu").history == found == other.history


def test_a_run_whose_last_save_failed_goes_on_to_more_epochs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit = {**FIT, "early_stopping": mc.EarlyStopping(30, restore_best=False), "every": "1 h"}
    whole, trainer = make(), make()
    with contextlib.ExitStack() as stack, pytest.raises(PermissionError):
        trainer.fit(X, Y, checkpoint="run", callbacks=[Ends(stack, read_only("run"))], **fit)
    with pytest.raises(
        ValueError, match=r"after the last of 4 epochs; got 3\. Pass at least 4, or call"
    ):
        trainer.fit(X, Y, **{**fit, "epochs": 3})
    trainer.save("elsewhere")
    whole.fit(X, Y, **fit)
    for other in (mc.Trainer.load("elsewhere", "cpu"), trainer):
        last = Ends()
        history = other.fit(X, Y, callbacks=[last], **{**fit, "epochs": 6}, checkpoint="run")
        assert [len(history["loss"]), other.progress.step, last.told] == [6, 66, ["begin", "end"]]
        assert history["loss"][:4] == whole.history["loss"]
        assert mc.Trainer.load("run", "cpu").unfinished is None


def test_a_folder_that_cannot_be_written_and_one_in_a_files_place_are_refused_at_the_start(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    trainer = make()
    with (
        read_only("run"),
        pytest.raises(
            PermissionError, match=r"checkpoint 'run', .* cannot be written; name another"
        ),
    ):
        trainer.fit(X, Y, checkpoint="run", **FIT)
    os.mkdir("run.1")
    with pytest.raises(IsADirectoryError, match=r"checkpoint 'run', keep=2: 'run\.1' is a folder"):
        trainer.fit(X, Y, checkpoint="run", keep=2, **FIT)
    trainer.about["data"] = X
    with pytest.raises(TypeError, match="about must be what JSON can hold"):
        trainer.fit(X, Y, checkpoint="run", **FIT)
    assert trainer.progress.step == 0
    assert os.listdir() == ["run.1"]
    trainer.about.clear()
    trainer.fit(X, Y, checkpoint="run", **FIT)


def test_a_callback_that_raises_at_the_end_is_told_again_and_those_before_it_are_not(tmp_path):
    class Raise(mc.Callback):
        ready = False

        def fit_end(self, trainer, history):
            if not self.ready:
                raise ValueError("not yet")

    class Average(Ends):
        def fit_end(self, trainer, history):
            super().fit_end(trainer, history)
            trainer.net.parameters[...] += 1  # it may write what it likes

    fit = {
        **FIT,
        "early_stopping": mc.EarlyStopping(1, minimum_change=1),
        "checkpoint": tmp_path / "run",
    }
    whole, trainer = make(), make()
    whole.fit(X, Y, **{**fit, "checkpoint": None})
    callbacks = [Average(), Raise(), Ends()]
    with pytest.raises(ValueError, match="not yet"):
        trainer.fit(X, Y, callbacks=callbacks, **fit)
    assert trainer.unfinished == "at its end, after 2 of 4 epochs"
    callbacks[1].ready = True
    trainer.fit(X, Y, callbacks=callbacks, **fit)
    assert (callbacks[0].told, callbacks[2].told) == (["begin", "end"], ["begin", "begin", "end"])
    np.testing.assert_array_equal(trainer.net.parameters, whole.net.parameters + 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_last_save_leaves_a_run_that_has_come_to_its_end(number, tmp_path):
    trainer, path = make(), tmp_path / "run"
    save = trainer.save

    def save_meanwhile(*arguments):
        signal.raise_signal(number)
        save(*arguments)

    trainer.save = save_meanwhile
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(X, Y, **{**FIT, "every": "1 h"}, checkpoint=path)
    assert trainer.unfinished is mc.Trainer.load(path, "cpu").unfinished is None
    assert len(trainer.history["loss"]) == len(mc.Trainer.load(path, "cpu").history["loss"]) == 4


def test_a_last_save_that_is_interrupted_is_all_that_is_made_up_for(tmp_path):
    whole, trainer = make(), make()
    history = whole.fit(X, Y, **FIT)

    def interrupted(*_):
        raise KeyboardInterrupt

    trainer.save = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(X, Y, **{**FIT, "every": "1 h"}, checkpoint=tmp_path / "run")
    del trainer.save
    assert trainer.unfinished == "after the last of 4 epochs"
    assert trainer.fit(X, Y, **FIT, checkpoint=tmp_path / "run")["loss"] == history["loss"]
    assert mc.Trainer.load(tmp_path / "run", "cpu").progress.step == 44
    np.testing.assert_array_equal(trainer.net.parameters, whole.net.parameters)


@pytest.mark.parametrize("name", ["full", "quota", "read-only"])
def test_a_network_that_cannot_be_written_leaves_the_one_before(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = mc.MLP([20, 30, 2], device="cpu")
    net.save("file")
    before = (tmp_path / "file").read_bytes()
    net.parameters[...] = 0
    fault, kind, number = FAULTS[name]
    with fault("file"), pytest.raises(kind, match="'file' cannot be written: ") as caught:
        net.save("file")
    assert caught.value.errno == number
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == before
