"""Files that are whole or not there: written under another name, forced to the disk, renamed.

    .name.xxxxxxxx.part  →  name      at the end; a digest stands for a long name

A process that is killed leaves such a file; the next one that writes `name` removes it. A
writer holds a lock on its own, which ends with the process (`claims.py`). A training locks its file
in place as well (`claimed`).
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

LONGEST = 100  # bytes of a name that temporary names repeat; every file system holds 140
REPLACED = "another training, or a program, has written it since this one began; name another file"


# -- the public functions


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], keep: int = 1, owner: object = None
) -> Iterator[BinaryIO]:
    """Open a binary file to write into, which takes the place of `path` when the block ends well.

    If the process is killed, the disk fills up, or the block raises, what was at `path` is still
    there, unchanged.

    - Links are followed: the file at their end is replaced, and its versions are in its folder.
    - Devices, pipes and sockets, and files that a process has open already (/dev/stdout), are
      written into instead. They have no versions.
    - Mode, owner, group and, on Linux, access control lists and user attributes are those of the
      file replaced. Where the system refuses to set them, fewer users can read the new file, never
      more. A new file's mode follows the umask.
    - Other hard links to the file replaced keep what it held.

    Args:
        path: of the file.
        keep: versions to keep: those before become `name.1.suffix`, `name.2.suffix`, …
        owner: who writes: a file that is `claimed` is written by the owner of the claim alone.

    Raises:
        OSError: the folder is missing, the path is a folder, it cannot be written, or another
            training writes it, or a version that would be renamed; names the path.
    """
    with naming(path):
        target = followed(path)
        with _beside(target, keep, owner) if _is_replaced(target) else _into(target) as file:
            yield file


@contextlib.contextmanager
def claimed(path: str | os.PathLike[str], keep: int = 1, owner: object = None) -> Iterator[Path]:
    """Claim a file for one training, until the block ends or the process does, however it ends.

    The block gets the file's place, absolute and without links: what is written there goes into the
    claimed file, whatever becomes of the links and the working directory.

    The claim is a lock on the file itself, which moves on with each `replacing` by its owner: no
    other file is needed. Readers do not see it, forked children do not inherit it. Where there is
    no file yet, the first training to write one has it; any other that claimed it as well then gets
    an error from `replacing`. On a file system without locks, only trainings of this process are
    seen.

    Args:
        path: of the file, as for `replacing`.
        keep: versions to keep, as there.
        owner: who may write the file, as there.

    Raises:
        OSError: another training has claimed it, or one of its versions, in this process or
            another; or a version's name is too long. Names the path.
    """
    claim = claims.Claim(owner)  # alive as long as the block, and so is its entry
    try:
        with naming(path):
            target = followed(path)
            if _is_replaced(target):
                folder = os.path.realpath(target.parent)
                if os.path.isdir(folder):  # one above the working directory may be closed to us
                    target = Path(folder) / target.name
                _require_short_names(target, keep)
                claims.begin(claim, target)
                _require_free_versions(target, keep)
        yield target
    finally:
        claims.end(claim)


def followed(path: str | os.PathLike[str]) -> Path:
    """Return the end of a path's links; they end at a file that a process has open, /proc/…/fd/1.

    They end at a claimed place as well, which was none when it was claimed.

    Raises:
        OSError: the links go round in a circle, or cannot be read.
    """
    place = Path(path)
    for _ in range(40):  # as many as Linux follows
        if not place.is_symlink() or _is_open_file(place) or claims.entry(place) in claims.registry:
            return place
        place = place.parent / os.readlink(place)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def numbered(path: str | os.PathLike[str], number: int) -> Path:
    """Return where the last version but one goes (1), the one before (2), and so on."""
    target = Path(path)
    return target.with_name(f"{target.stem}.{number}{target.suffix}")


def versions(path: str | os.PathLike[str], keep: int) -> Iterator[Path]:
    """Yield the end of a path's links, and the versions that `replacing` would move or replace."""
    target = followed(path)
    yield target
    for number in range(1, keep):
        if not numbered(target, number).exists():
            return
        yield numbered(target, number)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have an OSError of the block name the path."""
    try:
        yield
    except OSError as error:
        if not error.strerror:
            raise
        reason = f"{str(path)!r} cannot be written: {error.strerror}"
        raise type(error)(error.errno, reason) from error


# -- writing


def _is_open_file(place: Path) -> bool:
    """Return whether a path leads to a file that a process has open already."""
    return re.fullmatch(r"/proc/.+/fd|/dev/fd", os.path.realpath(place.parent)) is not None


def _is_replaced(target: Path) -> bool:
    """Return whether a file is, or will be, a regular one that may be replaced.

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
    """Open what is there already, to write into it: where this process is in it, or at its end."""
    own = re.fullmatch(rf"/proc/{os.getpid()}/fd|/dev/fd", os.path.realpath(target.parent))
    at_end = os.O_APPEND if target.is_file() else 0
    handle = os.dup(int(target.name)) if own else os.open(target, os.O_WRONLY | at_end)
    with os.fdopen(handle, "wb") as file:
        yield file


@contextlib.contextmanager
def _beside(target: Path, keep: int, owner: object) -> Iterator[BinaryIO]:
    """Write a temporary file, and give it the place of the target at the end."""
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
    """Give a file that has been written the attributes of the one before; force it to the disk."""
    file.flush()
    if before is not None:
        inherit(file.fileno(), before)
    os.fsync(file.fileno())


def _put(part: _Part, target: Path, keep: int, claim: claims.Claim | None) -> None:
    """Give a temporary file the place of the target; a claim moves on to it.

    Raises:
        OSError: a training that is not ours has the target.
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
    """Give a temporary file a free place; raise an OSError if another was faster."""
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
    """Return how the names of a file's temporary files begin."""
    name = os.fsencode(target.name)
    return f".{target.name if len(name) <= LONGEST else hashlib.sha256(name).hexdigest()[:32]}"


def _new_name(target: Path) -> Path:
    """Return a temporary file's name, which `_tidy` knows."""
    return target.with_name(f"{_stem(target)}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def _part(target: Path, mode: int, how: str) -> Iterator[_Part]:
    """Make a temporary file, locked; at the end remove its name, and its lock but a claim's."""
    opener = functools.partial(os.open, mode=mode)
    while True:
        name, lock = _new_name(target), None
        try:
            with open(name, "xb", opener=opener) as file:
                try:
                    lock = claims.lock_file(name, how)
                except BlockingIOError:
                    continue  # somebody has taken it for a dead one's before the lock was on it
                if os.path.exists(name):
                    yield _Part(file, name, lock)
                    return
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)
            if all(claim.lock is not lock for claim in list(claims.registry.values())):
                claims.release(lock)


def _tidy(target: Path, claim: claims.Claim | None) -> None:
    """Take away what writers of this file that were killed have left."""
    stem, name = re.escape(_stem(target)), re.escape(target.name)
    ours = re.compile(rf"{stem}\.[a-z0-9_]{{8}}\.part|\.{name}\.previous")
    with contextlib.suppress(OSError):  # a folder that may be written but not read
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
    """Number the versions there are, the oldest first; there is always a whole file at `target`.

    Other processes may number them meanwhile: what is gone has been moved on by them.
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
    """Return the number of the oldest version to be; raise an OSError if one is a training's."""
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
    """Give the file in place another name, or a copy one, for as long as the block lasts."""
    second, lock = _new_name(target), None
    with contextlib.suppress(BlockingIOError):  # a training's lock serves as well
        lock = claims.lock_file(target, "shared")
    with contextlib.ExitStack() as stack:
        stack.callback(claims.release, lock)
        try:
            os.link(target, second)
            stack.callback(second.unlink, missing_ok=True)  # one file is not renamed to itself
        except OSError:  # a file system without hard links
            part = stack.enter_context(_part(target, 0o600, "shared"))
            with open(target, "rb") as file, part.file:
                shutil.copyfileobj(file, part.file)
                _finish(part.file, attributes_of(target))
            second = part.name
        yield second


def _force(folder: Path) -> None:
    """Have the renaming on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)  # which Windows refuses
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
