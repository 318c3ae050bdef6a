"""Kernels for the CPU: sources compiled by g++ under cuda_on_cpu.hpp, many in one run, and kept for
the length of the process.

A kernel that is asked for is compiled when it is first launched, together with all others that were
asked for until then.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HEADER = Path(__file__).parent / "cuda_on_cpu.hpp"
LINK = ["-shared", "-nodefaultlibs", "-lm", "-lc", "-lgcc"]
FLAGS = [
    *("-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w"),
    *("-fPIC", "-fvisibility=hidden"),
    *("-U_FORTIFY_SOURCE", "-fcf-protection=none"),  # they take fibers for attacks
    # every access to memory calls a function of the header's
    "-fsanitize=kernel-address,alignment",
    *(
        f"--param=asan-{option}"
        for option in ("instrumentation-with-call-threshold=0", "stack=0", "globals=0")
    ),
]


class CpuKernel:
    """A kernel instance.

    Attributes:
        types: the C++ types of its parameters, as g++ spells them; once it is compiled.
        sizes: of those types, in bytes.
    """

    types: tuple[str, ...]
    sizes: tuple[int, ...]

    def __init__(self, source: str, name: str):
        self.source, self.name = source, name

    def load(self, library: ctypes.CDLL, number: int) -> None:
        """Take the functions that CUDA_ON_CPU_KERNEL(number, …) defines."""
        spell, self._launch = library[f"types_{number}"], library[f"launch_{number}"]
        spell.restype = self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [ctypes.c_void_p] * 3
        text = re.sub(r"\{anonymous\}::|k\d+::", "", spell().decode())
        self.types = tuple(re.search(r"Types = \{(.*?)\}; void", text)[1].split(", "))
        size = library[f"size_{number}"]
        size.argtypes, size.restype = [ctypes.c_size_t], ctypes.c_size_t
        self.sizes = tuple(size(i) for i in range(len(self.types)))

    def run(self, arguments: ctypes.Array, grid: ctypes.Array, ranges: ctypes.Array) -> None:
        """Run a grid: void**, Grid and Range[] of cuda_on_cpu.hpp. Raises RuntimeError if it goes
        wrong.
        """
        fault = self._launch(arguments, grid, ranges)
        if fault:
            raise RuntimeError(f"{self.name} on {list(grid)[:4]}: {fault.decode()}")


_kernels: dict[tuple[str, str], CpuKernel] = {}
_waiting: list[CpuKernel] = []


def kernel(source: str, name: str) -> CpuKernel:
    """The kernel instance `name` of a source; the same object for the same text."""
    if (source, name) not in _kernels:
        _kernels[source, name] = CpuKernel(source, name)
        _waiting.append(_kernels[source, name])
    return _kernels[source, name]


def compile_waiting() -> None:
    """Compile what was asked for and not yet compiled. Raises RuntimeError with g++'s messages;
    what is right is compiled.
    """
    waiting = _waiting.copy()
    _waiting.clear()
    errors = _compile_or_halve(waiting)
    if errors:
        raise errors[0]


def _compile_or_halve(kernels: Sequence[CpuKernel]) -> list[RuntimeError]:
    """Compile kernels, without those that are wrong; what is wrong with them."""
    try:
        _compile(kernels)
    except RuntimeError as error:
        if len(kernels) > 1:
            half = len(kernels) // 2
            return _compile_or_halve(kernels[:half]) + _compile_or_halve(kernels[half:])
        del _kernels[kernels[0].source, kernels[0].name]
        return [error]
    return []


def _compile(kernels: Sequence[CpuKernel]) -> None:
    """One run of g++, each source once in a namespace of its own."""
    if not kernels:
        return
    _copy_header()
    parts = [f'#include "{HEADER.name}"']
    for i, source in enumerate(dict.fromkeys(kernel.source for kernel in kernels)):
        instances = [
            f"CUDA_ON_CPU_KERNEL({n}, {kernel.name})"
            for n, kernel in enumerate(kernels)
            if kernel.source == source
        ]
        parts += [f"namespace k{i} {{ namespace {{", source, "}", *instances, "}"]
    text = "\n".join(parts)
    file = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    file.write_text(text)
    library = file.with_suffix(".so")
    _run_compiler([file, *LINK, "-o", library], ", ".join(kernel.name for kernel in kernels))
    functions = ctypes.CDLL(str(library))
    for n, kernel in enumerate(kernels):
        kernel.load(functions, n)


def _run_compiler(arguments: Sequence[str | Path], what: str) -> None:
    done = subprocess.run(["g++", *FLAGS, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ does not compile {what}:\n{done.stderr[:4000]}")


@functools.cache
def _copy_header() -> None:
    """Put the header into the folder and precompile it: each run of g++ would parse <math.h> for
    half of its time.
    """
    copy = _folder() / HEADER.name
    shutil.copy(HEADER, copy)
    _run_compiler(["-x", "c++-header", copy, "-o", f"{copy}.gch"], HEADER.name)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cuda_on_cpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
