"""Locks for the threads that share one trainer, and their handling when the process forks.

Each call holds two locks: `calls` until it returns, and `steps`, which `fit` releases between its
steps so that another thread can save or the process can fork.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Protocol

FORK_WAITS = 1.0  # seconds that a fork waits for steps of other threads


class Turns:
    """The locks of one trainer, and the threads that wait for them.

    Attributes:
        calls: lock of a call: only one thread at a time may be in one.
        steps: lock of the arrays, held during a call but released between the steps of `fit`.
        visitors: tokens of the threads that wait for `steps` or hold it during a `fit`.
    """

    def __init__(self) -> None:
        self.calls = threading.RLock()
        self.steps = threading.RLock()
        self.visitors: dict[object, None] = {}

    def take_steps(self, leaving: contextlib.ExitStack) -> None:
        """Hold the lock of the arrays until the stack exits, even if an interrupt arrives here."""
        leaving.callback(self._release_steps)
        self.steps.acquire()

    def _release_steps(self) -> None:
        with contextlib.suppress(RuntimeError):  # an interrupt came while `take_steps` waited
            self.steps.release()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Let other threads save during the block; those already waiting finish before it ends."""
        self.steps.release()
        try:
            yield
        finally:
            waiting = [*self.visitors]
            while any(one in self.visitors for one in waiting):
                time.sleep(0.001)  # otherwise this thread would get the lock right back
            self.steps.acquire()

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Stop another thread's `fit` between two steps until the block ends."""
        visitor = object()
        try:
            self.visitors[visitor] = None
            with self.steps:
                yield
        finally:
            self.visitors.pop(visitor, None)

    def renew(self) -> bool:
        """Release, after a fork, the locks of other threads; return True if one was in a call."""
        self.visitors.clear()
        if not self.steps.acquire(blocking=False):
            self.steps = threading.RLock()
            self.steps.acquire()
        self.steps.release()
        if self.calls.acquire(blocking=False):
            self.calls.release()
            return False
        self.calls = threading.RLock()
        return True


class Holder(Protocol):
    """An object that must be consistent in a forked process."""

    turns: Turns

    def renew(self) -> None:
        """Reset in a forked process, where the other threads do not exist."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_forking = threading.local()  # the turns taken by a thread that forks


def watch_forks(holder: Holder) -> None:
    """Make forks wait for the steps of this holder, as long as it exists."""
    _holders.add(holder)


def _pause_for_fork() -> None:
    """Wait briefly until no thread is in the middle of a step.

    A forked process then finds consistent parameters, and no BLAS call in progress, for which it
    would wait forever.
    """
    _forking.taken = taken = list[Turns]()
    deadline = time.monotonic() + FORK_WAITS
    for turns in [holder.turns for holder in [*_holders]]:
        turns.visitors[_forking] = None
        if turns.steps.acquire(timeout=max(0.0, deadline - time.monotonic())):
            taken.append(turns)


def _go_on_after_fork() -> None:
    """Release the locks that `_pause_for_fork` took."""
    for turns in _forking.taken:
        turns.steps.release()
    for holder in [*_holders]:
        holder.turns.visitors.pop(_forking, None)


def _renew_after_fork() -> None:
    """Release, in a forked process, the locks that threads of its parent held."""
    _go_on_after_fork()
    for holder in _holders:
        holder.renew()
    if "tqdm.auto" in sys.modules:
        sys.modules["tqdm.auto"].tqdm.set_lock(threading.RLock())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_pause_for_fork, after_in_parent=_go_on_after_fork, after_in_child=_renew_after_fork
    )
