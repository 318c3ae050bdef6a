"""Locks on files: shared ones of writers, and exclusive ones, the claims of trainings.

A writer holds a shared lock on its temporary file, which ends with the process, so a locked file is
in use. A training holds an exclusive lock, its claim, on the target file.
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

PATIENCE = 1.0  # seconds after which a lock must be a training's, since writers hold theirs briefly
BUSY = "another training is writing it; name another file, or wait until it has ended"

Identity = tuple[int, int]  # device and inode
Entry = tuple[Identity | None, str]  # folder and file name, independent of the path used
Lock = io.FileIO | None  # a file opened only for its lock; None if the system has no locks
held: weakref.WeakSet[io.FileIO] = weakref.WeakSet()  # all locks; weak, so unused ones close
registry: weakref.WeakValueDictionary[Entry, Claim] = weakref.WeakValueDictionary()
guard = threading.RLock()  # protects `held`, `registry` and renaming


@dataclass
class Claim:
    """A training's claim on a file.

    Attributes:
        owner: the only object that may write the file.
        lock: lock on the target file.
        seen: identity of the file that the training found or last wrote there.
    """

    owner: object
    lock: Lock = None
    seen: Identity | None = None


def begin(claim: Claim, target: Path) -> None:
    """Lock the target file, if it exists; raise an OSError if another training has locked it."""
    if registry.setdefault(entry(target), claim) is not claim:
        raise OSError(errno.EBUSY, BUSY)
    for _ in range(100):  # gives up if the file is replaced all the time
        claim.lock, claim.seen = _lock_patiently(target, "exclusive"), identity(target)
        if claim.lock is None or identity(claim.lock.fileno()) == claim.seen:
            break
        release(claim.lock)  # the locked file has been replaced in the meantime


def end(claim: Claim) -> None:
    """Release a claim and its lock."""
    with guard:
        for place, other in list(registry.items()):
            if other is claim:
                del registry[place]
        release(claim.lock)


def require_unclaimed(target: Path) -> None:
    """Raise an OSError if a training in this process or another has claimed a file."""
    if entry(target) in registry:
        raise OSError(errno.EBUSY, BUSY)
    release(_lock_patiently(target, "shared"))


def _lock_patiently(target: Path, how: str) -> Lock:
    """Lock a file as `lock_file` does; after `PATIENCE` seconds, raise an OSError."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            return lock_file(target, how)
        except BlockingIOError:
            if time.monotonic() > last:
                raise OSError(errno.EBUSY, BUSY) from None
        time.sleep(0.01)


def identity(file: Path | int) -> Identity | None:
    """Return the device and inode of a file; None if it does not exist."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def entry(target: Path) -> Entry:
    """Return the folder entry of a path, which is independent of how the path is written."""
    return identity(target.parent), target.name


def lock_file(place: Path, how: str) -> Lock:
    """Open a file only to lock it, and return it; return None if the system has no locks.

    The separate file object lets a forked child close it.

    Args:
        place: path of the file.
        how: "shared" for a single write; "exclusive" for a training, or to remove the file.

    Raises:
        BlockingIOError: another process holds a conflicting lock.
    """
    if sys.platform == "win32":  # an open file cannot be renamed there
        return None
    kind = fcntl.LOCK_SH if how == "shared" else fcntl.LOCK_EX
    for mode in ("rb", "rb+"):  # NFS needs the second for exclusive locks
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
    """Release a lock, unless a fork already has."""
    if lock is not None:
        held.discard(lock)
        with contextlib.suppress(OSError):
            lock.close()


def _forget_after_fork() -> None:
    """Release, in a forked child, the parent's locks, and treat its claims as another's."""
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
