"""NumPy's operations, with the passes between the products compiled: one pass over memory each.

An operation whose pass cannot be compiled, or whose arrays are empty, not contiguous or of a type
that no pass reads, is NumPy's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpcore.backends import formula_text
from mlpcore.backends.compiled import passes
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core.activation import Activation
from mlpcore.core.dropout import Dropped
from mlpcore.core.losses import Loss, Objective
from mlpcore.core.ops import Array, Input, Transposed, row_major
from mlpcore.core.program import Program

VECTORS = 4  # most vectors of an update
SMALL = 1 << 22  # multiplications of a product up to which ours needs no second thread


class CompiledOps(NumpyOps):
    """`core.ops.Ops` on NumPy arrays, by NumPy's products and compiled passes."""

    def __init__(self) -> None:
        super().__init__(np)
        # while calls are recorded for a `StepLoop`: True, and whether threads share each of them
        self.in_one_call = self.shared = False

    def gemm(self, A: Array, B: Array, C: Array, accumulate: bool = False) -> None:
        """Set C = A B, or C += A B. All may be transposed views, A an `Input`."""
        if not self._multiply(*row_major(A, B, C), accumulate):
            super().gemm(A, B, C, accumulate)

    def _multiply(self, A: Array, B: Array, C: Array, accumulate: bool) -> bool:
        """Run or record a compiled product; return False if NumPy must do it."""
        dtype, size = C.dtype.name, C.itemsize
        if isinstance(A, Input | Transposed) or not A.dtype == B.dtype == C.dtype:
            return False
        if dtype not in passes.TYPES or not C.dtype.isnative or C.strides[1] != size:
            return False
        strides = [stride // size for array in (A, B, C) for stride in array.strides]
        (m, n), k = C.shape, A.shape[1]
        names = ("a_row", "a_column", "b_row", "b_column", "c_row")
        given = {"A": A, "B": B, "C": C, "m": m, "n": n, "k": k, "accumulate": accumulate}
        given |= dict(zip(names, strides, strict=False))
        if m * n * k > SMALL and not self.in_one_call:
            return False
        run = passes.load("multiply Product", passes.TYPES[dtype])
        if run is None:
            return False
        self._do(*passes.call(run, "Product", given))
        return True

    def bias_activation(self, S: Array, b: Array | None, activation: Activation, Z: Array) -> None:
        """Set S += b and Z = σ(S), row by row. Z may be S."""
        if b is None and activation.value == "s" and Z is S:
            return
        a, dropped, (m, n) = activation.a, isinstance(activation, Dropped), S.shape
        options: tuple[bool, ...] = b is not None, activation.logarithmic
        if activation.rowwise:
            template, formula = "softmax", ""
        else:
            template = "activate_and_drop" if dropped else "activate"
            formula = formula_text.activation(activation, S.dtype.name)
            options = options[0], Z is not S, a is not None, a is not None and a.size > 1
        given = {"S": S, "b": b, "Z": Z, "a": a, "place": self.places, "m": m, "n": n}
        if isinstance(activation, Dropped):
            given |= {"key": activation.key, "threshold": activation.threshold}
        if not self._pass(f"{template} Activate", S, given, formula, options):
            super().bias_activation(S, b, activation, Z)

    def activation_gradient(
        self,
        G: Array,
        S: Array,
        Z: Array,
        activation: Activation,
        D: Array,
        db: Array | None,
        accumulate: bool = False,
    ) -> None:
        """Set D = G ⊙ σ'(S, Z), db = Σ_rows D, da = Σ G ⊙ ∂z/∂a, or db += …, da += ….

        D may be G or Z; otherwise S, Z and G are kept.
        """
        a, (m, n) = activation.a, Z.shape
        if not activation.rowwise and activation.da is None:
            formula = formula_text.activation(activation, Z.dtype.name)
            options = a is not None, a is not None and a.size > 1
            given = {"G": G, "S": S, "Z": Z, "D": D, "db": db, "a": a, "m": m, "n": n}
            given |= {"accumulate": accumulate}
            later = self._sum_later(given)
            if self._pass("descend Descend", Z, given, formula, options) and self._sum_up(later):
                return
        super().activation_gradient(G, S, Z, activation, D, db, accumulate)

    def loss(
        self,
        x: Array,
        Y: Array,
        k: Array,
        objective: Objective,
        D: Array,
        db: Array | None,
        J: Array,
        accumulate: bool,
    ) -> None:
        """Set J += Σ k ℓ(x, Y) and D = k ∂ℓ/∂x; with `db` also its sum over rows.

        x is S[L] if matched, else Z[L]; D may be x.
        """
        loss, (m, n) = objective.loss, x.shape
        given = {"x": x, "Y": Y, "k": k, "D": D, "db": db, "J": J, "m": m, "n": n}
        given |= {"columns": self._column_weights(loss, x.dtype), "accumulate": accumulate}
        given |= {"k_step": int(k.ndim > 0)}
        options: tuple[bool, ...] = ()
        labels = loss.rowwise and Y.ndim == 1
        fits = k.dtype == x.dtype and Y.dtype == (np.int64 if labels else x.dtype)
        if loss.rowwise:
            template, formula, options = "cross_entropy", "", (labels, loss.mixes(labels))
            given |= _of_classes(loss, n)
        else:
            template = "elementwise_loss"
            formula = formula_text.loss(objective, x.dtype.name)
        later = self._sum_later(given)
        done = fits and self._pass(f"{template} Loss", x, given, formula, options)
        if not (done and self._sum_up(later)):
            super().loss(x, Y, k, objective, D, db, J, accumulate)

    def map(
        self, program: Program, arrays: Mapping[str, Array], scalars: Mapping[str, Array]
    ) -> None:
        """Run elementwise statements over flat vectors in one pass."""
        first = next(iter(arrays.values()))
        if not first.size:
            return
        if len(arrays) <= VECTORS and {*scalars} == {*program.folded}:
            formula = formula_text.struct(*formula_text.over_vectors(program, [*arrays]))
            numbers = [scalars[key] for key in program.folded]
            k = np.array([number.ctypes.data for number in numbers], np.uintp)
            given = {f"v{i}": vector for i, vector in enumerate(arrays.values())}
            given |= {"k": k, "n": first.size}
            if self._pass("update Update", first, given, formula, alive=numbers):
                return
        super().map(program, arrays, scalars)

    def _sum_later(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the sums that a pass leaves to `_sum_up`, as threads may share it: else none."""
        if not self.shared:
            return {}
        names = ("D", "db", "m", "n", "accumulate", "J")
        later = {name: given[name] for name in names if name in given}
        given["db"] = None
        if "J" in given:
            # one for each block of rows, of which there is at most one for four
            given["sums"] = later["sums"] = np.empty(1 + given["m"] // 4)
        return later

    def _sum_up(self, later: dict[str, Any]) -> bool:
        return not later or self._pass("sum_up SumUp", later["D"], later)

    def _pass(
        self,
        template: str,
        first: Array,
        given: dict[str, Any],
        formula: str = "",
        options: tuple[bool, ...] = (),
        alive: object = None,
    ) -> bool:
        """Run or record a pass; return False if NumPy must do it."""
        every = [value for value in given.values() if isinstance(value, np.ndarray)]
        dtype = first.dtype.name
        if dtype not in passes.TYPES or not first.dtype.isnative or not first.size:
            return False
        if not all(array.flags.c_contiguous for array in every):
            return False
        run = passes.load(template, passes.TYPES[dtype], formula, options)
        if run is None:
            return False
        self._do(*passes.call(run, template.split()[1], given, alive))
        return True


def _of_classes(loss: Loss, classes: int) -> dict[str, float]:
    """Return the numbers of a cross-entropy."""
    smoothing, most = loss.label_smoothing, loss.most
    limit = math.inf if most is None else most
    return {"most": limit, "kept": 1 - smoothing, "spread": smoothing / classes}
