"""Chunks of a batch's rows and their operations: forward, loss, backward.

Rows are independent, so dW and db of a batch are sums over its chunks; the first chunk of a worker
overwrites them, and the others add to them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlpcore.core import backprop, dropout
from mlpcore.core.activations import Activation
from mlpcore.core.losses import Objective
from mlpcore.core.network import Pass, Views, in_turn, under_loss
from mlpcore.core.ops import Array, Input, Ops

SHAPES = 32  # recordings that a worker keeps; the least recently used is dropped first


def cut(size: int, chunk_rows: int, workers: int) -> list[list[tuple[int, int]]]:
    """Return each worker's chunks (start, stop) of at most `chunk_rows` rows, as equal as possible.

    Together they cover 0 … size.
    """
    few = size <= SHAPES * chunk_rows  # longer lists would take memory that no plan counts
    return (_cut if few else _cut.__wrapped__)(size, chunk_rows, workers)


@functools.lru_cache(64)
def _cut(size: int, chunk_rows: int, workers: int) -> list[list[tuple[int, int]]]:
    workers = min(workers, -(-size // chunk_rows))
    ends = [size * i // workers for i in range(workers + 1)]
    return [list(even(*part, chunk_rows)) for part in itertools.pairwise(ends)]


def even(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield the chunks of at most `most` rows, as equal as possible, in order."""
    count = -(-(stop - start) // most)
    return itertools.pairwise(start + (stop - start) * i // count for i in range(count + 1))


class Chunk:
    """The arrays of a chunk of rows, and the operations on them.

    Args:
        ops: a backend's operations, only for this chunk's arrays.
        W, b: views of the parameters.
        activations: bound to their learned parameters and to the gradients of these.
        objective: the loss.
        dW, db: views of the gradient that the chunk adds to.
        buffers: the arrays listed by `plan.chunk_buffers`.
        scale: 0-d, 1 / Σ w of the batch.
        J: 0-d, the loss that the chunk adds to.
        repeats: the layout's `repeats`: which dW a higher layer writes, too.
        x: Z[0] if it is not the buffer named X.
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
        """Return Y and the row weights over the batch's weight, in the form for `ops.loss`."""
        return self.rows("Y", rows), self.rows("w", rows)[:, None] if weighted else self.scale

    def run(self, what: str, rows: int, weighted: bool, accumulate: bool) -> None:
        """Call the operations of a chunk on the first `rows` rows of the buffers.

        Args:
            what: "step", "forward", or "loss" of the current output.
            rows: number of rows of the chunk.
            weighted: True if the rows have weights.
            accumulate: True to add to dW and db.
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
        G += [None] if matched else []  # the loss sets D[L] itself
        db = self.db[-1] if matched and what == "step" else None
        Y, k = self.targets(rows, weighted)
        D_or_G = work.Z[-1] if matched else G[-1]
        self.ops.loss(work.Z[-1], Y, k, self.objective, D_or_G, db, self.J, accumulate)
        if what == "step":
            work.backward(
                G, work.Z, Views(tuple(self.dW), tuple(self.db)), self.repeats, accumulate
            )
