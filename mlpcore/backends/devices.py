"""The devices of this machine by name, each opened once.

CuPy is imported when a CUDA device is requested, and by `"auto"`; importing mlpcore does not import
CuPy or create a context.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re

from mlpcore.backends.cuda.device import CudaDevice
from mlpcore.backends.numpy.host import HostDevice
from mlpcore.checks import arrays
from mlpcore.checks.errors import DeviceUnavailable, shown
from mlpcore.core.device import Device
from mlpcore.core.ops import Array

log = logging.getLogger("mlpcore")
INSTALL = "pip install 'mlpcore[cuda13]' (CUDA 13 driver) or 'mlpcore[cuda12]'"
HOST = HostDevice()
_opened: dict[str, CudaDevice] = {}  # CUDA devices in use, by name


def choose(device: object) -> str:
    """Return the device name that `"auto"`, `"cpu"`, `"cuda"` or `"cuda:1"` resolves to here.

    Raises:
        DeviceUnavailable: CUDA was requested and cannot be used; says why.
        TypeError, ValueError: not a device name.
    """
    if not isinstance(device, str):
        raise TypeError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:1'; got {shown(device)}")
    if device == "cpu":
        return HOST.name
    if device == "auto":
        reason = "" if "cuda:0" in _opened else why_no_cuda()
        if reason:
            _say_once(reason)
        return HOST.name if reason else "cuda:0"
    if not re.fullmatch(r"cuda(:[0-9]{1,4})?", device):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:1'; got {shown(device)}")
    name = str.__str__(device) if ":" in device else "cuda:0"
    open_device(name, device)
    return name


@functools.cache
def _say_once(reason: str) -> None:
    log.info("device='auto' selects the CPU: %s", reason)


def find(name: str) -> Device:
    """Return the device of a name that `choose` has returned.

    Raises:
        DeviceUnavailable: it cannot be used; says why, and what to install.
    """
    return HOST if name == HOST.name else open_device(name)


def open_device(name: str, asked: str = "") -> CudaDevice:
    """Return the CUDA device of this name, e.g. "cuda:0"; each is opened once.

    Args:
        name: name of the device, e.g. "cuda:0".
        asked: the name that the user passed.

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
    """Return why CUDA cannot be used and a remedy, or "" if it can; determined once."""
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed: {INSTALL}"
    wheels = cupy_wheels()
    if len(wheels) > 1:
        return (
            f"{len(wheels)} CuPy packages ({', '.join(wheels)}) overwrite each other: "
            "pip uninstall all but one"
        )
    try:
        from mlpcore.backends.cuda import gpu
    except (ImportError, AttributeError, OSError) as error:
        # partly installed, or the home directory does not allow a kernel cache
        return f"CuPy cannot be imported ({error}): {INSTALL}"
    return gpu.why_not()


def cupy_wheels() -> list[str]:
    """Return the installed CuPy packages, e.g. "cupy-cuda13x 14.2.0"."""
    import importlib.metadata  # takes 30 ms, only if CuPy is installed

    found = {
        f"{name} {dist.version}"
        for dist in importlib.metadata.distributions()
        if (name := (dist.metadata["Name"] or "").lower()) == "cupy"
        or name.startswith(("cupy-cuda", "cupy_cuda", "cupy-rocm"))
    }
    return sorted(found)


def of(array: object, name: str) -> str:
    """Return the name of the device that an argument is on, e.g. "cpu" or "cuda:0"."""
    number = arrays.gpu(array, name)
    return HOST.name if number is None else choose(f"cuda:{number}")


def adopt_on_host(value: object, name: str) -> Array:
    """Return a user's argument as a NumPy array, from any device."""
    device = find(of(value, name))
    return device.to_host(device.adopt(value, name))
