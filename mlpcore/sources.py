"""Where a run's batches come from: arrays in memory, or a stream of rows that are read as they are needed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.backends import device as devices
from mlpcore.core.losses import Loss
from mlpcore.streams import Stream
from mlpcore.training.chunks import Batch, Data
from mlpcore.training.plan import Inputs

Array = NDArray[Any]
Seeds = list[int]
AHEAD = 8192  # rows whose order takes longer to draw than a thread to start
Batches = Generator[tuple[Data, Batch], None, None]


class Rows:
    """The batches of arrays in memory: a shuffled order of their rows, cut into pieces.

    Args:
        data: the arrays.
        size: rows of a batch.
        place: where the order goes, on the data's device; None: an array of its own, on the host.
        device: the network's.
    """

    lasting = True

    def __init__(self, data: Data, size: int, place: Array | None, device: str):
        self.data, self.size, self.place, self.device = data, size, place, device
        self.rows: int | None = len(data.X)
        self._order = np.empty(self.rows, np.int64) if place is None or device != "cpu" else place
        self._drawn: Seeds | None = None  # from which the order has been drawn, ahead
        self._ahead: threading.Thread | None = None  # by this thread

    def _draw(self, seeds: Seeds | None) -> None:
        rows = self._order
        rows[...] = 1
        np.subtract(np.cumsum(rows, out=rows), 1, out=rows)  # 0, 1, 2, … without a second array of that size
        if seeds is not None:
            np.random.default_rng(seeds).shuffle(rows)
        self._drawn = seeds

    def epoch(
        self, number: int, seeds: Seeds | None, skip: int, together: Callable[[Data], int] = lambda _: 1,
        following: Seeds | None = None,
    ) -> Batches:  # fmt: skip
        """Yield an epoch's batches from number `skip` on, shuffled from `seeds` or (None) in order.

        `together` is asked how many whole batches may be yielded as one. Where the order is copied to a
        device, a thread then shuffles that of the epoch after this one, from the seeds `following`.
        """
        rows = self._order
        if self._ahead is not None:
            self._ahead.join()
        if seeds is None or seeds != self._drawn:
            self._draw(seeds)
        self._drawn = self._ahead = None  # that thread may never come to its end
        if self.place is not None and self.place is not rows:
            self.place[...] = devices.to_device(self.device, rows)
            if following is not None and len(rows) >= AHEAD:
                self._ahead = threading.Thread(target=self._draw, args=(following,))
                self._ahead.start()
            rows = self.place
        start = skip * self.size
        while start < len(rows):
            whole = (len(rows) - start) // self.size
            steps = 1 << (min(whole, together(self.data)).bit_length() - 1) if whole > 1 else 1
            yield self.data, self.data.batch(rows[start : start + steps * self.size], steps)
            start += steps * self.size


class Streamed:
    """The batches of a stream.

    Args:
        stream: the rows.
        size: rows of a batch.
        arrays: as the stream's `buffers` lists them.
        lay: makes a piece's X, Y and row weights what the steps take.
    """

    lasting = False  # the next window takes the place of this one

    def __init__(
        self, stream: Stream, size: int, arrays: Mapping[str, Array], lay: Callable[[Array, Array, Array | None], Data]
    ) -> None:  # fmt: skip
        self.stream, self.size, self.arrays, self.lay = stream, size, arrays, lay
        self.rows = stream.rows

    def epoch(
        self, number: int, seeds: Seeds | None, skip: int, together: Callable[[Data], int] | None = None,
        following: Seeds | None = None,
    ) -> Batches:  # fmt: skip
        """Yield an epoch's batches from number `skip` on, shuffled from `seeds` or (None) in order.

        Raises:
            ValueError: at the end: no row of the epoch weighs anything.
        """
        self.stream.epochs = number
        order = None if seeds is None else np.random.default_rng(seeds)
        weighs, by_class = skip > 0, False  # what was left out may have weighed
        with contextlib.closing(self.stream.epoch(self.size, order, skip, self.arrays)) as pieces:
            for piece in pieces:
                data = self.lay(piece.X, piece.Y, piece.weights)
                weighs = weighs or data.weights is None or bool(data.weights.any())
                by_class = data.by_class is not None
                for rows in piece.batches:
                    yield data, data.batch(rows)
        if not weighs:
            raise ValueError(f"sample_weight{', times class_weight,' if by_class else ''} must not be all zero")


def inputs_of(stream: Stream, loss: Loss, dtype: str) -> Inputs | None:
    """What the plan on a CPU must know of a stream's rows; None where only the first batch tells.

    Row weights are of this dtype where they depend on the class.
    """
    if stream.like is None:
        return None
    X, Y, weights = stream.like
    classes = loss.takes_classes and Y.ndim == 1
    given = "" if weights is None else weights.dtype.str
    return Inputs(X.dtype.str, Y.dtype.str, given if loss.class_weight is None else dtype, classes)
