"""The arrays of one chunk of rows for `derivatives.py`, cut from one allocation, and its passes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.backends import devices
from mlpcore.checks import values
from mlpcore.core import formulas
from mlpcore.core import losses as loss_sheet
from mlpcore.core.activations import SOFTMAX, Activation, bind
from mlpcore.core.network import IDENTITY, Network, Pass, Views, in_turn, under_loss
from mlpcore.core.ops import Buffer
from mlpcore.core.targets import mixed
from mlpcore.engine import plan as planning
from mlpcore.engine.memory import Size, temporaries

Array = NDArray[Any]
CUDA_BYTES = 256 << 20  # bytes of a chunk's arrays on a GPU, unless the caller sets chunk_rows
TEMPORARIES = 8  # arrays as large as a chunk's output or a learned layer's that the backend makes


class RowChunks:
    """The chunks of the caller's rows, and the arrays of one chunk, reused for each in turn.

    Args:
        net: the network.
        X: the caller's rows.
        keeps: the needs of a backward pass: 0 if there is none, 1 for every Z[l], 2 for every dS[l]
            and dZ[l], too.
        size: rows of a chunk, and the memory limit.
        fixed: the call's other arrays, for the plan.
        objective: the loss on top, if there is one.

    Attributes:
        work: the pass over the chunk that `chunks` yielded last.
    """

    work: Pass

    def __init__(
        self,
        net: Network,
        X: Array,
        keeps: int,
        size: Size,
        fixed: Sequence[Buffer],
        objective: loss_sheet.Objective | None = None,
    ) -> None:
        self.net, self.X, self.keeps, self.objective = net, X, keeps, objective
        self.xp = devices.find(net.device).xp
        self.ops = devices.find(net.device).operations(deterministic=True)()
        self.matched = objective is not None and objective.matched
        self.activations = bind(under_loss(net.activations, self.matched), net.store.a)
        self.reads_s = [σ is not None and σ.slope_reads_s for σ in self.activations]
        rows = self._choose_rows(size)

        def chunk(n: int) -> list[Buffer]:
            beside = temporaries(net, self.activations, n, TEMPORARIES, keeps == 2, objective)
            return [*self._buffers(n), beside]

        self.rows = size.plan(net, len(X), rows, fixed, chunk).rows
        self.arrays = planning.allocate(self.ops, self._buffers(self.rows))
        self.ops.use(self.arrays)
        self.top = self.arrays["top"]

    def _choose_rows(self, size: Size) -> int:
        if size.chunk_rows is not None:
            return values.positive_integer(size.chunk_rows, "chunk_rows")
        if self.net.device != "cpu":
            return max(1, CUDA_BYTES // (planning.part_bytes(self._buffers(1024)) // 1024))
        return planning.choose_rows(
            lambda m: planning.part_bytes(self._buffers(m)),
            self.net.layout,
            self.net.dtype.itemsize,
            len(self.X),
        )

    def _buffers(self, rows: int) -> list[Buffer]:
        """Return the arrays of chunks of `rows` rows; without a backward pass, of two layers."""
        sizes, dtype, keeps = self.net.sizes, self.net.dtype.name, self.keeps
        wide = max(sizes)
        shapes: dict[str, tuple[int, ...]] = {
            "X": (rows, sizes[0]),
            "dX": (rows, sizes[0]),
            "top": (rows, sizes[-1]),
        }
        for l in range(1, len(sizes)) if keeps else (0, 1):
            n = sizes[l] if keeps else wide
            shapes[f"Z[{l}]"] = (rows, n)
            if self.reads_s[l] if keeps else any(self.reads_s):
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
        """Yield each chunk's slice of X and its number of rows; `work` is the pass over them."""
        for start in range(0, len(self.X), self.rows):
            part = slice(start, min(start + self.rows, len(self.X)))
            X, m = self.load(self.X, part, self.arrays["X"]), part.stop - part.start
            W, b = self.net.store.W, self.net.store.b
            self.work = Pass(self.ops, W, b, self.activations, X, self._arrays_of(m))
            yield part, m

    def _arrays_of(self, m: int) -> Callable[[str, int], Array]:
        """Return the function that finds a pass's arrays of m rows.

        Without a second backward pass the layers alternate between two dZ buffers; without any
        backward pass, between two Z buffers and one of S. Arrays that share memory are one object,
        by which backends recognise them.
        """
        views: dict[tuple[str, int], Array] = {}
        kept = {"Z": self.keeps > 0, "S": self.keeps > 0, "dS": True, "dZ": self.keeps == 2}

        def find(letter: str, l: int) -> Array:
            slot, n = l if kept[letter] else 0 if letter == "S" else l % 2, self.net.sizes[l]
            key = f"{letter}[{slot}]", n
            if key not in views:
                views[key] = self.arrays[key[0]].reshape(-1)[: m * n].reshape(m, n)
            return views[key]

        return find

    def load(self, source: Array, part: slice, into: Array) -> Array:
        """Return rows of a caller's array as the network takes them, copied only if they differ."""
        rows = source[part]
        if self.net.device == "cpu" and rows.dtype == self.net.dtype and rows.flags.c_contiguous:
            return rows
        placed = into[: len(rows)]
        if self.net.device == "cpu":
            np.copyto(placed, rows, casting="unsafe")
        else:
            placed[...] = to_device(self.net, rows, self.net.dtype)
        return placed

    def in_turn(self, name: str, m: int) -> list[Any]:
        """Return one buffer as an (m, n_l) array for each layer, one layer at a time."""
        return in_turn(self.arrays[name], m, self.net.sizes)

    def tangent(self, along: Views | None, dX: Array | None = None) -> None:
        """Fill Z and its differential, and S and dS if a backward pass reads them."""
        self.work.tangent(dX, along, apart=self.keeps == 2)

    def first(self, Y: Array, k: Array, into: Array | None) -> None:
        """Compute K ∂ℓ/∂x for x = S[L] if matched, else Z[L]; if `into` is None, in place of x."""
        assert self.objective is not None
        x = self.work.Z[-1]
        J = self.xp.zeros((), np.float64 if self.net.device == "cpu" else self.net.dtype)
        self.ops.loss(x, Y, k, self.objective, x if into is None else into, None, J, False)

    def second(self, Y: Array, k: Array, into: Array) -> None:
        """Compute K ∂²ℓ/∂x² dx from dx in dZ[L]."""
        x, dx, objective = self.work.Z[-1], self.work.dZ[-1], self.objective
        assert objective is not None
        if objective.loss.rowwise:
            self.ops.bias_activation(x, None, SOFTMAX, P := self.xp.empty_like(x))
            # softmax ignores a constant added to a whole row; without it 1 - P keeps its digits
            apart = dx - dx[self.xp.arange(len(x)), x.argmax(axis=1)][:, None]
            self.ops.activation_gradient(apart, P, P, SOFTMAX, into, None)
            mixes = objective.loss.mixes(Y.ndim == 1)
            t = mixed(objective.loss, Y, x.shape[1], x.dtype, self.xp) if mixes else Y
            self.ops.scale_rows(into, k if t.ndim == 1 else k * t.sum(axis=1, keepdims=True))
            return
        columns = objective.loss.columns
        if not columns:
            self.ops.activation_gradient(dx, x, Y, _bent(objective), into, None)
        for p in dict.fromkeys(columns):  # columns with the same weight together
            at = self.xp.asarray([column for column, weight in enumerate(columns) if weight == p])
            d, s, y = (self.xp.ascontiguousarray(array[:, at]) for array in (dx, x, Y))
            self.ops.activation_gradient(d, s, y, _bent(objective, p), d, None)
            into[:, at] = d
        self.ops.scale_rows(into, k)


@functools.lru_cache(64)
def _bent(objective: loss_sheet.Objective, p: float | None = None) -> Activation:
    """Return an activation whose slope is the loss's curvature, for columns of weight p."""
    numbers = dict(objective.scalars) | ({} if p is None else {"p": p})
    written = {key: repr(value) for key, value in numbers.items()}
    formula = formulas.substitute(objective.curvature, {**written, "x": "s", "y": "z"})
    return Activation("loss", "s", formula)


class GradientSum:
    """The gradient by the parameters, added up over chunks: `vector`, flat."""

    @staticmethod
    def buffer(net: Network) -> Buffer:
        """Return the plan's line for the gradient."""
        return Buffer("gradient", (net.layout.size,), net.dtype.name, "a result")

    def __init__(self, chunks: RowChunks) -> None:
        self.chunks, net = chunks, chunks.net
        self.repeats = net.layout.repeats
        self.vector: Array = chunks.xp.zeros(net.layout.size, net.dtype)
        self.views = net.cut(self.vector)
        self.begun = False

    def add(self, G: list[Any], D_top: Array | None = None) -> None:
        """Add a chunk's gradient from G[L], or from D[L] if G[L] is None; fill the rest of G."""
        work = self.chunks.work
        D = work.Z if D_top is None else [*work.Z[:-1], D_top]
        if D_top is not None:
            db = self.views.b[-1]
            work.ops.activation_gradient(D_top, D_top, D_top, IDENTITY, D_top, db, self.begun)
        work.backward(G, D, self.views, self.repeats, self.begun)
        self.begun = True

    def add_second(
        self, G: list[Any], H: list[Any], along: Views | None, D_top: Array | None = None
    ) -> None:
        """Add a chunk's second gradient, after `tangent`, from G[L] and H[L].

        With D_top, from D[L] and E[L], where E[L] is stored in place of Z[L].
        """
        work = self.chunks.work
        top = None if D_top is None else (D_top, work.Z[-1])
        work.second_backward(G, H, top, self.views, self.repeats, along, self.begun)
        self.begun = True


def to_device(net: Network, array: Array, dtype: np.dtype[Any]) -> Array:
    """Return an array cast on its own device, row-major, on the network's device."""
    moved: Array = devices.find(net.device).to_device(array.astype(dtype, order="C", copy=False))
    return moved
