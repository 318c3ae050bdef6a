"""Time of an entry in each activation's forward pass and slope on NumPy: `python -m bench.rows [TREE …]`.

With the paths of other checkouts of this repository it runs in each of them by turns, and prints the ratios to the first.
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

from mlpcore.backends.numpy_ops import NumpyOps
from mlpcore.core import activations

ROWS, COLUMNS, REPEATS, TURNS = 512, 256, 60, 5


def measured() -> dict[str, tuple[float, float]]:
    """Return nanoseconds an entry of forward pass and slope (D = G σ') of each activation, float32."""
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


def main() -> None:
    """Print a table, a row for each activation that all trees have."""
    if sys.argv[1:] == ["--json"]:
        print(json.dumps(measured()))
        return
    trees = sys.argv[1:] or [str(Path(__file__).resolve().parent.parent)]
    turns: dict[str, list[dict[str, list[float]]]] = {tree: [] for tree in trees}
    for _ in range(TURNS):
        for tree in trees:  # its mlpcore, this file
            run = [sys.executable, __file__, "--json"]
            there = {**os.environ, "PYTHONPATH": str(Path(tree).resolve())}
            out = subprocess.run(run, env=there, check=True, capture_output=True, text=True)
            turns[tree].append(json.loads(out.stdout))
    print("ns an entry  " + "".join(f"{'forward':>9}{'slope':>7}" for _ in trees))
    for name in turns[trees[0]][0]:
        if all(name in turn[0] for turn in turns.values()):
            figures = [[statistics.median(turn[name][i] for turn in turns[tree]) for i in (0, 1)] for tree in trees]
            ratios = [f"   {a / figures[0][0]:5.2f} {b / figures[0][1]:5.2f}" for a, b in figures[1:] if figures[0][0]]
            print(f"{name:13}" + "".join(f"{a:9.2f}{b:7.2f}" for a, b in figures) + "".join(ratios))


if __name__ == "__main__":
    main()
