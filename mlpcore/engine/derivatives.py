"""Products with a network's Jacobian and Hessian: `net.jvp`, `net.vjp`, `net.hvp`, `net.gnvp`.

    jvp:  dZ = (∂Z/∂X) dX + (∂Z/∂θ) dθ            vjp:   Vᵀ ∂Z/∂θ, Vᵀ ∂Z/∂X
    hvp:  (∂²J/∂θ²) v                              gnvp:  (∂S/∂θ)ᵀ (∂²J/∂S²) (∂S/∂θ) v

Matrix products of a network of L layers with one width: forward L, gradient 3L - 1, jvp in X 2L,
jvp in the parameters 3L - 1, hvp 8L - 5, gnvp 5L - 2. There is no tape: the recurrences of
`core/differentials.py` run on the arrays of one chunk of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import arrays
from mlpcore.core import losses as loss_sheet
from mlpcore.core.network import Network
from mlpcore.core.ops import Buffer
from mlpcore.core.targets import weighed
from mlpcore.engine.memory import Size
from mlpcore.engine.passes import on_its_device
from mlpcore.engine.row_chunks import GradientSum, RowChunks, to_device

Array = NDArray[Any]


class Tangent(NamedTuple):
    """The output Z[L] (m, n_L) and its first-order change (m, n_L), as `net.jvp` returns them."""

    output: Array
    tangent: Array


class Cotangent(NamedTuple):
    """The gradients by the parameters, flat, and by X (m, n_0), as `net.vjp` returns them."""

    parameters: Array
    X: Array


@on_its_device
def jvp(
    net: Network,
    X: ArrayLike,
    dX: ArrayLike | None = None,
    dparameters: Any = None,
    *,
    chunk_rows: int | None = None,
    memory_limit: float | str | None = None,
) -> Tangent:
    """Return the output and its differential: `(output, tangent)`, each (m, n_L).

    The differential is dZ = (∂Z/∂X) dX + (∂Z/∂parameters) dparameters.

    Args:
        X: (m, n_0).
        dX: (m, n_0), one direction per row; None: X does not change.
        dparameters: flat, laid out as `parameters`, or an object with such a `.flat`; None: they do
            not change.
        chunk_rows: number of rows at a time; None: as many as fit into the cache.
        memory_limit: as in `predict`.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what was passed.
        MemoryError: `memory_limit` is too small; names the largest arrays.
    """
    source = _rows(net, X, net.sizes[0], "X")
    if dX is None and dparameters is None:
        raise ValueError("jvp needs a direction: dX, dparameters, or both")
    along = None if dX is None else _rows(net, dX, net.sizes[0], "dX", len(source))
    flat, copied = (None, []) if dparameters is None else _vector(net, dparameters, "dparameters")
    direction = None if flat is None else net.cut(flat)
    results = [_result(net, source, net.sizes[-1], name) for name in ("output", "tangent")]
    size = Size(chunk_rows, memory_limit)
    chunks = RowChunks(net, source, 0, size, [*copied, *results])
    output, change = (_new(net, source, result) for result in results)
    for part, _ in chunks.chunks():
        moved = None if along is None else chunks.load(along, part, chunks.arrays["dX"])
        chunks.tangent(direction, moved)
        _store(net, output, part, chunks.work.Z[-1])
        _store(net, change, part, chunks.work.dZ[-1])
    return Tangent(arrays.in_library_of(X, output), arrays.in_library_of(X, change))


@on_its_device
def vjp(
    net: Network,
    X: ArrayLike,
    V: ArrayLike,
    *,
    dX: ArrayLike | None = None,
    dV: ArrayLike | None = None,
    chunk_rows: int | None = None,
    memory_limit: float | str | None = None,
) -> Cotangent:
    """Return the gradient of ⟨V, Z⟩ by parameters and X: `(parameters, X)`, flat and (m, n_0).

    With dX and dV it is the gradient of ⟨V, Z⟩ + ⟨dV, dZ⟩, where dZ = (∂Z/∂X) dX. A loss with
    targets for a derivative needs this, with V = ∂J/∂Z and dV = ∂J/∂dZ. dX is held constant.

    Args:
        X, dX: (m, n_0).
        V, dV: (m, n_L).
        chunk_rows: number of rows at a time; None: as many as fit into the cache.
        memory_limit: as in `predict`.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what was passed.
        MemoryError: `memory_limit` is too small; names the largest arrays.
    """
    source = _rows(net, X, net.sizes[0], "X")
    given = _rows(net, V, net.sizes[-1], "V", len(source))
    if (dX is None) != (dV is None):
        missing = "dV" if dV is None else "dX"
        raise ValueError(
            f"dX and dV go together, for ⟨dV, dZ⟩ with dZ = (∂Z/∂X) dX; {missing} is missing"
        )
    along = None if dX is None else _rows(net, dX, net.sizes[0], "dX", len(source))
    weigh = None if dV is None else _rows(net, dV, net.sizes[-1], "dV", len(source))
    result = _result(net, source, net.sizes[0], "gradient by X")
    fixed, size = [GradientSum.buffer(net), result], Size(chunk_rows, memory_limit)
    chunks = RowChunks(net, source, 1 if along is None else 2, size, fixed)
    gradient, by_X = GradientSum(chunks), _new(net, source, result)
    for part, m in chunks.chunks():
        G = [*chunks.in_turn("G", m)[:-1], chunks.load(given, part, chunks.top)]
        if along is None or weigh is None:
            chunks.work.forward()
            gradient.add(G)
        else:
            chunks.tangent(None, chunks.load(along, part, chunks.arrays["dX"]))
            H = chunks.in_turn("H", m)
            H[-1] = chunks.load(weigh, part, H[-1])
            gradient.add_second(G, H, None)
        _store(net, by_X, part, G[0])
    return Cotangent(gradient.vector, arrays.in_library_of(X, by_X))


@on_its_device
def hvp(
    net: Network,
    X: ArrayLike,
    Y: ArrayLike,
    v: Any,
    loss: Any = "squared_error",
    *,
    sample_weight: ArrayLike | None = None,
    chunk_rows: int | None = None,
    memory_limit: float | str | None = None,
) -> Array:
    """Return the exact Hessian-vector product (∂²J/∂parameters²) v, flat.

    J is the mean loss over the rows as in `Trainer.step`, without penalties.

    Args:
        X, Y, sample_weight: the batch, as in `Trainer.step`.
        v: flat, laid out as `parameters`, or an object with such a `.flat`.
        loss: a name, `(name, parameter)` or `mc.Loss`.
        chunk_rows: number of rows at a time; None: as many as fit into the cache.
        memory_limit: as in `predict`.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what was passed.
        MemoryError: `memory_limit` is too small; names the largest arrays.
    """
    size = Size(chunk_rows, memory_limit)
    return _curvature_product(net, X, Y, v, loss, sample_weight, size, exact=True)


@on_its_device
def gnvp(
    net: Network,
    X: ArrayLike,
    Y: ArrayLike,
    v: Any,
    loss: Any = "squared_error",
    *,
    sample_weight: ArrayLike | None = None,
    chunk_rows: int | None = None,
    memory_limit: float | str | None = None,
) -> Array:
    """Return the Gauss-Newton product (∂x/∂parameters)ᵀ (∂²J/∂x²) (∂x/∂parameters) v, flat.

    x is S[L] if loss and output match (softmax and cross_entropy), else Z[L]. Arguments as in
    `hvp`. Schraudolph 2002.
    """
    size = Size(chunk_rows, memory_limit)
    return _curvature_product(net, X, Y, v, loss, sample_weight, size, exact=False)


def _curvature_product(
    net: Network,
    X: ArrayLike,
    Y: ArrayLike,
    v: Any,
    loss: Any,
    sample_weight: ArrayLike | None,
    size: Size,
    exact: bool,
) -> Array:
    """Return the product with the Hessian, or with its Gauss-Newton part if not `exact`."""
    source = _rows(net, X, net.sizes[0], "X")
    targets = _Targets(net, len(source), Y, loss, sample_weight)
    flat, copied = _vector(net, v, "v")
    along, fixed = net.cut(flat), [GradientSum.buffer(net), *copied, *targets.buffers]
    chunks = RowChunks(net, source, 2 if exact else 1, size, fixed, targets.objective)
    gradient = GradientSum(chunks)
    for part, m in chunks.chunks():
        y, k = targets.of(part)
        chunks.tangent(along)
        top = chunks.top[:m]
        chunks.second(y, k, top)
        G = [None, *chunks.in_turn("G", m)[1:-1], None if chunks.matched else top]
        D_top = top if chunks.matched else None
        if exact:
            H = chunks.in_turn("H", m)
            chunks.first(y, k, None if chunks.matched else H[-1])
            gradient.add_second(G, H, along, D_top)
        else:
            gradient.add(G, D_top)
    return gradient.vector


class _Targets:
    """Checked Y and weights of the rows, and the loss on top of a network."""

    def __init__(
        self, net: Network, rows: int, Y: ArrayLike, loss: Any, sample_weight: ArrayLike | None
    ) -> None:
        adopt, last = devices.find(net.device).adopt, net.activations[-1]
        assert last is not None
        self.net, self.loss = net, loss_sheet.resolve(loss)
        self.objective = loss_sheet.pair(self.loss, last)
        self.Y, self.classes = arrays.target(Y, rows, net.sizes[-1], self.loss, adopt=adopt)
        self.weights = arrays.weights(sample_weight, rows, adopt=adopt)
        if self.loss.class_weight is not None:
            Y_, w = (
                None if x is None else devices.find(net.device).to_device(x)
                for x in (self.Y, self.weights)
            )
            xp = devices.find(net.device).xp
            self.weights = weighed(self.loss, Y_, w, net.dtype, xp)
        by_class = Buffer("row weights", (rows,), net.dtype.name, "by class, times sample_weight")
        self.buffers = [by_class] if self.loss.class_weight is not None else []
        self.total = float(rows if self.weights is None else self.weights.sum(dtype=np.float64))

    def of(self, part: slice) -> tuple[Array, Array]:
        """Return Y of a chunk as the loss takes it, and k = w / Σ w: 0-d, or (m, 1)."""
        net, xp = self.net, devices.find(self.net.device).xp
        Y = to_device(net, self.Y[part], np.dtype(np.int64) if self.classes else net.dtype)
        if self.weights is None:
            return Y, xp.asarray(1 / self.total, net.dtype)
        return Y, to_device(net, self.weights[part] / self.total, net.dtype)[:, None]


def _rows(
    net: Network, value: ArrayLike, columns: int, name: str, rows: int | None = None
) -> Array:
    """Return a checked matrix with this many rows and columns, uncopied; errors name it."""
    array = arrays.matrix(value, columns, name, devices.find(net.device).adopt)
    if rows is not None and len(array) != rows:
        raise ValueError(f"{name} has {len(array)} rows; X has {rows}")
    return array


def _vector(net: Network, value: Any, name: str) -> tuple[Array, list[Buffer]]:
    """Return a flat vector on the network's device, and the plan's line for a copy, if any."""
    array = net.to_flat(value, name, devices.find(net.device).adopt)
    moved = to_device(net, array, net.dtype)
    copy = Buffer(name, moved.shape, net.dtype.name, "a copy of the direction")
    return moved, [] if moved is array else [copy]


def _result(net: Network, source: Array, columns: int, name: str) -> Buffer:
    """Return the plan's line for a result with one row per row of X."""
    return Buffer(name, (len(source), columns), net.dtype.name, "a result")


def _new(net: Network, source: Array, result: Buffer) -> Array:
    """Return a new array for a result: on the host if X is there."""
    xp = np if arrays.on_host(source) else devices.find(net.device).xp
    array: Array = xp.empty(result.shape, result.dtype)
    return array


def _store(net: Network, result: Array, part: slice, rows: Array) -> None:
    result[part] = devices.find(net.device).to_host(rows) if arrays.on_host(result) else rows
