"""Which device runs a network, and what there is to say about it.

CuPy is imported when a CUDA device is asked for, and by `"auto"`; importing mlpcore imports no CuPy
and creates no context.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import platform
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpcore.backends import machine
from mlpcore.backends.numpy import blas
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.checks import arrays
from mlpcore.checks.errors import DeviceUnavailable, shown
from mlpcore.core.ops import Array, Ops

if TYPE_CHECKING:
    from mlpcore.backends.cuda.device import Device
    from mlpcore.backends.cuda.ops import Algorithms

log = logging.getLogger("mlpcore")
INSTALL = "pip install 'mlpcore[cuda13]' (CUDA 13 driver) or 'mlpcore[cuda12]'"
_opened: dict[str, Device] = {}  # CUDA devices in use, by name
_algorithms: dict[
    tuple[str, bool], Algorithms
] = {}  # of matrix products, by device and whether they may be timed


def choose(device: object) -> str:
    """The device that `"auto"`, `"cpu"`, `"cuda"` or `"cuda:1"` means on this machine: "cpu",
    "cuda:0" or another.

    Raises:
        DeviceUnavailable: CUDA was asked for and cannot be used; says why.
        TypeError, ValueError: no such device.
    """
    if not isinstance(device, str):
        raise TypeError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:1'; got {shown(device)}")
    if device == "cpu":
        return "cpu"
    if device == "auto":
        reason = "" if "cuda:0" in _opened else why_no_cuda()
        if reason:
            _say_once(reason)
        return "cpu" if reason else "cuda:0"
    if not re.fullmatch(r"cuda(:[0-9]{1,4})?", device):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:1'; got {shown(device)}")
    name = str.__str__(device) if ":" in device else "cuda:0"
    open_device(name, device)
    return name


@functools.cache
def _say_once(reason: str) -> None:
    log.info("device='auto' is the CPU: %s", reason)


def open_device(name: str, asked: str = "") -> Device:
    """The CUDA device of this name, "cuda:0" …; opened once. `asked` is what the user called it.

    Raises:
        DeviceUnavailable: it cannot be used; says why, and what to install.
    """
    if name not in _opened:
        reason = why_no_cuda()
        if reason:
            raise DeviceUnavailable(f"device={(asked or name)!r}: CUDA cannot be used: {reason}")
        from mlpcore.backends.cuda.gpu import CupyDevice

        _opened[name] = CupyDevice(int(name.removeprefix("cuda:")))
    return _opened[name]


@functools.cache
def why_no_cuda() -> str:
    """Why CUDA cannot be used here, with what to do about it; "" where it can. Found out once."""
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed: {INSTALL}"
    wheels = _cupy_wheels()
    if len(wheels) > 1:
        return f"{len(wheels)} CuPy packages ({', '.join(wheels)}) overwrite each other: pip uninstall all but one"
    try:
        from mlpcore.backends.cuda import gpu as cupy_device
    except (
        ImportError,
        AttributeError,
        OSError,
    ) as error:  # half installed; a home where its kernel cache cannot be made
        return f"CuPy cannot be imported ({error}): {INSTALL}"
    return cupy_device.why_not()


def _cupy_wheels() -> list[str]:
    """The installed CuPy packages, e.g. "cupy-cuda13x 14.2.0"."""
    import importlib.metadata  # 30 ms, for those who have CuPy

    found = {
        f"{name} {dist.version}"
        for dist in importlib.metadata.distributions()
        if (name := (dist.metadata["Name"] or "").lower()) == "cupy"
        or name.startswith(("cupy-cuda", "cupy_cuda", "cupy-rocm"))
    }
    return sorted(found)


def operations(device: str, tf32: bool = False, deterministic: bool = False) -> Callable[[], Ops]:
    """What makes the operations of one stream of work on a device: all of them share one choice of
    algorithms.
    """
    if device == "cpu":
        return NumpyOps
    opened = open_device(device)
    if not opened.captures:
        from mlpcore.backends.cuda.eager import CupyReference

        return functools.partial(CupyReference, opened.xp)
    from mlpcore.backends.cuda.ops import Algorithms, CudaOps

    algorithms = _algorithms.setdefault((device, deterministic), Algorithms(deterministic))
    return functools.partial(CudaOps, opened, tf32, algorithms)


def active(device: str) -> AbstractContextManager[object]:
    """Make a device its module's current one inside the block; on the CPU, bound BLAS's threads."""
    return blas.within_cpus() if device == "cpu" else open_device(device).active()


def module(device: str) -> Any:
    """The array module of a device: NumPy or CuPy."""
    if device == "cpu":
        import numpy

        return numpy
    return open_device(device).xp


def adopter(device: str) -> Callable[[object, str], Array]:
    """What takes in a user's array for a network on a device: `adopt(value, argument's name)`."""
    return arrays.host_array if device == "cpu" else open_device(device).adopt


def adopt_on_host(value: object, name: str) -> Array:
    """A user's array as NumPy's, from wherever it lies."""
    device = of(value, name)
    return (
        adopter(device)(value, name)
        if device == "cpu"
        else to_host(device, adopter(device)(value, name))
    )


def of(array: object, name: str) -> str:
    """The device that an argument of this name lies on: "cpu", "cuda:0" or another."""
    number = arrays.gpu(array, name)
    return "cpu" if number is None else choose(f"cuda:{number}")


def free_bytes(device: str) -> int:
    """Memory that a device has left; on the host, no more than this process's control groups leave.

    Raises:
        ValueError: this system does not say.
    """
    if device != "cpu":
        return open_device(device).free_bytes()
    free = machine.free_memory()
    if free is None:
        raise ValueError(
            "memory_limit: this system does not say how much memory is free; give bytes, or text "
            "such as '2 GiB'"
        )
    return free


def to_device(device: str, array: Array) -> Array:
    """The array on this device; itself if it is there."""
    return (
        array
        if device == "cpu" or not arrays.on_host(array)
        else open_device(device).to_device(array)
    )


def to_host(device: str, array: Array) -> Array:
    """The array as NumPy's; itself on the CPU."""
    return array if device == "cpu" else open_device(device).to_host(array)


def _cpu() -> str:
    """The processor's name, as far as the system tells it."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", file.read_text(), re.M) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def info() -> dict[str, Any]:
    """What mlpcore finds on this machine: device and why not CUDA, CPUs, BLAS with its kernels,
    versions.
    """
    import importlib.metadata

    packages = (
        "mlpcore",
        "numpy",
        "threadpoolctl",
        "safetensors",
        "tqdm",
        "scikit-learn",
        "matplotlib",
    )
    names = {
        dist.metadata["Name"].lower(): dist.version
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"]
    }
    reason = why_no_cuda()
    if not reason:
        from mlpcore.backends.cuda import gpu as cupy_device

        reason = cupy_device.describe()
    return {
        "device": choose("auto"),
        "cuda": reason,
        "cpu": _cpu(),
        "cpus": machine.usable_cpus(),
        "cpus usable": machine.describe_cpus(),
        "blas": blas.describe(),
        "blas pinned by the environment": blas.pin(),
        "python": platform.python_version(),
        "versions": {
            **{name: names.get(name, "not installed") for name in packages},
            "cupy": ", ".join(_cupy_wheels()) or "not installed",
        },
    }
