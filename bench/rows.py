"""Time per entry of each activation's forward pass and slope on NumPy.

    python bench/rows.py [--steps] [TREE …]

With `--steps`, the time of a single step and of a step in `fit`. With the paths of other checkouts
of this repository it runs in each of them in turn, and prints the ratios to the first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import mlpcore as mc

ROWS, COLUMNS, REPEATS, TURNS = 512, 256, 60, 5
STEPS = {  # sizes and batch
    "64x4-1, 32": ([64, 64, 64, 64, 1], 32),
    "64x4-1, 512": ([64, 64, 64, 64, 1], 512),
    "784-128-10, 32": ([784, 128, 10], 32),
    "784-512-512-10, 1024": ([784, 512, 512, 10], 1024),
}
SECONDS = 0.5  # seconds per measurement of steps


def measured() -> dict[str, tuple[float, float]]:
    """Return nanoseconds per entry of forward pass and slope (D = G σ') of each activation."""
    # not at import: the checkouts compared by --steps have other modules
    from mlpcore.backends.numpy.ops import NumpyOps
    from mlpcore.core import activations

    ops, rng, found = NumpyOps(), np.random.default_rng(0), {}
    given, G = (rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) for _ in range(2))
    S, D = np.empty_like(given), np.empty_like(given)

    def median(run: Callable[[], None]) -> float:
        recording, seconds = ops.record(run), []
        for _ in range(REPEATS):
            S[...] = 2 * given
            begin = time.perf_counter()
            recording.replay()
            seconds.append(time.perf_counter() - begin)
        return 1e9 * statistics.median(seconds) / given.size

    for name in activations.names():
        sigma = activations.resolve(name)
        Z = np.empty_like(S) if sigma.slope_reads_s else S
        forward = median(lambda sigma=sigma, Z=Z: ops.bias_activation(S, None, sigma, Z))
        slope = median(lambda sigma=sigma, Z=Z: ops.activation_gradient(G, S, Z, sigma, D, None))
        found[name] = forward, slope
    return found


def stepped() -> dict[str, tuple[float, float]]:
    """Return microseconds of a step on prepared rows, and of a step of `fit` (tanh, AdamW)."""
    rng, found = np.random.default_rng(0), {}
    for name, (sizes, batch) in STEPS.items():
        X, Y = (
            rng.standard_normal((16 * batch, width)).astype(np.float32)
            for width in (sizes[0], sizes[-1])
        )
        trainer = mc.Trainer(mc.MLP(sizes, "tanh", device="cpu"), "squared_error")
        part = trainer.prepare(X[:batch], Y[:batch])
        once = _microseconds(lambda trainer=trainer, part=part: trainer.step(part))
        epochs = max(1, int(1e6 * SECONDS / once / 16))
        fit = {"epochs": epochs, "batch_size": batch, "progress": False}
        found[name] = (
            once,
            _microseconds(lambda trainer=trainer, X=X, Y=Y, fit=fit: trainer.fit(X, Y, **fit))
            / 16
            / epochs,
        )
    return found


def _microseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call, from batches of calls."""
    run()
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(seconds)


def main() -> None:
    """Print a table with one row per activation, or step, that all trees have."""
    steps = sys.argv[1:2] == ["--steps"]
    rest = sys.argv[2:] if steps else sys.argv[1:]
    if rest == ["--json"]:
        print(json.dumps(stepped() if steps else measured()))
        return
    trees = rest or [str(Path(__file__).resolve().parent.parent)]
    turns: dict[str, list[dict[str, list[float]]]] = {tree: [] for tree in trees}
    for _ in range(TURNS):
        for tree in trees:  # imports mlpcore from the tree, and this file
            run = [sys.executable, __file__, *["--steps"] * steps, "--json"]
            there = {**os.environ, "PYTHONPATH": str(Path(tree).resolve())}
            out = subprocess.run(run, env=there, check=True, capture_output=True, text=True)
            turns[tree].append(json.loads(out.stdout))
    unit, heads = (
        ("µs per step", ("alone", "fit")) if steps else ("ns per entry", ("forward", "slope"))
    )
    print(f"{unit:21}" + "".join(f"{heads[0]:>9}{heads[1]:>9}" for _ in trees))
    for name in turns[trees[0]][0]:
        if all(name in turn[0] for turn in turns.values()):
            figures = [
                [statistics.median(turn[name][i] for turn in turns[tree]) for i in (0, 1)]
                for tree in trees
            ]
            ratios = [
                f"   {a / figures[0][0]:5.2f} {b / figures[0][1]:5.2f}"
                for a, b in figures[1:]
                if figures[0][0]
            ]
            print(f"{name:21}" + "".join(f"{a:9.2f}{b:9.2f}" for a, b in figures) + "".join(ratios))


if __name__ == "__main__":
    main()
