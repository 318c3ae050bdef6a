"""Long runs on the device: they go on from a file to the bit, faults leave no trace, memory that
runs out, rows from files.
"""

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends import devices
from tests.gpu.test_training import data, host, near, trainer

FIT = {"epochs": 3, "batch_size": 13, "progress": False}


class Stop(mc.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def step_end(self, trainer, J):
        if trainer.progress.step == self.step:
            trainer.save(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize("precision", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_run_goes_on_from_a_file_to_the_bit(device, put, precision, stop, tmp_path):
    X, Y, w = put(*data())
    settings = {
        "precision": precision,
        "dropout": 0.2,
        "clip_norm": 1.0,
        "l2": 1e-3,
        "chunk_rows": 5,
    }
    more = {**FIT, "validation": (X, Y), "early_stopping": mc.EarlyStopping(5)}
    whole, first = (trainer("cuda", **settings) for _ in range(2))
    history = whole.fit(X, Y, w, **more)
    with pytest.raises(KeyboardInterrupt):
        first.fit(X, Y, w, callbacks=[Stop(stop, tmp_path / "run")], **more)
    second = mc.Trainer.load(tmp_path / "run", "cuda")
    found = second.fit(X, Y, w, **more)
    assert {k: v for k, v in found.items() if k != "seconds"} == {
        k: v for k, v in history.items() if k != "seconds"
    }
    assert (
        host(device, second.net.parameters).tobytes()
        == host(device, whole.net.parameters).tobytes()
    )
    (one, facts), (other, others) = whole._step.snapshot(), second._step.snapshot()
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}
    assert facts["control"] == others["control"]


def test_steps_that_overflow_are_skipped_and_leave_no_trace(device, put):
    X, Y, _ = data("not matched")
    bad = X.copy()
    bad[3] = np.nan  # which only the device sees
    one, other = (
        trainer("cuda", "not matched", hidden=("relu", "relu"), on_non_finite=x)
        for x in ("skip", "raise")
    )
    for i in range(6):
        one.step(*put(bad if i in (2, 4) else X, Y))
        if i not in (2, 4):
            other.step(*put(X, Y))
    assert one.skipped == 2
    assert (
        host(device, one.net.parameters).tobytes() == host(device, other.net.parameters).tobytes()
    )


def test_an_overflow_in_fit_names_its_layer(device, put):
    X, Y, _ = data("not matched")
    one = trainer("cuda", "not matched", hidden=("relu", "relu"))
    one.net.W[1][...] = 1e20
    one.net.W[2][...] = 1e30
    with pytest.raises(mc.NonFiniteLoss, match="it began in layer 2 of 3"):
        one.fit(*put(abs(X), Y), **FIT)


def test_penalties_that_change_count_from_the_next_step_on(device, put):
    X, Y, _ = data("sigmoid", "float64")
    here, there = (trainer(where, "sigmoid", "float64", l2=0.1) for where in ("cpu", "cuda"))
    for l1, l2 in ((0.0, 0.1), (0.0, 0.3), (0.2, 0.0), (0.2, 0.1), (0.0, 0.0)):
        here.l1, here.l2 = there.l1, there.l2 = l1, l2
        near(here.step(X, Y), float(there.step(*put(X, Y))), 1e-11)
    near(here.net.parameters, host(device, there.net.parameters), 1e-10)
    (J, g), (K, h) = here.gradient(X, Y), there.gradient(*put(X, Y))
    near(J, K, 1e-11)
    near(g, host(device, h), 1e-10)


def test_a_chunk_that_does_not_fit_is_halved(device, put, monkeypatch, caplog):
    X, Y, _ = data()
    plain, short = (trainer("cuda", chunk_rows=32) for _ in range(2))
    empty, calls = device.empty, []

    def scarce(nbytes):
        if short._step.state.rule and not calls:
            calls.append(nbytes)
            raise MemoryError(f"{nbytes} bytes")
        return empty(nbytes)

    J = float(plain.step(*put(X, Y)))
    monkeypatch.setattr(device, "empty", scarce)
    near(J, float(short.step(*put(X, Y))), 1e-6)
    assert calls
    assert "chunks of 16 rows instead of 32" in caplog.text


def test_rows_of_a_file_train_as_rows_on_the_device_do(device, put, tmp_path):
    X, Y, _ = data()
    X.tofile(tmp_path / "X")
    there = np.memmap(tmp_path / "X", X.dtype, "r", shape=X.shape)
    one, other = trainer("cuda"), trainer("cuda")
    losses = one.fit(*put(X, Y), shuffle=False, **FIT)["loss"]
    near(losses, other.fit(there, Y, shuffle=False, **FIT)["loss"], 1e-6)
    near(list(one.evaluate(*put(X, Y)).values()), list(other.evaluate(there, Y).values()), 1e-6)


@pytest.mark.gpu
def test_a_share_of_the_free_memory_is_one_of_the_gpus(gpu):
    free = devices.find("cuda:0").free_bytes()
    assert 1 << 30 < free < 1 << 42
    assert (
        0.4 * free
        < trainer("cuda", memory_limit=0.5)._step.problem.settings.memory_limit
        < 0.6 * free
    )


@pytest.mark.gpu
def test_cupys_own_error_for_want_of_memory_is_one_that_halves_the_chunk(cupy):
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
