"""Locks on files, and the claims of trainings on theirs.

A writer holds a shared lock on its temporary file, which ends with the process: a locked file is
in use. A training holds an exclusive lock on its file in place, its claim.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PATIENCE = 1.0  # seconds until a lock counts as a training's; a writer holds one for a moment
BUSY = "another training is writing it; name another file, or wait until it has ended"

Identity = tuple[int, int]  # device and inode
Entry = tuple[Identity | None, str]  # a folder, and a name in it, whatever path leads there
Lock = io.FileIO | None  # a file that is open for its lock alone; None where the system has none
held: weakref.WeakSet[io.FileIO] = weakref.WeakSet()  # the locks; one without a holder is let go
registry: weakref.WeakValueDictionary[Entry, Claim] = weakref.WeakValueDictionary()
guard = threading.RLock()  # of both, and of renaming


@dataclass
class Claim:
    """A training's claim on a file.

    Attributes:
        owner: who may write it.
        lock: on the file in place.
        seen: the file that the training found or wrote there.
    """

    owner: object
    lock: Lock = None
    seen: Identity | None = None


def begin(claim: Claim, target: Path) -> None:
    """Lock the file in place, if any; raise an OSError if another training has done so."""
    if registry.setdefault(entry(target), claim) is not claim:
        raise OSError(errno.EBUSY, BUSY)
    for _ in range(100):  # gives up on a file that is replaced at every moment
        claim.lock, claim.seen = _lock_patiently(target, "exclusive"), identity(target)
        if claim.lock is None or identity(claim.lock.fileno()) == claim.seen:
            break
        release(claim.lock)  # that file has been replaced meanwhile


def end(claim: Claim) -> None:
    """Give up a claim and its lock."""
    with guard:
        for place, other in list(registry.items()):
            if other is claim:
                del registry[place]
        release(claim.lock)


def require_unclaimed(target: Path) -> None:
    """Raise an OSError if a training writes a file, in this process or another."""
    if entry(target) in registry:
        raise OSError(errno.EBUSY, BUSY)
    release(_lock_patiently(target, "shared"))


def _lock_patiently(target: Path, how: str) -> Lock:
    """Lock a file as `lock_file` does; raise an OSError if another lock stays: a training's."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            return lock_file(target, how)
        except BlockingIOError:
            if time.monotonic() > last:
                raise OSError(errno.EBUSY, BUSY) from None
        time.sleep(0.01)


def identity(file: Path | int) -> Identity | None:
    """Return device and inode of a file; None if it does not exist."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def entry(target: Path) -> Entry:
    """Return the entry of a folder that a path leads to."""
    return identity(target.parent), target.name


def lock_file(place: Path, how: str) -> Lock:
    """Open a file and lock it; return what holds the lock, None where the system has none.

    It is opened for that alone, so that a forked child can close it.

    Args:
        place: of the file.
        how: "shared", by those who write a file once; "exclusive", by a training, or to take it
            away.

    Raises:
        BlockingIOError: another lock is in the way.
    """
    if sys.platform == "win32":  # an open file cannot be renamed there
        return None
    kind = fcntl.LOCK_SH if how == "shared" else fcntl.LOCK_EX
    for mode in ("rb", "rb+"):  # the second for NFS, where an exclusive lock takes it
        with guard:
            try:
                lock = io.FileIO(place, mode, opener=_open)
            except OSError:
                return None
            held.add(lock)
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except OSError as error:
                release(lock)
                if isinstance(error, BlockingIOError):
                    raise
                if error.errno != errno.EBADF:
                    return None
            else:
                return lock
    return None


def _open(place: str, flags: int) -> int:
    """Open a file without waiting for the other end of a pipe."""
    return os.open(place, flags | os.O_NONBLOCK)


def release(lock: Lock) -> None:
    """Let go of a lock, unless a fork has done so."""
    if lock is not None:
        held.discard(lock)
        with contextlib.suppress(OSError):
            lock.close()


def _forget_after_fork() -> None:
    """Let go, in a forked child, of the parent's locks, and treat its claims as another's."""
    for lock in list(held):
        release(lock)
    for claim in list(registry.values()):
        claim.owner = object()
    guard.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=guard.acquire,
        after_in_parent=guard.release,
        after_in_child=_forget_after_fork,
    )
