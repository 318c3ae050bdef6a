"""Turns of the threads that use one trainer, and what a fork does to them.

A call holds both locks: `calls` until it returns, `steps` not between the steps of `fit`. There
another thread may save, and a process may fork.
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
    """The locks of one trainer, and who waits for them.

    Attributes:
        calls: lock of a call, whatever its thread: one call at a time.
        steps: lock of the arrays: held by a call as well, but not between the steps of `fit`.
        visitors: those who wait for `steps`, or hold it, while a `fit` is under way.
    """

    def __init__(self) -> None:
        self.calls = threading.RLock()
        self.steps = threading.RLock()
        self.visitors: dict[object, None] = {}

    def take_steps(self, leaving: contextlib.ExitStack) -> None:
        """Take the lock of the arrays until the stack is left, also if an interrupt comes here."""
        leaving.callback(self._release_steps)
        self.steps.acquire()

    def _release_steps(self) -> None:
        with contextlib.suppress(RuntimeError):  # an interrupt came while `take_steps` waited
            self.steps.release()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Let other threads save meanwhile, and those that wait already before the block ends."""
        self.steps.release()
        try:
            yield
        finally:
            waiting = [*self.visitors]
            while any(one in self.visitors for one in waiting):
                time.sleep(0.001)  # a lock would be this thread's again at once
            self.steps.acquire()

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Keep other threads between two steps of their `fit` until the block ends."""
        visitor = object()
        try:
            self.visitors[visitor] = None
            with self.steps:
                yield
        finally:
            self.visitors.pop(visitor, None)

    def renew(self) -> bool:
        """Free, in a forked process, what other threads held; return True if one was in a call."""
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
    """An object that a fork must leave whole."""

    turns: Turns

    def renew(self) -> None:
        """Begin anew in a forked process, where the other threads are not."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_forking = threading.local()  # the turns that a thread which forks has taken


def watch_forks(holder: Holder) -> None:
    """Let forks wait for the steps of this holder, as long as it lives."""
    _holders.add(holder)


def _pause_for_fork() -> None:
    """Wait for a moment until no thread is in the middle of a step.

    A forked process then finds whole parameters, and BLAS in no product, which it would wait for in
    vain.
    """
    _forking.taken = taken = list[Turns]()
    deadline = time.monotonic() + FORK_WAITS
    for turns in [holder.turns for holder in [*_holders]]:
        turns.visitors[_forking] = None
        if turns.steps.acquire(timeout=max(0.0, deadline - time.monotonic())):
            taken.append(turns)


def _go_on_after_fork() -> None:
    """Give back what `_pause_for_fork` took."""
    for turns in _forking.taken:
        turns.steps.release()
    for holder in [*_holders]:
        holder.turns.visitors.pop(_forking, None)


def _renew_after_fork() -> None:
    """Free, in a forked process, what threads of its parent held."""
    _go_on_after_fork()
    for holder in _holders:
        holder.renew()
    if "tqdm.auto" in sys.modules:
        sys.modules["tqdm.auto"].tqdm.set_lock(threading.RLock())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_pause_for_fork, after_in_parent=_go_on_after_fork, after_in_child=_renew_after_fork
    )
