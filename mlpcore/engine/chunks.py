"""Chunks of a batch's rows, and the worker that runs them: gather, forward, loss, backward.

Rows are independent, so dW and db of a batch are sums over its chunks; the first chunk of a worker
writes them, the others add. A worker has arrays of its own and records each shape of chunk once.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlpcore.core import backprop, dropout
from mlpcore.core.activations import Activation
from mlpcore.core.losses import Objective
from mlpcore.core.network import Pass, Views, in_turn, under_loss
from mlpcore.core.ops import Array, EagerOps, Input, Ops, Recording
from mlpcore.data.batches import Batch

SHAPES = 32  # recordings that a worker keeps; the least recently used goes first


def cut(size: int, chunk_rows: int, workers: int) -> list[list[tuple[int, int]]]:
    """Return each worker's chunks (start, stop), of at most `chunk_rows` rows, as equal as can be.

    Together they are 0 … size.
    """
    few = size <= SHAPES * chunk_rows  # longer lists would take memory that no plan lists
    return (_cut if few else _cut.__wrapped__)(size, chunk_rows, workers)


@functools.lru_cache(64)
def _cut(size: int, chunk_rows: int, workers: int) -> list[list[tuple[int, int]]]:
    workers = min(workers, -(-size // chunk_rows))
    ends = [size * i // workers for i in range(workers + 1)]
    return [list(even(*part, chunk_rows)) for part in itertools.pairwise(ends)]


def even(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield the chunks of at most `most` rows, as equal as can be, one after the other."""
    count = -(-(stop - start) // most)
    return itertools.pairwise(start + (stop - start) * i // count for i in range(count + 1))


class Chunk:
    """The arrays of a chunk of rows, and the operations on them.

    Args:
        ops: a backend's operations, for this chunk's arrays alone.
        W, b: the parameters' views.
        activations: bound to their learned parameters and the gradients of these.
        objective: the loss.
        dW, db: views of the gradient that the chunk adds to.
        buffers: the arrays that `plan.chunk_buffers` lists.
        scale: 0-d, 1 / Σ w of the batch.
        J: 0-d, the loss that the chunk adds to.
        repeats: the layout's: which dW are written by a layer above, too.
        x: Z[0] where it is not the buffer of that name.
    """

    def __init__(
        self,
        ops: Ops,
        W: backprop.Arrays,
        b: backprop.Arrays,
        activations: tuple[Activation | None, ...],
        objective: Objective,
        dW: backprop.Arrays,
        db: backprop.Arrays,
        buffers: Mapping[str, Array],
        scale: Array,
        J: Array,
        repeats: Sequence[bool],
        x: Input | None = None,
    ) -> None:
        self.ops, self.W, self.b, self.dW, self.db = ops, W, b, dW, db
        self.activations, self.objective, self.repeats = activations, objective, repeats
        self.buffers, self.scale, self.J, self.x = buffers, scale, J, x
        ops.use(buffers)
        if "column weights" in buffers:
            columns = buffers["column weights"]
            columns[...] = ops.xp.asarray(objective.loss.columns, columns.dtype)

    def rows(self, name: str, rows: int) -> Array:
        """Return the first rows of a buffer."""
        return self.buffers[name][:rows]

    def output(self, rows: int) -> Array:
        """Return the array that the loss reads: S[L] if the pair is matched, else Z[L]."""
        return self.rows(f"{'S' if self.objective.matched else 'Z'}[{len(self.W) - 1}]", rows)

    def _layer(self, rows: int, letter: str, l: int) -> Array:
        last = l == len(self.W) - 1
        return self.output(rows) if last and letter == "Z" else self.rows(f"{letter}[{l}]", rows)

    def targets(self, rows: int, weighted: bool) -> tuple[Any, Any]:
        """Return Y and the row weights over the batch's weight, as `ops.loss` takes them."""
        return self.rows("Y", rows), self.rows("w", rows)[:, None] if weighted else self.scale

    def run(self, what: str, rows: int, weighted: bool, accumulate: bool) -> None:
        """Call the operations of a chunk, on the first `rows` rows of the buffers.

        Args:
            what: "step", "forward", or "loss" of the output that is there.
            rows: of the chunk.
            weighted: whether the rows have weights.
            accumulate: whether dW and db are added to.
        """
        activations = [σ if what == "step" else dropout.undropped(σ) for σ in self.activations]
        matched = self.objective.matched
        work = Pass(
            self.ops,
            self.W,
            self.b,
            under_loss(activations, matched),
            self.rows("X", rows) if self.x is None else self.x,
            functools.partial(self._layer, rows),
        )
        if what != "loss":
            work.forward()
        if what == "forward":
            return
        widths = [W.shape[1] for W in self.W[1:]]
        below = widths[:-1] if matched else widths
        G = [None, *(in_turn(self.buffers["G"], rows, below) if below else [])]
        G += [None] if matched else []  # the loss gives D[L] itself
        db = self.db[-1] if matched and what == "step" else None
        Y, k = self.targets(rows, weighted)
        D_or_G = work.Z[-1] if matched else G[-1]
        self.ops.loss(work.Z[-1], Y, k, self.objective, D_or_G, db, self.J, accumulate)
        if what == "step":
            work.backward(
                G, work.Z, Views(tuple(self.dW), tuple(self.db)), self.repeats, accumulate
            )


class Worker(Chunk):
    """One stream of chunks whose operations run as they are called, recorded once for each shape.

    Args: those of `Chunk` but J and x, which are its own: J is its share of the batch's.
    """

    ops: EagerOps

    def __init__(
        self,
        ops: EagerOps,
        W: backprop.Arrays,
        b: backprop.Arrays,
        activations: tuple[Activation | None, ...],
        objective: Objective,
        dW: backprop.Arrays,
        db: backprop.Arrays,
        buffers: Mapping[str, Array],
        scale: Array,
        repeats: Sequence[bool],
    ) -> None:
        self.input = Input()
        J = ops.xp.zeros((), np.float64)
        super().__init__(
            ops, W, b, activations, objective, dW, db, buffers, scale, J, repeats, self.input
        )
        self.recordings: OrderedDict[tuple[object, ...], Recording] = OrderedDict()

    def gradient(self, batch: Batch, chunks: list[tuple[int, int]]) -> None:
        """Compute J, dW and db of these rows in this worker's arrays, chunk by chunk."""
        self.J[...] = 0
        for i, (start, stop) in enumerate(chunks):
            self.load_chunk(batch, start, stop)
            self._recorded("step", stop - start, batch.weights is not None, i > 0).replay()

    def forward(self, batch: Batch, start: int, stop: int) -> Array:
        """Return the output of one chunk, valid until the next call.

        It is S[L] if the pair is matched, else Z[L].
        """
        self.load_chunk(batch, start, stop)
        self._recorded("forward", stop - start, batch.weights is not None, False).replay()
        return self.output(stop - start)

    def loss(self, batch: Batch, start: int, stop: int) -> None:
        """Add the loss of the chunk that went forward last to J; its output is overwritten."""
        self._recorded("loss", stop - start, batch.weights is not None, False).replay()

    def load_chunk(self, batch: Batch, start: int, stop: int) -> None:
        """Put the rows of a chunk where the recordings read them."""
        self.ops.first = start
        rows = slice(start, stop) if batch.rows is None else batch.rows[start:stop]
        X, size = self.rows("X", stop - start), stop - start
        if batch.rows is None and _like(batch.X, X):
            self.input.array = batch.X[rows]  # where they lie: no copy
        else:
            self._gather("X", batch.X, rows, size)
            self.input.array = X
        self._gather("Y", batch.Y, rows, size)
        if batch.weights is not None:
            self._gather("w", batch.weights, rows, size)
            w = self.rows("w", size)
            np.multiply(w, self.scale, w)

    def _gather(self, name: str, source: Array, rows: slice | Array, size: int) -> None:
        stage = self.rows(f"{name} as given", size) if f"{name} as given" in self.buffers else None
        self.ops.gather(source, rows, self.rows(name, size), stage)

    def _recorded(self, what: str, rows: int, weighted: bool, accumulate: bool) -> Recording:
        key = what, rows, weighted, accumulate
        if key not in self.recordings:
            self.recordings[key] = self.ops.record(
                lambda: self.run(what, rows, weighted, accumulate)
            )
            if len(self.recordings) > SHAPES:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key]


def _like(source: Array, X: Array) -> bool:
    """Return whether a GEMM can read rows of `source` in place of X."""
    return type(source) is type(X) and source.dtype == X.dtype and source.strides[1] == X.strides[1]
