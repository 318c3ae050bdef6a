"""Gradient checking by differences of J in float64, with a bound on their own error.

    D(h) = (J(θ + h v) - J(θ - h v)) / 2h = ∂J/∂v + c₂ h² + c₄ h⁴ + …            against   g · v

Two step sizes remove c₂, three remove c₄ (Richardson 1911). The gap between the two results bounds
the truncation error; a running error analysis of the forward pass (Wilkinson 1963) bounds the
rounding error, which is divided by h. The step size balances the two, block by block. A gradient is
called wrong if its distance from D exceeds both bounds together.

In a net with kinks (relu), a row whose activation pattern changes between the evaluation points has
no derivative in between. For such rows the engine's own share of g · v replaces the difference, and
the result reports their number.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import arrays, values
from mlpcore.core import losses as loss_sheet
from mlpcore.core.optimizers import SGD
from mlpcore.core.targets import weighed
from mlpcore.data.batches import Batch, Inputs, weight_of
from mlpcore.engine.differences import Comparer, Comparison, Differences, Stencil
from mlpcore.engine.make_step import make_step
from mlpcore.engine.problem import Settings
from mlpcore.mlp import MLP

Array = NDArray[Any]
TOLD = 1e-3  # a block gets a verdict if an error this large, or twice the tolerance, would show
PRODUCTS = ("<V, J u> = <J' V, u>", "<u, H v> = <v, H u>", "H v by differences")


@dataclass(frozen=True)
class GradientCheck:
    """The outcome of a gradient check.

    Attributes:
        max_relative_error: the largest of `errors`.
        worst: location of that error: "W[2]", or with `entries=True` one entry, "W[2][0, 3]".
        ok: True if no error exceeds `tolerance`. Blocks with the verdict "cannot tell" pass.
        errors: largest error of each block, by name: the part of |g · v - difference| that neither
            rounding nor truncation can explain, relative to the largest of |g · v|, |difference|
            and the typical size of g · v in that block.
        rows_left_out: largest number of rows left out of one difference because their activation
            pattern changed.
        tolerance: the bound.
        products: errors of the engine's other derivatives, by name: ⟨V, J u⟩ and ⟨Jᵀ V, u⟩ against
            a difference of ⟨V, Z[L]⟩, the symmetry ⟨u, H v⟩ = ⟨v, H u⟩, and both against a second
            difference of J. Empty if a `gradient` was passed to the check.
        resolution: for each block and product, the relative error above which an error along the
            checked directions is certain to be found.
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

        "cannot tell" means that even an error of 1e-3, or of twice the tolerance, might go unseen.
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
        """True if every block and product is either right or wrong, none "cannot tell"."""
        return "cannot tell" not in self.verdicts.values()

    def __str__(self) -> str:
        """Return one line per block, and the verdict."""
        verdicts, errors = self.verdicts, self.errors | self.products
        wide = max(map(len, errors))
        lines = [f"  {'':<{wide}}  {'error':<8}  {'smallest error that would show'}"]
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
            f"{verdict}: largest relative error {self.max_relative_error:.1e} beyond rounding and "
            f"truncation (bound {self.tolerance:.0e}){left_out}"
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
    """Compare ∂J/∂parameters with central differences, block by block (W[1], b[1], …).

    Everything is computed on a float64 copy of the network. A correct gradient is never called
    wrong, however small it is. If rounding hides it, the verdict is "cannot tell": `print` shows
    it, and `conclusive` is False. Sources: Richardson 1911; Wilkinson 1963; Higham 2002, sections 1
    and 3.

    Args:
        net: the network; the gradient is checked at its parameters, which are not changed.
        X, Y, sample_weight: the batch, as in `Trainer.step`.
        loss: a name, `(name, parameter)` or `mc.Loss`; None picks the one that matches the output.
        gradient: a gradient from elsewhere to check, flat and laid out as `net.parameters`, or an
            object with `.flat`. None checks the engine's own, as a training step computes it.
        entries: True to check every parameter separately, instead of each block along its gradient
            and random directions.
        directions: number of random directions per block.
        tolerance: largest error that is `ok`; 1e-6 suits float64, a gradient computed in float32
            needs about 1e-3.
        seed: seed of the random directions.

    Returns:
        The errors and the verdicts; `print` shows them as a table.

    Raises:
        TypeError, ValueError: invalid argument; the message says what was expected.
    """
    tolerance = values.number(tolerance, "tolerance", above=0)
    count = values.positive_integer(directions, "directions")
    entries = values.boolean(entries, "entries")
    rng = np.random.default_rng(values.seed(seed))
    with np.errstate(all="ignore"):  # if the net overflows, the errors show it
        checker = _Checker(net, X, Y, loss, sample_weight, tolerance)
        if gradient is None:
            g = checker.gradient()
        else:
            given = net.to_flat(gradient, "gradient", devices.adopt_on_host)
            g = given.astype(np.float64)
        result = checker.check_blocks(g, count if not entries else 0, rng)
        return result if gradient is not None else checker.check_products(result, rng)


def _blocks(net: MLP) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each W[l], b[l] and a[l], and its range in the flat vector."""
    offset = 0
    tied = {tie.layer for tie in net.layout.ties}  # checked at their owners, with all uses
    for letter, views, others in (("W", net.W, tied), ("b", net.b, set()), ("a", net.a, set())):
        for l, view in enumerate(views):
            if view is not None and l not in others:
                yield f"{letter}[{l}]", offset, offset + view.size
                offset += view.size


def _units(start: int, stop: int, net: MLP) -> Iterator[tuple[str, Array]]:
    """Yield the name of each entry of a block, and the unit vector along it."""
    for at in range(start, stop):
        v = np.zeros(net.layout.size)
        v[at] = 1
        yield net.layout.name(at), v


def _directions(
    g: Array, start: int, stop: int, count: int, rng: np.random.Generator
) -> Iterator[Array]:
    """Yield directions within a block, about √size long: along g, then random ones.

    An error in the scale of g shows best along g. No entry of a random direction is near 0, so that
    each of them shows an error in a single entry.
    """
    given, size = g[start:stop], stop - start
    length = _length(given)
    parts = [given / length * math.sqrt(size)] if 0 < length < math.inf and size > 1 else []
    drawn = (rng.uniform(0.5, 1.5, size) * rng.choice([-1.0, 1.0], size) for _ in range(count))
    for part in itertools.chain(parts, drawn):
        v = np.zeros(len(g))
        v[start:stop] = part
        yield v


class _Checker:
    """A comparison of the engine's derivatives over one batch with differences."""

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
        self.tolerance, adopt = tolerance, devices.adopt_on_host
        self.net = net.copy("float64")  # on the same device; differences run on the CPU
        self.X = np.ascontiguousarray(arrays.matrix(X, net.sizes[0], adopt=adopt))
        last = net.activations[-1]
        assert last is not None
        self.loss = loss_sheet.resolve(loss_sheet.matching(last) if loss is None else loss)
        self.objective = loss_sheet.pair(self.loss, last)
        rows = len(self.X)
        Y_, self.classes = arrays.target(Y, rows, net.sizes[-1], self.loss, adopt=adopt)
        self.Y = np.ascontiguousarray(Y_)
        w = arrays.weights(sample_weight, rows, adopt=adopt)
        self.sample_weight = None if w is None else np.ascontiguousarray(w)
        for array, name in ((self.X, "X"), (self.Y, "Y")):
            arrays.require_finite(array, name)
        weights = weighed(self.loss, self.Y, self.sample_weight, np.float64)
        self.batch = Batch(self.X, self.Y, weights, None, rows)
        self.total = weight_of(self.batch)
        self.share = np.full(rows, 1.0) if weights is None else weights.astype(np.float64)
        self.share /= self.total
        self.differences = Differences(
            self.net.to("cpu"), self.X, self.Y, self.share, self.objective
        )

    def gradient(self, rows: Array | None = None) -> Array:
        """Return the engine's gradient over these rows, divided by the whole batch's weight."""
        net, weights = self.net, self.batch.weights
        step = make_step(
            net.device, net.layout, net.store, net.activations, self.objective, SGD(0.0), Settings()
        )
        batch = self.batch if rows is None else self.batch._replace(rows=rows, size=len(rows))
        weight = "" if weights is None else weights.dtype.str
        types = self.X.dtype.str, self.Y.dtype.str, weight
        plan = step.prepare(batch.size, Inputs(*types, self.classes, host=net.device != "cpu"))
        if not weight_of(batch):
            return np.zeros(net.layout.size)
        step.loss_and_gradient(batch, plan)
        share: Array = devices.find(net.device).to_host(step.gradient) * (
            weight_of(batch) / self.total
        )
        return share

    def check_blocks(self, g: Array, directions: int, rng: np.random.Generator) -> GradientCheck:
        """Compare a gradient block by block, along random directions or (0) entry by entry."""
        errors: dict[str, float] = {}
        resolution: dict[str, float] = {}
        worst, left_out = "", 0
        for name, start, stop in _blocks(self.net):
            typical = _length(g[start:stop]) / math.sqrt(stop - start)
            errors[name] = resolution[name] = 0.0
            along = ((name, v) for v in _directions(g, start, stop, directions, rng))
            for place, v in along if directions else _units(start, stop, self.net):
                found = self._along(v, g, typical)
                if not worst or found.errors[0] > max(errors.values()):
                    worst = place
                errors[name] = max(errors[name], *found.errors)
                resolution[name] = max(resolution[name], found.resolution)
                left_out = max(left_out, len(found.left_out))
        largest = max(errors.values())
        return GradientCheck(
            largest,
            worst,
            largest <= self.tolerance,
            errors,
            left_out,
            self.tolerance,
            resolution=resolution,
        )

    def _along(self, v: Array, g: Array, typical: float) -> Comparison:
        """Compare g · v with the difference of J along v; `typical` is the size of g's entries."""

        def sides(left_out: Array) -> list[float]:
            there = self.gradient(left_out) if len(left_out) else np.zeros(len(g))
            return [float(np.sum(((g - there) * v)[v != 0]))]

        # entries of v have random signs: Σ g_i v_i has the mean square Σ g_i² v_i² ≈ typical² |v|²
        stencil: Stencil = [(0.5, (v, None)), (-0.5, (-v, None))]
        return self._compare(stencil, 1, sides, typical * _length(v))

    def check_products(self, result: GradientCheck, rng: np.random.Generator) -> GradientCheck:
        """Return the result with the checks in `PRODUCTS` added, along random directions."""
        net, rows = self.net, len(self.X)
        dX, V = rng.standard_normal(self.X.shape), rng.standard_normal((rows, net.sizes[-1]))
        u, v = (rng.standard_normal(net.layout.size) for _ in range(2))
        pairs = [self._transpose(V, u, None), self._transpose(V, None, dX)]
        curved = self._curvature(u, v)
        errors = (
            max(max(found.errors) for found in pairs),
            curved.apart,
            max(curved.errors),
        )
        seen = max(found.resolution for found in pairs), curved.resolution, curved.resolution
        products = dict(zip(PRODUCTS, errors, strict=True))
        wrong = [name for name, error in products.items() if error > self.tolerance]
        return dataclasses.replace(
            result,
            products=products,
            resolution=result.resolution | dict(zip(PRODUCTS, seen, strict=True)),
            ok=result.ok and not wrong,
            worst=wrong[0] if wrong and result.ok else result.worst,
        )

    def _transpose(self, V: Array, du: Array | None, dX: Array | None) -> Comparison:
        """Compare ⟨V, J u⟩ and ⟨Jᵀ V, u⟩ with the difference of ⟨V, Z[L]⟩ along u = du or dX."""
        net, rows = self.net, np.arange(len(self.X))
        terms = V * net.jvp(self.X, dX, du).tangent

        def sides(left_out: Array) -> list[float]:
            kept = np.delete(rows, left_out)
            if not len(kept):
                return [0.0, 0.0]
            by_parameters, by_X = net.vjp(self.X[kept], V[kept])
            if dX is not None:
                back = by_X * dX[kept]
            else:
                back = devices.find(net.device).to_host(by_parameters) * du
            return [float(np.sum(terms[kept])), float(np.sum(back))]

        back = None if du is None else -du, None if dX is None else -dX
        # V is standard normal: the sum of the terms has the mean square of their length
        return self._compare([(0.5, (du, dX)), (-0.5, back)], 1, sides, _length(terms), V)

    def _curvature(self, u: Array, v: Array) -> Comparison:
        """Compare ⟨u, H v⟩ and ⟨v, H u⟩ with the second difference of J."""
        rows = np.arange(len(self.X))

        def sides(left_out: Array) -> list[float]:
            kept = np.delete(rows, left_out)
            Hv, Hu = self._hessian_product(v, kept), self._hessian_product(u, kept)
            return [float(u @ Hv), float(v @ Hu)]

        # u is standard normal, |u| ≈ √size: ⟨u, H v⟩ has the mean square |H v|²
        typical = _length(self._hessian_product(v, rows)) * _length(u) / math.sqrt(len(u))
        corners: Stencil = [(0.25 * a * b, (a * u + b * v, None)) for a in (1, -1) for b in (1, -1)]
        return self._compare(corners, 2, sides, typical)

    def _hessian_product(self, v: Array, rows: Array) -> Array:
        """Return H v over these rows, divided by the whole batch's weight."""
        share = float(self.share[rows].sum())
        if not share:
            return np.zeros_like(v)
        given = None if self.sample_weight is None else self.sample_weight[rows]
        product = self.net.hvp(self.X[rows], self.Y[rows], v, self.loss, sample_weight=given)
        there: Array = devices.find(self.net.device).to_host(product) * share
        return there

    def _compare(
        self,
        stencil: Stencil,
        order: int,
        sides: Callable[[Array], list[float]],
        typical: float,
        V: Array | None = None,
    ) -> Comparison:
        comparer = Comparer(self.differences, stencil, order, sides, typical, self.tolerance, V)
        return comparer.compare()


def _length(x: Array) -> float:
    """Return the Euclidean length, even if squares overflow or underflow."""
    largest = float(np.abs(x).max())
    return float(np.linalg.norm(x / largest)) * largest if 0 < largest < math.inf else largest
