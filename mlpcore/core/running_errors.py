"""Running error analysis of a forward pass: numbers with bounds of their rounding errors.

    |computed - exact| ≤ error        carried along with each number (Wilkinson 1963)

The bounds below, with u = ε/2 the unit roundoff and δs the error of an argument:

- Sums. S = Σ x w + b over n products is off by at most n u Σ|x||w| in any order of summation, and
  by u for the bias (Higham 2002, 3.1). After a step along a direction, w = θ + h v and x are
  rounded themselves, by u each; one more u covers all second-order terms: (n + 4) u in all.
- Functions of one operation: `ULPS` of their value, plus for each argument the larger of the
  changes in value at the two ends of its bound; exact to first order, and for monotonic functions
  of one argument.
- Softmax. ∂z_i/∂s_j = z_i (δ_ij - z_j), and Σ_{j≠i} z_j = 1 - z_i, thus
  |δz_i| ≤ z_i ((1 - z_i)|δs_i| + Σ_{j≠i} z_j |δs_j|) ≤ 2 z_i (1 - z_i) max|δs|. Two exponentials,
  n additions and a division add (n + 8) ε z_i.
- Cross-entropy. ∂(-log p_i)/∂s_j = p_j - δ_ij, thus |δ| ≤ 2 (1 - p_i) max|δs|. Exponentials, the
  sum and the logarithm add (n + 10) ε times the value.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.core import formulas
from mlpcore.core.activations import Activation
from mlpcore.core.program import program

Array = NDArray[Any]
EPS, TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)
ULPS = 4 * EPS  # relative error of one NumPy operation: the tolerance of NumPy's own tests


@dataclass
class Numbers:
    """Computed numbers, and bounds of their distance from the exact results."""

    value: Any = None
    error: Any = None

    def sum(self) -> Numbers:
        """Return the sums over the last axis."""
        total = np.sum(self.value, axis=-1)
        return Numbers(
            total, np.sum(self.error + self.value.shape[-1] * EPS * np.abs(self.value), axis=-1)
        )


class RunningErrors:
    """The one operation that `backprop.forward` needs, on numbers with bounds.

    Args:
        ops: a backend's operations on the host.

    Attributes:
        bounded: False to compute only the numbers; errors of layers and formulas are then 0.
    """

    def __init__(self, ops: Any):
        self.ops = ops
        self.bounded = True

    def layer(
        self,
        below: Numbers,
        W: Array,
        b: Array | None,
        activation: Activation,
        S: Numbers,
        Z: Numbers,
    ) -> None:
        """Fill S and Z of one layer."""
        rounding = (len(W) + 4) * EPS / 2
        S.value, S.error = below.value @ W, 0.0
        if b is not None:
            S.value += b
        if self.bounded:
            S.error = (rounding * np.abs(below.value) + below.error) @ np.abs(W) + TINY
            S.error += 0 if b is None else rounding * np.abs(b)
        if activation.logarithmic:
            found = cross_entropies(S)
            Z.value, Z.error = -found.value, found.error
        elif activation.rowwise:
            t = np.exp(S.value - S.value.max(axis=1, keepdims=True))
            Z.value = t / t.sum(axis=1, keepdims=True)
            Z.error = Z.value * ((1 - Z.value) * 2 * _row_error(S) + (t.shape[1] + 8) * EPS) + TINY
        else:
            learned = learned_arrays(activation, S.value).items()
            rounded = {name: Numbers(a, EPS / 2 * np.abs(a)) for name, a in learned}
            found = self.formula(activation.value, activation.scalars, s=S, **rounded)
            Z.value, Z.error = found.value, found.error

    def formula(self, formula: str, scalars: Mapping[str, float], **arguments: Numbers) -> Numbers:
        """Return the values of a formula, operation by operation."""
        if not self.bounded:
            given = {name: number.value for name, number in arguments.items()}
            return Numbers(self.evaluate(formula, scalars, given), 0.0)
        like = next(iter(arguments.values())).value
        known = dict(arguments)
        operations, result = _operations(formula, frozenset(scalars))
        for text, call, parts in operations:
            if call:
                known[text] = self._call(call, [known[part] for part in parts])
            else:
                number = formulas.evaluate_scalar(text, **scalars)
                known[text] = Numbers(np.full_like(like, number), np.zeros_like(like))
        return known[result]

    def _call(self, call: str, parts: list[Numbers]) -> Numbers:
        """Return one operation's values, bounded by those at the ends of its arguments' bounds."""
        here = {f"u{i}": part.value for i, part in enumerate(parts)}
        value = self.evaluate(call, {}, here)
        error = ULPS * np.abs(value) + TINY
        if not call.startswith(("positive", "sign")):  # rows at a jump are detected as kinks
            for name, part in zip(here, parts, strict=True):
                if part.error.any():
                    ends = [
                        self.evaluate(call, {}, here | {name: here[name] + e})
                        for e in (part.error, -part.error)
                    ]
                    error += np.fmax(*(np.abs(end - value) for end in ends))
        return Numbers(value, error)

    def evaluate(
        self, formula: str, scalars: Mapping[str, float], arrays: Mapping[str, Array]
    ) -> Array:
        """Return a formula's values for the given scalars and arrays."""
        out = np.empty_like(next(iter(arrays.values())))
        compiled = program(f"out = {formula}", frozenset(scalars), "float64")
        folded = {key: np.asarray(value) for key, value in compiled.fold(scalars).items()}
        named = {key: np.ascontiguousarray(array).reshape(-1) for key, array in arrays.items()}
        self.ops.map(compiled, {"out": out.reshape(-1), **named}, folded)
        return out


def learned_arrays(activation: Activation, s: Array) -> dict[str, Array]:
    """Return the learned parameter per pre-activation as {"a": …}, or {} if there is none."""
    if activation.a is None:
        return {}
    return {"a": np.ascontiguousarray(np.broadcast_to(activation.a, s.shape))}


@functools.cache
def _operations(
    formula: str, scalars: frozenset[str]
) -> tuple[list[tuple[str, str, list[str]]], str]:
    """Return a formula's operations in order, and the text of the last one.

    Each consists of its text, the operation as a formula of u0, u1, … ("" for a scalar), and the
    texts of its operands.
    """
    found: dict[str, tuple[str, str, list[str]]] = {}

    def visit(node: Any) -> str:
        text = ast.unparse(node)
        if formulas.reads(text) <= scalars:
            found[text] = (text, "", [])
        elif not isinstance(node, ast.Name) and text not in found:
            parts: list[ast.expr]
            call: ast.expr
            match node:
                case ast.BinOp(left=left, op=ast.Pow(), right=exponent):
                    parts, call = [left], ast.BinOp(ast.Name("u0"), ast.Pow(), exponent)
                case ast.BinOp(left=left, right=right):
                    parts, call = [left, right], ast.BinOp(ast.Name("u0"), node.op, ast.Name("u1"))
                case ast.UnaryOp(operand=operand):
                    parts, call = [operand], ast.UnaryOp(node.op, ast.Name("u0"))
                case _:
                    names: list[ast.expr] = [ast.Name(f"u{i}") for i in range(len(node.args))]
                    parts, call = node.args, ast.Call(node.func, names, [])
            operands = [visit(part) for part in parts]  # these come first in `found`
            found[text] = (text, ast.unparse(call), operands)
        return text

    result = visit(formulas.parse(formula))
    return list(found.values()), result


def _row_error(S: Numbers) -> Array:
    """Return the bound of the error of s_i - s_j for a row's pre-activations, (m, 1)."""
    found: Array = (S.error + EPS * np.abs(S.value)).max(axis=1, keepdims=True)
    return found


def cross_entropies(S: Numbers) -> Numbers:
    """Return -log p of each class, (m, n_L), also accurate if p is near 1.

    `ULPS` is added to the error for the rounding of p - y, which the engine uses as the slope: over
    a step that moves S by 1, the longest there is, the value changes by as much.
    """
    first = S.value.argmax(axis=1)[:, None]
    t = S.value - np.take_along_axis(S.value, first, axis=1)
    others = np.exp(t)  # all terms but the largest, which is 1 without rounding
    np.put_along_axis(others, first, 0, axis=1)
    value = np.log1p(others.sum(axis=1, keepdims=True)) - t
    moved, rounding = -np.expm1(-value) * 2 * _row_error(S), (value.shape[1] + 10) * EPS * value
    return Numbers(value, moved + rounding + ULPS)
