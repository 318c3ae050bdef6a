"""Products of matrices on one thread: the compiled ones against NumPy's BLAS.

    python bench/products.py

Medians in GFLOP/s, interleaved, of the products of a chunk: S = Z W, dW = Zᵀ D and G = D Wᵀ.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

from mlpcore.backends.compiled.ops import CompiledOps
from mlpcore.backends.numpy import blas

SHAPES = (  # rows, inputs, outputs of a layer
    (32, 784, 128), (64, 784, 128), (512, 784, 128), (128, 784, 512), (128, 512, 512),
    (512, 64, 64), (64, 256, 256), (512, 256, 1024), (512, 1024, 1024),
)  # fmt: skip
ROUNDS, SECONDS = 9, 0.02


def products(m: int, k: int, n: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return A, B and C of the products of a layer."""
    rng = np.random.default_rng(0)
    Z, W, D = (rng.standard_normal(shape, np.float32) for shape in ((m, k), (k, n), (m, n)))
    return {
        "Z W": (Z, W, np.empty_like(D)),
        "Zᵀ D": (Z.T, D, np.empty_like(W)),
        "D Wᵀ": (D, W.T, np.empty_like(Z)),
    }


def rate(run: Callable[[], object], flop: int) -> float:
    """Return GFLOP/s."""
    count, begin = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < SECONDS:
        run()
        count += 1
    return flop * count / seconds / 1e9


def main() -> None:
    """Print a table."""
    ops = CompiledOps()
    ops.in_one_call = True
    print("| rows, inputs, outputs | product | ours | BLAS | ours / BLAS |\n|---|---|---|---|---|")
    with blas.limited(1):
        for shape in SHAPES:
            for name, (A, B, C) in products(*shape).items():
                ours = ops.record(lambda a=A, b=B, c=C: ops.gemm(a, b, c)).replay
                ways = ours, lambda a=A, b=B, c=C: np.matmul(a, b, out=c)
                rates: tuple[list[float], list[float]] = ([], [])
                for _ in range(ROUNDS):
                    for way, found in zip(ways, rates, strict=True):
                        found.append(rate(way, 2 * A.size * B.shape[1]))
                first, second = (statistics.median(found) for found in rates)
                ratio = statistics.median(a / b for a, b in zip(*rates, strict=True))
                sizes = ", ".join(f"{size:,}" for size in shape)
                print(
                    f"| {sizes} | {name} | {first:.0f} | {second:.0f} | {ratio:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
