"""The Protocol of a device: where the arrays of a network are, and which operations run on them.

`backends.devices.find` returns the device of a name; data, io and engine are handed one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from mlpcore.core.ops import Array, Ops


class Device(Protocol):
    """A device that runs networks: the CPU, or a GPU.

    Attributes:
        name: "cpu", "cuda:0", …
        xp: the array module: NumPy or CuPy.
        captures: True if steps are captured as graphs.
    """

    name: str
    xp: Any
    captures: bool

    def active(self) -> AbstractContextManager[object]:
        """Return a context in which `xp` works here; on the CPU it bounds the threads of BLAS."""

    def operations(self, tf32: bool = False, deterministic: bool = False) -> Callable[[], Ops]:
        """Return a factory of operations, one call for each stream of work.

        All of them share one choice of algorithms.

        Args:
            tf32: True if products of float32 may round their factors to 10 bits.
            deterministic: True if no algorithm may be chosen by timing.
        """

    def free_bytes(self) -> int:
        """Return the memory that may still be allocated.

        Raises:
            ValueError: the system does not say.
        """

    def holds(self, array: Array) -> bool:
        """Return whether an array is in this device's memory."""

    def adopt(self, value: object, name: str) -> Array:
        """Return a user's argument as an array: this device's (without a copy) or NumPy's.

        Raises:
            TypeError, ValueError: names the argument: no array, or one on another device.
        """

    def to_device(self, array: Array) -> Array:
        """Return the array on this device; itself if it is there."""

    def to_host(self, array: Array) -> Array:
        """Return the array as NumPy's, once it is computed; itself on the CPU."""
