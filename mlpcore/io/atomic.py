"""Atomic writing: a file is written under a temporary name, flushed to disk, then renamed.

    .name.xxxxxxxx.part  →  name      at the end; a long name is replaced with a digest

A process that is killed leaves its temporary file behind; the next one that writes `name` removes
it. A writer holds a lock on its temporary file, which ends with the process (`claims.py`). A
training also locks the target file itself (`claimed`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mlpcore.io import claims
from mlpcore.io.attributes import Attributes, attributes_of, inherit

LONGEST = 100  # longest name in bytes that temporary names repeat; all file systems allow 140
REPLACED = "another training or program has written it since this one began; name another file"


# -- the public functions


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], keep: int = 1, owner: object = None
) -> Iterator[BinaryIO]:
    """Open a binary file to write; it replaces `path` if the block ends without an error.

    If the process is killed, the disk fills up, or the block raises, the file at `path` is left
    unchanged.

    - Links are followed: their final target is replaced, and versions are kept in its folder.
    - Devices, pipes and sockets, and files that a process already has open (/dev/stdout), are
      written directly. They have no versions.
    - The new file gets the mode, owner and group of the old one, and on Linux its access control
      list and user attributes. If the system refuses to set them, fewer users can read the new
      file, never more. A file without a predecessor gets its mode from the umask.
    - Other hard links to the old file keep its content.

    Args:
        path: path of the file.
        keep: versions to keep; older ones become `name.1.suffix`, `name.2.suffix`, …
        owner: the writer; only the owner of its claim can write a `claimed` file.

    Raises:
        OSError: the folder is missing, the path is a folder or cannot be written, or another
            training is writing it or a version that would be renamed; names the path.
    """
    with naming(path):
        target = followed(path)
        with _beside(target, keep, owner) if _is_replaced(target) else _into(target) as file:
            yield file


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str], keep: int = 1, owner: object = None) -> Iterator[Path]:
    """Claim a file for one training, until the block or the process ends, for whatever reason.

    The block gets the file's absolute path without links: writing there reaches the claimed file,
    even if links or the working directory change later.

    The claim is a lock on the file itself and passes to the new file with each `replacing` by its
    owner; no other file is needed. It does not affect readers, and forked children do not inherit
    it. If there is no file yet, the first training to write one gets the claim; any other that
    claimed it then gets an error from `replacing`. On a file system without locks, only trainings
    in the same process are detected.

    Args:
        path, keep, owner: as in `replacing`.

    Raises:
        OSError: another training, in this process or another, has claimed the file or one of its
            versions; or the name of a version is too long. Names the path.
    """
    claim = claims.Claim(owner)  # the registry entry exists as long as this reference
    try:
        with naming(path):
            target = followed(path)
            if _is_replaced(target):
                folder = os.path.realpath(target.parent)
                if os.path.isdir(folder):  # a parent folder may be inaccessible
                    target = Path(folder) / target.name
                _require_short_names(target, keep)
                claims.begin(claim, target)
                _require_free_versions(target, keep)
        yield target
    finally:
        claims.end(claim)


def followed(path: str | os.PathLike[str]) -> Path:
    """Return the target of a path after links; open files (/proc/…/fd/1) are not followed.

    Claimed paths are not followed either: they were not links when they were claimed.

    Raises:
        OSError: the links form a loop or cannot be read.
    """
    place = Path(path)
    for _ in range(40):  # as many as Linux follows
        if not place.is_symlink() or _is_open_file(place) or claims.entry(place) in claims.registry:
            return place
        place = place.parent / os.readlink(place)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def numbered(path: str | os.PathLike[str], number: int) -> Path:
    """Return the path of an older version: 1 for the previous one, 2 for the one before it."""
    target = Path(path)
    return target.with_name(f"{target.stem}.{number}{target.suffix}")


def versions(path: str | os.PathLike[str], keep: int) -> Iterator[Path]:
    """Yield the target of a path, and the versions that `replacing` would rename or replace."""
    target = followed(path)
    yield target
    for number in range(1, keep):
        if not numbered(target, number).exists():
            return
        yield numbered(target, number)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make OSErrors of the block name the path."""
    try:
        yield
    except OSError as error:
        if not error.strerror:
            raise
        reason = f"{str(path)!r} cannot be written: {error.strerror}"
        raise type(error)(error.errno, reason) from error


# -- writing


def _is_open_file(place: Path) -> bool:
    """Return True if a path leads to a file that a process already has open."""
    return re.fullmatch(r"/proc/.+/fd|/dev/fd", os.path.realpath(place.parent)) is not None


def _is_replaced(target: Path) -> bool:
    """Return True if a path is free or a regular file, so that it can be replaced.

    Raises:
        OSError: it is a folder, or its folder does not exist.
    """
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder {str(target.parent)!r} does not exist")
    return not _is_open_file(target) and (target.is_file() or not target.exists())


@contextlib.contextmanager
def _into(target: Path) -> Iterator[BinaryIO]:
    """Open an existing target to write into: at this process's own position, or at its end."""
    own = re.fullmatch(rf"/proc/{os.getpid()}/fd|/dev/fd", os.path.realpath(target.parent))
    at_end = os.O_APPEND if target.is_file() else 0
    handle = os.dup(int(target.name)) if own else os.open(target, os.O_WRONLY | at_end)
    with os.fdopen(handle, "wb") as file:
        yield file


@contextlib.contextmanager
def _beside(target: Path, keep: int, owner: object) -> Iterator[BinaryIO]:
    """Write a temporary file, and replace the target with it at the end."""
    _require_short_names(target, keep)
    claim, before = claims.registry.get(claims.entry(target)), attributes_of(target)
    if claim is None or claim.owner is not owner:
        claim = None
        claims.require_unclaimed(target)
    _tidy(target, claim)
    mode = 0o666 if before is None else 0o600
    with _part(target, mode, "exclusive" if claim else "shared") as part:
        with part.file:
            yield part.file
            _finish(part.file, before)
        with claims.guard:
            _put(part, target, keep, claim)
    _force(target.parent)


def _finish(file: BinaryIO, before: Attributes | None) -> None:
    """Give a written file the attributes of its predecessor, and flush it to disk."""
    file.flush()
    if before is not None:
        inherit(file.fileno(), before)
    os.fsync(file.fileno())


def _put(part: _Part, target: Path, keep: int, claim: claims.Claim | None) -> None:
    """Replace the target with a temporary file, and pass the claim on to it.

    Raises:
        OSError: another training has claimed the target.
    """
    found = claims.identity(target)
    if claim is None:
        claims.require_unclaimed(target)
    elif claims.registry.get(claims.entry(target)) is not claim or found not in (None, claim.seen):
        raise OSError(errno.EBUSY, REPLACED)
    _move_on(target, keep)
    if claim is not None and found is None:
        _put_first(part, target)
    else:
        os.replace(part.name, target)
    if claim is not None:
        old, claim.lock, claim.seen = claim.lock, part.lock, claims.identity(target)
        claims.release(old)


def _put_first(part: _Part, target: Path) -> None:
    """Move a temporary file to a free path; raise an OSError if another writer was faster."""
    try:
        os.link(part.name, target)
    except FileExistsError:
        raise OSError(errno.EBUSY, REPLACED) from None
    except OSError:  # a file system without hard links
        os.replace(part.name, target)


def _require_short_names(target: Path, keep: int) -> None:
    """Raise an OSError if the oldest version's name is longer than the file system allows."""
    try:
        os.stat(numbered(target, keep - 1) if keep > 1 else target)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            text = f"the name of its version {keep - 1}" if keep > 1 else "its name"
            raise OSError(error.errno, f"{text} is too long; take a shorter one") from None


class _Part(NamedTuple):
    """A temporary file, open, with its name and its lock."""

    file: BinaryIO
    name: Path
    lock: claims.Lock


def _stem(target: Path) -> str:
    """Return the prefix of the names of a file's temporary files."""
    name = os.fsencode(target.name)
    return f".{target.name if len(name) <= LONGEST else hashlib.sha256(name).hexdigest()[:32]}"


def _new_name(target: Path) -> Path:
    """Return a new temporary name that `_tidy` recognizes."""
    return target.with_name(f"{_stem(target)}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def _part(target: Path, mode: int, how: str) -> Iterator[_Part]:
    """Make a locked temporary file; at the end remove its name, and its lock unless claimed."""
    opener = functools.partial(os.open, mode=mode)
    while True:
        name, lock = _new_name(target), None
        try:
            with open(name, "xb", opener=opener) as file:
                try:
                    lock = claims.lock_file(name, how)
                except BlockingIOError:
                    continue  # taken for a leftover before it was locked
                if os.path.exists(name):
                    yield _Part(file, name, lock)
                    return
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)
            if all(claim.lock is not lock for claim in list(claims.registry.values())):
                claims.release(lock)


def _tidy(target: Path, claim: claims.Claim | None) -> None:
    """Remove temporary files of this file that killed writers left behind."""
    stem, name = re.escape(_stem(target)), re.escape(target.name)
    ours = re.compile(rf"{stem}\.[a-z0-9_]{{8}}\.part|\.{name}\.previous")
    with contextlib.suppress(OSError):  # a folder may be writable but not readable
        for name in filter(ours.fullmatch, os.listdir(target.parent)):
            left = target.with_name(name)
            if claim is not None and claims.identity(left) == claim.seen:  # our file's second name
                left.unlink(missing_ok=True)
                continue
            with contextlib.suppress(BlockingIOError):
                if (lock := claims.lock_file(left, "exclusive")) is not None:
                    with lock:
                        left.unlink(missing_ok=True)


def _move_on(target: Path, keep: int) -> None:
    """Rename existing versions, the oldest first; there is a complete file at `target` throughout.

    Other processes may do the same at the same time: a missing version was renamed by them.
    """
    if keep < 2 or not target.exists():
        return
    last = _require_free_versions(target, keep)
    with contextlib.suppress(FileNotFoundError), _second_name(target) as second:
        for number in range(last, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(numbered(target, number - 1), numbered(target, number))
        os.replace(second, numbered(target, 1))


def _require_free_versions(target: Path, keep: int) -> int:
    """Return the number of the oldest version; raise an OSError if a training writes one."""
    last = 0
    while last < keep - 1:
        last += 1
        version = numbered(target, last)
        found = claims.identity(version)
        if found is None or found != claims.identity(target):  # a killed writer left two names
            claims.require_unclaimed(version)
        if found is None:
            break
    return last


@contextlib.contextmanager
def _second_name(target: Path) -> Iterator[Path]:
    """Give the target, or a copy of it, a second name during the block."""
    second, lock = _new_name(target), None
    with contextlib.suppress(BlockingIOError):  # a training's lock protects it as well
        lock = claims.lock_file(target, "shared")
    with contextlib.ExitStack() as stack:
        stack.callback(claims.release, lock)
        try:
            os.link(target, second)
            stack.callback(second.unlink, missing_ok=True)  # no rename between links of one file
        except OSError:  # a file system without hard links
            part = stack.enter_context(_part(target, 0o600, "shared"))
            with open(target, "rb") as file, part.file:
                shutil.copyfileobj(file, part.file)
                _finish(part.file, attributes_of(target))
            second = part.name
        yield second


def _force(folder: Path) -> None:
    """Flush a folder to disk, so that renaming persists, if the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)  # Windows refuses this
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
