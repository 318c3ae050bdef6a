"""The facts of this machine that a bug report needs."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

from mlpcore.backends import devices, machine
from mlpcore.backends.compiled import compiler
from mlpcore.backends.numpy import blas

PACKAGES = (
    "mlpcore", "numpy", "threadpoolctl", "safetensors", "tqdm", "scikit-learn", "matplotlib",
)  # fmt: skip


def info() -> dict[str, Any]:
    """Return device, reason against CUDA, CPUs, compiler, BLAS and its kernels, and versions."""
    import importlib.metadata  # takes 10 to 30 ms

    names = {
        dist.metadata["Name"].lower(): dist.version
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"]
    }
    versions = {name: names.get(name, "not installed") for name in PACKAGES}
    versions["cupy"] = ", ".join(devices.cupy_wheels()) or "not installed"
    return {
        "device": devices.choose("auto"),
        "cuda": devices.why_no_cuda() or _gpu(),
        "cpu": _cpu(),
        "cpus": machine.usable_cpus(),
        "cpus usable": machine.describe_cpus(),
        "cpu passes": compiler.describe(),
        "blas": blas.describe(),
        "blas pinned by the environment": blas.pin(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _gpu() -> str:
    """Return device 0 and its driver in one line."""
    from mlpcore.backends.cuda import gpu

    return gpu.describe()


def _cpu() -> str:
    """Return the processor's name, if the system reports it."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", file.read_text(), re.M) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
