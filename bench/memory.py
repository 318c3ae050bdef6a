"""Peak memory of a process of its own: how far its resident pages grow while a network is made and
trained for three steps.

The peak is VmHWM of /proc/self/status, set back before by writing 5 to /proc/self/clear_refs; where
that is not allowed, the highest ever of a fresh process. Rows (X, Y) and libraries are there
before: a step of a tiny batch has loaded what is loaded once. Compilers that a peer runs inside its
process count. On a GPU the peak is the allocator's, with NVML's figure beside.
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
    """Sets VmHWM back to what is resident now, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def growth(run: Callable[[], Any]) -> dict[str, Any]:
    """Bytes by which the resident memory of this process peaks above where it was, while `run`
    runs.
    """
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
    """Bytes of GPU memory that NVML counts for this process; None where it does not tell (in a
    container it may not).
    """
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    return next(
        (process.usedGpuMemory for process in processes if process.pid == os.getpid()), None
    )
