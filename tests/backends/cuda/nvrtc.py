"""CUDA C++ compiled by NVRTC as CuPy does it, with no GPU and no driver: PTX, and what ptxas says
of each kernel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

OPTIONS = ["--std=c++17", "-ftz=true", "--device-int128", "--ptxas-options=-v"]


class Kernel(NamedTuple):
    """A compiled instance.

    Attributes:
        ptx: its own part of the PTX.
        registers: a thread's.
        stack: bytes of a thread's stack frame.
        spills: bytes that are written to it for want of registers.
    """

    ptx: str
    registers: int
    stack: int
    spills: int


def compile_kernels(source: str, names: Sequence[str], architecture: str) -> dict[str, Kernel]:
    """The instances `names` of a source, for an architecture such as "sm_90"; a RuntimeError says
    what does not compile.
    """
    from cuda.bindings import nvrtc  # a wheel of its own, which only these tests need

    def call(function, *arguments):
        status, *results = function(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{function.__name__}: {status.name}")
        return results[0] if len(results) == 1 else results

    def text(size, get):
        content = bytes(call(size, program))
        call(get, program, content)
        return content.decode().rstrip("\0")

    program = call(nvrtc.nvrtcCreateProgram, source.encode(), b"kernels.cu", 0, [], [])
    try:
        for name in names:
            call(nvrtc.nvrtcAddNameExpression, program, name.encode())
        options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={architecture}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC does not compile for {architecture}:\n{log[:4000]}")
        ptx = text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        mangled = {
            name: call(nvrtc.nvrtcGetLoweredName, program, name.encode()).decode() for name in names
        }
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^\}", ptx, re.M | re.S))
    reports = {
        name: tuple(map(int, numbers))
        for name, *numbers in re.findall(
            r"Compiling entry function '(\w+)' for .*?(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores.*?Used (\d+) registers",
            log, re.S,
        )
    }  # fmt: skip
    found = {}
    for name, entry in mangled.items():
        stack, spills, registers = reports[entry]
        found[name] = Kernel(bodies[entry], registers, stack, spills)
    return found
