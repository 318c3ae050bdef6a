"""The BLAS under NumPy: how many threads it uses, which kernels, and a limit for the time that workers share the cores."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_before: list[int] = []  # threads that the first of them found
_limits: list[Any] = []  # BLAS threads are a setting of the whole process, so is the count of those who limit it


@functools.cache
def _controller() -> Any:
    import threadpoolctl

    return threadpoolctl.ThreadpoolController().select(user_api="blas")


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Threads that a GEMM uses: what the user allows by OMP_NUM_THREADS and the like, at most the CPUs there are."""
    if _before:
        return _before[0]
    counts: list[int] = [pool["num_threads"] for pool in _controller().info() if "numpy" in pool["filepath"]]
    return max(1, min([cpus(), *counts]))


@contextmanager
def limited(count: int) -> Iterator[None]:
    """BLAS with `count` threads inside the block. Nested and concurrent blocks restore what was there before the first."""
    with _lock:
        if not _limits:
            _before[:] = [threads()]
            _limits.append(_controller().limit(limits=count))
        else:
            _limits.append(None)
    try:
        yield
    finally:
        with _lock:
            first = _limits[0]
            _limits.pop()
            if not _limits:
                first.restore_original_limits()
                _before.clear()


def describe() -> list[dict[str, Any]]:
    """Each BLAS loaded: library, version, kernel family, threads."""
    import threadpoolctl

    keys = ("internal_api", "version", "architecture", "num_threads", "filepath")
    return [{key: pool.get(key) for key in keys} for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]


def pin() -> str | None:
    """How the environment pins OpenBLAS to other kernels than it would choose itself, or None."""
    pins = [f"{name}={os.environ[name]}" for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if name in os.environ]
    return " ".join(pins) or None
