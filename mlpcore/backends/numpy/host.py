"""The CPU as a `core.device.Device`: NumPy's arrays and NumPy's BLAS."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from mlpcore.backends import machine
from mlpcore.backends.compiled import compiler
from mlpcore.backends.compiled.ops import CompiledOps
from mlpcore.backends.numpy import blas
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.checks import arrays
from mlpcore.core.ops import Array, Ops

log = logging.getLogger("mlpcore")


@functools.cache
def _say_once(reason: str) -> None:
    mistaken = reason.startswith("CXX")  # while a machine may well lack a compiler
    level = logging.WARNING if mistaken else logging.INFO
    log.log(level, "NumPy computes all passes: %s", reason)


class HostDevice:
    """The CPU; every array given to it is already a NumPy array."""

    name = "cpu"
    xp: Any = np
    captures = False
    active = staticmethod(blas.within_cpus)
    adopt = staticmethod(arrays.host_array)

    def operations(self, tf32: bool = False, deterministic: bool = False) -> Callable[[], Ops]:
        """Return the class of operations: compiled passes if there is a compiler, else NumPy's."""
        reason = compiler.why_not()
        if reason:
            _say_once(reason)
        return NumpyOps if reason else CompiledOps

    def free_bytes(self) -> int:
        """Return the memory that the system and this process's control groups leave free."""
        free = machine.free_memory()
        if free is None:
            raise ValueError(
                "memory_limit: this system does not report free memory; pass bytes, or "
                "text such as '2 GiB'"
            )
        return free

    def holds(self, array: Array) -> bool:
        """Return True."""
        return True

    def to_device(self, array: Array) -> Array:
        """Return the array itself."""
        return array

    def to_host(self, array: Array) -> Array:
        """Return the array itself."""
        return array
