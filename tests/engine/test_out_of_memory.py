"""A step that runs out of memory halves its chunks, down to one row."""

import logging

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.engine.plan import part_bytes
from tests.backends.cuda.emulator.device import CpuDevice

RNG = np.random.default_rng(0)

X, Y = (
    RNG.standard_normal((60, 4)).astype(np.float32),
    RNG.standard_normal((60, 2)).astype(np.float32),
)


def make(device="cpu", **settings):
    net = mc.MLP([4, 6, 5, 2], "tanh", device=device, seed=3)
    return mc.Trainer(net, "squared_error", mc.SGD(0.01), **settings)


def test_when_memory_runs_out_the_chunk_is_halved_and_the_step_is_the_same(
    device, monkeypatch, caplog
):
    plain, short = make(device, chunk_rows=32, workers=1), make(device, chunk_rows=32, workers=1)
    allowed = part_bytes(make(device, chunk_rows=16, workers=1).plan(60).parts["workspace"])
    target = NumpyOps if device == "cpu" else CpuDevice
    empty = target.empty
    limit = {"on": False}

    def scarce(self, nbytes):
        if limit["on"] and allowed < nbytes != 65536:  # which are the losses of the steps
            raise MemoryError(f"{nbytes} bytes")
        return empty(self, nbytes)

    monkeypatch.setattr(target, "empty", scarce)
    J = float(plain.step(X, Y))
    limit["on"] = True
    with caplog.at_level(logging.WARNING):
        K = float(short.step(X, Y))
    assert "out of memory: chunks of 16 rows instead of 32 from here on" in caplog.text
    np.testing.assert_allclose(J, K, rtol=1e-6)
    np.testing.assert_allclose(plain.net.parameters, short.net.parameters, rtol=1e-5, atol=1e-7)
    caplog.clear()
    short.step(X, Y)
    assert not caplog.text, "it stays at the smaller chunk"


def test_when_not_even_one_row_fits_the_largest_arrays_are_named(monkeypatch):
    trainer = make(workers=1)
    trainer.step(X[:1], Y[:1])
    trainer._step.workspace.drop()

    def none(self, nbytes):
        raise MemoryError(f"{nbytes} bytes")

    monkeypatch.setattr(NumpyOps, "empty", none)
    with pytest.raises(
        MemoryError,
        match="not even one row at a time fits into the remaining memory; the largest: parameters",
    ):
        trainer.step(X, Y)
    monkeypatch.undo()
    assert np.isfinite(trainer.step(X, Y))
