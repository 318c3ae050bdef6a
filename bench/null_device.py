"""A CUDA device that computes nothing, so that a training step costs only its Python.

    with null_device.installed() as device:
        net = mc.MLP([256, 256, 256], device="cuda")        # on cuda:0, which `device` plays

`bench/host_path.py` times the host's share of a step on it, `bench/launch_plan.py` counts what a
step launches. Its memory is NumPy's, zero until the host writes it: losses and statuses are 0.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from mlpcore.backends import devices
from mlpcore.backends.cuda.gemm import Algorithms
from mlpcore.backends.cuda.ops import new_operations
from mlpcore.core.ops import Ops

ALIGNMENT = 256  # bytes, as in CUDA's own allocations
FREE = 64 << 30  # bytes reported as free
MARK = object()  # a mark in the only stream
STREAM = object()
NOTHING: AbstractContextManager[object] = contextlib.nullcontext()


def nothing() -> None:
    """A kernel bound to its arguments, which does nothing."""


class NullRecording:
    """A graph that computes nothing."""

    def replay(self) -> None:
        """Do nothing."""


class NullDevice:
    """A `CudaDevice` (mlpcore/backends/cuda/device.py) that keeps memory and does no work.

    Args:
        multiprocessors: number for launch plans; an H100 and an H200 have 132.
        host_inputs: True if the user's arrays count as host arrays, not as device arrays.
    """

    xp: Any = np
    name = "cuda:0"
    product_workspace = 32 << 20
    captures = True
    library = "no products"

    def __init__(self, multiprocessors: int = 132, host_inputs: bool = False):
        self.multiprocessors, self.host_inputs = multiprocessors, host_inputs
        self.lock = threading.RLock()
        self.choices: dict[bool, Algorithms] = {}
        self._times = itertools.count(1)

    def active(self) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return NOTHING

    def operations(self, tf32: bool = False, deterministic: bool = False) -> Callable[[], Ops]:
        """Return a factory of the CUDA backend's operations."""
        return new_operations(self, tf32, deterministic)

    def empty(self, nbytes: int) -> np.ndarray:
        """Return aligned zeros, as a 1-D uint8 array; unwritten pages take no memory."""
        memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
        begin = -self.address(memory) % ALIGNMENT
        return memory[begin : begin + nbytes]

    def free_bytes(self) -> int:
        """Return more bytes than any test or benchmark needs."""
        return FREE

    def address(self, array: np.ndarray) -> int:
        """Return the array's address."""
        return int(array.__array_interface__["data"][0])

    def kernel(self, source: str, name: str) -> Any:
        """Return the instance's name: nothing is compiled."""
        return name

    def launch(self, kernel: Any, launch: Any, arguments: Sequence[object]) -> None:
        """Do nothing."""

    def bind(self, kernel: Any, launch: Any, arguments: Sequence[object]) -> Callable[[], None]:
        """Return a launch that does nothing."""
        return nothing

    def algorithms(self, product: Any) -> Sequence[bytes]:
        """Return two candidates, so that there is something to choose from."""
        return [b"first", b"second"]

    def multiply(
        self, product: Any, algorithm: bytes, left: int, right: int, result: int, bias: int,
        aux: int, workspace: int,
    ) -> None:  # fmt: skip
        """Do nothing."""

    def seconds(self, run: Callable[[], None]) -> float:
        """Run once and return 1, 2, 3, … microseconds: the first candidate is always chosen."""
        run()
        return 1e-6 * next(self._times)

    def record(self, run: Callable[[], None]) -> Any:
        """Run once and return a recording that does nothing."""
        run()
        return NullRecording()

    # -- arrays of the host and of the device --

    def holds(self, array: np.ndarray) -> bool:
        """Return whether arrays count as device arrays."""
        return not self.host_inputs

    def adopt(self, value: object, name: str) -> np.ndarray:
        """Return a user's array as NumPy's."""
        return np.asarray(value)

    def to_device(self, array: np.ndarray) -> np.ndarray:
        """Return the array itself."""
        return array

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """Return a copy."""
        return array.copy()

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """Return zeros."""
        return np.zeros(nbytes, np.uint8)

    def upload(self, source: np.ndarray, destination: np.ndarray, after: object) -> object:
        """Copy nothing; return a mark."""
        return MARK

    def mark(self) -> object:
        """Return the only mark."""
        return MARK

    def wait(self, mark: object) -> None:
        """Do nothing."""

    def synchronize(self, mark: object) -> None:
        """Do nothing."""

    def stream(self) -> object:
        """Return the only stream."""
        return STREAM

    def follow(self, stream: object) -> object:
        """Return a stream's stand-in."""
        return self


@contextlib.contextmanager
def installed(device: NullDevice | None = None) -> Iterator[NullDevice]:
    """Let a device play cuda:0 inside the `with` block."""
    device = NullDevice() if device is None else device
    opened = devices._opened.copy()
    devices._opened[device.name] = device
    try:
        yield device
    finally:
        devices._opened.clear()
        devices._opened.update(opened)
