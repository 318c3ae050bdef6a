"""The compiled passes of `kernels/cpu_passes.cpp`: their arguments, and the source of each."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpcore.backends import kernel_files
from mlpcore.core.ops import Call

# the fields of each pass's arguments; T is the type of the matrices
ARGUMENTS = {
    "Activate": (
        "T* S; const T* b; T* Z; const T* a; const int64* place; int64 m; int64 n; int64 key;"
        " int64 threshold"
    ),
    "Descend": (
        "const T* G; const T* S; const T* Z; T* D; T* db; const T* a; int64 m; int64 n;"
        " int64 accumulate"
    ),
    "Loss": (
        "const T* x; const void* Y; const T* k; T* D; T* db; double* J; const T* columns; int64 m;"
        " int64 n; int64 k_step; int64 accumulate; double most; double kept; double spread"
    ),
    "Update": "T* v0; T* v1; T* v2; T* v3; const T* const* k; int64 n",
}
TYPES = {"float32": "float", "float64": "double"}


@functools.cache
def structure(name: str) -> type[ctypes.Structure]:
    """Return the ctypes structure of a pass's arguments."""
    fields = []
    for field in ARGUMENTS[name].split("; "):
        declared, identifier = field.rsplit(" ", 1)
        kind = ctypes.c_void_p if declared.endswith("*") else _NUMBERS[declared]
        fields.append((identifier, kind))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_NUMBERS: dict[str, Any] = {"int64": ctypes.c_int64, "double": ctypes.c_double}


@functools.cache
def source(template: str, dtype: str, formula: str = "", options: tuple[bool, ...] = ()) -> str:
    """Return the C++ of one pass, which exports it as `run`.

    Args:
        template: the pass's name in `cpu_passes.cpp` and that of its arguments: "drop Activate".
        dtype: "float32" or "float64".
        formula: the struct of its formula, from `formula_text`; "": the pass has none.
        options: values of the template's flags.
    """
    seen = set[str]()
    functions = kernel_files.inlined("cpu_math.h", seen, {})
    more_functions = kernel_files.inlined("functions.cuh", seen, {})
    declared = "\n".join(
        f"template <class T>\nstruct {name} {{ {fields}; }};" for name, fields in ARGUMENTS.items()
    )
    passes = kernel_files.inlined("cpu_passes.cpp", seen, {"arguments.h": declared})
    name, arguments = template.split()
    flags = [str(option).lower() for option in options]
    instance = ", ".join([TYPES[dtype], *(["Formula"] if formula else []), *flags])
    given = f"*static_cast<const {arguments}<{TYPES[dtype]}>*>(arguments)"
    return "\n".join(
        [
            "#define __device__",
            "#define __forceinline__ inline __attribute__((always_inline))",
            functions,
            "namespace mlp {",
            "using int64 = long long;",
            more_functions,
            formula,
            passes,
            "}  // namespace mlp",
            'extern "C" void run(const void* arguments) {',
            "  using namespace mlp;",
            f"  {name}<{instance}>({given});",
            "}",
            "",
        ]
    )


def call(run: Any, name: str, given: Mapping[str, Any], alive: object = None) -> Call:
    """Return a call of a pass.

    Args:
        run: the compiled function.
        name: name of its arguments.
        given: arguments by name: arrays, numbers, or None for a null pointer.
        alive: what must live as long as the call, apart from the arrays.
    """
    arguments = structure(name)()
    for field, value in given.items():
        address = isinstance(value, np.ndarray)
        setattr(arguments, field, value.ctypes.data if address else value)
    arguments.alive = [*given.values(), alive]
    return run, ctypes.byref(arguments)
