"""The worker that runs chunks on a CPU: it loads their rows and replays recorded operations."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpcore.core import backprop
from mlpcore.core.activations import Activation
from mlpcore.core.losses import Objective
from mlpcore.core.ops import Array, EagerOps, EagerRecording, Input, make
from mlpcore.data.batches import Batch
from mlpcore.engine.chunks import SHAPES, Chunk

Key = tuple[str, int, bool, bool]  # operation, number of rows, weighted, accumulated


class Worker(Chunk):
    """One stream of chunks whose operations run as they are called, recorded once per shape.

    Args: those of `Chunk` except J and x, which it owns: J is its share of the batch's.

    Attributes:
        stretches: its steps in one call (`engine.stretch.Stretch`), or None, by kind of batch.
        stretches_of: the objects that `stretches` were made from.
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
        self.stretches: dict[Any, Any] = {}
        self.stretches_of: tuple[Any, ...] | None = None
        self.recordings: OrderedDict[Key, EagerRecording] = OrderedDict()

    def gradient(self, batch: Batch, chunks: list[tuple[int, int]]) -> None:
        """Run forward, loss and backward chunk by chunk; J, dW and db cover all these rows."""
        self.J[...] = 0
        weighted, more = batch.weights is not None, False
        for start, stop in chunks:
            self.load_chunk(batch, start, stop)
            key = "step", stop - start, weighted, more
            make((self.recordings.get(key) or self._recorded(key)).calls)
            self.recordings.move_to_end(key)  # the least recently used is dropped first
            more = True

    def forward(self, batch: Batch, start: int, stop: int) -> Array:
        """Return the output of a chunk, valid until the next call.

        It is S[L] if output and loss match, else Z[L].
        """
        self.load_chunk(batch, start, stop)
        self._recorded(("forward", stop - start, batch.weights is not None, False)).replay()
        return self.output(stop - start)

    def loss(self, batch: Batch, start: int, stop: int) -> None:
        """Add the loss of the chunk whose forward pass ran last to J; overwrite its output."""
        self._recorded(("loss", stop - start, batch.weights is not None, False)).replay()

    def load_chunk(self, batch: Batch, start: int, stop: int) -> None:
        """Put the rows of a chunk where the recordings read them."""
        self.ops.places[1], size, X, own = start, stop - start, batch.X, self.buffers["X"]
        rows = slice(start, stop) if batch.rows is None else batch.rows[start:stop]
        # X is read from the caller's memory if a GEMM can read it there
        like = type(X) is type(own) and X.dtype == own.dtype and X.strides[1] == own.strides[1]
        there = batch.rows is None and like
        self.input.array = X[rows] if there else own[:size]
        for name, source in (("X", None if there else X), ("Y", batch.Y), ("w", batch.weights)):
            if source is not None:
                stage = self.buffers.get(f"{name} as given")
                stage = None if stage is None else stage[:size]
                self.ops.gather(source, rows, self.buffers[name][:size], stage)
        if batch.weights is not None:
            w = self.buffers["w"][:size]
            np.multiply(w, self.scale, w)

    def _recorded(self, key: Key) -> EagerRecording:
        """Return the recording of this key; make it if there is none."""
        if key not in self.recordings:
            self.recordings[key] = self.ops.record(functools.partial(self.run, *key))
            if len(self.recordings) > SHAPES:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key]
