"""Steps under a memory limit, without one, and with whole batches: time, planned and peak bytes.

    python bench/limits.py [--out DIR]

The same batch goes through trainers in turn: without a limit (chunks as the engine chooses them),
the same again (the noise), under an ample and under a tight limit, and with the batch in one piece,
as frameworks do it. Ratios of times are paired, medians with their 95% bound. The peak is the
growth of resident memory while a trainer is made and takes three steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

import mlpcore as mc
from bench import machine, memory, stats

NETS = [  # limits: ample, and tight
    ([64, 64, 64, 64, 1], "tanh", ("1.5 MiB", "512 KiB"), 1 << 20),
    ([784, 512, 512, 10], "relu", ("24 MiB", "12 MiB"), 1 << 17),
]
BATCHES = (1024, 8192, 65536, 1 << 17, 1 << 20)
WHOLE = 2 << 30  # most bytes of a whole batch's arrays to try


def trainers(sizes: list[int], limits: tuple[str, str], batch: int) -> dict[str, dict[str, Any]]:
    """Return the trainers' settings by name."""
    found: dict[str, dict[str, Any]] = {"free": {}, "again": {}}
    found |= {
        name: {"memory_limit": limit}
        for name, limit in zip(("ample", "tight"), limits, strict=True)
    }
    if 4 * batch * 2 * sum(sizes) < WHOLE:
        found["whole"] = {"chunk_rows": batch, "workers": 1}
    return found


def measure(
    sizes: list[int], activation: str, limits: tuple[str, str], batch: int, rounds: int
) -> list[dict[str, Any]]:
    """Return one row per trainer."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((batch, sizes[0]), np.float32)
    Y = rng.standard_normal((batch, sizes[-1]), np.float32)
    net = mc.MLP(sizes, activation, device="cpu")
    settings = trainers(sizes, limits, batch)
    made = {
        name: mc.Trainer(net, "squared_error", mc.SGD(0.0), **more)
        for name, more in settings.items()
    }
    data = {name: trainer.prepare(X, Y) for name, trainer in made.items()}
    series: dict[str, list[float]] = {name: [] for name in made}
    for i in range(-1, rounds):
        for name in list(made)[:: 1 if i % 2 else -1]:
            begin = time.perf_counter()
            made[name].step(data[name])
            if i >= 0:
                series[name].append(time.perf_counter() - begin)
    plans = {name: trainer.plan(batch) for name, trainer in made.items()}
    made.clear()
    found = []
    for name, more in settings.items():

        def run(more: dict[str, Any] = more) -> mc.Trainer:
            trainer = mc.Trainer(net, "squared_error", mc.SGD(0.0), **more)
            for _ in range(3):
                trainer.step(X, Y)
            return trainer

        found.append({
            "sizes": sizes, "activation": activation, "batch": batch, "trainer": name,
            "limit": more.get("memory_limit"),
            "chunk_rows": plans[name].rows, "workers": plans[name].workers,
            "planned_bytes": plans[name].total_bytes,
            "peak": memory.growth(run), "seconds": stats.bounded(series[name]),
            "speed over free": stats.paired(series["free"], series[name]),
        })  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder of limits.json")
    options = parser.parse_args()
    found = []
    for sizes, activation, limits, most in NETS:
        print(f"{'-'.join(map(str, sizes))} {activation}, limits {limits[0]} and {limits[1]}")
        for batch in (b for b in BATCHES if b <= most):
            for row in measure(sizes, activation, limits, batch, options.rounds):
                found.append(row)
                speed = row["speed over free"]
                print(
                    f"  {batch:>9,} rows  {row['trainer']:<8} chunks of {row['chunk_rows']:>9,} x "
                    f"{row['workers']}  "
                    f"plan {row['planned_bytes'] / 2**20:9.2f} MiB  process "
                    f"+{row['peak']['peak_bytes'] / 2**20:8.1f} MiB  "
                    f"{1e3 * row['seconds'].median:9.2f} ms  speed {speed.median:5.2f} "
                    f"({speed.low:.2f} … {speed.high:.2f})",
                    flush=True,
                )
    machine.save(options.out, "limits", "cpu", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
