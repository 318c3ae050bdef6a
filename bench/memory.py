"""Peak memory of a separate process: the growth while a network is made and takes three steps.

The peak is VmHWM of /proc/self/status, reset before by writing 5 to /proc/self/clear_refs; if that
is not allowed, the highest value of a fresh process. Rows (X, Y) and libraries are loaded before,
by a step of a tiny batch. Compilers that a peer runs inside its process count. On a GPU the peak is
the allocator's, together with NVML's figure.
"""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def _reset() -> bool:
    """Reset VmHWM to the current resident memory, if the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def growth(run: Callable[[], Any]) -> dict[str, Any]:
    """Return the bytes by which this process's resident memory peaks during `run`."""
    gc.collect()
    if Path("/proc/self/status").exists() and _reset():
        before = _status("VmRSS")
        keep = run()
        after, how = _status("VmHWM"), "VmHWM"
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        keep = run()
        after, how = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "ru_maxrss"
    del keep
    return {"peak_bytes": max(0, after - before), "how": how}


def nvml() -> int | None:
    """Return NVML's GPU memory of this process, bytes; None if unknown, as in some containers."""
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    return next(
        (process.usedGpuMemory for process in processes if process.pid == os.getpid()), None
    )
