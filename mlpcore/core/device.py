"""The Protocol of a device, which holds a network's arrays and runs operations on them.

`backends.devices.find` returns a device by name; data, io and engine receive it as an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from mlpcore.core.ops import Array, Ops


class Device(Protocol):
    """A device that runs networks: the CPU or a GPU.

    Attributes:
        name: "cpu", "cuda:0", …
        xp: the array module: NumPy or CuPy.
        captures: True if steps are captured as graphs.
    """

    name: str
    xp: Any
    captures: bool

    def active(self) -> AbstractContextManager[object]:
        """Return a context in which `xp` uses this device; on the CPU it limits BLAS threads."""

    def operations(self, tf32: bool = False, deterministic: bool = False) -> Callable[[], Ops]:
        """Return a factory of operations, to be called once per stream of work.

        Operations from one factory share their choice of algorithms.

        Args:
            tf32: True if float32 products may round their factors to 10 bits.
            deterministic: True if algorithms must not be chosen by timing.
        """

    def free_bytes(self) -> int:
        """Return the number of bytes that can still be allocated.

        Raises:
            ValueError: the system does not report it.
        """

    def holds(self, array: Array) -> bool:
        """Return True if an array is in this device's memory."""

    def adopt(self, value: object, name: str) -> Array:
        """Return a user's argument as an array of this device (without a copy) or of NumPy.

        Raises:
            TypeError, ValueError: it is not an array, or is on another device; names the argument.
        """

    def to_device(self, array: Array) -> Array:
        """Return the array on this device; the same array if it is already there."""

    def to_host(self, array: Array) -> Array:
        """Return the array as a NumPy array, after it is computed; the same array on the CPU."""
