"""Files that are whole or not there: written beside their place, forced to the disk, then renamed.

Meanwhile they are called `.name.xxxxxxxx.part`. A process that is killed leaves such a file behind; the next one that writes
`name` takes it away. A writer holds a lock on its own, which ends with the process: what is locked is somebody's work.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], keep: int = 1) -> Iterator[BinaryIO]:
    """A binary file to write into, which takes the place of `path` when the block ends well.

    If the process is killed, the disk fills up, or the block raises, what was at `path` is still there, unchanged.

    Args:
        path: of the file.
        keep: versions to keep: those before become `name.1.suffix`, `name.2.suffix`, …

    Raises:
        OSError: the folder is missing, the path is a folder, it cannot be written; names the path.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{str(path)!r} cannot be written: it is a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} cannot be written: the folder {str(target.parent)!r} does not exist")
    temporary, lock = None, -1
    try:
        _tidy(target)
        handle, temporary = _begun(target)
        if sys.platform != "win32":  # where an open file cannot be renamed
            lock = os.dup(handle)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes it private
        _move_on(target, keep)
        os.replace(temporary, target)
        _force(target.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError) and error.strerror:
            raise type(error)(error.errno, f"{str(path)!r} cannot be written: {error.strerror}") from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def _begun(target: Path) -> tuple[int, str]:
    """A new temporary file, locked: its handle and name."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        _lock(handle, wait=True)
        if os.path.exists(name):  # nobody has taken it for a dead one before the lock was on it
            return handle, name
        os.close(handle)


def _tidy(target: Path) -> None:
    """Take away what writers of this file that were killed have left."""
    for name in os.listdir(target.parent):
        if re.fullmatch(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.part", name):
            with contextlib.suppress(OSError):
                handle = os.open(target.parent / name, os.O_RDWR)
                try:
                    if _lock(handle, wait=False):
                        os.unlink(target.parent / name)
                finally:
                    os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file for as long as it is open in this process; False where it is another's, or the system cannot."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def numbered(path: str | os.PathLike[str], number: int) -> Path:
    """Where the last version but one goes (1), the one before (2), and so on."""
    target = Path(path)
    return target.with_name(f"{target.stem}.{number}{target.suffix}")


def _move_on(target: Path, keep: int) -> None:
    """Number the versions there are, the oldest first; at every moment there is a whole file at `target`."""
    if keep < 2 or not target.exists():
        return
    last = 1
    while last < keep - 1 and numbered(target, last).exists():
        last += 1
    for number in range(last, 1, -1):
        os.replace(numbered(target, number - 1), numbered(target, number))
    second = target.with_name(f".{target.name}.previous")
    second.unlink(missing_ok=True)
    try:
        os.link(target, second)
    except OSError:  # a file system without hard links
        shutil.copy2(target, second)
    os.replace(second, numbered(target, 1))


def _force(folder: Path) -> None:
    """Have the renaming on the disk, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
