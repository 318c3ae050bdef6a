"""Streams: data larger than memory, read ahead piece by piece in a thread."""

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
Place = TypeVar("Place")  # memory of a piece, reused for the next piece but one
LOOK = 0.05  # seconds between checks, while waiting for rows, whether to go on waiting
PATIENCE = 1.0  # seconds that a reader thread has to end
NAMES = ("X", "Y", "sample_weight")
# errors that libraries raise if rows cannot be read
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
        """Return a block with `change` applied to each array."""
        weights = None if self.weights is None else change(self.weights)
        return Block(change(self.X), change(self.Y), weights)

    def rows(self, start: int, stop: int) -> Block:
        """Return the rows start … stop, as views."""
        return self.each(lambda x: x[start:stop])


class Piece(NamedTuple):
    """A window of rows, valid until the next one is requested.

    Attributes:
        X, Y, weights: host arrays (k, n_0), (k,) or (k, n_L), and (k,) or None.
        batches: one entry per batch: its row numbers (int64) within the window, or None for all
            rows in order.
    """

    X: Array
    Y: Array
    weights: Array | None
    batches: Sequence[Array | None]


Pieces = Generator[Piece, None, None]


class Stream(ABC):
    """Rows that come piece by piece, in epochs.

    Attributes:
        rows: number of rows of an epoch; None until it is known.
        columns: n_0; None if it is unknown before reading.
        like: a block of 0 rows with the shapes and dtypes of the data; None if they are unknown
            before reading.
        dtype: dtype in which numbers must be finite.
        require_targets: raises an error for a Y that the loss does not accept; called with Y, its
            name and the number of its first row.
        epochs: number of epochs begun so far; a resumed run sets it.
        waited: seconds that the consumer has waited for the reader.
        waiting: makes a context manager for each wait for the reader; the function that it yields
            is called repeatedly during the wait.
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
        """Return the number of batches of an epoch; None if it is not known."""

    @abstractmethod
    def buffers(self, batch_size: int, limit: int | None = None) -> list[Buffer]:
        """Return the stream's host arrays, for the plan; within `limit` bytes if possible."""

    @abstractmethod
    def epoch(
        self,
        batch_size: int,
        order: np.random.Generator | None,
        skip: int,
        arrays: Mapping[str, Array],
    ) -> Pieces:
        """Return an iterator of the pieces of one epoch.

        Its thread ends with the iterator; to end both earlier, close or drop the iterator.

        Args:
            batch_size: rows of a batch; the last one may be smaller.
            order: generator for the row order, from which one number is drawn immediately; None for
                file order.
            skip: number of batches to skip at the beginning, without reading rows that only they
                need; the other batches are the same as without skipping.
            arrays: the arrays listed by `buffers`; together with `order` and `batch_size` they
                determine the batches bit for bit.

        Raises:
            ValueError: during the iteration: a number is not finite (names row and column), or the
                loss does not accept a target. Errors of the source are raised as well.
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

        A thread whose source does not respond is abandoned after `PATIENCE` seconds; it does not
        keep the process alive.
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
        """Return the reader's next piece, or raise the error that the source raised."""
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
        fill: fills a place and returns its piece; returns None at the end.

    Attributes:
        places: queue of places to fill; None ends the thread.
    """

    def __init__(self, fill: Callable[[Place], Piece | None]):
        super().__init__(name="mlpcore-reader", daemon=True)
        self._fill = fill
        self.places: queue.SimpleQueue[Place | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[Future[Piece | None]] = queue.SimpleQueue()

    def run(self) -> None:
        """Fill the places in turn."""
        for place in iter(self.places.get, None):
            filled: Future[Piece | None] = Future()
            try:
                filled.set_result(self._fill(place))
            except BaseException as error:  # raised in the consumer's thread
                filled.set_exception(error)
            self._filled.put(filled)
            del filled  # its traceback would keep the thread's frame alive

    def take(self, seconds: float) -> Piece | None:
        """Return the next piece, or raise the error that the source raised.

        Raises:
            queue.Empty: no piece came within this number of seconds.
            RuntimeError: the thread does not exist in this process, as after a fork.
        """
        there = self.is_alive()
        try:
            filled = self._filled.get(timeout=seconds)
        except queue.Empty:
            if there:
                raise
            raise RuntimeError(
                "the thread that reads X does not exist in this process: call fit after the fork"
            ) from None
        return filled.result()


def _nothing_to_do() -> AbstractContextManager[Callable[[], object]]:
    """Return a context manager that does nothing while waiting for rows."""
    return contextlib.nullcontext(lambda: None)
