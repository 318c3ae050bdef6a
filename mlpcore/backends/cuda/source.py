"""CUDA C++ from `kernels/` and from formulas: one source per kernel, without includes."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence

from mlpcore.backends import kernel_files
from mlpcore.backends.cuda import slot as cuda_slot
from mlpcore.backends.formula_text import FUNCTIONS, over_vectors, struct
from mlpcore.core.formulas import parse, reads
from mlpcore.core.program import Program

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


def update(
    compiled: Program,
    vectors: Sequence[str],
    settings: Sequence[str] = (),
    flags: Sequence[str] = (),
    kept: str = "",
    bounds: tuple[str, str] = ("0", "0"),
) -> str:
    """Return the struct of statements on flat vectors.

    It has `run` for one entry, `fold` for the scalars, and `bounds` in double.

    Args:
        compiled: the statements' program.
        vectors: names of the vectors, at most four, in the order of the kernel's arguments.
        settings: scalars that `fold` reads from the slot, in the slot's order.
        flags: those `settings` that are 0 on biases.
        kept: a vector whose entries change only temporarily and are not written; or "".
        bounds: formulas of the largest entry of the first state vector, and of the largest change.
    """
    return _update(compiled, tuple(vectors), tuple(settings), tuple(flags), kept, bounds)


@functools.cache
def _update(
    compiled: Program,
    vectors: tuple[str, ...],
    settings: tuple[str, ...],
    flags: tuple[str, ...],
    kept: str,
    bounds: tuple[str, str],
) -> str:
    lines = [
        *over_vectors(compiled, vectors, kept),
        f"  static constexpr int decay = {settings.index('decay') if 'decay' in settings else -1}; "
        " // its index",
    ]
    values = [
        f"const double {x} = "
        f"{f'weights ? settings[{i}] : 0.0' if x in flags else f'settings[{i}]'};"
        for i, x in enumerate(settings)
    ]
    folded = [
        f"k[{i}] = {_scalar(parse(source))};"
        for i, source in enumerate(compiled.folded_text.values())
    ]
    lines.append(
        "  static __device__ void fold(const double* settings, double t, double clip, double "
        "unscale, bool weights, double* k) "
        f"{{ {' '.join([*values, *folded])} }}"
    )
    read = {"G", "reach"}.union(*map(reads, bounds))
    values = [f"const double {x} = settings[{i}];" for i, x in enumerate(settings) if x in read]
    lines.append(
        "  static __device__ void bounds(const double* settings, double G, double reach, double& "
        "after, double& change) "
        f"{{ {' '.join(values)} after = {_scalar(parse(bounds[0]))}; "
        f"change = {_scalar(parse(bounds[1]))}; }}"
    )
    return struct(*lines)


def _scalar(node: ast.expr) -> str:
    """Return a checked formula of scalars as a C++ expression in double."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return repr(float(value))
        case ast.Name(id=name):
            return name
        case ast.UnaryOp(operand=operand):
            return f"(-{_scalar(operand)})"
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return f"pow({_scalar(left)}, {_scalar(right)})"
        case ast.BinOp(left=left, op=op, right=right):
            sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}[type(op)]
            return f"({_scalar(left)} {sign} {_scalar(right)})"
        case ast.Call(func=ast.Name(id="T"), args=[x]):
            return _scalar(x)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return f"{FUNCTIONS.get(name, name)}({', '.join(_scalar(x) for x in arguments)})"
    raise AssertionError(ast.dump(node))
