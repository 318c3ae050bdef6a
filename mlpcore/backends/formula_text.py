"""C++ from formulas: the text of a struct that CUDA kernels and compiled CPU passes take.

A formula goes through the same `Program` that NumPy runs, so all compute the same operations in
the same order:

    relu  →  struct Formula { template <class C> static C value(C s) { C z; z = maximum(s, C(0.0));
    return z; } };
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence

from mlpcore.core.activation import Activation
from mlpcore.core.formulas import parse, reads
from mlpcore.core.losses import Objective
from mlpcore.core.program import Program, program

_INLINE = "  template <class C> static __device__ __forceinline__"
_INFIX = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_FUNCTIONS = {"abs": "absolute", "negative": "-", "copy": "", "normcdf": "normal_cdf"}


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
    name: str,
    arguments: str,
    target: str,
    formula: str,
    scalars: Mapping[str, float],
    dtype: str | None,
) -> str:
    parameters = ", ".join(f"C {argument}" for argument in arguments.split())
    body = _statements(program(f"{target} = {formula}", frozenset(scalars), dtype), scalars)
    return f"{_INLINE} C {name}({parameters}) {{ C {target}; {body} return {target}; }}"


def struct(*lines: str) -> str:
    """Return the struct with these members."""
    return "\n".join(["struct Formula {", *lines, "};"])


def activation(sigma: Activation, dtype: str | None = None) -> str:
    """Return the struct of an activation: `value(s)` and `gradient(g, s, z)` = g σ'.

    Its flags tell which of s and z the gradient reads. If the activation is bound to a learned
    parameter, both also read `a`, and there is `by_parameter(g, s, z, a)` = g ∂z/∂a.

    Args:
        sigma: the activation.
        dtype: as in `Program`: None if the functions of `core.special` are there.
    """
    return _activation(sigma, sigma.a is not None, dtype)


@functools.cache
def _activation(sigma: Activation, learned: bool, dtype: str | None) -> str:
    slope, a = "g" if sigma.slope == "1" else f"g * ({sigma.slope})", " a" if learned else ""
    read = reads(sigma.slope) | (reads(sigma.by_parameter) if learned else set())
    functions = [
        _function("value", f"s{a}", "z", sigma.value, sigma.scalars, dtype),
        _function("gradient", f"g s z{a}", "d", slope, sigma.scalars, dtype),
    ]
    if learned:
        functions.append(
            _function(
                "by_parameter",
                "g s z a",
                "d",
                f"g * ({sigma.by_parameter})",
                sigma.scalars,
                dtype,
            )
        )
    return struct(
        *(f"  static constexpr bool reads_{x} = {str(x in read).lower()};" for x in "sz"),
        *functions,
    )


@functools.cache
def loss(objective: Objective, dtype: str | None = None) -> str:
    """Return the struct of an elementwise loss, with p of the column.

    It has `value(x, y, k, p)` = k ℓ and `slope(x, y, k, p)` = k ∂ℓ/∂x. `dtype` is as in
    `activation`.
    """
    scalars = dict(objective.scalars)
    return struct(
        f"  static constexpr bool reads_columns = {str(bool(objective.loss.columns)).lower()};",
        _function("value", "x y k p", "v", f"k * ({objective.value})", scalars, dtype),
        _function("slope", "x y k p", "d", f"k * ({objective.slope})", scalars, dtype),
    )


def over_vectors(compiled: Program, vectors: Sequence[str], kept: str = "") -> list[str]:
    """Return the members of a struct of statements on flat vectors, with `run` for one entry.

    Args:
        compiled: the statements' program.
        vectors: names of the vectors, at most four, in the order of the arguments.
        kept: a vector whose entries change only temporarily and are not written; or "".
    """
    names = [*vectors, *(f"unused{i}" for i in range(4 - len(vectors)))]
    written = {out for _, _, out in compiled.instructions}
    writes = sum(1 << i for i, name in enumerate(vectors) if name in written and name != kept)
    return [
        f"  static constexpr int arrays = {len(vectors)}, scalars = {len(compiled.folded)}, writes "
        f"= {writes};",
        f"{_INLINE} void run({', '.join(f'C& {x}' for x in names)}, const C* k) "
        f"{{ {_statements(compiled)} }}",
    ]


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
            return f"{_FUNCTIONS.get(name, name)}({', '.join(_scalar(x) for x in arguments)})"
    raise AssertionError(ast.dump(node))
