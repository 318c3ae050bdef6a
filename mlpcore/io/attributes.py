"""Mode, owner and extended attributes of a file, for the file that replaces it."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ACL = "system.posix_acl_access"


class Attributes(NamedTuple):
    """Mode, owner and group of a file, and on Linux its user-level extended attributes."""

    status: os.stat_result
    extended: Mapping[str, bytes]


def attributes_of(target: Path) -> Attributes | None:
    """Return the attributes of a file; None if it does not exist."""
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    extended = {}
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for name in os.listxattr(target):
                if name.startswith("user.") or name in (ACL, "security.selinux"):
                    extended[name] = os.getxattr(target, name)
    return Attributes(status, extended)


def inherit(handle: int, before: Attributes) -> None:
    """Give an open, so far private file the attributes of the one it replaces, if possible."""
    if sys.platform == "win32":
        return
    wanted = before.status
    for owner in (wanted.st_uid, -1):
        with contextlib.suppress(OSError):
            os.fchown(handle, owner, wanted.st_gid)
            break
    found, mode = os.fstat(handle), stat.S_IMODE(wanted.st_mode)
    same_group = found.st_gid == wanted.st_gid
    if found.st_uid != wanted.st_uid or not same_group:
        mode &= 0o1777  # no setuid or setgid for another owner or group
    if not (_extend(handle, before.extended) and same_group):
        mode &= ~0o70 | (mode & 7) << 3  # the new group gets only the rights of others
    with contextlib.suppress(OSError):
        os.fchmod(handle, mode)


def _extend(handle: int, extended: Mapping[str, bytes]) -> bool:
    """Set extended attributes; return True if the access control list is now the given one."""
    if sys.platform != "linux":
        return True
    for name in sorted(extended, key=ACL.__eq__):  # the ACL last
        try:
            os.setxattr(handle, name, extended[name])
        except OSError:
            if name == ACL:
                return False
    if ACL not in extended:
        with contextlib.suppress(OSError):
            os.removexattr(handle, ACL)  # inherited from the folder
        with contextlib.suppress(OSError):
            return ACL not in os.listxattr(handle)
    return True
