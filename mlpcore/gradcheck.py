"""Gradient checking by central differences, in float64.

    (J(θ + h v) - J(θ - h v)) / 2h   against   g · v,    error O(h²) + O(ε J / h)

Shapes that match do not prove a gradient right; this does, as far as numbers can. A row of a net with kinks (relu) whose
activation pattern differs between θ + h v and θ - h v has no derivative in between: for such rows the engine's own share of
g · v stands in for the difference, and the result says how many there were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import device as devices
from mlpcore.core import backprop, formulas, inputs
from mlpcore.core import losses as loss_sheet
from mlpcore.core.optimizers import SGD
from mlpcore.core.targets import mixed, row_weights
from mlpcore.mlp import MLP
from mlpcore.training.chunks import Batch
from mlpcore.training.new_step import new_step
from mlpcore.training.plan import Inputs
from mlpcore.training.planned import Settings
from mlpcore.training.step import weight_of

Array = NDArray[Any]
ROWS = 1024  # rows of a chunk of the two forward passes
STEP = 1e-5  # relative to the block's norm: where truncation h² and rounding ε/h are both small in float64
PRODUCTS = {"<V, J u> = <J' V, u>": 1e-10, "<u, H v> = <v, H u>": 1e-9, "H v by differences": 1e-5}  # and their bounds
NOISE = 16 * np.finfo(np.float64).eps  # of J, relative


@dataclass(frozen=True)
class GradientCheck:
    """What a gradient check found.

    Attributes:
        max_relative_error: the largest |g · v - difference|, relative to the larger of the two, of the size that g · v
            typically has in that block, and of what rounding and curvature let a difference resolve.
        worst: where: "W[2]", or with `entries=True` one entry, "W[2][0, 3]".
        ok: whether it is at most `tolerance`.
        errors: the largest error of each block, by name.
        rows_left_out: rows whose activation pattern differed, at most, in one difference.
        tolerance: the bound.
        products: of the engine's own derivatives, relative errors by name, each within its bound in `PRODUCTS` if `ok`: the
            dot-product test ⟨V, J u⟩ = ⟨Jᵀ V, u⟩, the symmetry ⟨u, H v⟩ = ⟨v, H u⟩, and H v against a difference of gradients.
            Empty where somebody else's gradient was checked.
    """

    max_relative_error: float
    worst: str
    ok: bool
    errors: dict[str, float] = field(repr=False)
    rows_left_out: int
    tolerance: float
    products: dict[str, float] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """A line a block, and the verdict."""
        lines = [
            f"  {name:<6} {error:8.1e}{'' if error <= self.tolerance else '   <- wrong'}" for name, error in self.errors.items()
        ]
        lines += [f"  {name:<22} {x:8.1e}{'' if x <= PRODUCTS[name] else '   <- wrong'}" for name, x in self.products.items()]
        verdict = "gradient right" if self.ok else f"gradient WRONG, worst in {self.worst}"
        left_out = f", {self.rows_left_out} row(s) at a kink left out" if self.rows_left_out else ""
        lines.append(f"{verdict}: largest relative error {self.max_relative_error:.1e} (bound {self.tolerance:.0e}){left_out}")
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
    """Compare ∂J/∂parameters with central differences, block by block (W[1], b[1], …), on a float64 copy of the network.

    Args:
        net: its parameters are where the gradient is checked; it is not changed.
        X, Y, sample_weight: the batch, as in `Trainer.step`.
        loss: a name, `(name, parameter)` or `mc.Loss`; None: the one that matches the output.
        gradient: somebody else's gradient to check: flat, laid out as `net.parameters`, or an object with `.flat`. None
            checks the engine's, as a training step computes it.
        entries: difference every parameter by itself (2 passes each), instead of `directions` random directions a block.
        tolerance: the bound of `ok`; 1e-6 suits float64, a gradient computed in float32 needs about 1e-3.
        seed: of the directions.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """
    if not inputs.not_negative(tolerance, "tolerance"):
        raise ValueError("tolerance must be positive; got 0")
    count, entries = inputs.positive_integer(directions, "directions"), inputs.boolean(entries, "entries")
    with np.errstate(all="ignore"):  # a net may overflow: then the errors say so
        return _check(net, X, Y, loss, gradient, sample_weight, entries, count, tolerance, seed)


def _check(
    net: MLP, X: ArrayLike, Y: ArrayLike, loss: Any, gradient: Any, sample_weight: ArrayLike | None, entries: bool, count: int,
    tolerance: float, seed: int,
) -> GradientCheck:  # fmt: skip
    checker = _Checker(net, X, Y, loss, sample_weight)
    g = checker.gradient() if gradient is None else _flat(gradient, net.layout.size)
    rng = np.random.default_rng(inputs.positive_integer(seed, "seed", least=0))
    errors: dict[str, float] = {}
    worst, largest, left_out = "", -1.0, 0
    for name, start, stop in _blocks(net):
        typical = float(np.linalg.norm(g[start:stop])) / np.sqrt(stop - start)
        blocks = _units(start, stop, net) if entries else ((name, v) for v in _random(checker, start, stop, count, rng))
        errors[name] = 0.0
        for place, v in blocks:
            numeric, noise, excluded = checker.difference(v)
            analytic = float(g @ v)
            size = max(abs(analytic), abs(numeric), typical * float(np.linalg.norm(v)), noise / tolerance)
            error = abs(analytic - numeric) / size if analytic != numeric else 0.0
            error = float("inf") if np.isnan(error) else float(error)
            errors[name] = max(errors[name], error)
            left_out = max(left_out, excluded)
            if error > largest:
                worst, largest = place, error
    products = checker.products(rng) if gradient is None else {}
    wrong = [name for name, error in products.items() if not error <= PRODUCTS[name]]
    if wrong and largest <= tolerance:
        worst = wrong[0]
    ok = bool(largest <= tolerance) and not wrong
    return GradientCheck(largest, worst, ok, errors, left_out, tolerance, products)


def _flat(gradient: Any, size: int) -> Array:
    flat = gradient if hasattr(gradient, "dtype") else getattr(gradient, "flat", gradient)  # arrays have a flat of their own
    array = inputs.numeric(flat, "gradient", devices.adopt_on_host)
    if array.shape != (size,):
        raise ValueError(f"gradient must be flat, shape ({size},), laid out as net.parameters; got {array.shape}")
    return array.astype(np.float64)


def _blocks(net: MLP) -> Iterator[tuple[str, int, int]]:
    """Name and range in the flat vector of each W[l] and b[l]."""
    offset = 0
    tied = {tie.layer for tie in net.layout.ties}  # whose matrix is checked where it stands first, with all its uses
    for letter, views, there in (("W", net.W, tied), ("b", net.b, set())):
        for l, view in enumerate(views):
            if view is not None and l not in there:
                yield f"{letter}[{l}]", offset, offset + view.size
                offset += view.size


def _units(start: int, stop: int, net: MLP) -> Iterator[tuple[str, Array]]:
    for at in range(start, stop):
        v = np.zeros(net.layout.size)
        v[at] = 1
        yield net.layout.name(at), v


def _random(checker: _Checker, start: int, stop: int, count: int, rng: np.random.Generator) -> Iterator[Array]:
    """Random directions within a block, as long as the block itself (as √size where it is zero)."""
    for _ in range(count):
        v = np.zeros(checker.net.layout.size)
        v[start:stop] = rng.standard_normal(stop - start)
        length = float(np.linalg.norm(checker.net.parameters[start:stop])) or np.sqrt(stop - start)
        yield v * (length / np.linalg.norm(v))


class _Checker:
    """The two sides of the comparison, on a float64 copy."""

    def __init__(self, net: MLP, X: ArrayLike, Y: ArrayLike, loss: Any, sample_weight: ArrayLike | None):
        if not isinstance(net, MLP):
            raise TypeError(f"net must be an mc.MLP; got {type(net).__name__}")
        self.on_device = net.copy("float64")  # whose gradient it is; the differences are taken on the CPU
        self.net = self.on_device.to("cpu")
        self.X = inputs.contiguous(inputs.matrix(X, net.sizes[0], adopt=devices.adopt_on_host))
        last = self.net.activations[-1]
        assert last is not None
        self.loss = loss_sheet.resolve(loss_sheet.matching(last) if loss is None else loss)
        self.objective = loss_sheet.pair(self.loss, last)
        Y_, self.classes = inputs.target(Y, len(self.X), net.sizes[-1], self.loss, adopt=devices.adopt_on_host)
        self.Y = inputs.contiguous(Y_)
        self.weights = inputs.weights(sample_weight, len(self.X), adopt=devices.adopt_on_host)
        for array, name in ((self.X, "X"), (self.Y, "Y")):
            inputs.require_finite(array, name)
        self.sample_weight = self.weights
        if self.loss.class_weight is not None:
            self.weights = np.empty(len(self.X))
            row_weights(self.loss, self.Y, self.sample_weight, self.weights)
        self.batch = Batch(self.X, self.Y, self.weights, None, len(self.X))
        self.total = weight_of(self.batch)
        self.ops = devices.operations("cpu")()
        self.reach: Any = 0.0
        parts = [slice(i, i + ROWS) for i in range(0, len(self.X), ROWS)]
        self.base = np.concatenate([self._rows(part)[0] for part in parts])

    def gradient(self, rows: Array | None = None) -> Array:
        """The engine's gradient of J over these rows, their weights over the *whole* batch's weight."""
        net = self.on_device
        step = new_step(net.device, net.layout, net.store, net.activations, self.objective, SGD(0.0), Settings())
        batch = self.batch if rows is None else self.batch._replace(rows=rows, size=len(rows))
        weight = "" if self.weights is None else self.weights.dtype.str
        given = Inputs(self.X.dtype.str, self.Y.dtype.str, weight, self.classes, host=net.device != "cpu")
        plan = step.prepare(batch.size, given)
        if not weight_of(batch):
            return np.zeros(self.net.layout.size)
        step.loss_and_gradient(batch, plan)
        share: Array = devices.to_host(net.device, step.gradient) * (weight_of(batch) / self.total)
        return share

    def difference(self, v: Array) -> tuple[float, float, int]:
        """The central difference of J along v, what it cannot resolve, and how many rows the engine stood in for."""
        theta = self.net.parameters.copy()
        h = STEP * max(1.0, float(np.linalg.norm(theta[v != 0])) / float(np.linalg.norm(v)))
        total, size, bend, excluded = 0.0, 0.0, 0.0, []
        for start in range(0, len(self.X), ROWS):
            part = slice(start, start + ROWS)
            self.net.parameters[...] = theta + h * v
            above, pattern = self._rows(part)
            self.net.parameters[...] = theta - h * v
            below, other = self._rows(part)
            same = (pattern == other).all(axis=1)
            w = np.ones(len(same)) if self.weights is None else self.weights[part].astype(np.float64)
            total += float(np.sum((w * (above - below))[same])) / self.total
            here = self.base[part]
            bend += float(np.sum((w * (above - here + (below - here)))[same])) / self.total
            size += float(np.sum((w * (abs(above) + abs(below) + self.reach))[same])) / self.total
            excluded.append(start + np.flatnonzero(~same))
        self.net.parameters[...] = theta
        rows = np.concatenate(excluded)
        at_kinks = float(self.gradient(rows) @ v) if len(rows) else 0.0
        # rounding is about ε J / h, truncation h² J''' / 6; the second difference h² J'' says how large the latter may be
        return total / (2 * h) + at_kinks, NOISE * size / h + abs(bend), len(rows)

    def products(self, rng: np.random.Generator) -> dict[str, float]:
        """The relative errors of the checks in `PRODUCTS`, on random directions.

        What the last bits of the parameters, and a step twice as long, change in either side cannot be told from rounding and
        truncation: it counts as noise, beside saturated outputs for example.
        """
        shapes = self.X.shape, (len(self.X), self.net.sizes[-1]), self.net.layout.size, self.net.layout.size
        dX, V, u, v = (rng.standard_normal(shape) for shape in shapes)
        theta = self.net.parameters.copy()
        h = STEP * max(1.0, float(np.linalg.norm(theta))) / float(np.linalg.norm(v))
        nudged = theta * (1 + 4 * np.finfo(np.float64).eps * rng.choice([-1.0, 1.0], theta.size))
        parts = [slice(i, i + ROWS) for i in range(0, len(self.X), ROWS)]
        patterns = []
        for sign in (2, -2):
            self._move(theta + sign * h * v)
            patterns.append(np.concatenate([self._rows(part)[1] for part in parts]))
        rows = np.flatnonzero((patterns[0] == patterns[1]).all(axis=1))  # only these have a second derivative in between
        found, again = (self._sides(at, step, rows, dX, V, u, v) for at, step in ((theta, h), (nudged, 2 * h)))
        self._move(theta)
        errors = {}
        for (name, bound), (one, other, size), (one_2, other_2, _) in zip(PRODUCTS.items(), found, again, strict=True):
            noise = 16 * float(np.linalg.norm(one - one_2) + np.linalg.norm(other - other_2))
            error = float(np.linalg.norm(one - other))
            errors[name] = error / max(size, noise / bound) if error else 0.0
        return errors

    def _sides(
        self, theta: Array, h: float, rows: Array, dX: Array, V: Array, u: Array, v: Array
    ) -> list[tuple[Array, Array, float]]:  # fmt: skip
        """The two sides of each check at these parameters, and their size."""
        net = self.on_device
        gradients = []
        for sign in (1, -1):
            self._move(theta + sign * h * v)
            gradients.append(self.gradient(rows) if len(rows) else np.zeros(theta.size))
        self._move(theta)
        terms = V * net.jvp(self.X, dX, u).tangent
        by_parameters, by_X = net.vjp(self.X, V)
        transposed = np.concatenate([devices.to_host(net.device, by_parameters) * u, (by_X * dX).ravel()])
        Hu, Hv = (self._hessian_product(direction, rows) for direction in (u, v))
        numeric = (gradients[0] - gradients[1]) / (2 * h)
        rounding = NOISE * float(np.linalg.norm(gradients[0])) / h / PRODUCTS["H v by differences"]
        return [
            (np.sum(terms), np.sum(transposed), float(np.sum(abs(terms)) + np.sum(abs(transposed)))),
            (u @ Hv, v @ Hu, float(np.sum(abs(u * Hv)) + np.sum(abs(v * Hu)))),
            (numeric, Hv, max(float(np.linalg.norm(numeric)), float(np.linalg.norm(Hv)), rounding)),
        ]

    def _move(self, theta: Array) -> None:
        """Other parameters, for both copies."""
        self.net.parameters[...] = theta
        self.on_device.parameters[...] = devices.to_device(self.on_device.device, theta)

    def _hessian_product(self, v: Array, rows: Array) -> Array:
        """H v over these rows, their weights over the *whole* batch's weight."""
        weights = np.ones(len(self.X)) if self.weights is None else self.weights
        share = float(weights[rows].sum(dtype=np.float64)) / self.total
        if not share:
            return np.zeros_like(v)
        given = None if self.sample_weight is None else self.sample_weight[rows]
        product = self.on_device.hvp(self.X[rows], self.Y[rows], v, self.loss, sample_weight=given)
        there: Array = devices.to_host(self.on_device.device, product) * share
        return there

    def _rows(self, part: slice) -> tuple[Array, Array]:
        """The loss of each row (rows,), and the signs at every kink (rows, kinks)."""
        net = self.net
        Z = [self.X[part].astype(np.float64)] + [np.empty((len(self.X[part]), n)) for n in net.sizes[1:]]
        S: list[Any] = [None] + [np.empty_like(z) for z in Z[1:]]
        with np.errstate(all="ignore"):
            backprop.forward(self.ops, net.W, net.b, net.activations, S, Z)
            signs = []
            for s, activation in zip(S[1:], net.activations[1:], strict=True):
                assert activation is not None
                if not activation.rowwise:
                    for kink in formulas.kinks(activation.value):
                        signs.append(self._evaluate(kink, activation.scalars, s=s) > 0)
            Y, objective = self.Y[part], self.objective
            if self.loss.rowwise:  # from S[L], as the engine: Z[L] says nothing where it has rounded to 0 or 1
                s = S[-1] - S[-1].max(axis=1, keepdims=True)
                log_p = s - np.log(np.exp(s).sum(axis=1, keepdims=True))
                self.reach = np.abs(S[-1]).max(axis=1)  # ε of which is what log_p can be off
                if self.loss.mixes(self.classes):
                    Y = mixed(self.loss, Y, net.sizes[-1], np.float64)
                rows = -log_p[np.arange(len(Y)), Y] if Y.ndim == 1 else -np.sum(Y * log_p, axis=1)
            else:
                arrays = {"x": S[-1] if objective.matched else Z[-1], "y": np.ascontiguousarray(Y, np.float64)}
                if self.loss.columns:
                    arrays["p"] = np.tile(self.loss.columns, (len(Y), 1))
                scalars = dict(objective.scalars)
                rows = self._evaluate(objective.value, scalars, **arrays).sum(axis=1)
                signs += [self._evaluate(kink, scalars, **arrays) > 0 for kink in formulas.kinks(objective.value)]
        return rows, np.concatenate(signs, axis=1) if signs else np.zeros((len(rows), 0), bool)

    def _evaluate(self, formula: str, scalars: dict[str, float], **arrays: Array) -> Array:
        out = np.empty_like(next(iter(arrays.values())))
        compiled = formulas.program(f"out = {formula}", frozenset(scalars), "float64")
        folded = {key: np.asarray(value) for key, value in compiled.fold(scalars).items()}
        self.ops.map(compiled, {"out": out.reshape(-1), **{k: a.reshape(-1) for k, a in arrays.items()}}, folded)
        return out
