"""Jacobian and Hessian products against the gradient, on the same network, rows and chunks.

    python bench/derivatives.py [--out DIR]

On L square layers, a gradient takes 3L - 1 matrix products, a jvp in X 2L, a jvp in the parameters
3L - 1, a Gauss-Newton product 5L - 2, a Hessian product 8L - 5. A ratio of 1 means a time
proportional to these counts. The gradient is that of a training step without the update, on one
worker. Medians of interleaved repeats, with their 95% bounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

import mlpcore as mc
from bench import machine, stats

LAYERS = 4
POINTS = [
    (width, rows, activation)
    for width, rows in ((256, 2048), (512, 4096))
    for activation in ("tanh", "relu", "gelu")
]
COUNTS = {
    "gradient": 3 * LAYERS - 1, "again": 3 * LAYERS - 1, "jvp in X": 2 * LAYERS,
    "jvp in the parameters": 3 * LAYERS - 1,
    "gnvp": 5 * LAYERS - 2, "hvp": 8 * LAYERS - 5,
}  # fmt: skip


def runs(
    width: int, rows: int, activation: str, device: str
) -> tuple[dict[str, Callable[[], Any]], int]:
    """Return the timed functions by name, and the rows per chunk."""
    rng = np.random.default_rng(0)
    sizes = [width] * (LAYERS + 1)
    net = mc.MLP(sizes, activation, device=device)
    trainer = mc.Trainer(net, "squared_error", mc.SGD(0.0), workers=1)
    X, Y, dX = (rng.standard_normal((rows, width), np.float32) for _ in range(3))
    v = rng.standard_normal(net.layout.size).astype(np.float32)
    if device != "cpu":
        import cupy

        X, Y, dX, v = (cupy.asarray(array) for array in (X, Y, dX, v))
    chunk = trainer.plan(rows).rows
    data = trainer.prepare(X, Y)
    batch, step = data.batch(None), trainer._step
    plan = step.prepare(rows, data.inputs)

    def gradient() -> None:
        step.loss_and_gradient(batch, plan)

    def waiting(run: Callable[[], Any]) -> Callable[[], None]:
        def and_wait() -> None:
            run()
            if device != "cpu":
                import cupy

                cupy.cuda.get_current_stream().synchronize()

        return and_wait

    every: dict[str, Callable[[], Any]] = {
        "gradient": gradient, "again": gradient,
        "jvp in X": lambda: net.jvp(X, dX, chunk_rows=chunk),
        "jvp in the parameters": lambda: net.jvp(X, None, v, chunk_rows=chunk),
        "gnvp": lambda: net.gnvp(X, Y, v, chunk_rows=chunk),
        "hvp": lambda: net.hvp(X, Y, v, chunk_rows=chunk),
    }  # fmt: skip
    return {name: waiting(run) for name, run in every.items()}, chunk


def measure(
    width: int, rows: int, activation: str, device: str, rounds: int
) -> list[dict[str, Any]]:
    """Return one row per product: seconds, ratio to the gradient, ratio over share of products."""
    every, chunk = runs(width, rows, activation, device)
    series: dict[str, list[float]] = {name: [] for name in every}
    for run in every.values():
        run()
    for i in range(rounds):
        for name in list(every)[:: 1 if i % 2 else -1]:
            every[name]()
            begin = time.perf_counter()
            every[name]()
            series[name].append(time.perf_counter() - begin)
    found = []
    for name, seconds in series.items():
        over, share = stats.paired(seconds, series["gradient"]), COUNTS[name] / COUNTS["gradient"]
        found.append({
            "width": width, "rows": rows, "activation": activation, "device": device,
            "chunk_rows": chunk, "product": name,
            "seconds": stats.bounded(seconds), "over gradient": over, "share": share,
            "over share": stats.Median(*(value / share for value in over)),
        })  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder of derivatives.json")
    options = parser.parse_args()
    found = []
    print(
        f"{LAYERS} square layers, {options.device}; time over a gradient's, and that "
        "ratio over the share of matrix products"
    )
    for width, rows, activation in POINTS:
        for row in measure(width, rows, activation, options.device, options.rounds):
            found.append(row)
            point = f"{width:>4} x {LAYERS} {activation:<5} {rows:>6,} rows "
            point += f"in chunks of {row['chunk_rows']:>5,}"
            times = f"{1e3 * row['seconds'].median:8.2f} ms  {row['over gradient'].median:5.2f} "
            times += f"(share {row['share']:.2f})"
            ratio = row["over share"]
            print(
                f"{point}  {row['product']:<22} {times}  {ratio.median:5.2f} ({ratio.low:.2f} … "
                f"{ratio.high:.2f})",
                flush=True,
            )
    machine.save(options.out, "derivatives", options.device, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
