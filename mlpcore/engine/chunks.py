"""A batch cut into chunks of rows, and the worker that runs chunks: gather, forward, loss,
backward.

Rows are independent, so dW and db of a batch are sums over its chunks; the first chunk of a worker
writes them, the others add. A worker has arrays of its own and records each shape of chunk once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlpcore.core import backprop, dropout
from mlpcore.core.activations import Activation, resolve
from mlpcore.core.losses import Objective
from mlpcore.core.ops import Array, Input, Ops

SHAPES = 32  # recordings that a worker keeps; the least recently used goes first
IDENTITY = resolve("identity")


def cut(size: int, chunk_rows: int, workers: int) -> list[list[tuple[int, int]]]:
    """For each worker its chunks (start, stop), of at most `chunk_rows` rows and as equal as can
    be; together 0 … size.
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
        W, b: the parameters' views; dW, db: of the gradient that the chunk adds to.
        buffers: the arrays that `plan.chunk_buffers` lists.
        scale: 0-d, 1 / Σ w of the batch.
        J: 0-d, the loss that the chunk adds to.
        repeats: of the layout: which dW are written by a layer above, too.
        x: Z[0] where it is not the buffer of that name.
    """

    def __init__(
        self, ops: Ops, W: backprop.Arrays, b: backprop.Arrays, activations: tuple[Activation | None, ...],
        objective: Objective, dW: backprop.Arrays, db: backprop.Arrays, buffers: Mapping[str, Array], scale: Array, J: Array,
        repeats: Sequence[bool], x: Input | None = None,
    ) -> None:  # fmt: skip
        self.ops, self.W, self.b, self.activations, self.objective = (
            ops,
            W,
            b,
            activations,
            objective,
        )
        self.dW, self.db, self.buffers, self.scale, self.J, self.repeats, self.x = (
            dW,
            db,
            buffers,
            scale,
            J,
            repeats,
            x,
        )
        ops.use(buffers)
        if "column weights" in buffers:
            columns = buffers["column weights"]
            columns[...] = ops.xp.asarray(objective.loss.columns, columns.dtype)

    def rows(self, name: str, rows: int) -> Array:
        """The first rows of a buffer."""
        return self.buffers[name][:rows]

    def output(self, rows: int) -> Array:
        """What the loss reads: S[L] if the pair is matched, else Z[L]."""
        return self.rows(f"{'S' if self.objective.matched else 'Z'}[{len(self.W) - 1}]", rows)

    def targets(self, rows: int, weighted: bool) -> tuple[Any, Any]:
        """Return Y and the row weights over the batch's weight, as `ops.loss` takes them."""
        return self.rows("Y", rows), self.rows("w", rows)[:, None] if weighted else self.scale

    def run(self, what: str, rows: int, weighted: bool, accumulate: bool) -> None:
        """The operations of a chunk, on the first `rows` rows of the buffers."""
        L, matched = len(self.W) - 1, self.objective.matched
        activations = [σ if what == "step" else dropout.undropped(σ) for σ in self.activations]
        if matched:
            activations[L] = IDENTITY  # the loss reads S[L] itself
        Z: list[Array] = [self.rows("X", rows) if self.x is None else self.x]
        S: list[Array] = [None]
        G: list[Array] = [None]
        for l in range(1, L + 1):
            last = matched and l == L
            S.append(
                self.rows(f"S[{l}]", rows)
                if f"S[{l}]" in self.buffers
                else self.rows(f"Z[{l}]", rows)
            )
            Z.append(S[l] if last or f"S[{l}]" not in self.buffers else self.rows(f"Z[{l}]", rows))
            G.append(
                None if last else self.buffers["G"][: rows * Z[l].shape[1]].reshape(Z[l].shape)
            )
        target = Z[L] if matched else G[L]
        db = self.db[L] if matched else None
        if what in ("step", "forward"):
            backprop.forward(self.ops, self.W, self.b, activations, S, Z)
        if what in ("step", "loss"):
            db = None if what == "loss" else db
            Y, k = self.targets(rows, weighted)
            self.ops.loss(Z[L], Y, k, self.objective, target, db, self.J, accumulate)
        if what == "step":
            backprop.backward(
                self.ops,
                self.W,
                activations,
                S,
                Z,
                G,
                Z,
                self.dW,
                self.db,
                self.repeats,
                accumulate,
            )
