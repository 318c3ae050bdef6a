"""Gradient checking by differences of J in float64, with a bound for what they cannot tell.

    D(h) = (J(θ + h v) - J(θ - h v)) / 2h = ∂J/∂v + c₂ h² + c₄ h⁴ + …            against   g · v

Two step sizes remove c₂, three remove c₄ (Richardson 1911). What differs between the two results
bounds the truncation; a running error analysis of the forward pass (Wilkinson 1963) bounds the
rounding, which is divided by h. The step is the one that balances both, block by block. A gradient
is called wrong where it is further from D than the two bounds reach.

A row of a net with kinks (relu) whose activation pattern is not the same at all points has no
derivative in between: for such rows the engine's own share of g · v stands in for the difference,
and the result says how many there were.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.backends.numpy import blas
from mlpcore.checks import arrays, values
from mlpcore.core import backprop, differentials, formulas
from mlpcore.core import losses as loss_sheet
from mlpcore.core.activations import Activation, bind
from mlpcore.core.optimizers import SGD
from mlpcore.core.targets import mixed, weighed
from mlpcore.data.batches import Batch, Inputs, weight_of
from mlpcore.engine.make_step import make_step
from mlpcore.engine.problem import Settings
from mlpcore.mlp import MLP

Array = NDArray[Any]
Direction = tuple[Array | None, Array | None]  # of the parameters, and of X; None: they stay
WIDE = 2**15  # entries of a chunk's widest layer in a forward pass
SHARED = 2e8  # multiplications of a matrix product from which on BLAS may use its threads
EPS, TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)
ULPS = 4 * EPS  # of one operation or function of NumPy's, relative: what its own tests allow
LEVELS = np.array([1, -20, 64]) / 45  # of D(h), D(h/2), D(h/4): exact up to h⁶
LOWER = np.array([0, -1, 4]) / 3  # exact up to h⁴
START = 2.0**-5  # how far the first step moves the pre-activations
CLOSE = (
    2.0**-15
)  # the same relative to the largest, where there are kinks to keep clear of; its root for curvatures
TOLD = 1e-3  # a block is told where an error of this size, or of twice the tolerance, would be seen
TRIES = 12  # steps that are tried, each 4 times the one before or a quarter of it
PRODUCTS = ("<V, J u> = <J' V, u>", "<u, H v> = <v, H u>", "H v by differences")


@dataclass(frozen=True)
class GradientCheck:
    """The outcome of a gradient check.

    Attributes:
        max_relative_error: the largest of `errors`.
        worst: where: "W[2]", or with `entries=True` one entry, "W[2][0, 3]".
        ok: whether nothing is wrong: no error above `tolerance`. Blocks of which the check cannot
            tell do not count.
        errors: the largest error of each block, by name: the part of |g · v - difference| that
            neither rounding nor truncation can explain, relative to the larger of the two and to
            the size that g · v typically has in that block.
        rows_left_out: rows whose activation pattern differed, at most, in one difference.
        tolerance: the bound.
        products: the errors of the engine's own derivatives, by name: ⟨V, J u⟩ and ⟨Jᵀ V, u⟩
            against a difference of ⟨V, Z[L]⟩, the symmetry ⟨u, H v⟩ = ⟨v, H u⟩, and both against a
            second difference of J. Empty where somebody else's gradient was checked.
        resolution: for each block and product the relative error, along the directions of the
            check, above which one is found for sure.
    """

    max_relative_error: float
    worst: str
    ok: bool
    errors: dict[str, float] = field(repr=False)
    rows_left_out: int
    tolerance: float
    products: dict[str, float] = field(default_factory=dict, repr=False)
    resolution: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict on each block and product: "right", "wrong", or "cannot tell".

        The last is said where even an error of 1e-3, or of twice the tolerance, might not be seen.
        """
        told = max(TOLD, 2 * self.tolerance)
        return {
            name: "wrong"
            if error > self.tolerance
            else "right"
            if self.resolution[name] <= told
            else "cannot tell"
            for name, error in (self.errors | self.products).items()
        }

    @property
    def conclusive(self) -> bool:
        """True if every block and product was told to be right or wrong."""
        return "cannot tell" not in self.verdicts.values()

    def __str__(self) -> str:
        """A line a block, and the verdict."""
        verdicts, errors = self.verdicts, self.errors | self.products
        wide = max(map(len, errors))
        lines = [f"  {'':<{wide}}  {'error':<8}  {'would see':<9}"]
        for name, error in errors.items():
            mark = {"wrong": "<- wrong"}.get(verdicts[name], verdicts[name])
            lines.append(f"  {name:<{wide}}  {error:<8.1e}  {self.resolution[name]:<9.1e}  {mark}")
        untold = [name for name, verdict in verdicts.items() if verdict == "cannot tell"]
        if not self.ok:
            verdict = f"gradient WRONG, worst in {self.worst}"
        elif untold:
            verdict = f"nothing wrong, but cannot tell about {len(untold)} of {len(errors)}"
        else:
            verdict = "gradient right"
        left_out = f", {self.rows_left_out} row(s) at a kink left out" if self.rows_left_out else ""
        lines.append(
            f"{verdict}: largest relative error {self.max_relative_error:.1e} (bound "
            f"{self.tolerance:.0e}){left_out}"
        )
        return "\n".join(lines)


def check_gradients(
    net: MLP,
    X: ArrayLike,
    Y: ArrayLike,
    loss: Any = None,
    gradient: Any = None,
    *,
    sample_weight: ArrayLike | None = None,
    entries: bool = False,
    directions: int = 2,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> GradientCheck:
    """Compare ∂J/∂parameters with central differences, block by block (W[1], b[1], …), on a float64
    copy of the network.

    A right gradient is not called wrong, however small it is; where rounding hides it, the check
    says that it cannot tell (`print` shows it, `conclusive` is then False). Sources: Richardson
    1911; Wilkinson 1963; Higham 2002, sections 1 and 3.

    Args:
        net: its parameters are where the gradient is checked; it is not changed.
        X, Y, sample_weight: the batch, as in `Trainer.step`.
        loss: a name, `(name, parameter)` or `mc.Loss`; None: the one that matches the output.
        gradient: somebody else's gradient to check: flat, laid out as `net.parameters`, or an
            object with `.flat`. None checks the engine's, as a training step computes it.
        entries: difference every parameter by itself, instead of along the gradient and random
            directions of a block.
        directions: random directions a block.
        tolerance: the bound of `ok`; 1e-6 suits float64, a gradient computed in float32 needs about
            1e-3.
        seed: of the directions.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """
    tolerance = values.number(tolerance, "tolerance", above=0)
    count, entries = (
        values.positive_integer(directions, "directions"),
        values.boolean(entries, "entries"),
    )
    rng = np.random.default_rng(values.seed(seed))
    with np.errstate(all="ignore"):  # a net may overflow: then the errors say so
        checker = _Checker(net, X, Y, loss, sample_weight, tolerance)
        g = checker.gradient() if gradient is None else _flat(gradient, net.layout.size)
        errors: dict[str, float] = {}
        resolution: dict[str, float] = {}
        worst, left_out = "", 0
        for name, start, stop in _blocks(net):
            typical = _length(g[start:stop]) / math.sqrt(stop - start)
            errors[name] = resolution[name] = 0.0
            units = (
                _units(start, stop, net)
                if entries
                else ((name, v) for v in _directions(g, start, stop, count, rng))
            )
            for place, v in units:
                found = checker.along(v, g, typical)
                if not worst or found.errors[0] > max(errors.values()):
                    worst = place
                errors[name] = max(errors[name], *found.errors)
                resolution[name] = max(resolution[name], found.resolution)
                left_out = max(left_out, len(found.left_out))
        products = {}
        if gradient is None:
            for name, error, seen in checker.products(rng):
                products[name], resolution[name] = error, seen
    largest = max(errors.values())
    wrong = [name for name, error in products.items() if error > tolerance]
    if wrong and largest <= tolerance:
        worst = wrong[0]
    return GradientCheck(
        largest,
        worst,
        largest <= tolerance and not wrong,
        errors,
        left_out,
        tolerance,
        products,
        resolution,
    )


def _flat(gradient: Any, size: int) -> Array:
    flat = (
        gradient if hasattr(gradient, "dtype") else getattr(gradient, "flat", gradient)
    )  # arrays have a flat of their own
    array = arrays.numeric(flat, "gradient", devices.adopt_on_host)
    if array.shape != (size,):
        raise ValueError(
            f"gradient must be flat, shape ({size},), laid out as net.parameters; got {array.shape}"
        )
    return array.astype(np.float64)


def _blocks(net: MLP) -> Iterator[tuple[str, int, int]]:
    """Name and range in the flat vector of each W[l], b[l] and a[l]."""
    offset = 0
    tied = {
        tie.layer for tie in net.layout.ties
    }  # whose matrix is checked where it stands first, with all its uses
    for letter, views, there in (("W", net.W, tied), ("b", net.b, set()), ("a", net.a, set())):
        for l, view in enumerate(views):
            if view is not None and l not in there:
                yield f"{letter}[{l}]", offset, offset + view.size
                offset += view.size


def _units(start: int, stop: int, net: MLP) -> Iterator[tuple[str, Array]]:
    for at in range(start, stop):
        v = np.zeros(net.layout.size)
        v[at] = 1
        yield net.layout.name(at), v


def _directions(
    g: Array, start: int, stop: int, count: int, rng: np.random.Generator
) -> Iterator[Array]:
    """Yield directions within a block, about √size long: that of g, and random ones.

    Along g an error of its scale shows best. Of the random ones no entry is near 0, so that each
    shows an error in one entry.
    """
    given = g[start:stop]
    length = _length(given)
    along = (
        [given / length * math.sqrt(stop - start)]
        if 0 < length < math.inf and stop - start > 1
        else []
    )
    drawn = (
        rng.uniform(0.5, 1.5, stop - start) * rng.choice([-1.0, 1.0], stop - start)
        for _ in range(count)
    )
    for part in (*along, *drawn):
        v = np.zeros(len(g))
        v[start:stop] = part
        yield v


# -- numbers with bounds
# --------------------------------------------------------------------------------------------------


@dataclass
class _Numbers:
    """Computed numbers, and how far each may lie from what exact arithmetic gives."""

    value: Any = None
    error: Any = None

    def sum(self) -> _Numbers:
        """Return the sums over the last axis."""
        total = np.sum(self.value, axis=-1)
        return _Numbers(
            total, np.sum(self.error + self.value.shape[-1] * EPS * np.abs(self.value), axis=-1)
        )


class _RunningErrors:
    """The one operation that `backprop.forward` asks for, on numbers with bounds.

    A sum of n products is off by (n + 4) ε/2 Σ|x||w| at most, in whatever order it is taken, and
    however x and w were rounded after a step along a direction (Higham 2002, 3.1). Through a
    function go the errors of its arguments, by its values there.
    """

    def __init__(self, ops: Any):
        self.ops = ops
        self.bounded = True  # False: only the numbers are wanted, their errors are given as 0

    def layer(
        self,
        below: _Numbers,
        W: Array,
        b: Array | None,
        activation: Activation,
        S: _Numbers,
        Z: _Numbers,
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
            found = _cross_entropies(S)
            Z.value, Z.error = -found.value, found.error
        elif activation.rowwise:
            t = np.exp(S.value - S.value.max(axis=1, keepdims=True))
            Z.value = t / t.sum(axis=1, keepdims=True)
            Z.error = Z.value * ((1 - Z.value) * 2 * _largest(S) + (t.shape[1] + 8) * EPS) + TINY
        else:
            learned = {
                name: _Numbers(a, EPS / 2 * np.abs(a))
                for name, a in _learned(activation, S.value).items()
            }
            found = self.formula(activation.value, activation.scalars, s=S, **learned)
            Z.value, Z.error = found.value, found.error

    def formula(
        self, formula: str, scalars: Mapping[str, float], **arguments: _Numbers
    ) -> _Numbers:
        """Return the values of a formula, operation by operation."""
        if not self.bounded:
            return _Numbers(
                self.evaluate(
                    formula, scalars, {name: number.value for name, number in arguments.items()}
                ),
                0.0,
            )
        like = next(iter(arguments.values())).value
        known = dict(arguments)
        operations, result = _operations(formula, frozenset(scalars))
        for text, call, parts in operations:
            if call:
                known[text] = self._call(call, [known[part] for part in parts])
            else:
                number = formulas.evaluate_scalar(text, **scalars)
                known[text] = _Numbers(np.full_like(like, number), np.zeros_like(like))
        return known[result]

    def _call(self, call: str, parts: list[_Numbers]) -> _Numbers:
        """Return one operation's values; each argument's error moves them by what they differ at
        its ends.
        """
        here = {f"u{i}": part.value for i, part in enumerate(parts)}
        value = self.evaluate(call, {}, here)
        error = ULPS * np.abs(value) + TINY
        if not call.startswith(
            ("positive", "sign")
        ):  # a jump is a kink's affair, or that of two branches that agree there
            for name, part in zip(here, parts, strict=True):
                if part.error.any():
                    ends = [
                        self.evaluate(call, {}, here | {name: here[name] + e})
                        for e in (part.error, -part.error)
                    ]
                    error += np.fmax(*(np.abs(end - value) for end in ends))
        return _Numbers(value, error)

    def evaluate(
        self, formula: str, scalars: Mapping[str, float], arrays: Mapping[str, Array]
    ) -> Array:
        """Return a formula's values, in the names of the arrays and scalars."""
        out = np.empty_like(next(iter(arrays.values())))
        compiled = formulas.program(f"out = {formula}", frozenset(scalars), "float64")
        folded = {key: np.asarray(value) for key, value in compiled.fold(scalars).items()}
        named = {key: np.ascontiguousarray(array).reshape(-1) for key, array in arrays.items()}
        self.ops.map(compiled, {"out": out.reshape(-1), **named}, folded)
        return out


def _learned(activation: Activation, s: Array) -> dict[str, Array]:
    """Return the learned parameter beside each pre-activation, by the name that formulas have for
    it, if there is one.
    """
    return (
        {}
        if activation.a is None
        else {"a": np.ascontiguousarray(np.broadcast_to(activation.a, s.shape))}
    )


@functools.cache
def _operations(
    formula: str, scalars: frozenset[str]
) -> tuple[list[tuple[str, str, list[str]]], str]:
    """Return a formula's operations in order and the text of the last.

    Of each its text, the operation as a formula of u0, u1, … ("" for a scalar), and the texts of
    its operands.
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
                    parts, call = (
                        node.args,
                        ast.Call(node.func, [ast.Name(f"u{i}") for i in range(len(node.args))], []),
                    )
            found[text] = (
                text,
                ast.unparse(call),
                [visit(part) for part in parts],
            )  # after its operands
        return text

    result = visit(formulas.parse(formula))
    return list(found.values()), result


def _largest(S: _Numbers) -> Array:
    """Return how far any pre-activation of a row is off, (m, 1), its subtraction from another one
    included.
    """
    found: Array = (S.error + EPS * np.abs(S.value)).max(axis=1, keepdims=True)
    return found


def _cross_entropies(S: _Numbers) -> _Numbers:
    """Return -log p of each class, (m, n_L), without the largest term's rounding where that one is
    sure.

    An error e of S changes it by (1 - p) 2 e at most. To that comes what rounding leaves in p - y,
    which the engine takes for its slope: over a step that moves S by 1, the longest there is, the
    value changes by as much.
    """
    first = S.value.argmax(axis=1)[:, None]
    t = S.value - np.take_along_axis(S.value, first, axis=1)
    others = np.exp(t)
    np.put_along_axis(others, first, 0, axis=1)
    value = np.log1p(others.sum(axis=1, keepdims=True)) - t
    return _Numbers(
        value, -np.expm1(-value) * 2 * _largest(S) + (value.shape[1] + 10) * EPS * value + ULPS
    )


# -- the comparison
# -------------------------------------------------------------------------------------------------------


class _Difference(NamedTuple):
    """A derivative by differences.

    Attributes:
        value: the derivative, over the rows that have one.
        truncation, rounding: how far either may move it.
        left_out: the rows that have none.
        kept: the share of the others in the weight of all.
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
        return (
            bound if self.kept and math.isfinite(bound) and math.isfinite(self.value) else math.inf
        )


class _Found(NamedTuple):
    """The outcome of one comparison: an error for each side, what would be seen, the rows left out,
    the two sides' distance.
    """

    errors: list[float]
    resolution: float
    left_out: Array
    apart: float


class _Checker:
    """The two sides of the comparison, on a float64 copy."""

    def __init__(
        self,
        net: MLP,
        X: ArrayLike,
        Y: ArrayLike,
        loss: Any,
        sample_weight: ArrayLike | None,
        tolerance: float,
    ):
        if not isinstance(net, MLP):
            raise TypeError(f"net must be an mc.MLP; got {type(net).__name__}")
        self.tolerance = tolerance
        self.on_device = net.copy(
            "float64"
        )  # whose gradient it is; the differences are taken on the CPU
        self.net = self.on_device.to("cpu")
        self.activations = bind(self.net.activations, self.net.a)
        self.theta = self.net.parameters.copy()
        self.X = np.ascontiguousarray(arrays.matrix(X, net.sizes[0], adopt=devices.adopt_on_host))
        last = self.net.activations[-1]
        assert last is not None
        self.loss = loss_sheet.resolve(loss_sheet.matching(last) if loss is None else loss)
        self.objective = loss_sheet.pair(self.loss, last)
        Y_, self.classes = arrays.target(
            Y, len(self.X), net.sizes[-1], self.loss, adopt=devices.adopt_on_host
        )
        self.Y = np.ascontiguousarray(Y_)
        w = arrays.weights(sample_weight, len(self.X), adopt=devices.adopt_on_host)
        self.weights = None if w is None else np.ascontiguousarray(w)
        for array, name in ((self.X, "X"), (self.Y, "Y")):
            arrays.require_finite(array, name)
        self.sample_weight = self.weights
        self.weights = weighed(self.loss, self.Y, self.sample_weight, np.float64)
        self.batch = Batch(self.X, self.Y, self.weights, None, len(self.X))
        self.total = weight_of(self.batch)
        self.share = (
            np.full(len(self.X), 1.0) if self.weights is None else self.weights.astype(np.float64)
        )
        self.share /= self.total
        self.ops = devices.operations("cpu")()
        self.numbers = _RunningErrors(self.ops)
        self.rows = min(len(self.X), max(256, WIDE // max(net.sizes)))
        alone = self.rows * max(a * b for a, b in itertools.pairwise(net.sizes)) < SHARED
        self.threads = functools.partial(blas.limited, 1) if alone else contextlib.nullcontext
        self.kinks = [
            [] if a is None or a.rowwise else formulas.kinks(a.value) for a in self.net.activations
        ]
        slope = self.objective.slope
        for _ in range(2):
            slope = "" if self.loss.rowwise else formulas.differentiate(slope, {"x": "1"})
        self.bends = slope != "0"  # whether the loss is no polynomial of degree 2
        self.loss_kinks = [] if self.loss.rowwise else formulas.kinks(self.objective.value)

    def gradient(self, rows: Array | None = None) -> Array:
        """Return the engine's gradient of J over these rows, their weights over the *whole* batch's
        weight.
        """
        net = self.on_device
        step = make_step(
            net.device, net.layout, net.store, net.activations, self.objective, SGD(0.0), Settings()
        )
        batch = self.batch if rows is None else self.batch._replace(rows=rows, size=len(rows))
        weight = "" if self.weights is None else self.weights.dtype.str
        given = Inputs(
            self.X.dtype.str, self.Y.dtype.str, weight, self.classes, host=net.device != "cpu"
        )
        plan = step.prepare(batch.size, given)
        if not weight_of(batch):
            return np.zeros(self.net.layout.size)
        step.loss_and_gradient(batch, plan)
        share: Array = devices.to_host(net.device, step.gradient) * (weight_of(batch) / self.total)
        return share

    def along(self, v: Array, g: Array, typical: float) -> _Found:
        """Compare g · v with the difference of J along v; `typical` is the size of an entry of g."""

        def sides(left_out: Array) -> list[float]:
            there = self.gradient(left_out) if len(left_out) else np.zeros(len(g))
            return [float(np.sum(((g - there) * v)[v != 0]))]

        return self._compare([(0.5, (v, None)), (-0.5, (-v, None))], 1, sides, typical * _length(v))

    def products(self, rng: np.random.Generator) -> Iterator[tuple[str, float, float]]:
        """Yield name, error and resolution of the checks in `PRODUCTS`, on random directions."""
        net, rows = self.on_device, np.arange(len(self.X))
        shapes = self.X.shape, (len(self.X), net.sizes[-1]), net.layout.size, net.layout.size
        dX, V, u, v = (rng.standard_normal(shape) for shape in shapes)
        pairs: list[_Found] = []
        for du, dx in ((u, None), (None, dX)):
            terms = V * net.jvp(self.X, dx, du).tangent

            def transposed(
                left_out: Array, du: Array | None = du, terms: Array = terms
            ) -> list[float]:
                kept = np.delete(rows, left_out)
                if not len(kept):
                    return [0.0, 0.0]
                by_parameters, by_X = net.vjp(self.X[kept], V[kept])
                back = (
                    by_X * dX[kept]
                    if du is None
                    else devices.to_host(net.device, by_parameters) * du
                )
                return [float(np.sum(terms[kept])), float(np.sum(back))]

            stencil = [
                (0.5, (du, dx)),
                (-0.5, (None if du is None else -du, None if dx is None else -dx)),
            ]
            pairs.append(self._compare(stencil, 1, transposed, _length(terms), V))
        yield (
            PRODUCTS[0],
            max(max(found.errors) for found in pairs),
            max(found.resolution for found in pairs),
        )
        typical = _length(self._hessian_product(v, rows)) * _length(u) / math.sqrt(len(u))

        def curved(left_out: Array) -> list[float]:
            kept = np.delete(rows, left_out)
            return [
                float(u @ self._hessian_product(v, kept)),
                float(v @ self._hessian_product(u, kept)),
            ]

        corners = [(0.25 * a * b, (a * u + b * v, None)) for a in (1, -1) for b in (1, -1)]
        found = self._compare(corners, 2, curved, typical)
        yield PRODUCTS[1], found.apart, found.resolution
        yield PRODUCTS[2], max(found.errors), found.resolution

    def _hessian_product(self, v: Array, rows: Array) -> Array:
        """Return H v over these rows, their weights over the *whole* batch's weight."""
        share = float(self.share[rows].sum())
        if not share:
            return np.zeros_like(v)
        given = None if self.sample_weight is None else self.sample_weight[rows]
        product = self.on_device.hvp(self.X[rows], self.Y[rows], v, self.loss, sample_weight=given)
        there: Array = devices.to_host(self.on_device.device, product) * share
        return there

    def _compare(
        self, stencil: Sequence[tuple[float, Direction]], order: int, sides: Callable[[Array], list[float]], typical: float,
        V: Array | None = None,
    ) -> _Found:  # fmt: skip
        """Compare analytic sides with the difference, at the step whose bound is least.

        A larger step counts only where it agrees with all smaller ones. Before a side is called
        wrong, four smaller steps are asked if they could tell: an error is seen by all of them, a
        truncation that was underestimated is not.
        """
        tried: dict[float, _Difference] = {}
        analytic: dict[float, list[float]] = {}

        def take(h: float) -> _Difference:
            with self.threads():
                tried[h] = self._difference(stencil, order, h, V)
            analytic[h] = sides(tried[h].left_out)
            return tried[h]

        def size(h: float) -> float:
            return max(typical, abs(tried[h].value), *map(abs, analytic[h]))

        def errors(h: float) -> list[float]:
            return [_excess(side - tried[h].value, tried[h].bound, size(h)) for side in analytic[h]]

        most = len(self.X) // (32 if order == 1 else 2)
        h, longest = self._steps(stencil, order)
        while len(tried) < TRIES and h not in tried and h <= longest:
            found, goal = take(h), self.tolerance * size(h) / 8
            crowded = len(found.left_out) > most and (
                4**order * found.rounding <= goal or not found.kept
            )
            if found.bound <= goal and not crowded:
                break
            h = h * 4 if found.rounding >= found.truncation and not crowded else h / 4
        steps = sorted(tried)
        best = steps[0]
        for i, h in enumerate(steps):
            agrees = all(
                abs(tried[h].value - tried[k].value) <= tried[h].bound + tried[k].bound
                for k in steps[:i]
            )
            if not agrees:
                break
            best = h if tried[h].bound < tried[best].bound else best
        for h in (best / 4, best / 16, best / 64, best / 256):
            off = max(abs(side - tried[best].value) for side in analytic[best])
            if max(errors(best)) <= self.tolerance or not (tried.get(h) or take(h)).bound < off:
                break
            best = h if max(errors(h)) <= self.tolerance else best
        bound, kept = tried[best].bound, tried[best].kept
        seen = self.tolerance + 2 * bound / size(best) / kept if size(best) and kept else math.inf
        apart = _excess(max(analytic[best]) - min(analytic[best]), 2 * bound, size(best))
        return _Found(errors(best), seen if seen == seen else math.inf, tried[best].left_out, apart)

    def _steps(self, stencil: Sequence[tuple[float, Direction]], order: int) -> tuple[float, float]:
        """Return the first step along the first direction, and the longest.

        The first moves the pre-activations by `START`, and not past many kinks; the longest by 1
        where something bends.
        """
        (_, (v, dX)), net, L = stencil[0], self.net, self.net.layout.layers
        m = self.rows
        S, Z, dS, dZ = (
            list[Any]([None, *(np.empty((m, n)) for n in net.sizes[1:])]) for _ in range(4)
        )
        Z[0], dZ[0] = self.X[:m].astype(np.float64), None if dX is None else dX[:m]
        (dW, db), da = (
            ((None, None), None) if v is None else (net.layout.views(v), net.layout.slopes(v))
        )
        differentials.forward(self.ops, net.W, net.b, self.activations, S, Z, dW, db, dS, dZ, da)
        steps, longest = [], math.inf
        for l, activation in enumerate(net.activations[1:], 1):
            assert activation is not None
            moved, largest = float(np.abs(dS[l]).max()), float(np.abs(S[l]).max())
            if 0 < moved < math.inf:
                steps.append(START / moved)
                if (self.kinks[l] or (l == L and self.loss_kinks)) and 0 < largest < math.inf:
                    steps.append(CLOSE ** (1 / order) * largest / moved)
                if activation.rowwise or activation.curvature != "0" or (l == L and self.bends):
                    longest = min(longest, 1 / moved)
        return min(steps, default=START), max(longest, min(steps, default=START))

    def _difference(
        self, stencil: Sequence[tuple[float, Direction]], order: int, h: float, V: Array | None
    ) -> _Difference:
        """Return Σ c J(θ + h v) / h^order over (c, v) of the stencil, at h, h/2 and h/4,
        extrapolated to h = 0.
        """
        sums, rounding, weights, excluded = np.zeros(3), np.zeros(3), np.zeros(2), []
        reach = sum(abs(c) for c, _ in stencil)
        for start in range(0, len(self.X), self.rows):
            part = slice(start, start + self.rows)
            X, share = (
                self.X[part].astype(np.float64),
                np.ones_like(self.share[part]) if V is not None else self.share[part],
            )
            values, error = np.zeros((3, len(X))), np.zeros(len(X))
            first: Any = None
            kept = share > 0
            for k in range(3):
                self.numbers.bounded = (
                    k == 0
                )  # the nearer points lie between the outer ones, and so do their errors
                for c, (v, dX) in stencil:
                    self.net.parameters[...] = (
                        self.theta if v is None else self.theta + h / 2**k * v
                    )
                    rows, signs = self._rows(part, X if dX is None else X + h / 2**k * dX[part], V)
                    first = signs if first is None else first
                    kept &= (signs == first).all(axis=-1)
                    values[k] += c * rows.value
                    if k == 0:
                        error = np.maximum(error, rows.error + EPS * np.abs(rows.value))
            sums += values[:, kept] @ share[kept]
            for k in range(3):
                rounding[k] += reach * (error[kept] @ share[kept]) + len(X) * EPS * (
                    np.abs(values[k, kept]) @ share[kept]
                )
            weights += share.sum(), share[kept].sum()
            excluded.append(start + np.flatnonzero(~kept & (share > 0)))
        self.net.parameters[...] = self.theta
        steps = (h / 2.0 ** np.arange(3)) ** order
        found = sums / steps
        value = float(LEVELS @ found)
        off = abs(value - float(LOWER @ found)), float(np.abs(LEVELS) @ (rounding / steps))
        return _Difference(value, *off, np.concatenate(excluded), float(weights[1] / weights[0]))

    def _rows(self, part: slice, X: Array, V: Array | None) -> tuple[_Numbers, Array]:
        """Return the loss of each row, or its ⟨V, Z[L]⟩, with a bound, and the signs at every kink
        (rows, kinks).
        """
        net, objective, signs = self.net, self.objective, [np.zeros((len(X), 0), bool)]
        Z, S = ([_Numbers() for _ in net.sizes] for _ in range(2))
        Z[0] = _Numbers(X, np.zeros_like(X))
        backprop.forward(self.numbers, net.W, net.b, self.activations, S, Z)  # type: ignore[arg-type]
        for s, activation, kinks in zip(S, self.activations, self.kinks, strict=True):
            if activation is not None:
                given = {"s": s.value, **_learned(activation, s.value)} if kinks else {}
                signs += [
                    self.numbers.evaluate(kink, activation.scalars, given) > 0 for kink in kinks
                ]
        if V is not None:
            top = _Numbers(V[part] * Z[-1].value, np.abs(V[part]) * Z[-1].error)
        elif (
            self.loss.rowwise
        ):  # from S[L], as the engine: Z[L] says nothing where it has rounded to 0 or 1
            each, Y = (
                _cross_entropies(S[-1]),
                mixed(self.loss, self.Y[part], net.sizes[-1], np.float64),
            )
            top = _Numbers(Y * each.value, Y * each.error)
        else:
            x, Y = (
                S[-1] if objective.matched else Z[-1],
                np.ascontiguousarray(self.Y[part], np.float64),
            )
            scalars = dict(objective.scalars)
            given = {
                "y": Y,
                **({"p": np.tile(self.loss.columns, (len(Y), 1))} if self.loss.columns else {}),
            }
            numbers = {name: _Numbers(array, np.zeros_like(array)) for name, array in given.items()}
            top = self.numbers.formula(objective.value, scalars, x=x, **numbers)
            signs += [
                self.numbers.evaluate(kink, scalars, {"x": x.value, **given}) > 0
                for kink in self.loss_kinks
            ]
        return top.sum(), np.concatenate(signs, axis=1)


def _length(x: Array) -> float:
    """Return the Euclidean length, also where squares overflow or underflow."""
    largest = float(np.abs(x).max())
    return float(np.linalg.norm(x / largest)) * largest if 0 < largest < math.inf else largest


def _excess(difference: float, bound: float, size: float) -> float:
    """Return how much of a difference its bound does not explain, relative; infinite where it is no
    number.
    """
    if bound == math.inf:  # J itself overflows
        return 0.0
    beyond = max(0.0, abs(difference) - bound) if math.isfinite(difference) else math.inf
    return beyond / size if 0 < beyond < math.inf else beyond
