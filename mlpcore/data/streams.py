"""Rows from anywhere, block by block: data larger than memory.

    source → blocks of consecutive rows, permuted → window (as many as fit) → its rows, permuted →
    batches

There are two windows: one is in use while a thread reads the next rows into the other. In each
epoch the blocks are cut at another place, cyclically, and drawn in another order; where one window
holds all rows, their order is that of the same rows in memory, to the row.
"""

from __future__ import annotations

import copy
import itertools
import math
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlpcore.checks import arrays
from mlpcore.core.ops import Buffer

Array = NDArray[Any]
Slot = list[Any]  # X, Y, row weights (or None) and, of a window, the row order
WINDOW = 64 << 20  # bytes of a window
BLOCK = 1 << 20  # bytes of a block: a disk reads as much at a time nearly as fast as in a row
MIXED = 16  # blocks in a window at least, where blocks can be made small enough
LOOK = 0.05  # seconds of a wait for rows after which it is asked whether to wait on
PATIENCE = 1.0  # seconds in which a thread that reads may come to its end
NAMES = ("X", "Y", "sample_weight")
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
)  # what libraries raise where rows cannot be read


class Piece(NamedTuple):
    """What an epoch gives at a time: a window of rows, valid until the next one is asked for.

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
        rows: of an epoch; None until they are known.
        columns: n_0; None where it cannot be told without reading.
        like: X, Y and row weights (or None) of no rows, with the shapes and dtypes of what will
            come; None as above.
        dtype: in which numbers must be finite.
        require_targets: raises the error of a Y that the loss does not take; called with Y, its
            name and its first row.
        epochs: begun so far; who resumes a run sets it.
        waited: seconds that the consumer has waited for the reader.
        waiting: makes a block around each wait for the reader, whose value is called a few times a
            second meanwhile.
    """

    def __init__(self, dtype: DTypeLike):
        self.dtype = dtype
        self.rows: int | None = None
        self.columns: int | None = None
        self.like: Slot | None = None
        self.require_targets: Callable[[Array, str, int], None] | None = None
        self.epochs = 0
        self.waited = 0.0
        self.waiting: Callable[[], AbstractContextManager[Callable[[], object]]] = _nothing_to_do

    @abstractmethod
    def batches(self, batch_size: int) -> int | None:
        """Batches of an epoch, if known."""

    @abstractmethod
    def buffers(self, batch_size: int, limit: int | None = None) -> list[Buffer]:
        """Its arrays on the host, for the plan: in `limit` bytes, if that holds two batches; else
        two batches.
        """

    @abstractmethod
    def epoch(
        self, batch_size: int, order: np.random.Generator | None, skip: int, arrays: Mapping[str, Array]
    ) -> Pieces:  # fmt: skip
        """The pieces of one epoch; close the iterator, or drop it, to end it before: its thread
        ends with it.

        Args:
            batch_size: rows of a batch, the last one may be smaller.
            order: draws the row order (one number is drawn, now); None: file order.
            skip: leave out so many first batches, and what only they would read. The others are
                those that would have come.
            arrays: as `buffers` listed them; together with `order` and `batch_size` they determine
                the batches to the bit.

        Raises:
            ValueError: in the iteration: a number that is not finite (names row and column), a
                target that the loss does not take, or what the source raises.
        """

    def _require_values(
        self, parts: Sequence[Array | None], prefix: str = "", first: int = 0
    ) -> None:
        """Raise a ValueError that names the row, counted from `first`, of the first bad number,
        weight or target.
        """
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
        self, fill: Callable[[Slot], Piece | None], slots: Sequence[Slot], stop: threading.Event
    ) -> Pieces:
        """Yield the pieces that `fill` makes of one slot after the other, until None, read a piece
        ahead.

        A thread whose source does not answer is left behind after a moment; it does not keep the
        process alive.
        """
        reader, turn = _Reader(fill), itertools.cycle(slots)
        try:
            reader.start()
            reader.slots.put(next(turn))
            while True:
                begin = time.perf_counter()
                piece = self._next(reader)
                self.waited += time.perf_counter() - begin
                if piece is None:
                    return
                reader.slots.put(next(turn))
                yield piece
        finally:
            stop.set()
            reader.slots.put(None)
            if reader.is_alive():
                reader.join(PATIENCE)

    def _next(self, reader: _Reader) -> Piece | None:
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


class _Reader(threading.Thread):
    """A thread that fills slots.

    Args:
        fill: makes a piece of a slot; None at the end.

    Attributes:
        slots: to be filled; None ends the thread.
    """

    def __init__(self, fill: Callable[[Slot], Piece | None]):
        super().__init__(name="mlpcore-reader", daemon=True)
        self._fill = fill
        self.slots: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[Future[Piece | None]] = queue.SimpleQueue()

    def run(self) -> None:
        """Fill one slot after the other."""
        for slot in iter(self.slots.get, None):
            filled: Future[Piece | None] = Future()
            try:
                filled.set_result(self._fill(slot))
            except BaseException as error:  # into the consumer's thread
                filled.set_exception(error)
            self._filled.put(filled)
            del filled  # whose traceback would keep the thread's frame alive

    def take(self, seconds: float) -> Piece | None:
        """Return the next piece, or raise what the source raised.

        Raises:
            queue.Empty: there is none within so many seconds.
            RuntimeError: the thread is not there, as in a forked process.
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
    return nullcontext(lambda: None)


class Source(Protocol):
    """A table that is read by row numbers.

    Attributes:
        like: X, Y and row weights (or None) of no rows, as they will be read.
        rows: its length.
        starts: first rows of the stretches that blocks are made of, ascending from 0.
        chunk: rows that are read as a whole anyway, from a multiple of it on.
    """

    like: Slot
    rows: int
    chunk: int

    @property
    def starts(self) -> Sequence[int]: ...

    def reader(self) -> Callable[[int, int, Slot], None]:
        """A function that reads rows start … stop into arrays for X, Y and row weights; for one
        epoch, in one thread.
        """


class RowStream(Stream):
    """A stream of a table of known length."""

    def __init__(self, source: Source, dtype: DTypeLike = np.float64):
        super().__init__(dtype)
        self._source = source
        self.rows: int = source.rows
        self.like = source.like
        self._row_bytes = sum(
            x.itemsize * math.prod(x.shape[1:]) for x in source.like if x is not None
        )
        self.columns = source.like[0].shape[1]

    def batches(self, batch_size: int) -> int:
        """The last one may be smaller."""
        return -(-self.rows // batch_size)

    def buffers(self, batch_size: int, limit: int | None = None) -> list[Buffer]:
        """One window if it holds all rows, else two, of whole batches each."""
        size, row = min(batch_size, self.rows), self._row_bytes + 8
        most = WINDOW if limit is None else min(WINDOW, limit // 2)
        rows = min(self.rows, max(1, most // row // size) * size)
        parts = zip((*NAMES, "order"), (*self._source.like, np.empty(0, np.int64)), strict=True)
        held = [(name, (rows, *x.shape[1:]), x.dtype.name) for name, x in parts if x is not None]
        halves = (1, 2) if rows < self.rows else (1,)
        return [
            Buffer(f"{name} window {k}", shape, dtype, "rows read ahead")
            for k in halves
            for name, shape, dtype in held
        ]

    def epoch(
        self, batch_size: int, order: np.random.Generator | None, skip: int, arrays: Mapping[str, Array]
    ) -> Pieces:  # fmt: skip
        """Windows of rows; of one that was partly left out, all rows are read, but in file order."""
        unused = copy.deepcopy(order)
        seed = None if order is None else int(order.integers(1 << 63))
        self.epochs += 1
        slots = [
            [arrays.get(f"{name} window {half}") for name in (*NAMES, "order")] for half in (1, 2)
        ]
        slots = [slot for slot in slots if slot[0] is not None]
        size = min(batch_size, self.rows)
        held = len(arrays["X window 1"])
        window = held if held >= self.rows else held // size * size
        assert window, "arrays of another batch size"
        as_in_memory = (
            unused if window >= self.rows else None
        )  # shuffles all rows, as it does in `sources.Rows`
        block = max(1, min(BLOCK, held * self._row_bytes // MIXED) // self._row_bytes)
        windows: Iterator[tuple[int, list[tuple[int, int]]]]
        if seed is None:
            windows = enumerate(_windows([(skip * size, self.rows)], window))
            skip = 0
        else:
            windows = enumerate(_windows(self._blocks(block, seed), window))
            windows = itertools.islice(windows, skip * size // window, None)
            skip = skip % (window // size) if window < self.rows else skip
        chunk = self._source.chunk
        step = max(1, block // chunk) * chunk
        read, stop, left_out = self._source.reader(), threading.Event(), iter([skip])

        def fill(slot: Slot) -> Piece | None:
            number, ranges = next(windows, (0, []))
            at = 0
            for start, end in ranges:
                while start < end:
                    if stop.is_set():
                        return None
                    next_start = min(end, start + step - start % chunk)
                    place = at if as_in_memory is None else start
                    parts = [
                        None if x is None else x[place : place + next_start - start]
                        for x in slot[:3]
                    ]
                    try:
                        read(start, next_start, parts)
                    except UNREADABLE as error:
                        error.add_note(f"X was asked for its rows {start} … {next_start - 1}")
                        raise
                    self._require_values(parts, first=start)
                    at, start = at + next_start - start, next_start
            if not at:
                return None
            used: Slot = [None if x is None else x[:at] for x in slot]
            X, Y, weights, rows = used
            if seed is not None:
                rows[...] = 1
                np.subtract(
                    np.cumsum(rows, out=rows), 1, out=rows
                )  # 0, 1, 2, … without a second array of that size
                (as_in_memory or np.random.default_rng([seed, 1 + number])).shuffle(rows)
            return Piece(
                X, Y, weights, _Batches(None if seed is None else rows, at, size, next(left_out, 0))
            )

        return self._ahead(fill, slots, stop)

    @property
    def starts(self) -> Sequence[int]:
        """The rows from which reading is cheap."""
        return self._source.starts

    def read(self, places: Sequence[Sequence[int]]) -> Iterator[Slot]:
        """Yield X, Y and row weights (or None) of the rows start … stop of each place, not yet
        checked.
        """
        read = self._source.reader()
        for start, stop in places:
            like, count = self._source.like, stop - start
            parts: Slot = [
                None if x is None else np.empty((count, *x.shape[1:]), x.dtype) for x in like
            ]
            try:
                read(start, stop, parts)
            except UNREADABLE as error:
                error.add_note(f"X was asked for its rows {start} … {stop - 1}")
                raise
            yield parts

    def _blocks(self, block: int, seed: int) -> Iterator[tuple[int, int]]:
        """Rows (start, stop) of the blocks of one epoch; the two ends of the table may lie in one
        block.
        """
        starts = self._source.starts
        count = len(starts)
        each = max(1, block * count // self.rows)  # stretches in a block
        rng = np.random.default_rng([seed, 0])
        offset = int(rng.integers(count))

        def edge(i: int) -> int:
            return starts[i] if i < count else self.rows

        for k in rng.permutation(-(-count // each)).tolist():
            first, last = offset + k * each, min(offset + (k + 1) * each, offset + count)
            if first < count:
                yield edge(first), edge(min(last, count))
            if last > count:
                yield edge(max(first - count, 0)), edge(last - count)


def _windows(
    blocks: Iterator[tuple[int, int]] | list[tuple[int, int]], rows: int
) -> Iterator[list[tuple[int, int]]]:
    """The blocks, cut into lists of `rows` rows each; the last may have less."""
    window: list[tuple[int, int]] = []
    room = rows
    for start, stop in blocks:
        while start < stop:
            end = min(stop, start + room)
            window.append((start, end))
            room -= end - start
            start = end
            if not room:
                yield window
                window, room = [], rows
    if window:
        yield window


class _Batches(Sequence[Array | None]):
    """`order`, or 0 … count - 1, cut into batches from number `skip` on; views, made when they are
    asked for.
    """

    def __init__(self, order: Array | None, count: int, size: int, skip: int):
        self._order, self._count, self._size, self._skip = order, count, size, skip

    def __len__(self) -> int:
        return max(0, -(-self._count // self._size) - self._skip)

    def __getitem__(self, index: Any) -> Any:
        start = (range(len(self))[index] + self._skip) * self._size
        stop = min(start + self._size, self._count)
        if self._order is not None:
            return self._order[start:stop]
        return None if stop - start == self._count else np.arange(start, stop)
