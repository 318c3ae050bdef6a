"""CUDA C++ from `kernels/` and from formulas: one source per kernel, without includes.

A formula goes through the same `Program` that NumPy runs, so both compute the same operations in
the same order:

    relu  →  struct Formula { template <class C> static C value(C s) { C z; z = maximum(s, C(0.0));
    return z; } };
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping, Sequence

from mlpcore.backends.cuda import kernel_files
from mlpcore.backends.cuda import slot as cuda_slot
from mlpcore.core.activation import Activation
from mlpcore.core.formulas import parse, reads
from mlpcore.core.losses import Objective
from mlpcore.core.program import Program, program

TYPES = {
    "float32": "float", "float64": "double", "float16": "half_t", "bfloat16": "bfloat16_t",
    "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long",
    "uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned int",
    "uint64": "unsigned long long", "bool": "bool",
}  # fmt: skip
_INLINE = "  template <class C> static __device__ __forceinline__"
_INFIX = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_FUNCTIONS = {"abs": "absolute", "negative": "-", "copy": "", "normcdf": "normal_cdf"}


@functools.cache
def text(file: str, formula: str = "") -> str:
    """Return the source of a file in `kernels/`: its includes, a formula's struct, the file."""
    seen: set[str] = set()
    return f"{_inline('numbers.cuh', seen)}\n{formula}\n{_inline(file, seen)}"


def _inline(file: str, seen: set[str]) -> str:
    """Return a file with each header inlined once; `#line` keeps messages' line numbers correct."""
    if file in seen:
        return ""
    seen.add(file)
    lines = []
    for number, line in enumerate(_read(file).splitlines(), 1):
        include = re.match(r'#include "(.+)"', line)
        if include:
            lines += [_inline(include[1], seen), f'#line {number + 1} "{file}"']
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join([f'#line 1 "{file}"', *lines])


@functools.cache
def _read(file: str) -> str:
    return cuda_slot.declarations() if file == "slot.cuh" else kernel_files.read(file)


# -- formulas --


def _statements(compiled: Program, values: Mapping[str, float] | None = None) -> str:
    """Return a program as C++ statements, with scalars from `values` or from the array `k`."""
    keys = list(compiled.folded)
    if values is None:
        names = {key: f"k[{i}]" for i, key in enumerate(keys)}
    else:
        names = {key: f"C({value!r})" for key, value in compiled.fold(values).items()}
    lines = [f"C r{i};" for i in range(compiled.registers)]
    for function, operands, out in compiled.instructions:
        inputs = [names.get(x, x) for x in operands]
        if function in _INFIX:
            lines.append(f"{out} = {inputs[0]} {_INFIX[function]} {inputs[1]};")
        else:
            lines.append(f"{out} = {_FUNCTIONS.get(function, function)}({', '.join(inputs)});")
    return " ".join(lines)


def _function(
    name: str, arguments: str, target: str, formula: str, scalars: Mapping[str, float]
) -> str:
    parameters = ", ".join(f"C {argument}" for argument in arguments.split())
    body = _statements(program(f"{target} = {formula}", frozenset(scalars)), scalars)
    return f"{_INLINE} C {name}({parameters}) {{ C {target}; {body} return {target}; }}"


def _struct(*lines: str) -> str:
    return "\n".join(["struct Formula {", *lines, "};"])


def activation(sigma: Activation) -> str:
    """Return the struct of an activation: `value(s)` and `gradient(g, s, z)` = g σ'.

    Its flags tell which of s and z the gradient reads. If the activation is bound to a learned
    parameter, both also read `a`, and there is `by_parameter(g, s, z, a)` = g ∂z/∂a.
    """
    return _activation(sigma, sigma.a is not None)


@functools.cache
def _activation(sigma: Activation, learned: bool) -> str:
    slope, a = "g" if sigma.slope == "1" else f"g * ({sigma.slope})", " a" if learned else ""
    read = reads(sigma.slope) | (reads(sigma.by_parameter) if learned else set())
    functions = [
        _function("value", f"s{a}", "z", sigma.value, sigma.scalars),
        _function("gradient", f"g s z{a}", "d", slope, sigma.scalars),
    ]
    if learned:
        functions.append(
            _function("by_parameter", "g s z a", "d", f"g * ({sigma.by_parameter})", sigma.scalars)
        )
    return _struct(
        *(f"  static constexpr bool reads_{x} = {str(x in read).lower()};" for x in "sz"),
        *functions,
    )


@functools.cache
def loss(objective: Objective) -> str:
    """Return the struct of an elementwise loss, with p of the column.

    It has `value(x, y, k, p)` = k ℓ and `slope(x, y, k, p)` = k ∂ℓ/∂x.
    """
    scalars = dict(objective.scalars)
    return _struct(
        f"  static constexpr bool reads_columns = {str(bool(objective.loss.columns)).lower()};",
        _function("value", "x y k p", "v", f"k * ({objective.value})", scalars),
        _function("slope", "x y k p", "d", f"k * ({objective.slope})", scalars),
    )


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
    names = [*vectors, *(f"unused{i}" for i in range(4 - len(vectors)))]
    written = {out for _, _, out in compiled.instructions}
    writes = sum(1 << i for i, name in enumerate(vectors) if name in written and name != kept)
    lines = [
        f"  static constexpr int arrays = {len(vectors)}, scalars = {len(compiled.folded)}, writes "
        f"= {writes};",
        f"  static constexpr int decay = {settings.index('decay') if 'decay' in settings else -1}; "
        " // its index",
        f"{_INLINE} void run({', '.join(f'C& {x}' for x in names)}, const C* k) "
        f"{{ {_statements(compiled)} }}",
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
    return _struct(*lines)


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
            return f"{_FUNCTIONS.get(name, name)}({', '.join(_scalar(x) for x in arguments)})"
    raise AssertionError(ast.dump(node))
