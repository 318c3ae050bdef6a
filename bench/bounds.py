"""The least time of a step: its FLOP at a measured rate, its bytes at a measured bandwidth.

    FLOP  = 2 m (3 Σ_l n_{l-1} n_l - n_0 n_1)
            S = Z W and dW = Zᵀ D of every layer, G = D Wᵀ of all but the first
    bytes = m (n_0 + targets) + (2 + 2 states) parameters
            X and Y read once, parameters and optimizer state read and written

The bytes include no layer's output, since chunks of rows may keep outputs in cache. If everything
fits into a cache (small nets, the same batch again), memory is not accessed and the second bound
does not apply.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bench.cases import STATES, Case

GPU_ORDER = 8192  # order of the multiplied matrices
GPU_ENTRIES = 1 << 28  # length of the copied float32 vector


def flop(case: Case, batch: int) -> int:
    """Return the floating-point operations of a step's GEMMs."""
    products = [m * n for m, n in zip(case.sizes, case.sizes[1:], strict=False)]
    return 2 * batch * (3 * sum(products) - products[0])


def traffic(case: Case, batch: int, optimizer: str) -> int:
    """Return the bytes a step must read or write: float32 rows and parameters, int64 classes."""
    target = 8 if case.loss == "cross_entropy" else 4 * case.sizes[-1]
    return batch * (4 * case.sizes[0] + target) + 4 * case.parameters * (2 + 2 * STATES[optimizer])


def bound(case: Case, batch: int, optimizer: str, ceiling: dict[str, Any]) -> dict[str, Any]:
    """Return the least seconds of a step, and which of the two bounds it is."""
    times = {
        "FLOP": flop(case, batch) / ceiling["flop_per_second"],
        "bytes": traffic(case, batch, optimizer) / ceiling["bytes_per_second"],
    }
    which = max(times, key=lambda name: times[name])
    return {
        "seconds": times[which],
        "by": which,
        "flop": flop(case, batch),
        "bytes": traffic(case, batch, optimizer),
    }


def _fastest(run: Callable[[], Any], repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(device: str, precision: str) -> dict[str, Any]:
    """Return the rate of a large GEMM and the bandwidth of a large copy, the best of seven each."""
    rate, bandwidth = _cpu() if device == "cpu" else _gpu(precision)
    return {"flop_per_second": rate, "bytes_per_second": bandwidth}


def _cpu(n: int = 2048, megabytes: int = 256) -> tuple[float, float]:
    from mlpcore.backends import machine

    rng = np.random.default_rng(0)
    A, B, C = (rng.standard_normal((n, n), np.float32) for _ in range(3))
    rate = 2 * n**3 / _fastest(lambda: np.matmul(A, B, out=C))
    source = np.ones(megabytes << 18, np.float32)
    target, cpus = np.zeros_like(source), machine.usable_cpus()
    pieces = list(zip(np.array_split(source, cpus), np.array_split(target, cpus), strict=True))
    with ThreadPoolExecutor(cpus) as pool:  # one core does not saturate the memory bandwidth
        seconds = _fastest(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pieces)))
    return rate, 2 * source.nbytes / seconds


def _gpu(precision: str) -> tuple[float, float]:
    """TF32 by CuPy's environment variable CUPY_TF32, which the parent sets; bfloat16 at float16's
    rate, which is the same.
    """
    from mlpcore.backends import devices

    device, n = devices.open_device("cuda:0"), GPU_ORDER
    xp = device.xp
    dtype = xp.float16 if precision in ("float16", "bfloat16") else xp.float32
    rng = xp.random.default_rng(0)
    A, B, C = (rng.standard_normal((n, n), dtype=xp.float32).astype(dtype) for _ in range(3))

    def gemms() -> None:
        for _ in range(10):
            xp.matmul(A, B, out=C)
        device.synchronize(device.mark())

    source = xp.ones(GPU_ENTRIES, xp.float32)
    target = xp.zeros_like(source)

    def copies() -> None:
        for _ in range(10):
            xp.copyto(target, source)
        device.synchronize(device.mark())

    return 20 * n**3 / _fastest(gemms), 20 * source.nbytes / _fastest(copies)
