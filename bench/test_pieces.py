"""Each piece of the NumPy backend by itself, by pytest-benchmark: `pytest bench/ --benchmark-only`.

A piece is recorded once, as a step records it, and its replay is timed: 512 rows of 512 units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import activations
from mlpcore.core.ops import Ops

ROWS, UNITS = 512, 512
rng = np.random.default_rng(0)


def _numbers(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def gemm(ops: Ops) -> None:
    ops.gemm(_numbers(ROWS, UNITS), _numbers(UNITS, UNITS), _numbers(ROWS, UNITS))


def _activation(name: str, gradient: bool) -> Callable[[Ops], None]:
    def piece(ops: Ops) -> None:
        row, S, Z, b = (
            activations.resolve(name),
            _numbers(ROWS, UNITS),
            _numbers(ROWS, UNITS),
            np.zeros(UNITS, np.float32),
        )
        if gradient:  # D is a separate array, so that every replay finds the same numbers
            ops.activation_gradient(_numbers(ROWS, UNITS), S, Z, row, np.empty_like(Z), b)
        else:
            ops.bias_activation(S, b, row, Z)

    return piece


PIECES: dict[str, Callable[[Ops], None]] = {"gemm": gemm}
for _name in ("identity", "relu", "tanh", "sigmoid", "gelu"):
    PIECES |= {
        f"bias_activation {_name}": _activation(_name, False),
        f"activation_gradient {_name}": _activation(_name, True),
    }


@pytest.mark.parametrize("piece", PIECES)
def test_piece(benchmark: Any, piece: str) -> None:
    ops = NumpyOps()
    recording = ops.record(functools.partial(PIECES[piece], ops))
    benchmark.extra_info["rows"] = ROWS
    benchmark(recording.replay)


@pytest.mark.parametrize(
    "optimizer", [mc.SGD(1e-8), mc.AdamW(1e-8)], ids=lambda optimizer: type(optimizer).__name__
)
def test_update(benchmark: Any, optimizer: mc.AdamW) -> None:
    """The optimizer's pass over a million parameters, in a one-row step with hardly any GEMM."""
    net = mc.MLP([1000, 1000], device="cpu")
    trainer = mc.Trainer(net, "squared_error", optimizer)
    X, Y = _numbers(1, 1000), _numbers(1, 1000)
    benchmark(trainer.step, X, Y)
