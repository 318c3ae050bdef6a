"""A disk that is full, a folder that is gone or cannot be written: the checkpoint before is intact, the run is not lost."""

import contextlib
import errno
import os
import resource
import shutil

import numpy as np
import pytest

import mlpcore as mc

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((103, 4)), RNG.standard_normal((103, 2))
FIT = {"epochs": 4, "batch_size": 10, "progress": False, "validation": (X[:20], Y[:20]), "every": "5 steps"}


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
    with contextlib.ExitStack() as stack, pytest.raises(kind, match=r"run\.safetensors' cannot be written: ") as caught:
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
