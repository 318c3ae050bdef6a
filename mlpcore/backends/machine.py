"""The CPUs and memory that this process may use, by its affinity and its control groups.

A container, or a job on a cluster, sees all CPUs of the machine, but is throttled if it uses them:
its quota is in the files of its control group, or of a group above it (Linux).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
JOBLIB = "LOKY_MAX_CPU_COUNT"  # joblib's variable for a user's limit


def usable_cpus(root: Path = ROOT) -> int:
    """Return the number of CPUs that this process may use, at least 1, as joblib counts them.

    Args:
        root: the folder that replaces "/", for tests.
    """
    return min(_cpu_limits(root).values())


def describe_cpus(root: Path = ROOT) -> str:
    """Return the usable CPUs, the total and the limit's cause, e.g. "2 of 64 (cgroup quota)"."""
    limits = _cpu_limits(root)
    usable, there = min(limits.values()), limits["machine"]
    reason = next(name for name, count in limits.items() if count == usable)
    return f"{usable} of {there}" + ("" if reason == "machine" else f" ({reason})")


def _cpu_limits(root: Path) -> dict[str, int]:
    """Return the limits on this process's CPUs by name, the machine's own number first."""
    limits = {"machine": os.cpu_count() or 1}
    if hasattr(os, "sched_getaffinity"):
        limits["affinity"] = len(os.sched_getaffinity(0))
    if hasattr(os, "process_cpu_count"):  # Python 3.13; includes -X cpu_count
        limits["Python's cpu_count"] = os.process_cpu_count() or limits["machine"]
    quotas = [quota for folder in _groups("cpu", root) if (quota := _quota(folder)) is not None]
    if quotas:
        limits["cgroup quota"] = min(quotas)
    if os.environ.get(JOBLIB, "").strip().isdecimal():
        limits[JOBLIB] = int(os.environ[JOBLIB])
    return {name: max(1, count) for name, count in limits.items()}


def _quota(folder: Path) -> int | None:
    """Return the CPUs that a control group grants, rounded up; None if it sets no quota."""
    words = _words(folder / "cpu.max")
    words = words or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return None  # "max" and "-1" mean none
    return math.ceil(int(words[0]) / int(words[1]))


def free_memory(root: Path = ROOT) -> int | None:
    """Return the bytes that system and control groups leave free; None if they do not report it."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.M)
    if found is None:
        return None
    free = 1024 * int(found[1])
    for folder in _groups("memory", root):
        second = _words(folder / "memory.max") + _words(folder / "memory.current")
        first = _words(folder / "memory.limit_in_bytes") + _words(folder / "memory.usage_in_bytes")
        for words in (second, first):
            if len(words) == 2 and all(word.isdecimal() for word in words):
                free = min(free, max(0, int(words[0]) - int(words[1])))
    return free


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups, and of the groups above them."""
    paths: dict[str, str] = {}  # by the controllers of version 1; "" for version 2
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        paths |= dict.fromkeys(names.split(","), path)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        kind, _, options = kind.split(" ", 2)
        name = {"cgroup2": "", "cgroup": controller}.get(kind)
        if name not in paths or (name and controller not in options.split(",")):
            continue
        shown, at = map(_decoded, mount.split()[3:5])
        top = root / at.lstrip("/")
        inside = os.path.relpath(paths[name], shown)  # a container may see its own group as the top
        folder = top if inside == "." or inside.startswith("..") else top / inside
        yield from (folder, *(above for above in folder.parents if above.is_relative_to(top)))


def _decoded(name: str) -> str:
    """Return a path from mountinfo with its numeric escapes decoded."""
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), name)


def _text(file: Path) -> str:
    """Return the text of a system file, "" if it does not exist."""
    try:
        return file.read_text(errors="surrogateescape")  # a mount point may have any name
    except OSError:
        return ""


def _words(file: Path) -> list[str]:
    return _text(file).split()
