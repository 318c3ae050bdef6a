"""Calls that run at once or are recorded, and the planned memory that they use."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mlpcore.core.ops import Array, Call, make

# entries that NumPy buffers in a broadcast; the default, 8,192, is slower and takes 64 KiB
BUFFER = 2048


class Tape:
    """A recorded run: functions, each with its arguments."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def replay(self) -> None:
        """Repeat the calls, inside `NumpyOps.quietly`."""
        make(self.calls)


def _quiet_context() -> contextvars.Context:
    """Return a context without floating-point warnings, which broadcasts by `BUFFER` entries.

    Calling a function in it costs a fraction of an errstate block.
    """
    context = contextvars.copy_context()
    context.run(np.seterr, all="ignore")
    context.run(np.setbufsize, BUFFER)
    return context


class Recorder:
    """The memory and the tape of one stream of work.

    Args:
        xp: NumPy, or a module with its interface.

    Attributes:
        quietly: calls a function with the given arguments and without overflow warnings.
    """

    def __init__(self, xp: Any = np):
        self.xp = xp
        self.quietly: Callable[..., Any] = _quiet_context().run
        self._tape: Tape | None = None
        self._scratch: Mapping[str, Array] = {}

    # -- memory --

    def empty(self, nbytes: int) -> Array:
        """Return `nbytes` of uninitialised memory, as a 1-D uint8 array."""
        return self.xp.empty(nbytes, self.xp.uint8)

    def use(self, scratch: Mapping[str, Array]) -> None:
        """Use these arrays, as listed by `scratch`, instead of allocating at each call."""
        self._scratch = scratch
        if "ones" in scratch:
            scratch["ones"][...] = 1
        for name in ("row numbers", "mask numbers"):
            if name in scratch:
                scratch[name][...] = self.xp.arange(len(scratch[name]))

    def _take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return the scratch array of this name, cut to `shape`, or a new one without a plan."""
        if name in self._scratch:
            size = int(np.prod(shape))
            return self._scratch[name].reshape(-1)[:size].reshape(shape)
        return self.xp.empty(shape, dtype)

    def _numbers(self, name: str, count: int, dtype: Any) -> Array:
        """Return 0, 1, 2, …: the scratch array of this name, or a new one."""
        if name in self._scratch:
            return self._scratch[name][:count]
        return self.xp.arange(count, dtype=dtype)

    def _constant(self, value: float, like: Array) -> Array:
        """Return a number in the dtype of an array."""
        return self.xp.asarray(value, like.dtype)

    # -- recording --

    def renew(self) -> None:
        """Drop work that another thread had under way here when the process was forked."""
        self.quietly, self._tape = _quiet_context().run, None

    def record(self, run: Callable[[], None]) -> Tape:
        """Record the operations that `run` calls, without executing them."""
        assert self._tape is None, "a recording is under way"
        self._tape = tape = Tape()
        try:
            run()
        finally:
            self._tape = None
        return tape

    def _do(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call the function, or record the call on the tape."""
        if self._tape is None:
            function(*arguments)
        else:
            self._tape.calls.append((function, *arguments))
