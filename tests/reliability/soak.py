"""Many steps on a tiny net: what the process takes and how long a step lasts, at the beginning and
at the end.
"""

from __future__ import annotations

import _thread
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import mlpcore as mc

rng = np.random.default_rng(0)
X, Y = (
    rng.standard_normal((64, 8)).astype(np.float32),
    rng.standard_normal((64, 2)).astype(np.float32),
)
PARTS = 20  # of a soak; the first two are the warm-up


class Soaked(NamedTuple):
    """The findings of a run.

    Attributes:
        growth: bytes of resident memory from the end of the warm-up to the largest later.
        slowdown: median seconds of a step in the last tenth, over that in the first tenth after the
            warm-up.
        threads: how many there were at the end of each part.
    """

    growth: int
    slowdown: float
    threads: set[int]


def resident() -> int:
    """Bytes of the process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(kind: str, steps: int) -> Soaked:
    """So many steps by "step", by "fit" (64 rows in batches of 8, so that an epoch is 8 steps)."""
    net = mc.MLP([8, 16, 2], "tanh", device="cpu")
    trainer = mc.Trainer(net, "squared_error", mc.AdamW(1e-3), dropout=0.1, clip_norm=1.0)
    memory, times, threads = [], [], set()
    each = max(1, steps // PARTS)
    for _ in range(PARTS):
        if kind == "step":
            times.append(statistics.median([_timed(trainer, i) for i in range(each)]))
        else:
            clock = _Clock()
            trainer.fit(
                X,
                Y,
                epochs=max(1, each // 8),
                batch_size=8,
                progress=False,
                validation=(X, Y),
                callbacks=[clock],
            )
            times.append(statistics.median(clock.times))
            del clock
        gc.collect()
        memory.append(resident())
        threads.add(_thread._count())
    return Soaked(max(memory[2:]) - memory[1], sum(times[-2:]) / sum(times[2:4]), threads)


def _timed(trainer: mc.Trainer, i: int) -> float:
    start = time.perf_counter()
    trainer.step(X, Y, rows=[i % 64, (7 * i) % 64, 3])
    return time.perf_counter() - start


class _Clock(mc.Callback):
    """The times between the steps."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last = 0.0

    def fit_begin(self, trainer: mc.Trainer) -> None:
        self._last = time.perf_counter()

    def step_end(self, trainer: mc.Trainer, J: float) -> None:
        now = time.perf_counter()
        self.times.append(now - self._last)
        self._last = now


if __name__ == "__main__":
    found = soak(sys.argv[1], int(sys.argv[2]))
    print(
        json.dumps(
            {"growth": found.growth, "slowdown": found.slowdown, "threads": sorted(found.threads)}
        )
    )
