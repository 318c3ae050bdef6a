"""Streams: rows that come piece by piece, read ahead by a thread: data larger than memory."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlpcore.checks import arrays
from mlpcore.core.ops import Buffer

Array = NDArray[Any]
Place = TypeVar("Place")  # where a piece of rows is kept until the next but one is asked for
LOOK = 0.05  # seconds of a wait for rows after which it is asked whether to wait on
PATIENCE = 1.0  # seconds in which a thread that reads may come to its end
NAMES = ("X", "Y", "sample_weight")
# what libraries raise where rows cannot be read
UNREADABLE = (OSError, ValueError, TypeError, RuntimeError, LookupError)


class Block(NamedTuple):
    """Rows as arrays on the host.

    Attributes:
        X: (k, n_0).
        Y: (k,) or (k, n_L).
        weights: (k,) row weights, or None.
    """

    X: Array
    Y: Array
    weights: Array | None = None

    def each(self, change: Callable[[Array], Array]) -> Block:
        """Return the block of what `change` makes of each array."""
        weights = None if self.weights is None else change(self.weights)
        return Block(change(self.X), change(self.Y), weights)

    def rows(self, start: int, stop: int) -> Block:
        """Return the rows start … stop, as views."""
        return self.each(lambda x: x[start:stop])


class Piece(NamedTuple):
    """A window of rows, valid until an epoch is asked for the next one.

    Attributes:
        X, Y, weights: host arrays (k, n_0), (k,) or (k, n_L), (k,) or None.
        batches: row numbers (int64) within the window, one entry a batch; None: all rows in order.
    """

    X: Array
    Y: Array
    weights: Array | None
    batches: Sequence[Array | None]


Pieces = Generator[Piece, None, None]


class Stream(ABC):
    """Rows that come piece by piece, in epochs.

    Attributes:
        rows: number of rows of an epoch; None until they are known.
        columns: n_0; None where only reading tells it.
        like: a block of no rows, with the shapes and dtypes of those that will come; None where
            only reading tells them.
        dtype: number type in which numbers must be finite.
        require_targets: raises the error of a Y that the loss does not take; called with Y, its
            name and its first row.
        epochs: number of epochs begun so far; a resumed run sets it.
        waited: seconds that the consumer has waited for the reader.
        waiting: makes a block around each wait for the reader, whose value is called a few times a
            second meanwhile.
    """

    def __init__(self, dtype: DTypeLike):
        self.dtype = dtype
        self.rows: int | None = None
        self.columns: int | None = None
        self.like: Block | None = None
        self.require_targets: Callable[[Array, str, int], None] | None = None
        self.epochs = 0
        self.waited = 0.0
        self.waiting: Callable[[], AbstractContextManager[Callable[[], object]]] = _nothing_to_do

    @abstractmethod
    def batches(self, batch_size: int) -> int | None:
        """Return the number of batches of an epoch; None where it is not known."""

    @abstractmethod
    def buffers(self, batch_size: int, limit: int | None = None) -> list[Buffer]:
        """Return its host arrays, for the plan; of `limit` bytes if two batches fit there."""

    @abstractmethod
    def epoch(
        self,
        batch_size: int,
        order: np.random.Generator | None,
        skip: int,
        arrays: Mapping[str, Array],
    ) -> Pieces:
        """Return an iterator of the pieces of one epoch.

        Its thread ends with it; to end both earlier, close the iterator or drop it.

        Args:
            batch_size: rows of a batch, the last one may be smaller.
            order: draws the row order (one number is drawn, now); None: file order.
            skip: first batches to leave out, and what only they would read; the others are those
                that would have come.
            arrays: as `buffers` listed them; together with `order` and `batch_size` they determine
                the batches to the bit.

        Raises:
            ValueError: in the iteration: a number that is not finite (names row and column), a
                target that the loss does not take, or what the source raises.
        """

    def require_values(
        self, parts: Sequence[Array | None], prefix: str = "", first: int = 0
    ) -> None:
        """Raise a ValueError that names the row, counted from `first`, of the first bad value."""
        for name, part in zip(NAMES, parts, strict=True):
            if part is not None:
                arrays.require_finite(part, prefix + name, self.dtype, first)
        _, Y, weights = parts
        if weights is not None and weights.min() < 0:
            at = int((weights < 0).argmax())
            raise ValueError(
                f"{prefix}sample_weight must be finite and not negative; row {first + at} holds "
                f"{weights[at]}"
            )
        if self.require_targets is not None and Y is not None:
            self.require_targets(Y, prefix + "Y", first)

    def _ahead(
        self, fill: Callable[[Place], Piece | None], places: Sequence[Place], stop: threading.Event
    ) -> Pieces:
        """Yield pieces from `fill` until it returns None, prefetching one piece in a thread.

        A thread whose source does not answer is left behind after a moment; it does not keep the
        process alive.
        """
        reader, turn = _Reader(fill), itertools.cycle(places)
        try:
            reader.start()
            reader.places.put(next(turn))
            while True:
                begin = time.perf_counter()
                piece = self._next(reader)
                self.waited += time.perf_counter() - begin
                if piece is None:
                    return
                reader.places.put(next(turn))
                yield piece
        finally:
            stop.set()
            reader.places.put(None)
            if reader.is_alive():
                reader.join(PATIENCE)

    def _next(self, reader: _Reader[Any]) -> Piece | None:
        """Return the reader's next piece, or raise what the source raised."""
        try:
            return reader.take(0)
        except queue.Empty:
            with self.waiting() as look:
                while True:
                    try:
                        return reader.take(LOOK)
                    except queue.Empty:
                        look()


class _Reader(threading.Thread, Generic[Place]):
    """A thread that fills places with rows.

    Args:
        fill: makes a piece of a place; None at the end.

    Attributes:
        places: to be filled; None ends the thread.
    """

    def __init__(self, fill: Callable[[Place], Piece | None]):
        super().__init__(name="mlpcore-reader", daemon=True)
        self._fill = fill
        self.places: queue.SimpleQueue[Place | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[Future[Piece | None]] = queue.SimpleQueue()

    def run(self) -> None:
        """Fill one place after the other."""
        for place in iter(self.places.get, None):
            filled: Future[Piece | None] = Future()
            try:
                filled.set_result(self._fill(place))
            except BaseException as error:  # into the consumer's thread
                filled.set_exception(error)
            self._filled.put(filled)
            del filled  # whose traceback would keep the thread's frame alive

    def take(self, seconds: float) -> Piece | None:
        """Return the next piece, or raise what the source raised.

        Raises:
            queue.Empty: none came within so many seconds.
            RuntimeError: this process has no such thread, as after a fork.
        """
        there = self.is_alive()
        try:
            filled = self._filled.get(timeout=seconds)
        except queue.Empty:
            if there:
                raise
            raise RuntimeError(
                "the thread that reads X is not in this process: begin a new fit after a fork"
            ) from None
        return filled.result()


def _nothing_to_do() -> AbstractContextManager[Callable[[], object]]:
    """Make a block in which nothing is done while rows are waited for."""
    return contextlib.nullcontext(lambda: None)
