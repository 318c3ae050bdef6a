"""CUDA C++ from `kernels/` and from formulas: one source per kernel, without includes."""

from __future__ import annotations

import functools

from mlpcore.backends import kernel_files
from mlpcore.backends.cuda import slot as cuda_slot

TYPES = {
    "float32": "float", "float64": "double", "float16": "half_t", "bfloat16": "bfloat16_t",
    "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long",
    "uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned int",
    "uint64": "unsigned long long", "bool": "bool",
}  # fmt: skip


@functools.cache
def text(file: str, formula: str = "") -> str:
    """Return the source of a file in `kernels/`: its includes, a formula's struct, the file."""
    seen, generated = set[str](), {"slot.cuh": cuda_slot.declarations()}
    numbers = kernel_files.inlined("numbers.cuh", seen, generated)
    return f"{numbers}\n{formula}\n{kernel_files.inlined(file, seen, generated)}"
