"""A run resumed from a file; in a new process, its first products are captured at once."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

import mlpcore as mc
from bench.gpu import kit


def _rows() -> tuple[np.ndarray, np.ndarray]:
    X = np.random.default_rng(0).standard_normal((64, 32), dtype=np.float32)
    return X, X[:, :8]


def begin(path: str) -> float:
    """Take a step, save the trainer, and return J of the step after it."""
    net = mc.MLP([32, 48, 8], device="cuda", seed=0)
    trainer = mc.Trainer(net, "squared_error")
    float(trainer.step(*_rows()))
    trainer.save(path)
    return float(trainer.step(*_rows()))


def go_on(path: str) -> float:
    """Load the trainer and return J of its next step."""
    return float(mc.Trainer.load(path, "cuda").step(*_rows()))


CALLS: dict[str, Callable[[str], float]] = {"begin": begin, "go_on": go_on}

if __name__ == "__main__":
    kit.opened()
    print(repr(CALLS[sys.argv[1]](sys.argv[2])))
