"""Products with the Jacobian and the Hessian of a network, chunk by chunk: `net.jvp`, `vjp`, `hvp`,
`gnvp`.

    jvp:  dZ = (∂Z/∂X) dX + (∂Z/∂θ) dθ            vjp:   Vᵀ ∂Z/∂θ, Vᵀ ∂Z/∂X
    hvp:  (∂²J/∂θ²) v                              gnvp:  (∂S/∂θ)ᵀ (∂²J/∂S²) (∂S/∂θ) v

Matrix products of a network of L layers with one width: forward L, gradient 3L - 1, jvp in X 2L,
jvp in the parameters 3L - 1, hvp 8L - 5, gnvp 5L - 2. No tape: the recurrences of
`core/differentials.py` on the arrays of one chunk of rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.backends.numpy.programs import PIECE
from mlpcore.checks import arrays, values
from mlpcore.core import backprop, differentials, formulas
from mlpcore.core import losses as loss_sheet
from mlpcore.core.activations import SOFTMAX, Activation, bind, resolve
from mlpcore.core.ops import Buffer
from mlpcore.core.program import program
from mlpcore.core.targets import mixed, weighed
from mlpcore.engine import plan as planning
from mlpcore.engine.plan import Plan

if TYPE_CHECKING:
    from mlpcore.mlp import MLP

Array = NDArray[Any]
CUDA_BYTES = 256 << 20  # of a chunk's arrays on a GPU, unless the caller says how many rows
TEMPORARIES = 8  # arrays of a chunk's output, or of a layer that learns, that the backend makes
VECTORS = 10  # numbers of 8 bytes for each row: weights, sums, labels
IDENTITY = resolve("identity")


class Tangent(NamedTuple):
    """What `net.jvp` returns: the output Z[L] (m, n_L), and how it changes to first order (m, n_L)."""

    output: Array
    tangent: Array


class Cotangent(NamedTuple):
    """What `net.vjp` returns: the gradient by the parameters, flat as `net.parameters`, and by X
    (m, n_0).
    """

    parameters: Array
    X: Array


class _Direction(NamedTuple):
    """The views dW, db and da of a flat vector laid out as the parameters."""

    W: tuple[Array, ...]
    b: tuple[Array, ...]
    a: tuple[Array, ...]

    @classmethod
    def of(cls, net: MLP, flat: Array) -> _Direction:
        """Cut a flat vector."""
        return cls(*net.layout.views(flat), net.layout.slopes(flat))


class Size(NamedTuple):
    """The caller's wishes about memory.

    Attributes:
        chunk_rows: rows of a chunk at most; None: chosen.
        memory_limit: as `plan.parse_bytes` takes it.
    """

    chunk_rows: int | None = None
    memory_limit: float | str | None = None

    def plan(
        self, net: MLP, rows: int, chosen: int, fixed: Sequence[Buffer],
        chunk: Callable[[int], list[Buffer]],
    ) -> Plan:  # fmt: skip
        """Return the plan of a pass over so many rows of X, by `chosen` at a time at most.

        Args:
            net: the network, whose parameters count.
            rows: how many there are.
            chosen: rows of a chunk.
            fixed: the arrays beside those of a chunk.
            chunk: lists the arrays of a chunk of so many rows.

        Raises:
            MemoryError: not even one row at a time keeps the limit; names the largest arrays.
        """
        limit = planning.parse_bytes(self.memory_limit, free=lambda: devices.free_bytes(net.device))
        parameters = Buffer("parameters", (net.layout.size,), net.dtype.name, "of the network")

        def table(n: int) -> Plan:
            parts = {"parameters": [parameters], "call": list(fixed), "workspace": chunk(n)}
            return Plan(n, 1, rows, parts)

        return planning.within(limit, table, min(chosen, rows))


def temporaries(
    net: MLP, activations: Sequence[Activation | None], rows: int, count: int = 1,
    curved: bool = False, objective: loss_sheet.Objective | None = None,
) -> Buffer:  # fmt: skip
    """Return, for a plan, a bound of the bytes that the backend takes for a chunk by itself.

    Args:
        net: the network.
        activations: of its layers.
        rows: of a chunk.
        count: arrays of a chunk's output, or of a layer that learns, that are made at a time.
        curved: whether second derivatives are taken.
        objective: the loss on top, if there is one.
    """
    dtype, registers = net.dtype.name, 0
    for σ in activations:
        if σ is not None and not σ.rowwise:
            slope = f"g * ({σ.slope})" + (f" + h * t * ({σ.curvature})" if curved else "")
            found = (_registers(text, σ.scalars, dtype) for text in (σ.value, slope))
            registers = max(registers, *found)
    if objective is not None and not objective.loss.rowwise:
        scalars = dict(objective.scalars)
        for text in (objective.value, objective.slope):
            count = max(count, 2 + _registers(f"k * ({text})", scalars, dtype))
        registers = max(registers, _registers(f"g * ({objective.curvature})", scalars, dtype))
    learned = [n for n, σ in zip(net.sizes, activations, strict=True) if σ and σ.learned]
    numbers = count * rows * max(net.sizes[-1], *learned, 0)
    numbers += registers * min(PIECE, rows * max(net.sizes))
    bound = numbers * net.dtype.itemsize + 8 * VECTORS * rows
    return Buffer("temporaries", (bound,), "uint8", "of the backend, at most")


def _registers(text: str, scalars: Mapping[str, float], dtype: str) -> int:
    """Return how many intermediate results a formula has at most at a time."""
    return program(f"d = {text}", frozenset(scalars), dtype).registers


class _Pass:
    """The arrays of one chunk of rows, cut from one allocation, and the passes over them.

    Args:
        net: the network.
        X: the caller's rows.
        keeps: how much a backward pass needs: 0 none comes, 1 every Z[l], 2 every dS[l] and dZ[l],
            too.
        size: rows of a chunk, and the limit.
        fixed: what the call allocates beside, for the plan.
        objective: the loss on top, if there is one.
    """

    def __init__(
        self, net: MLP, X: Array, keeps: int, size: Size, fixed: Sequence[Buffer],
        objective: loss_sheet.Objective | None = None,
    ) -> None:  # fmt: skip
        self.net, self.X, self.L, self.objective = net, X, net.layout.layers, objective
        self.xp, self.ops = (
            devices.module(net.device),
            devices.operations(net.device, deterministic=True)(),
        )
        self.matched = objective is not None and objective.matched
        self.activations = list(bind(net.activations, net.store.a))
        if self.matched:
            self.activations[self.L] = IDENTITY  # the loss reads S[L] itself
        itemsize = net.dtype.itemsize
        if size.chunk_rows is not None:
            rows = values.positive_integer(size.chunk_rows, "chunk_rows")
        elif net.device == "cpu":
            rows = planning.choose_rows(
                lambda m: planning.part_bytes(self._buffers(m, keeps)), net.layout, itemsize, len(X)
            )
        else:
            rows = max(1, CUDA_BYTES // (planning.part_bytes(self._buffers(1024, keeps)) // 1024))
        curved = keeps == 2

        def chunk(n: int) -> list[Buffer]:
            beside = temporaries(net, self.activations, n, TEMPORARIES, curved, objective)
            return [*self._buffers(n, keeps), beside]

        self.rows = size.plan(net, len(X), rows, fixed, chunk).rows
        self.arrays = planning.allocate(self.ops, self._buffers(self.rows, keeps))
        self.ops.use(self.arrays)
        layers, slots = range(self.L + 1), [l % 2 for l in range(self.L + 1)]
        self.names = {
            "Z": [f"Z[{l if keeps else slots[l]}]" for l in layers],
            "dZ": [f"dZ[{l if keeps == 2 else slots[l]}]" for l in layers],
        }
        self.names["S"] = ["S[0]" if self._reads_s(l) and not keeps else f"S[{l}]" if self._reads_s(l) else z
                           for l, z in enumerate(self.names["Z"])]  # fmt: skip
        self.names["dS"] = [f"dS[{l}]" for l in layers] if keeps == 2 else self.names["dZ"]
        self.Z0 = self.dZ0 = self.arrays["X"]
        self.top = self.arrays["top"]

    def _reads_s(self, l: int) -> bool:
        activation = self.activations[l]
        return activation is not None and activation.slope_reads_s

    def _buffers(self, rows: int, keeps: int) -> list[Buffer]:
        """The arrays of chunks of `rows` rows. Without a backward pass two layers at a time are
        enough.
        """
        sizes, dtype, wide = self.net.sizes, self.net.dtype.name, max(self.net.sizes)
        shapes: dict[str, tuple[int, ...]] = {
            "X": (rows, sizes[0]),
            "dX": (rows, sizes[0]),
            "top": (rows, sizes[-1]),
        }
        for l in range(1, self.L + 1) if keeps else (0, 1):
            n = sizes[l] if keeps else wide
            shapes[f"Z[{l}]"] = (rows, n)
            if self._reads_s(l) or (not keeps and any(map(self._reads_s, range(self.L + 1)))):
                shapes[f"S[{l}]"] = (rows, n)
            if keeps == 2:
                shapes[f"dS[{l}]"] = shapes[f"dZ[{l}]"] = (rows, n)
        if keeps < 2:
            shapes |= {"dZ[0]": (rows, wide), "dZ[1]": (rows, wide)}
        if keeps:
            shapes |= {
                "G": (rows * wide,),
                "H": (rows * wide,),
                "ones": (rows,),
                "db of a chunk": (wide,),
            }
        largest = max(rows * wide, *(a * b for a, b in itertools.pairwise(sizes)))
        shapes["dW of a chunk"] = (largest if keeps else rows * wide,)
        return [Buffer(name, shape, dtype, "of a chunk") for name, shape in shapes.items()]

    def chunks(self) -> Iterator[tuple[slice, int]]:
        """The rows of X, cut, and how many; Z[0] holds those of the chunk."""
        for start in range(0, len(self.X), self.rows):
            part = slice(start, min(start + self.rows, len(self.X)))
            self.Z0 = self.load(self.X, part, self.arrays["X"])
            yield part, part.stop - part.start

    def load(self, source: Array, part: slice, into: Array) -> Array:
        """Rows of a caller's array: where they lie if they are as the network wants them, else in a
        buffer.
        """
        rows = source[part]
        if self.net.device == "cpu" and rows.dtype == self.net.dtype and rows.flags.c_contiguous:
            return rows
        placed = into[: len(rows)]
        if self.net.device == "cpu":
            np.copyto(placed, rows, casting="unsafe")
        else:
            placed[...] = _moved(self.net, rows, self.net.dtype)
        return placed

    def of(self, m: int) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """The first m rows of S, Z, dS and dZ; one object where two share a buffer, which is how
        backends know it.
        """
        views: dict[tuple[str, int], Array] = {}

        def cut(names: list[str], first: Array) -> list[Any]:
            found = [first]
            for name, n in zip(names[1:], self.net.sizes[1:], strict=True):
                if (name, n) not in views:
                    views[name, n] = self.arrays[name].reshape(-1)[: m * n].reshape(m, n)
                found.append(views[name, n])
            return found

        S, Z = cut(self.names["S"], self.Z0), cut(self.names["Z"], self.Z0)
        return S, Z, cut(self.names["dS"], self.dZ0), cut(self.names["dZ"], self.dZ0)

    def flat(self, name: str, m: int) -> list[Any]:
        """One buffer as an (m, n_l) array for each layer, one layer at a time."""
        return [self.arrays[name][: m * n].reshape(m, n) for n in self.net.sizes]

    def forward(self, m: int) -> None:
        """Z of the chunk, and S where the slope reads it."""
        S, Z, _, _ = self.of(m)
        backprop.forward(self.ops, self.net.store.W, self.net.store.b, self.activations, S, Z)

    def tangent(self, m: int, along: _Direction | None, moved: bool) -> None:
        """Z of the chunk and its differential; `moved`: whether dZ[0] holds a change of X."""
        S, Z, dS, dZ = self.of(m)
        dZ[0] = dZ[0] if moved else None
        dW, db, da = along or (None, None, None)
        differentials.forward(
            self.ops, self.net.store.W, self.net.store.b, self.activations, S, Z, dW, db, dS, dZ, da
        )

    def output(self, m: int) -> Array:
        """Z[L] of the chunk, S[L] if the loss reads that."""
        last: Array = self.of(m)[1][-1]
        return last

    def first(self, Y: Array, k: Array, m: int, into: Array | None) -> None:
        """K ∂ℓ/∂x of the chunk, by x = S[L] if matched, else Z[L]; None: in the place of x."""
        assert self.objective is not None
        x = self.output(m)
        J = self.xp.zeros((), np.float64 if self.net.device == "cpu" else self.net.dtype)
        self.ops.loss(x, Y, k, self.objective, x if into is None else into, None, J, False)

    def second(self, Y: Array, k: Array, m: int, into: Array) -> None:
        """K ∂²ℓ/∂x² dx of the chunk, from dx in dZ[L]."""
        x, dx, objective = self.output(m), self.of(m)[3][-1], self.objective
        assert objective is not None
        if objective.loss.rowwise:
            self.ops.bias_activation(x, None, SOFTMAX, P := self.xp.empty_like(x))
            apart = (
                dx - dx[self.xp.arange(m), x.argmax(axis=1)][:, None]
            )  # the same to softmax, and 1 - P keeps its digits
            self.ops.activation_gradient(apart, P, P, SOFTMAX, into, None)
            mixes = objective.loss.mixes(Y.ndim == 1)
            t = mixed(objective.loss, Y, x.shape[1], x.dtype, self.xp) if mixes else Y
            self.ops.scale_rows(into, k if t.ndim == 1 else k * t.sum(axis=1, keepdims=True))
            return
        columns = objective.loss.columns
        if not columns:
            self.ops.activation_gradient(dx, x, Y, _bent(objective), into, None)
        for p in dict.fromkeys(columns):  # columns of one weight together
            at = self.xp.asarray([column for column, weight in enumerate(columns) if weight == p])
            d, s, y = (self.xp.ascontiguousarray(array[:, at]) for array in (dx, x, Y))
            self.ops.activation_gradient(d, s, y, _bent(objective, p), d, None)
            into[:, at] = d
        self.ops.scale_rows(into, k)


@functools.lru_cache(64)
def _bent(objective: loss_sheet.Objective, p: float | None = None) -> Activation:
    """Return the loss as an activation whose slope is the loss's curvature, of columns of weight p."""
    numbers = dict(objective.scalars) | ({} if p is None else {"p": p})
    written = {key: f"T({value!r})" for key, value in numbers.items()}
    formula = formulas.substitute(objective.curvature, {**written, "x": "s", "y": "z"})
    return Activation("loss", "s", formula)


class _Gradient:
    """The gradient by the parameters, added up over chunks: `vector`, flat."""

    @staticmethod
    def buffer(net: MLP) -> Buffer:
        """Return the plan's line for it."""
        return Buffer("gradient", (net.layout.size,), net.dtype.name, "a result")

    def __init__(self, work: _Pass) -> None:
        self.work, self.net = work, work.net
        self.vector: Array = work.xp.zeros(work.net.layout.size, work.net.dtype)
        self.W, self.b, self.a = _Direction.of(work.net, self.vector)
        self.activations = bind(work.activations, work.net.store.a, self.a)
        self.begun = False

    def add(self, m: int, G: list[Any], D_top: Array | None = None) -> None:
        """The backward pass of the chunk from G[L], or from D[L] where that is None; fills the rest
        of G.
        """
        work, net = self.work, self.net
        S, Z, _, _ = work.of(m)
        D = [*Z[:-1], Z[-1] if D_top is None else D_top]
        if D_top is not None:
            work.ops.activation_gradient(
                D_top, D_top, D_top, IDENTITY, D_top, self.b[-1], self.begun
            )
        repeats, begun = net.layout.repeats, self.begun
        backprop.backward(
            work.ops, net.store.W, self.activations, S, Z, G, D, self.W, self.b, repeats, begun
        )
        self.begun = True

    def add_second(
        self, m: int, G: list[Any], H: list[Any], along: _Direction | None, moved: bool, D_top: Array | None = None
    ) -> None:  # fmt: skip
        """The backward pass behind a tangent, from G[L] and H[L], or from D[L] and from E[L] in the
        place of Z[L].
        """
        work, net = self.work, self.net
        S, Z, dS, dZ = work.of(m)
        D, E = ([*Z[:-1], D_top], [*dZ[:-1], Z[-1]]) if D_top is not None else (Z, dZ)
        dZ = [dZ[0] if moved else None, *dZ[1:]]
        dW, _, da = along or (None, None, None)
        differentials.backward(
            work.ops, net.store.W, work.activations, S, Z, dS, dZ, G, H, D, E, self.W, self.b, net.layout.repeats, dW,
            self.begun, self.a, da,
        )  # fmt: skip
        self.begun = True


class _Targets:
    """Checked Y and weights of the rows, and the loss on top of a network."""

    def __init__(
        self, net: MLP, rows: int, Y: ArrayLike, loss: Any, sample_weight: ArrayLike | None
    ) -> None:
        adopt, last = devices.adopter(net.device), net.activations[-1]
        assert last is not None
        self.net, self.loss = net, loss_sheet.resolve(loss)
        self.objective = loss_sheet.pair(self.loss, last)
        self.Y, self.classes = arrays.target(Y, rows, net.sizes[-1], self.loss, adopt=adopt)
        self.weights = arrays.weights(sample_weight, rows, adopt=adopt)
        if self.loss.class_weight is not None:
            Y_, w = (
                None if x is None else devices.to_device(net.device, x)
                for x in (self.Y, self.weights)
            )
            xp = devices.module(net.device)
            self.weights = weighed(self.loss, Y_, w, net.dtype, xp)
        by_class = Buffer("row weights", (rows,), net.dtype.name, "by class, times sample_weight")
        self.buffers = [by_class] if self.loss.class_weight is not None else []
        self.total = float(rows if self.weights is None else self.weights.sum(dtype=np.float64))

    def of(self, part: slice) -> tuple[Array, Array]:
        """Y of a chunk as the loss takes it, and k = w / Σ w: 0-d, or (m, 1)."""
        net, xp = self.net, devices.module(self.net.device)
        Y = _moved(net, self.Y[part], np.dtype(np.int64) if self.classes else net.dtype)
        if self.weights is None:
            return Y, xp.asarray(1 / self.total, net.dtype)
        return Y, _moved(net, self.weights[part] / self.total, net.dtype)[:, None]


def jvp(net: MLP, X: ArrayLike, dX: ArrayLike | None, dparameters: Any, size: Size) -> Tangent:
    """See `MLP.jvp`."""
    source = _rows(net, X, net.sizes[0], "X")
    if dX is None and dparameters is None:
        raise ValueError("jvp needs a direction: dX, dparameters, or both")
    along = None if dX is None else _rows(net, dX, net.sizes[0], "dX", len(source))
    flat, copied = (None, []) if dparameters is None else _vector(net, dparameters, "dparameters")
    parameters = None if flat is None else _Direction.of(net, flat)
    results = [_result(net, source, net.sizes[-1], name) for name in ("output", "tangent")]
    work = _Pass(net, source, 0, size, [*copied, *results])
    output, change = (_new(net, source, result) for result in results)
    for part, m in work.chunks():
        if along is not None:
            work.dZ0 = work.load(along, part, work.arrays["dX"])
        work.tangent(m, parameters, along is not None)
        _, Z, _, dZ = work.of(m)
        _store(net, output, part, Z[-1])
        _store(net, change, part, dZ[-1])
    return Tangent(arrays.in_library_of(X, output), arrays.in_library_of(X, change))


def vjp(
    net: MLP, X: ArrayLike, V: ArrayLike, dX: ArrayLike | None, dV: ArrayLike | None, size: Size
) -> Cotangent:  # fmt: skip
    """See `MLP.vjp`."""
    source = _rows(net, X, net.sizes[0], "X")
    given = _rows(net, V, net.sizes[-1], "V", len(source))
    if (dX is None) != (dV is None):
        raise ValueError(
            "dX and dV go together, for ⟨dV, dZ⟩ with dZ = (∂Z/∂X) dX; "
            f"{'dV' if dV is None else 'dX'} is missing"
        )
    along = None if dX is None else _rows(net, dX, net.sizes[0], "dX", len(source))
    weigh = None if dV is None else _rows(net, dV, net.sizes[-1], "dV", len(source))
    result = _result(net, source, net.sizes[0], "gradient by X")
    work = _Pass(net, source, 1 if along is None else 2, size, [_Gradient.buffer(net), result])
    gradient, by_X = _Gradient(work), _new(net, source, result)
    for part, m in work.chunks():
        G = [*work.flat("G", m)[:-1], work.load(given, part, work.top)]
        if along is None or weigh is None:
            work.forward(m)
            gradient.add(m, G)
        else:
            work.dZ0 = work.load(along, part, work.arrays["dX"])
            work.tangent(m, None, True)
            H = work.flat("H", m)
            H[-1] = work.load(weigh, part, H[-1])
            gradient.add_second(m, G, H, None, True)
        _store(net, by_X, part, G[0])
    return Cotangent(gradient.vector, arrays.in_library_of(X, by_X))


def curvature_product(
    net: MLP, X: ArrayLike, Y: ArrayLike, v: Any, loss: Any, sample_weight: ArrayLike | None,
    size: Size, exact: bool,
) -> Array:  # fmt: skip
    """See `MLP.hvp`; with `exact` False what bends in the network is left out: `MLP.gnvp`."""
    source = _rows(net, X, net.sizes[0], "X")
    targets = _Targets(net, len(source), Y, loss, sample_weight)
    flat, copied = _vector(net, v, "v")
    along, fixed = _Direction.of(net, flat), [_Gradient.buffer(net), *copied, *targets.buffers]
    work = _Pass(net, source, 2 if exact else 1, size, fixed, targets.objective)
    gradient = _Gradient(work)
    for part, m in work.chunks():
        y, k = targets.of(part)
        work.tangent(m, along, False)
        top = work.top[:m]
        work.second(y, k, m, top)
        G = [None, *work.flat("G", m)[1:-1], None if work.matched else top]
        D_top = top if work.matched else None
        if exact:
            H = work.flat("H", m)
            work.first(y, k, m, None if work.matched else H[-1])
            gradient.add_second(m, G, H, along, False, D_top)
        else:
            gradient.add(m, G, D_top)
    return gradient.vector


def _rows(net: MLP, value: ArrayLike, columns: int, name: str, rows: int | None = None) -> Array:
    """A matrix of so many columns and rows, where it lies. Raises TypeError, ValueError that name
    it.
    """
    array = arrays.matrix(value, columns, name, devices.adopter(net.device))
    if rows is not None and len(array) != rows:
        raise ValueError(f"{name} has {len(array)} rows; X has {rows}")
    return array


def _vector(net: MLP, value: Any, name: str) -> tuple[Array, list[Buffer]]:
    """Return a flat vector laid out as the parameters, on the network's device.

    With it comes, for the plan, the copy that it may be.

    Raises:
        TypeError, ValueError: names the argument.
    """
    flat = (
        value if hasattr(value, "dtype") else getattr(value, "flat", value)
    )  # arrays have a flat of their own
    array = arrays.numeric(flat, name, devices.adopter(net.device))
    if array.shape != (net.layout.size,):
        raise ValueError(
            f"{name} must have shape ({net.layout.size},), laid out as net.parameters; got "
            f"{array.shape}"
        )
    moved = _moved(net, array, net.dtype)
    copy = Buffer(name, moved.shape, net.dtype.name, "a copy of the direction")
    return moved, [] if moved is array else [copy]


def _moved(net: MLP, array: Array, dtype: np.dtype[Any]) -> Array:
    """An array in this dtype, row-major, on the network's device."""
    moved: Array = devices.to_device(net.device, array.astype(dtype, order="C", copy=False))
    return moved


def _result(net: MLP, source: Array, columns: int, name: str) -> Buffer:
    """Return the plan's line for a result with a row for each row of X."""
    return Buffer(name, (len(source), columns), net.dtype.name, "a result")


def _new(net: MLP, source: Array, result: Buffer) -> Array:
    """Return the array that a result goes to: on the host if X lies there."""
    xp = np if arrays.on_host(source) else devices.module(net.device)
    array: Array = xp.empty(result.shape, result.dtype)
    return array


def _store(net: MLP, result: Array, part: slice, rows: Array) -> None:
    result[part] = devices.to_host(net.device, rows) if arrays.on_host(result) else rows
