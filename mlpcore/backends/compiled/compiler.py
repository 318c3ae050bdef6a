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
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("mlpcore")
SWITCH = "MLPCORE_COMPILE"  # environment variable: one of OFF leaves all passes to NumPy
OFF = ("0", "off", "false", "no")
CACHE = "MLPCORE_CACHE"  # environment variable: the folder of compiled passes
NAMES = ("g++", "clang++", "c++")
FLAGS = (
    "-std=c++17", "-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fPIC", "-shared", "-pthread", "-w",
)  # fmt: skip
SECONDS = 120  # limit on one compilation
STALE = 86_400  # seconds after which the folder of a compilation is what a killed process left
REMEDY = "install one, for example by `apt install g++`"

_lock = threading.Lock()
_functions: dict[bytes, Any] = {}  # by the digest of the source
_took: dict[bytes, float] = {}  # seconds by digest, of those that the cache did not have
_failure: list[str] = []  # why the compiler is no longer used
_unkept: list[str] = []  # why the cache is not used


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


def load(source: str, name: str = "a pass", flags: Sequence[str] = ()) -> Any:
    """Return the function `run` of a C++ source; None if it cannot be compiled here.

    It is compiled unless the cache has it. After one failure, which is logged, nothing more is
    compiled in this process.

    Args:
        source: the text.
        name: its name in the log.
        flags: the compiler's flags, in addition to `FLAGS`.
    """
    key = digest(source)
    function = _functions.get(key)
    if function is not None or why_not():
        return function
    with _lock:
        if key not in _functions and not _failure:
            try:
                _functions[key] = _loaded(source, name, (*_flags(), *flags))
            except (CompilationFailed, OSError, AttributeError) as error:  # the last: no `run`
                _failure.append(f"{shlex.join(_required().command)}: {error}")
                log.warning("NumPy computes what would be compiled: %s", _failure[0])
    return _functions.get(key)


def digest(source: str) -> bytes:
    """Return the digest by which a source's function is known in this process."""
    return hashlib.sha256(source.encode()).digest()


def loaded(key: bytes) -> Any:
    """Return the function of a source that has been loaded, by its digest, or None."""
    return _functions.get(key)


def counts() -> tuple[int, int, float]:
    """Return the sources compiled by this process, those found in the cache, and the seconds."""
    return len(_took), len(_functions) - len(_took), sum(_took.values())


def why_not() -> str:
    """Return why passes are not compiled, or "" if they are."""
    if _failure:
        return _failure[0]
    return _why_never(os.environ.get(SWITCH, ""), os.environ.get("CXX", ""))


@functools.cache
def _why_never(switch: str, cxx: str) -> str:
    if switch.strip().lower() in OFF:
        return f"{SWITCH} is {switch}"
    if os.name != "posix":
        return "only on Linux and macOS"
    if _find(cxx) is None:
        if cxx:
            return f"CXX is {cxx!r}, which is not on the PATH: unset it, or name a compiler"
        return f"no C++ compiler ({', '.join(NAMES)}) is on the PATH: {REMEDY}"
    return ""


def describe() -> str:
    """Return in one line the compiler and its cache folder, or why NumPy computes all passes."""
    if reason := why_not():
        return f"NumPy: {reason}"
    compiler = _required()
    try:
        said = _run([*compiler.command, "--version"], 10)[1]
    except (OSError, CompilationFailed) as error:
        said = str(error)
    reason = _why_no_cache()
    kept = f"not kept: {reason}" if reason else f"kept in {cache_folder()}"
    return f"compiled by {said.partition(chr(10))[0] or shlex.join(compiler.command)}, {kept}"


def _run(command: list[str], seconds: float, **more: Any) -> tuple[int, str, str]:
    """Return the status, output and errors of a program; however this ends, the program ends.

    It gets no Ctrl-C from the terminal, which is for the caller to handle.
    """
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", process_group=0, **more,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()  # which `with` does not after KeyboardInterrupt
            if isinstance(error, subprocess.TimeoutExpired):
                raise CompilationFailed(f"took more than {seconds} s") from None
            raise
    return process.returncode, output, errors


@functools.cache
def _find(cxx: str) -> Compiler | None:
    """Return the compiler that CXX names or, if it is empty, the first of `NAMES` found."""
    for name in [cxx] if cxx else NAMES:
        try:
            program, *arguments = shlex.split(name) or [""]
        except ValueError:  # a quotation mark that is not closed
            return None
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
        kept = re.findall(
            r"^(?:model name|cpu family|model|flags|Features|CPU \w+)\s*:.*$", text, re.M
        )
        if kept:
            return "\n".join(sorted({*kept}))
    return f"{platform.machine()} {platform.processor()} {platform.release()}"


def _flags() -> tuple[str, ...]:
    native = (
        "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    )
    return (*FLAGS, native)


# -- libraries --


def _loaded(source: str, name: str, flags: Sequence[str]) -> Any:
    compiler = _required()
    parts = (source, *flags, *compiler.command, compiler.identity, _processor(), sys.platform)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    reason = _why_no_cache()
    if not reason and (function := _kept(cache_folder(), key)):
        return function
    began = time.perf_counter()
    function = None
    if not reason:
        try:
            function = _compiled(compiler, flags, source, cache_folder(), key)
        except OSError as error:  # full, read-only, or no place for programs
            reason = str(error)
    if function is None:
        with tempfile.TemporaryDirectory(prefix="mlpcore-", ignore_cleanup_errors=True) as folder:
            function = _compiled(compiler, flags, source, Path(folder), key)
        if not _unkept:
            _unkept.append(reason)
            log.warning(
                "compiled passes are not kept for the next process: %s; %s may name another folder",
                reason,
                CACHE,
            )
    _took[digest(source)] = seconds = time.perf_counter() - began
    log.info("compiled %s in %.1f s", name, seconds)
    return function


def cache_folder() -> Path:
    """Return the folder of compiled passes, which may not exist."""
    if named := os.environ.get(CACHE):
        return Path(named).absolute()  # a library's name without a "/" would be searched for
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlpcore"
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "mlpcore"


def _why_no_cache() -> str:
    """Return why the cache folder, which is made, cannot be trusted, or ""."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        return str(error)
    if there.st_uid not in (0, os.geteuid()) or there.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {folder}"
    return ""


def _kept(folder: Path, key: str) -> Any:
    """Return the function of the library of this key if it is there, whole and accepted."""
    for library in folder.glob(f"{key}-*.so"):
        with contextlib.suppress(OSError, AttributeError):
            if library.name == _name(key, library):
                return _function(library)
        with contextlib.suppress(OSError):
            library.unlink()
    return None


def _function(library: Path) -> Any:
    loaded: Any = ctypes.CDLL(str(library))
    loaded.run.restype = None
    loaded.run.library = loaded
    return loaded.run


def _name(key: str, library: Path) -> str:
    with library.open("rb") as file:
        return f"{key}-{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}.so"


def _compiled(compiler: Compiler, flags: Sequence[str], source: str, folder: Path, key: str) -> Any:
    """Compile a source into a library in this folder, where it appears whole or not at all."""
    for left in folder.glob("part-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix="part-", dir=folder, ignore_cleanup_errors=True
    ) as part:
        file, made = Path(part, "passes.cpp"), Path(part, "passes.so")
        file.write_text(source, encoding="utf-8")
        command = [*compiler.command, *flags, "-o", str(made), str(file)]
        environment = {**os.environ, "TMPDIR": part, "LC_ALL": "C"}
        code, _, errors = _run(command, SECONDS, env=environment)
        if code or not made.is_file():
            lines = [line for line in errors.splitlines() if line.strip()]
            first = lines[0] if lines else "it wrote no library"
            first = next((line for line in lines if "error" in line), first)
            raise CompilationFailed(f"ended with code {code}: {first.strip():.300}")
        function = _function(made)
        os.replace(made, folder / _name(key, made))
    return function


def _renew_after_fork() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_after_fork)
