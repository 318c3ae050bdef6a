"""The compiled passes of `kernels/cpu_passes.cpp`: their arguments, and the source of each."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpcore.backends import kernel_files
from mlpcore.backends.compiled import compiler
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
        "const T* x; const void* Y; const T* k; T* D; T* db; double* J; double* sums;"
        " const T* columns; int64 m; int64 n; int64 k_step; int64 accumulate; double most;"
        " double kept; double spread"
    ),
    "SumUp": (
        "const T* D; T* db; double* J; const double* sums; int64 m; int64 n; int64 accumulate"
    ),
    "Update": "T* v0; T* v1; T* v2; T* v3; const T* const* k; int64 n",
    "Product": (
        "const T* A; const T* B; T* C; int64 m; int64 n; int64 k; int64 a_row; int64 a_column;"
        " int64 b_row; int64 b_column; int64 c_row; int64 accumulate"
    ),
    "Gather": (
        "T* to; const void* source; const int64* place; int64 m; int64 n; int64 row; int64 column"
    ),
    "Advance": "int64* place; int64 rows",
    "Penalize": "const T* w; double* J; int64 n; double l1; double l2",
    "Steps": (
        "const void* calls; const int64* ends; int64 updates; int64 calls_end; int64 workers;"
        " int64* const* places; const int64* starts; const int64* row_numbers; double* const* J;"
        " const T* g; double* squares; double* losses; const double* rates; double* settings;"
        " const double* factors; T* const* numbers; double* reach; int64* done; int64 segments;"
        " int64 settings_each; int64 steps; int64 number; int64 rows; int64 n; int64 threads;"
        " double done_before; double clip_norm; double floor; double roots; double halves"
    ),
}
TYPES = {"float32": "float", "float64": "double"}
FUSED = ("-ffp-contract=fast",)  # for products: their bits need not be those of another order
PASSES, PRODUCTS, STEPS = "cpu_passes.cpp", "cpu_products.cpp", "cpu_steps.cpp"
FILES = {
    "multiply": PRODUCTS,
    **dict.fromkeys(("gather", "advance", "penalize", "run_steps"), STEPS),
}


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


def source(template: str, type: str, formula: str = "", options: tuple[Any, ...] = ()) -> str:
    """Return the C++ of one pass, which exports it as `run`, and a thread's part as `run_part`.

    Args:
        template: the pass's name, and that of its arguments: "activate Activate".
        type: the C++ type of the matrices.
        formula: the struct of its formula, from `formula_text`; "": the pass has none.
        options: the template's flags and further types.
    """
    seen = set[str]()
    functions = _code(kernel_files.inlined("cpu_math.h", seen, {}))
    more_functions = _code(kernel_files.inlined("functions.cuh", seen, {}))
    declared = "\n".join(
        f"template <class T>\nstruct {name} {{ {fields}; }};" for name, fields in ARGUMENTS.items()
    )
    name, arguments = template.split()
    file = FILES.get(name, PASSES)
    passes = _code(kernel_files.inlined(file, seen, {"arguments.h": declared}))
    flags = [option if isinstance(option, str) else str(option).lower() for option in options]
    instance = ", ".join([type, *(["Formula"] if formula else []), *flags])
    given = f"*static_cast<const {arguments}<{type}>*>(arguments)"
    system = [line for line in passes.splitlines() if line.startswith("#include <")]
    return "\n".join(
        [
            *system,
            "#define __device__",
            "#define __forceinline__ inline __attribute__((always_inline))",
            functions,
            "namespace mlp {",
            "using int64 = long long;",
            more_functions,
            formula,
            re.sub("#include <.*", "", passes),
            "}  // namespace mlp",
            "using namespace mlp;",
            'extern "C" void run_part(const void* arguments, int64 index, int64 count) {',
            f"  {name}<{instance}>({given}, Part{{index, count}});",
            "}",
            'extern "C" void run(const void* arguments) { run_part(arguments, 0, 1); }',
            "",
        ]
    )


def _code(text: str) -> str:
    """Return a text without its comments, whose letters would double its size in memory."""
    return re.sub("[ \t]*//.*", "", text)


@functools.cache
def _digest(template: str, type: str, formula: str, options: tuple[Any, ...]) -> bytes:
    """Return the digest of a pass's source; the text itself, 25 KB each, is not kept."""
    return compiler.digest(source(template, type, formula, options))


def load(template: str, type: str, formula: str = "", options: tuple[Any, ...] = ()) -> Any:
    """Return a pass as a function, or None if it cannot be compiled; arguments as in `source`."""
    found = compiler.loaded(_digest(template, type, formula, options))
    if found is not None or compiler.why_not():
        return found
    name = template.split()[0]
    flags = FUSED if FILES.get(name) == PRODUCTS else ()
    return compiler.load(source(template, type, formula, options), f"{name}<{type}>", flags)


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
