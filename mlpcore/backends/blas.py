"""The BLAS under NumPy: how many threads it uses, which kernels, and a limit for the time that workers share the cores."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_found: list[int] = []  # threads that the first of nested limits found, a number a library; empty outside
_inside: dict[object, int] = {}  # the blocks that limit them, by thread: they are a setting of the whole process


@functools.cache
def _libraries() -> list[Any]:
    """The BLAS that NumPy brought along, or, where it uses one of the system, all that are loaded."""
    import threadpoolctl

    every = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    return [library for library in every if "numpy" in library.filepath] or every


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Threads that a GEMM uses: what the user allows by OMP_NUM_THREADS and the like, at most the CPUs there are."""
    counts = _found or [library.get_num_threads() for library in _libraries()]
    return max(1, min([cpus(), *counts]))


@contextmanager
def limited(count: int) -> Iterator[None]:
    """BLAS with `count` threads inside the block. Nested and concurrent blocks restore what was there before the first."""
    block = object()
    try:
        with _lock:
            if not _found:
                _found[:] = [library.get_num_threads() for library in _libraries()]
                for library in _libraries():
                    library.set_num_threads(count)
            _inside[block] = threading.get_ident()
        yield
    finally:
        with _lock:
            _inside.pop(block, None)
            if not _inside:
                for library, before in zip(_libraries(), _found, strict=False):  # none: an interrupt
                    library.set_num_threads(before)
                _found.clear()


def _renew_after_fork() -> None:
    """Forget, in a forked process, the blocks of threads that are not there; the next block restores what they found."""
    global _lock
    _lock, me = threading.Lock(), threading.get_ident()
    for block in [block for block, thread in _inside.items() if thread != me]:
        del _inside[block]


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_after_fork)


def describe() -> list[dict[str, Any]]:
    """Each BLAS loaded: library, version, kernel family, threads."""
    import threadpoolctl

    keys = ("internal_api", "version", "architecture", "num_threads", "filepath")
    return [{key: pool.get(key) for key in keys} for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]


def pin() -> str | None:
    """How the environment pins OpenBLAS to other kernels than it would choose itself, or None."""
    pins = [f"{name}={os.environ[name]}" for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if name in os.environ]
    return " ".join(pins) or None
