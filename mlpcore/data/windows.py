"""Streams of shuffled windows from tables that are read by row number.

    source → blocks of consecutive rows, permuted → window (as many as fit) → its rows, permuted →
    batches

There are two windows: one is in use while a thread reads the next rows into the other. In each
epoch the blocks are cut at a different offset, cyclically, and drawn in a different order. If one
window holds all rows, their order is exactly that of the same rows in memory.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlpcore.core.ops import Buffer
from mlpcore.data.streams import NAMES, UNREADABLE, Block, Piece, Pieces, Stream

Array = NDArray[Any]
Range = tuple[int, int]  # first row, and the one after the last
WINDOW = 64 << 20  # bytes of a window
BLOCK = 1 << 20  # bytes of a block: random reads of this size are nearly as fast as sequential ones
MIXED = 16  # least number of blocks in a window, if blocks can be small enough


class Source(ABC):
    """A table that is read by row number.

    Attributes:
        like: a block of 0 rows with the shapes and dtypes of the data.
        rows: number of rows.
        starts: first rows of the stretches that form blocks, ascending from 0.
        chunk: number of rows that storage can only read as a whole, aligned to multiples of it.
        ways: number of blocks that are read in turns, to mix their rows.
    """

    like: Block
    rows: int
    starts: Sequence[int]
    chunk: int = 1
    ways: int = 1

    @abstractmethod
    def reader(self) -> Callable[[int, int, Block], None]:
        """Return a function that reads rows start … stop into a block, for one thread."""


class RowStream(Stream):
    """A stream of a table of known length."""

    def __init__(self, source: Source, dtype: DTypeLike = np.float64):
        super().__init__(dtype)
        self.source = source
        self.rows: int = source.rows
        self.like: Block = source.like
        self.row_bytes = sum(
            x.itemsize * math.prod(x.shape[1:]) for x in source.like if x is not None
        )
        self.columns = source.like.X.shape[1]

    def batches(self, batch_size: int) -> int:
        """Return the number of batches, the last of which may be smaller."""
        return -(-self.rows // batch_size)

    def buffers(self, batch_size: int, limit: int | None = None) -> list[Buffer]:
        """Return the arrays of two windows of whole batches, or of one that holds all rows."""
        size, row = min(batch_size, self.rows), self.row_bytes + 8
        most = WINDOW if limit is None else min(WINDOW, limit // 2)
        rows = min(self.rows, max(1, most // row // size) * size)
        parts = zip((*NAMES, "order"), (*self.like, np.empty(0, np.int64)), strict=True)
        held = [(name, (rows, *x.shape[1:]), x.dtype.name) for name, x in parts if x is not None]
        halves = (1, 2) if rows < self.rows else (1,)
        return [
            Buffer(f"{name} window {k}", shape, dtype, "rows read ahead")
            for k in halves
            for name, shape, dtype in held
        ]

    def epoch(
        self,
        batch_size: int,
        order: np.random.Generator | None,
        skip: int,
        arrays: Mapping[str, Array],
    ) -> Pieces:
        """Return windows of rows.

        If rows are shuffled, a partly skipped window is read as a whole.
        """
        self.epochs += 1
        windows = _Windows(self, batch_size, len(arrays["X window 1"]), order, skip)
        places: list[tuple[Block, Array | None]] = []
        for k in (1, 2):
            if f"X window {k}" in arrays:
                weights = arrays.get(f"sample_weight window {k}")
                block = Block(arrays[f"X window {k}"], arrays[f"Y window {k}"], weights)
                places.append((block, arrays.get(f"order window {k}")))
        return self._ahead(windows.fill, places, windows.stop)

    @property
    def starts(self) -> Sequence[int]:
        """Row numbers at which reads are cheap to begin."""
        return self.source.starts

    def read(self, places: Iterable[Sequence[int]]) -> Iterator[Block]:
        """Yield the rows start … stop of each place, unchecked."""
        read = self.source.reader()
        for start, stop in places:
            block = self.like.each(partial(_empty, stop - start))
            with _naming_rows(start, stop):
                read(start, stop, block)
            yield block


def _empty(rows: int, like: Array) -> Array:
    """Return an uninitialised array of `rows` rows, otherwise like `like`."""
    return np.empty((rows, *like.shape[1:]), like.dtype)


class _Windows:
    """The windows of one epoch of a table.

    Args:
        stream: the table.
        batch_size: rows of a batch.
        held: rows that the arrays of a window hold.
        order: generator for the row order; None for file order.
        skip: number of batches to skip at the beginning.

    Attributes:
        stop: set it from another thread to end `fill` early.
    """

    def __init__(
        self,
        stream: RowStream,
        batch_size: int,
        held: int,
        order: np.random.Generator | None,
        skip: int,
    ):
        self.stop = threading.Event()
        self._stream, self._size = stream, min(batch_size, stream.rows)
        window = held if held >= stream.rows else held // self._size * self._size
        assert window, "arrays of another batch size"
        # shuffles all rows as `epochs.Rows` does
        self._as_in_memory = copy.deepcopy(order) if window >= stream.rows else None
        self._seed = None if order is None else int(order.integers(1 << 63))
        chunk = stream.source.chunk
        block = max(1, min(BLOCK, held * stream.row_bytes // MIXED) // stream.row_bytes)
        self._step = max(1, block // chunk) * chunk
        self._ranges: Iterator[tuple[int, list[Range]]]
        if self._seed is None:
            self._ranges = enumerate(_cut([(skip * self._size, stream.rows)], window))
            skip = 0
        else:
            blocks = _draw_blocks(stream.starts, stream.rows, block, self._seed)
            if stream.source.ways > 1:
                blocks = _take_turns(blocks, stream.source.ways, self._step)
            self._ranges = itertools.islice(
                enumerate(_cut(blocks, window)), skip * self._size // window, None
            )
            skip = skip % (window // self._size) if window < stream.rows else skip
        self._skip = iter([skip])  # batches to skip in the first window
        self._read = stream.source.reader()

    def fill(self, place: tuple[Block, Array | None]) -> Piece | None:
        """Read the next window into a place (block, order) and return it; None at the end."""
        number, ranges = next(self._ranges, (0, []))
        at = 0
        for start, stop in ranges:
            first = at if self._as_in_memory is None else start
            if not self._read_range(start, stop, place[0].rows(first, first + stop - start)):
                return None
            at += stop - start
        if not at:
            return None
        rows = None
        if self._seed is not None:
            assert place[1] is not None
            rows = place[1][:at]
            rows[...] = 1  # 0, 1, 2, … without a second array of that size
            np.subtract(np.cumsum(rows, out=rows), 1, out=rows)
            rng = self._as_in_memory or np.random.default_rng([self._seed, 1 + number])
            rng.shuffle(rows)
        return Piece(*place[0].rows(0, at), _Batches(rows, at, self._size, next(self._skip, 0)))

    def _read_range(self, start: int, stop: int, block: Block) -> bool:
        """Read and check the rows start … stop; return False if the epoch has been stopped."""
        chunk, at = self._stream.source.chunk, start
        while at < stop:
            if self.stop.is_set():
                return False
            end = min(stop, at + self._step - at % chunk)
            part = block.rows(at - start, end - start)
            with _naming_rows(at, end):
                self._read(at, end, part)
            self._stream.require_values(part, first=at)
            at = end
        return True


@contextlib.contextmanager
def _naming_rows(start: int, stop: int) -> Iterator[None]:
    """Add to errors of the block a note with the rows that X was asked for."""
    try:
        yield
    except UNREADABLE as error:
        error.add_note(f"X was asked for its rows {start} … {stop - 1}")
        raise


def _draw_blocks(starts: Sequence[int], rows: int, block: int, seed: int) -> Iterator[Range]:
    """Yield the blocks of one epoch; one block may span the end and the start of the table."""
    count = len(starts)
    each = max(1, block * count // rows)  # stretches in a block
    rng = np.random.default_rng([seed, 0])
    offset = int(rng.integers(count))

    def edge(i: int) -> int:
        return starts[i] if i < count else rows

    for k in rng.permutation(-(-count // each)).tolist():
        first, last = offset + k * each, min(offset + (k + 1) * each, offset + count)
        if first < count:
            yield edge(first), edge(min(last, count))
        if last > count:
            yield edge(max(first - count, 0)), edge(last - count)


def _take_turns(blocks: Iterator[Range], ways: int, rows: int) -> Iterator[Range]:
    """Yield parts of `rows` rows from `ways` blocks at a time, in turns."""
    under_way = list(itertools.islice(blocks, ways))
    while under_way:
        start, stop = under_way.pop(0)
        yield start, min(stop, start + rows)
        rest = [(start + rows, stop)] if start + rows < stop else itertools.islice(blocks, 1)
        under_way.extend(rest)


def _cut(blocks: Iterable[Range], rows: int) -> Iterator[list[Range]]:
    """Yield the blocks, cut into lists of `rows` rows each; the last may have fewer."""
    window: list[Range] = []
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
    """Views of `order`, or of 0 … count - 1, as batches from number `skip` on."""

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
