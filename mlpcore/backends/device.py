"""Which device runs a network, and what there is to say about it."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlpcore.backends import blas
from mlpcore.backends.numpy_ops import NumpyOps
from mlpcore.core.errors import DeviceUnavailable
from mlpcore.core.ops import Ops

log = logging.getLogger("mlpcore")
NO_CUDA = "this version of mlpcore has no CUDA backend yet (see CHANGELOG.md); use device='cpu' or 'auto'"


def choose(device: object) -> str:
    """The device that `"auto"`, `"cpu"`, `"cuda"` or `"cuda:1"` means on this machine.

    Raises:
        DeviceUnavailable: CUDA was asked for and cannot be used; says why.
        TypeError, ValueError: no such device.
    """
    if not isinstance(device, str):
        raise TypeError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:1'; got {device!r}")
    if device in ("auto", "cpu"):
        return "cpu"
    if re.fullmatch(r"cuda(:\d+)?", device):
        raise DeviceUnavailable(f"device={device!r}: {NO_CUDA}")
    raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:1'; got {device!r}")


def operations(device: str) -> Callable[[], Ops]:
    """What makes the operations of one stream of work on a device."""
    assert device == "cpu", device
    return NumpyOps


def _cpu() -> str:
    """The processor's name, as far as the system tells it."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", file.read_text(), re.M) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def info() -> dict[str, Any]:
    """What mlpcore finds on this machine: device and why not CUDA, CPUs, BLAS with its kernels, versions.

    Creates no CUDA context.
    """
    import importlib.metadata  # 30 ms, for this function alone

    packages = ("mlpcore", "numpy", "cupy", "threadpoolctl", "safetensors", "tqdm", "scikit-learn", "matplotlib")
    names = {
        dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]
    }
    cupy = [f"{name} {version}" for name, version in names.items() if name.startswith("cupy")]
    return {
        "device": choose("auto"),
        "cuda": NO_CUDA,
        "cpu": _cpu(),
        "cpus": blas.cpus(),
        "blas": blas.describe(),
        "blas pinned by the environment": blas.pin(),
        "python": platform.python_version(),
        "versions": {
            **{name: names.get(name, "not installed") for name in packages},
            "cupy": ", ".join(cupy) or "not installed",
        },
    }
