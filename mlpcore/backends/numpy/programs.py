"""Formulas of activations and losses, compiled for the arrays that they read and write."""

from __future__ import annotations

from mlpcore.core.activation import Activation
from mlpcore.core.losses import Objective
from mlpcore.core.program import Program, program

PIECE = 32768  # entries per pass of a formula: its inputs and outputs stay in L2


def piece_rows(rows: int, columns: int) -> int:
    """Return the number of rows in a piece of a matrix, at least one."""
    return max(1, min(rows, PIECE // columns))


def value(activation: Activation, dtype: str, in_place: bool) -> Program | None:
    """Compile Z = σ(s), written into s if Z is S; None if there is nothing to compute."""
    if activation.value == "s" and in_place:
        return None
    formula = f"{'s' if in_place else 'z'} = {activation.value}"
    return program(formula, frozenset(activation.scalars), dtype)


def slope(activation: Activation, dtype: str, target: str) -> Program:
    """Compile D = G σ', written into the array that shares memory with D."""
    formula = "g" if activation.slope == "1" else f"g * ({activation.slope})"
    return program(f"{target} = {formula}", frozenset(activation.scalars), dtype)


def curvature(activation: Activation, dtype: str, target: str) -> Program:
    """Compile D = G σ' + H T σ'', written into the array that shares memory with D."""
    formula = f"g * ({activation.slope}) + h * t * ({activation.curvature})"
    return program(f"{target} = {formula}", frozenset(activation.scalars), dtype)


def by_parameter(activation: Activation, dtype: str) -> Program:
    """Compile P = G ∂z/∂a."""
    formula = f"p = g * ({activation.by_parameter})"
    return program(formula, frozenset(activation.scalars), dtype)


def loss(objective: Objective, dtype: str, in_place: bool) -> tuple[Program, Program]:
    """Compile V = k ℓ and D = k ∂ℓ/∂x, the latter written into x if D is x."""
    scalars, target = frozenset(dict(objective.scalars)), "x" if in_place else "d"
    losses = program(f"v = k * ({objective.value})", scalars, dtype)
    return losses, program(f"{target} = k * ({objective.slope})", scalars, dtype)
