"""The BLAS used by NumPy: its threads, its kernels, and a limit while workers share the cores."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from mlpcore.backends import machine

_lock = threading.Lock()
# thread counts before the outermost limit, one per library; empty outside
_found: list[int] = []
# count and thread of each active block, for the whole process
_limits: dict[object, tuple[int, int]] = {}
NOTHING: AbstractContextManager[object] = nullcontext()


@functools.cache
def _libraries() -> list[Any]:
    """Return NumPy's own BLAS, or every loaded BLAS if NumPy uses the system's."""
    import threadpoolctl

    every = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    return [library for library in every if "numpy" in library.filepath] or every


def threads() -> int:
    """Return the threads of a GEMM: OMP_NUM_THREADS if set, at most the usable CPUs."""
    return max(1, min([machine.usable_cpus(), *(_found or _counts())]))


def most() -> int:
    """Return the number of threads that BLAS uses by default, which ignores CPU quotas."""
    return max(_found or _counts(), default=1)


def files() -> list[str]:
    """Return the paths of the libraries."""
    return [library.filepath for library in _libraries()]


def _counts() -> list[int]:
    return [library.get_num_threads() for library in _libraries()]


@contextmanager
def limited(count: int) -> Iterator[None]:
    """Keep BLAS at `count` threads at most inside the block.

    With nested and concurrent blocks the lowest count applies; the last block to end restores the
    counts from before the first.
    """
    block = object()
    try:
        with _lock:
            if not _found:
                _found[:] = _counts()
            _limits[block] = count, threading.get_ident()
            _set()
        yield
    finally:
        with _lock:
            _limits.pop(block, None)
            _set()
            if not _limits:
                _found.clear()


def _set() -> None:
    """Give each library the threads that the active blocks allow."""
    for library, own in zip(_libraries(), _found, strict=False):  # empty after an interrupt
        wanted = min([own, *(count for count, _ in _limits.values())])
        if library.get_num_threads() != wanted:
            library.set_num_threads(wanted)


def within_cpus() -> AbstractContextManager[object]:
    """Keep BLAS at the usable CPUs inside the block if it would use more (with a quota)."""
    return limited(threads()) if _exceeds() else NOTHING


@functools.cache
def _exceeds() -> bool:
    """Return True if BLAS would use more threads than there are usable CPUs; determined once."""
    return most() > machine.usable_cpus()


def _renew_after_fork() -> None:
    """Forget, in a forked process, the blocks of threads that were not forked.

    The next block restores the counts found by those blocks.
    """
    global _lock
    _lock, me = threading.Lock(), threading.get_ident()
    for block, (_, thread) in [*_limits.items()]:
        if thread != me:
            del _limits[block]


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_after_fork)


def describe() -> list[dict[str, Any]]:
    """Return library, version, kernel family and threads of each loaded BLAS."""
    import threadpoolctl

    keys = ("internal_api", "version", "architecture", "num_threads", "filepath")
    return [
        {key: pool.get(key) for key in keys}
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    ]


def pin() -> str | None:
    """Return the variables that override OpenBLAS's choice of kernels, or None."""
    pins = [
        f"{name}={os.environ[name]}"
        for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
        if name in os.environ
    ]
    return " ".join(pins) or None
