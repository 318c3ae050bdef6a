"""Products with the Jacobian and the Hessian of a network, chunk by chunk: `net.jvp`, `vjp`, `hvp`, `gnvp`.

    jvp:  dZ = (∂Z/∂X) dX + (∂Z/∂θ) dθ            vjp:   Vᵀ ∂Z/∂θ, Vᵀ ∂Z/∂X
    hvp:  (∂²J/∂θ²) v                              gnvp:  (∂S/∂θ)ᵀ (∂²J/∂S²) (∂S/∂θ) v

Matrix products of a network of L layers with one width: forward L, gradient 3L - 1, jvp in X 2L, jvp in the parameters 3L - 1,
hvp 8L - 5, gnvp 5L - 2. No tape: the recurrences of `core/differentials.py` on the arrays of one chunk of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import device as devices
from mlpcore.core import backprop, differentials, formulas, inputs
from mlpcore.core import losses as loss_sheet
from mlpcore.core.activations import SOFTMAX, Activation, resolve
from mlpcore.training import plan as planning

if TYPE_CHECKING:
    from mlpcore.mlp import MLP

Array = NDArray[Any]
CUDA_BYTES = 256 << 20  # of a chunk's arrays on a GPU, unless the caller says how many rows
IDENTITY = resolve("identity")


class Tangent(NamedTuple):
    """What `net.jvp` returns: the output Z[L] (m, n_L), and how it changes to first order (m, n_L)."""

    output: Array
    tangent: Array


class Cotangent(NamedTuple):
    """What `net.vjp` returns: the gradient by the parameters, flat as `net.parameters`, and by X (m, n_0)."""

    parameters: Array
    X: Array


class _Pass:
    """The arrays of one chunk of rows, and the passes over them.

    Args:
        net: the network.
        X: the caller's rows.
        second: whether dS and dZ are wanted apart, for the backward pass behind a tangent.
        chunk_rows: rows of a chunk, or None.
        objective: the loss on top, if there is one.
    """

    def __init__(
        self, net: MLP, X: Array, second: bool, chunk_rows: int | None, objective: loss_sheet.Objective | None = None
    ) -> None:
        self.net, self.X, self.L, self.objective = net, X, net.layout.layers, objective
        self.xp, self.ops = devices.module(net.device), devices.operations(net.device, deterministic=True)()
        self.matched = objective is not None and objective.matched
        self.activations = list(net.activations)
        if self.matched:
            self.activations[self.L] = IDENTITY  # the loss reads S[L] itself
        self.keeps = [a is not None and a.slope_reads_s for a in self.activations]
        sizes, itemsize = net.sizes, net.dtype.itemsize
        columns = sum(sizes) * (3 if second else 2) + 3 * max(sizes)
        if chunk_rows is not None:
            rows = inputs.positive_integer(chunk_rows, "chunk_rows")
        elif net.device == "cpu":
            rows = planning.choose_rows(lambda m: m * columns * itemsize, net.layout, itemsize, len(X))
        else:
            rows = max(1, CUDA_BYTES // (columns * itemsize))
        self.rows = rows = min(rows, len(X))
        self.Z = [self._new(rows, n) for n in sizes]
        self.S = [self._new(rows, n) if keep else z for n, keep, z in zip(sizes, self.keeps, self.Z, strict=True)]
        self.dZ = [self._new(rows, n) for n in sizes]
        self.dS = [self._new(rows, n) for n in sizes] if second else self.dZ
        self.G, self.H = self._new(rows, max(sizes)).reshape(-1), self._new(rows, max(sizes)).reshape(-1)
        self.top = self._new(rows, sizes[-1])
        largest = max(rows * max(sizes), *(a * b for a, b in itertools.pairwise(sizes)))
        self.ops.use({
            "ones": self._new(1, rows)[0],
            "dW of a chunk": self._new(1, largest)[0],
            "db of a chunk": self._new(1, max(sizes))[0],
        })  # fmt: skip

    def _new(self, rows: int, columns: int) -> Array:
        array: Array = self.xp.empty((rows, columns), self.net.dtype)
        return array

    def chunks(self) -> Iterator[tuple[slice, int]]:
        """The rows of X, cut, and how many; Z[0] holds those of the chunk."""
        for start in range(0, len(self.X), self.rows):
            part = slice(start, min(start + self.rows, len(self.X)))
            self.load(self.X, part, self.Z[0])
            yield part, part.stop - part.start

    def load(self, source: Array, part: slice, into: Array) -> Array:
        """Rows of a caller's array, cast and moved into a buffer."""
        into[: part.stop - part.start] = _moved(self.net, source[part], self.net.dtype)
        return into[: part.stop - part.start]

    def of(self, m: int) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """The first m rows of S, Z, dS and dZ; one object where two share a buffer, which is how backends know it."""
        views: dict[int, Array] = {}

        def cut(buffers: list[Array]) -> list[Any]:
            return [views.setdefault(id(buffer), buffer[:m]) for buffer in buffers]

        return cut(self.S), cut(self.Z), cut(self.dS), cut(self.dZ)

    def flat(self, buffer: Array, m: int) -> list[Any]:
        """One buffer as an (m, n_l) array for each layer, one layer at a time."""
        return [buffer[: m * n].reshape(m, n) for n in self.net.sizes]

    def forward(self, m: int) -> None:
        """Z of the chunk, and S where the slope reads it."""
        S, Z, _, _ = self.of(m)
        backprop.forward(self.ops, self.net.W, self.net.b, self.activations, S, Z)

    def tangent(self, m: int, dW: Any, db: Any, moved: bool) -> None:
        """The differentials of the chunk; `moved`: whether dZ[0] holds a change of X."""
        S, Z, dS, dZ = self.of(m)
        dZ[0] = dZ[0] if moved else None
        differentials.tangent(self.ops, self.net.W, self.activations, S, Z, dW, db, dS, dZ)

    def first(self, Y: Array, k: Array, m: int, into: Array | None) -> None:
        """K ∂ℓ/∂x of the chunk, by x = S[L] if matched, else Z[L]; None: in the place of x."""
        assert self.objective is not None
        x = self.Z[self.L][:m]
        J = self.xp.zeros((), np.float64 if self.net.device == "cpu" else self.net.dtype)
        self.ops.loss(x, Y, k, self.objective, x if into is None else into, None, J, False)

    def second(self, Y: Array, k: Array, m: int, into: Array) -> None:
        """K ∂²ℓ/∂x² dx of the chunk, from dx in dZ[L]."""
        x, dx, objective = self.Z[self.L][:m], self.dZ[self.L][:m], self.objective
        assert objective is not None
        if objective.loss.rowwise:
            self.ops.bias_activation(x, None, SOFTMAX, P := self._new(m, x.shape[1]))
            self.ops.activation_gradient(dx, P, P, SOFTMAX, into, None)
            self.ops.scale_rows(into, k if Y.ndim == 1 else k * Y.sum(axis=1, keepdims=True))
            return
        numbers = {key: f"T({value!r})" for key, value in objective.scalars}
        formula = formulas.differentiate(formulas.substitute(objective.slope, numbers), {"x": "1"})
        bent = Activation("loss", "s", formulas.substitute(formulas.substitute(formula, {"x": "s"}), {"y": "z"}))
        self.ops.activation_gradient(dx, x, Y, bent, into, None)
        self.ops.scale_rows(into, k)


class _Gradient:
    """The gradient by the parameters, added up over chunks: `vector`, flat."""

    def __init__(self, work: _Pass) -> None:
        self.work, self.net = work, work.net
        self.vector: Array = work.xp.zeros(work.net.layout.size, work.net.dtype)
        self.W, self.b = work.net.layout.views(self.vector)
        self.begun = False

    def add(self, m: int, G: list[Any], D_top: Array | None = None) -> None:
        """The backward pass of the chunk from G[L], or from D[L] where that is None; fills the rest of G."""
        work, net = self.work, self.net
        S, Z, _, _ = work.of(m)
        D = [*Z[:-1], Z[-1] if D_top is None else D_top]
        if D_top is not None:
            work.ops.activation_gradient(D_top, D_top, D_top, IDENTITY, D_top, self.b[-1], self.begun)
        repeats, begun = net.layout.repeats, self.begun
        backprop.backward(work.ops, net.W, work.activations, S, Z, G, D, self.W, self.b, repeats, begun)
        self.begun = True

    def add_second(self, m: int, G: list[Any], H: list[Any], dW: Any, moved: bool, D_top: Array | None = None) -> None:
        """The backward pass behind a tangent, from G[L] and H[L], or from D[L] and from E[L] in the place of Z[L]."""
        work, net = self.work, self.net
        S, Z, dS, dZ = work.of(m)
        D, E = ([*Z[:-1], D_top], [*dZ[:-1], Z[-1]]) if D_top is not None else (Z, dZ)
        dZ = [dZ[0] if moved else None, *dZ[1:]]
        differentials.backward(
            work.ops, net.W, work.activations, S, Z, dS, dZ, G, H, D, E, self.W, self.b, net.layout.repeats, dW, self.begun
        )
        self.begun = True


class _Targets:
    """Checked Y and weights of the rows, and the loss on top of a network."""

    def __init__(self, net: MLP, rows: int, Y: ArrayLike, loss: Any, sample_weight: ArrayLike | None) -> None:
        adopt, last = devices.adopter(net.device), net.activations[-1]
        assert last is not None
        self.net, self.loss = net, loss_sheet.resolve(loss)
        self.objective = loss_sheet.pair(self.loss, last)
        self.Y, self.classes = inputs.target(Y, rows, net.sizes[-1], self.loss, adopt=adopt)
        self.weights = inputs.weights(sample_weight, rows, adopt=adopt)
        self.total = float(rows if self.weights is None else self.weights.sum(dtype=np.float64))

    def of(self, part: slice) -> tuple[Array, Array]:
        """Y of a chunk as the loss takes it, and k = w / Σ w: 0-d, or (m, 1)."""
        net, xp = self.net, devices.module(self.net.device)
        Y = _moved(net, self.Y[part], np.dtype(np.int64) if self.classes else net.dtype)
        if self.weights is None:
            return Y, xp.asarray(1 / self.total, net.dtype)
        return Y, _moved(net, self.weights[part] / self.total, net.dtype)[:, None]


def jvp(net: MLP, X: ArrayLike, dX: ArrayLike | None, dparameters: Any, chunk_rows: int | None) -> Tangent:
    """See `MLP.jvp`."""
    source = _rows(net, X, net.sizes[0], "X")
    if dX is None and dparameters is None:
        raise ValueError("jvp needs a direction: dX, dparameters, or both")
    along = None if dX is None else _rows(net, dX, net.sizes[0], "dX", len(source))
    dW, db = (None, None) if dparameters is None else net.layout.views(_vector(net, dparameters, "dparameters"))
    work = _Pass(net, source, False, chunk_rows)
    output, change = (_result(net, source, net.sizes[-1]) for _ in range(2))
    for part, m in work.chunks():
        if along is not None:
            work.load(along, part, work.dZ[0])
        work.forward(m)
        work.tangent(m, dW, db, along is not None)
        _store(net, output, part, work.Z[-1][:m])
        _store(net, change, part, work.dZ[-1][:m])
    return Tangent(output, change)


def vjp(
    net: MLP, X: ArrayLike, V: ArrayLike, dX: ArrayLike | None, dV: ArrayLike | None, chunk_rows: int | None
) -> Cotangent:  # fmt: skip
    """See `MLP.vjp`."""
    source = _rows(net, X, net.sizes[0], "X")
    given = _rows(net, V, net.sizes[-1], "V", len(source))
    if (dX is None) != (dV is None):
        raise ValueError(f"dX and dV go together, for ⟨dV, dZ⟩ with dZ = (∂Z/∂X) dX; {'dV' if dV is None else 'dX'} is missing")
    along = None if dX is None else _rows(net, dX, net.sizes[0], "dX", len(source))
    weigh = None if dV is None else _rows(net, dV, net.sizes[-1], "dV", len(source))
    work = _Pass(net, source, along is not None, chunk_rows)
    gradient, by_X = _Gradient(work), _result(net, source, net.sizes[0])
    for part, m in work.chunks():
        work.forward(m)
        G = [*work.flat(work.G, m)[:-1], work.load(given, part, work.top)]
        if along is None or weigh is None:
            gradient.add(m, G)
        else:
            work.load(along, part, work.dZ[0])
            work.tangent(m, None, None, True)
            H = work.flat(work.H, m)
            work.load(weigh, part, H[-1])
            gradient.add_second(m, G, H, None, True)
        _store(net, by_X, part, G[0])
    return Cotangent(gradient.vector, by_X)


def hvp(
    net: MLP, X: ArrayLike, Y: ArrayLike, v: Any, loss: Any, sample_weight: ArrayLike | None, chunk_rows: int | None
) -> Array:  # fmt: skip
    """See `MLP.hvp`."""
    source = _rows(net, X, net.sizes[0], "X")
    targets = _Targets(net, len(source), Y, loss, sample_weight)
    dW, db = net.layout.views(_vector(net, v, "v"))
    work = _Pass(net, source, True, chunk_rows, targets.objective)
    gradient = _Gradient(work)
    for part, m in work.chunks():
        y, k = targets.of(part)
        work.forward(m)
        work.tangent(m, dW, db, False)
        G, H, top = work.flat(work.G, m), work.flat(work.H, m), work.top[:m]
        work.second(y, k, m, top)
        work.first(y, k, m, None if work.matched else H[-1])
        G = [None, *G[1:-1], None if work.matched else top]
        gradient.add_second(m, G, H, dW, False, top if work.matched else None)
    return gradient.vector


def gnvp(
    net: MLP, X: ArrayLike, Y: ArrayLike, v: Any, loss: Any, sample_weight: ArrayLike | None, chunk_rows: int | None
) -> Array:  # fmt: skip
    """See `MLP.gnvp`."""
    source = _rows(net, X, net.sizes[0], "X")
    targets = _Targets(net, len(source), Y, loss, sample_weight)
    dW, db = net.layout.views(_vector(net, v, "v"))
    work = _Pass(net, source, False, chunk_rows, targets.objective)
    gradient = _Gradient(work)
    for part, m in work.chunks():
        y, k = targets.of(part)
        work.forward(m)
        work.tangent(m, dW, db, False)
        top = work.top[:m]
        work.second(y, k, m, top)
        G = [None, *work.flat(work.G, m)[1:-1], None if work.matched else top]
        gradient.add(m, G, top if work.matched else None)
    return gradient.vector


def _rows(net: MLP, value: ArrayLike, columns: int, name: str, rows: int | None = None) -> Array:
    """A matrix of so many columns and rows, where it lies. Raises TypeError, ValueError that name it."""
    array = inputs.matrix(value, columns, name, devices.adopter(net.device))
    if rows is not None and len(array) != rows:
        raise ValueError(f"{name} has {len(array)} rows; X has {rows}")
    return array


def _vector(net: MLP, value: Any, name: str) -> Array:
    """A flat vector laid out as the parameters, on the network's device. Raises TypeError, ValueError that name it."""
    flat = value if hasattr(value, "dtype") else getattr(value, "flat", value)  # arrays have a flat of their own
    array = devices.adopter(net.device)(flat, name)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers; its dtype is {array.dtype}")
    if array.shape != (net.layout.size,):
        raise ValueError(f"{name} must have shape ({net.layout.size},), laid out as net.parameters; got {array.shape}")
    return _moved(net, array, net.dtype)


def _moved(net: MLP, array: Array, dtype: np.dtype[Any]) -> Array:
    """An array in this dtype, row-major, on the network's device."""
    moved: Array = devices.to_device(net.device, array.astype(dtype, order="C", copy=False))
    return moved


def _result(net: MLP, source: Array, columns: int) -> Array:
    """Where the rows of a result go: to the host if X lies there."""
    xp = np if inputs.on_host(source) else devices.module(net.device)
    array: Array = xp.empty((len(source), columns), net.dtype)
    return array


def _store(net: MLP, result: Array, part: slice, rows: Array) -> None:
    result[part] = devices.to_host(net.device, rows) if inputs.on_host(result) else rows
