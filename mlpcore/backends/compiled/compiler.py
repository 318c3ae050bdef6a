"""The machine's own C++ compiler: sources become functions, kept in the user's cache folder.

A library is named after its source, the compiler, the flags and the processor, and after its own
content, so that a damaged file, another machine's or another version's is never loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("mlpcore")
SWITCH = "MLPCORE_COMPILE"  # environment variable: 0 leaves all passes to NumPy
CACHE = "MLPCORE_CACHE"  # environment variable: the folder of compiled passes
NAMES = ("g++", "clang++", "c++")
FLAGS = (
    "-std=c++17", "-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fPIC", "-shared", "-w",
)  # fmt: skip
FUSED = "-ffp-contract=fast"  # for products, whose bits need not be those of another order
SECONDS = 120  # limit on one compilation

_lock = threading.Lock()
_functions: dict[str, Any] = {}  # by source
_failure: list[str] = []  # why the compiler is no longer used


class Compiler(NamedTuple):
    """A C++ compiler.

    Attributes:
        command: the program and its own arguments.
        identity: its path, size and time, which change with its version.
    """

    command: tuple[str, ...]
    identity: str


class CompilationFailed(Exception):
    """The compiler, or the cache folder, did not do what it should."""


def load(source: str, *flags: str) -> Any:
    """Return the function `run` of a C++ source; None if it cannot be compiled here.

    It is compiled, with these flags in addition, unless the cache has it. After one failure, which
    is logged, nothing more is compiled in this process.
    """
    function = _functions.get(source)
    if function is not None or why_not():
        return function
    with _lock:
        if source not in _functions and not _failure:
            try:
                _functions[source] = _loaded(source, (*_flags(), *flags))
            except (CompilationFailed, OSError) as error:
                _failure.append(f"{shlex.join(_required().command)}: {error}")
                log.warning("NumPy computes what would be compiled: %s", _failure[0])
    return _functions.get(source)


def why_not() -> str:
    """Return why passes are not compiled, or "" if they are."""
    if _failure:
        return _failure[0]
    return _why_never(os.environ.get(SWITCH, ""), os.environ.get("CXX", ""))


@functools.cache
def _why_never(switch: str, cxx: str) -> str:
    if switch == "0":
        return f"{SWITCH} is 0"
    if os.name != "posix":
        return "only on Linux and macOS"
    if _find(cxx) is None:
        missing = f"CXX is {cxx!r}, which is" if cxx else f"no C++ compiler ({', '.join(NAMES)}) is"
        return f"{missing} not on the PATH"
    return ""


def describe() -> str:
    """Return the compiler and its version in one line, e.g. "g++ (Debian 12.2.0) 12.2.0"."""
    compiler = _required()
    try:
        said = subprocess.run(
            [*compiler.command, "--version"], capture_output=True, text=True, timeout=SECONDS,
            stdin=subprocess.DEVNULL, check=False,
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{shlex.join(compiler.command)} ({error})"
    return said.partition("\n")[0] or shlex.join(compiler.command)


@functools.cache
def _find(cxx: str) -> Compiler | None:
    """Return the compiler that CXX names or, if it is empty, the first of `NAMES` found."""
    for name in [cxx] if cxx else NAMES:
        program, *arguments = shlex.split(name) or [""]
        path = shutil.which(program)
        if path is not None:
            there = os.stat(path)
            identity = f"{os.path.realpath(path)} {there.st_size} {there.st_mtime_ns}"
            return Compiler((path, *arguments), identity)
    return None


def _required() -> Compiler:
    compiler = _find(os.environ.get("CXX", ""))
    assert compiler is not None
    return compiler


@functools.cache
def _processor() -> str:
    """Return the processor's features, for which `-march=native` compiles."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        kept = re.findall(r"^(?:model name|cpu family|model|flags|Features)\s*:.*$", text, re.M)
        if kept:
            return "\n".join(sorted({*kept}))
    return f"{platform.machine()} {platform.processor()} {platform.release()}"


def _flags() -> tuple[str, ...]:
    native = (
        "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    )
    return (*FLAGS, native)


# -- libraries --


def _loaded(source: str, flags: Sequence[str]) -> Any:
    compiler = _required()
    parts = (source, *flags, *compiler.command, compiler.identity, _processor(), sys.platform)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    with _folder() as folder:
        library = _kept(folder, key) or _compiled(compiler, source, flags, folder, key)
        function = ctypes.CDLL(str(library)).run
    function.restype = None
    return function


def cache_folder() -> Path:
    """Return the folder of compiled passes, which may not exist."""
    if named := os.environ.get(CACHE):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlpcore"
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "mlpcore"


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Yield the cache folder or, if it cannot be used, one that is removed at the end."""
    reason = _why_no_cache()
    if not reason:
        yield cache_folder()
        return
    _say_once(reason)
    with tempfile.TemporaryDirectory(prefix="mlpcore-") as folder:
        yield Path(folder)


def _why_no_cache() -> str:
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = folder.stat()
        if there.st_uid != os.geteuid() or there.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write to {folder}"
        if not os.access(folder, os.W_OK):
            return f"{folder} is read-only"
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        return str(error)
    return ""


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("compiled passes are not kept for the next process: %s", reason)


def _kept(folder: Path, key: str) -> Path | None:
    """Return the library of this key if it is there and whole."""
    for library in folder.glob(f"{key}-*.so"):
        content = library.read_bytes()
        if library.name == _name(key, content):
            return library
        library.unlink(missing_ok=True)
    return None


def _name(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _compiled(
    compiler: Compiler, source: str, flags: Sequence[str], folder: Path, key: str
) -> Path:
    """Compile a source into a library in this folder; it appears there whole, or not at all."""
    with tempfile.TemporaryDirectory(prefix="part-", dir=folder) as part:
        file, made = Path(part, "passes.cpp"), Path(part, "passes.so")
        file.write_text(source, encoding="utf-8")
        try:
            done = subprocess.run(
                [*compiler.command, *flags, "-o", str(made), str(file)],
                capture_output=True, text=True, errors="replace", timeout=SECONDS,
                stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CompilationFailed(f"took more than {SECONDS} s") from None
        if done.returncode or not made.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            first = next((line for line in lines if "error" in line), lines[0] if lines else "")
            raise CompilationFailed(f"ended with code {done.returncode}: {first.strip()}")
        library = folder / _name(key, made.read_bytes())
        os.replace(made, library)
    return library


def _renew_after_fork() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_after_fork)
