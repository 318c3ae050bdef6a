"""Directional derivatives of J by differences in float64, with error bounds.

    D(h) = (J(θ + h v) - J(θ - h v)) / 2h = ∂J/∂v + c₂ h² + c₄ h⁴ + …

D(h), D(h/2) and D(h/4) yield two extrapolations, one exact up to h⁴ and one up to h⁶ (Richardson
1911): their distance bounds the truncation of the second. The rounding of J is bounded by a running
error analysis (`core/running_errors.py`) at the outer points; the nearer ones lie between these,
and so do their errors. A stencil Σ c J(θ + h v) has an error of at most Σ|c| times the largest.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlpcore.backends import devices
from mlpcore.backends.numpy import blas
from mlpcore.core import formulas
from mlpcore.core.activations import bind
from mlpcore.core.losses import Objective
from mlpcore.core.network import Network, Pass
from mlpcore.core.running_errors import (
    EPS,
    Numbers,
    RunningErrors,
    cross_entropies,
    learned_arrays,
)
from mlpcore.core.targets import mixed

Array = NDArray[Any]
Direction = tuple[Array | None, Array | None]  # of the parameters, and of X; None: no change
Stencil = Sequence[tuple[float, Direction]]  # coefficients, and the points at which J is evaluated
WIDE = 2**15  # entries of a chunk's widest layer in a forward pass
SHARED = 2e8  # multiplications of a matrix product from which BLAS may use its threads
LEVELS = np.array([1, -20, 64]) / 45  # weights of D(h), D(h/2), D(h/4): exact up to h⁶
LOWER = np.array([0, -1, 4]) / 3  # weights that are exact up to h⁴
START = 2.0**-5  # change of the pre-activations by the first step
# the same relative to the largest, if there are kinks to keep clear of; its root for curvatures
CLOSE = 2.0**-15
TRIES = 12  # number of steps tried, each 4 times or a quarter of the one before


class Difference(NamedTuple):
    """A derivative by differences.

    Attributes:
        value: the derivative over the rows that have one.
        truncation, rounding: bounds of these two errors.
        left_out: number of rows without a derivative.
        kept: fraction of the total weight in the other rows.
    """

    value: float
    truncation: float
    rounding: float
    left_out: Array
    kept: float

    @property
    def bound(self) -> float:
        """Bound of the value's error."""
        bound = self.truncation + self.rounding
        known = self.kept and math.isfinite(bound) and math.isfinite(self.value)
        return bound if known else math.inf


class Comparison(NamedTuple):
    """The outcome of one comparison of analytic sides with a difference.

    Attributes:
        errors: relative error of each side beyond the bound.
        resolution: any error above it is certain to be found.
        left_out: number of rows without a derivative.
        apart: relative distance between the sides beyond twice the bound.
    """

    errors: list[float]
    resolution: float
    left_out: Array
    apart: float


class Differences:
    """Differences of J, or of ⟨V, Z[L]⟩, along directions.

    Args:
        net: a float64 network on the CPU; its parameters are changed and restored.
        X, Y: the batch, with Y as the loss takes it.
        share: each row's weight over the batch's weight, (m,).
        objective: the loss on top.
    """

    def __init__(self, net: Network, X: Array, Y: Array, share: Array, objective: Objective):
        self.net, self.X, self.Y, self.share, self.objective = net, X, Y, share, objective
        self.loss, self.theta = objective.loss, net.parameters.copy()
        self.activations = bind(net.activations, net.a)
        self.ops = devices.find("cpu").operations()()
        self.numbers: Any = RunningErrors(self.ops)
        self.rows = min(len(X), max(256, WIDE // max(net.sizes)))
        alone = self.rows * max(a * b for a, b in itertools.pairwise(net.sizes)) < SHARED
        self.threads = functools.partial(blas.limited, 1) if alone else contextlib.nullcontext
        self.kinks = [
            [] if σ is None or σ.rowwise else formulas.kinks(σ.value) for σ in net.activations
        ]
        slope = objective.slope
        for _ in range(2):
            slope = "" if self.loss.rowwise else formulas.differentiate(slope, {"x": "1"})
        self.bends = slope != "0"  # True unless the loss is a polynomial of degree 2
        self.loss_kinks = [] if self.loss.rowwise else formulas.kinks(objective.value)

    def first_step(self, stencil: Stencil, order: int) -> tuple[float, float]:
        """Return the first step along the first direction, and the longest one.

        The first changes the pre-activations by `START`, without passing many kinks; the longest
        changes them by 1 if anything is curved.
        """
        (_, (v, dX)), net, L, m = stencil[0], self.net, self.net.layout.layers, self.rows
        work = Pass(
            self.ops,
            net.W,
            net.b,
            self.activations,
            self.X[:m].astype(np.float64),
            lambda _, l: np.empty((m, net.sizes[l])),
            apart=True,
        )
        along = None if v is None else net.cut(v)
        work.tangent(None if dX is None else dX[:m], along, apart=True)
        steps, longest = [], math.inf
        for l, activation in enumerate(net.activations[1:], 1):
            assert activation is not None
            moved, largest = (float(np.abs(array[l]).max()) for array in (work.dS, work.S))
            if 0 < moved < math.inf:
                steps.append(START / moved)
                if (self.kinks[l] or (l == L and self.loss_kinks)) and 0 < largest < math.inf:
                    steps.append(CLOSE ** (1 / order) * largest / moved)
                if activation.rowwise or activation.curvature != "0" or (l == L and self.bends):
                    longest = min(longest, 1 / moved)
        return min(steps, default=START), max(longest, min(steps, default=START))

    def take(self, stencil: Stencil, order: int, h: float, V: Array | None) -> Difference:
        """Return Σ c J(θ + h v) / h^order over (c, v) of the stencil, extrapolated to h = 0.

        With V, it is taken of ⟨V, Z[L]⟩ instead of J.
        """
        sums, rounding, weights, excluded = np.zeros(3), np.zeros(3), np.zeros(2), []
        reach = sum(abs(c) for c, _ in stencil)
        with self.threads():
            for start in range(0, len(self.X), self.rows):
                part = slice(start, start + self.rows)
                share = self.share[part] if V is None else np.ones_like(self.share[part])
                values, error, same = self._take_rows(part, stencil, h, V)
                kept = (share > 0) & same
                sums += values[:, kept] @ share[kept]
                summing = values.shape[1] * EPS * (np.abs(values[:, kept]) @ share[kept])
                rounding += reach * (error[kept] @ share[kept]) + summing
                weights += share.sum(), share[kept].sum()
                excluded.append(start + np.flatnonzero(~kept & (share > 0)))
        self.net.parameters[...] = self.theta
        steps = (h / 2.0 ** np.arange(3)) ** order
        found = sums / steps
        value = float(LEVELS @ found)
        off = abs(value - float(LOWER @ found)), float(np.abs(LEVELS) @ (rounding / steps))
        return Difference(value, *off, np.concatenate(excluded), float(weights[1] / weights[0]))

    def _take_rows(
        self, part: slice, stencil: Stencil, h: float, V: Array | None
    ) -> tuple[Array, Array, Array]:
        """Return each row's sums at h, h/2 and h/4 (3, m), its error, and if it has a derivative.

        A row has a derivative if its activation pattern is the same at all points.
        """
        X = self.X[part].astype(np.float64)
        values, error, same = np.zeros((3, len(X))), np.zeros(len(X)), np.ones(len(X), bool)
        first: Any = None
        for k in range(3):
            self.numbers.bounded = k == 0  # only the outer points; their errors bound the others
            for c, (v, dX) in stencil:
                self.net.parameters[...] = self.theta if v is None else self.theta + h / 2**k * v
                rows, signs = self._evaluate(part, X if dX is None else X + h / 2**k * dX[part], V)
                first = signs if first is None else first
                same &= (signs == first).all(axis=-1)
                values[k] += c * rows.value
                if k == 0:
                    error = np.maximum(error, rows.error + EPS * np.abs(rows.value))
        return values, error, same

    def _evaluate(self, part: slice, X: Array, V: Array | None) -> tuple[Numbers, Array]:
        """Return each row's loss, or ⟨V, Z[L]⟩, and the signs at every kink (rows, kinks)."""
        net = self.net
        Z0 = Numbers(X, np.zeros_like(X))
        work = Pass(
            self.numbers, net.W, net.b, self.activations, Z0, lambda *_: Numbers(), apart=True
        )
        work.forward()
        signs = [np.zeros((len(X), 0), bool)]
        for s, activation, kinks in zip(work.S, self.activations, self.kinks, strict=True):
            if activation is not None:
                given = {"s": s.value, **learned_arrays(activation, s.value)} if kinks else {}
                signs += self._signs(kinks, activation.scalars, given)
        if V is not None:
            Z = work.Z[-1]
            top = Numbers(V[part] * Z.value, np.abs(V[part]) * Z.error)
        elif self.loss.rowwise:
            # from S[L], as in the engine: Z[L] is useless once it has rounded to 0 or 1
            each = cross_entropies(work.S[-1])
            Y = mixed(self.loss, self.Y[part], net.sizes[-1], np.float64)
            top = Numbers(Y * each.value, Y * each.error)
        else:
            x = work.S[-1] if self.objective.matched else work.Z[-1]
            given = {"y": np.ascontiguousarray(self.Y[part], np.float64)}
            if self.loss.columns:
                given["p"] = np.tile(self.loss.columns, (len(X), 1))
            scalars = dict(self.objective.scalars)
            numbers = {name: Numbers(array, np.zeros_like(array)) for name, array in given.items()}
            top = self.numbers.formula(self.objective.value, scalars, x=x, **numbers)
            signs += self._signs(self.loss_kinks, scalars, {"x": x.value, **given})
        return top.sum(), np.concatenate(signs, axis=1)

    def _signs(
        self, kinks: Sequence[str], scalars: dict[str, float], given: dict[str, Array]
    ) -> list[Array]:
        return [self.numbers.evaluate(kink, scalars, given) > 0 for kink in kinks]


class Comparer:
    """The comparison of analytic sides with differences at several steps, smallest to largest.

    Args:
        differences: differences of the batch.
        stencil, order: coefficients and directions, and the order of the derivative.
        sides: returns the analytic sides without the rows that have no derivative.
        typical: lower bound of the derivative's size, to which errors are relative.
        tolerance: the relative error allowed for a correct side.
        V: if given, ⟨V, Z[L]⟩ is differenced instead of J.
    """

    def __init__(
        self,
        differences: Differences,
        stencil: Stencil,
        order: int,
        sides: Callable[[Array], list[float]],
        typical: float,
        tolerance: float,
        V: Array | None = None,
    ) -> None:
        self.differences, self.stencil, self.order, self.V = differences, stencil, order, V
        self.sides, self.typical, self.tolerance = sides, typical, tolerance
        self.tried: dict[float, Difference] = {}
        self.analytic: dict[float, list[float]] = {}

    def compare(self) -> Comparison:
        """Compare the sides with the difference at the step with the smallest bound.

        Before a side is declared wrong, four smaller steps are checked, if they are accurate
        enough: all of them show a real error, but not an underestimated truncation.
        """
        self._try_steps()
        best = self._best_step()
        for h in (best / 4, best / 16, best / 64, best / 256):
            off = max(abs(side - self.tried[best].value) for side in self.analytic[best])
            right = max(self._errors(best)) <= self.tolerance
            if right or not (self.tried.get(h) or self._try(h)).bound < off:
                break
            best = h if max(self._errors(h)) <= self.tolerance else best
        found, size, analytic = self.tried[best], self._size(best), self.analytic[best]
        known = size and found.kept
        seen = self.tolerance + 2 * found.bound / size / found.kept if known else math.inf
        apart = _excess(max(analytic) - min(analytic), 2 * found.bound, size)
        resolution = seen if seen == seen else math.inf
        return Comparison(self._errors(best), resolution, found.left_out, apart)

    def _try(self, h: float) -> Difference:
        found = self.differences.take(self.stencil, self.order, h, self.V)
        self.tried[h], self.analytic[h] = found, self.sides(found.left_out)
        return found

    def _size(self, h: float) -> float:
        return max(self.typical, abs(self.tried[h].value), *map(abs, self.analytic[h]))

    def _errors(self, h: float) -> list[float]:
        found, size = self.tried[h], self._size(h)
        return [_excess(side - found.value, found.bound, size) for side in self.analytic[h]]

    def _try_steps(self) -> None:
        """Try longer steps while rounding dominates, shorter ones while truncation does."""
        most = len(self.differences.X) // (32 if self.order == 1 else 2)
        h, longest = self.differences.first_step(self.stencil, self.order)
        while len(self.tried) < TRIES and h not in self.tried and h <= longest:
            found = self._try(h)
            goal = self.tolerance * self._size(h) / 8
            shorter = 4**self.order * found.rounding <= goal or not found.kept
            crowded = len(found.left_out) > most and shorter
            if found.bound <= goal and not crowded:
                break
            h = h * 4 if found.rounding >= found.truncation and not crowded else h / 4

    def _best_step(self) -> float:
        """Return the step with the smallest bound; a larger one only if all smaller ones agree."""
        tried, steps = self.tried, sorted(self.tried)
        best = steps[0]
        for i, h in enumerate(steps):
            agrees = all(
                abs(tried[h].value - tried[k].value) <= tried[h].bound + tried[k].bound
                for k in steps[:i]
            )
            if not agrees:
                break
            best = h if tried[h].bound < tried[best].bound else best
        return best


def _excess(difference: float, bound: float, size: float) -> float:
    """Return the relative excess of a difference over its bound; infinite if it is NaN."""
    if bound == math.inf:  # J itself overflows
        return 0.0
    beyond = max(0.0, abs(difference) - bound) if math.isfinite(difference) else math.inf
    return beyond / size if 0 < beyond < math.inf else beyond
