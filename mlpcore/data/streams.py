"""Rows from anywhere, block by block: data larger than memory.

    source → blocks of consecutive rows, permuted → window (as many as fit) → its rows, permuted →
    batches

There are two windows: one is in use while a thread reads the next rows into the other. In each
epoch the blocks are cut at another place, cyclically, and drawn in another order; where one window
holds all rows, their order is that of the same rows in memory, to the row.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import copy
import inspect
import itertools
import json
import math
import mmap
import os
import queue
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlpcore.checks import arrays
from mlpcore.checks.errors import cut, line, listed, nearest, shown
from mlpcore.core.ops import Buffer

Array = NDArray[Any]
Slot = list[Any]  # X, Y, row weights (or None) and, of a window, the row order
WINDOW = 64 << 20  # bytes of a window
BLOCK = 1 << 20  # bytes of a block: a disk reads as much at a time nearly as fast as in a row
MIXED = 16  # blocks in a window at least, where blocks can be made small enough
AROUND = 64 << 10  # bytes that the kernel maps at a time
BUFFER = 64 << 10  # bytes that pyarrow reads of a column at a time
LOOK = 0.05  # seconds of a wait for rows after which it is asked whether to wait on
PATIENCE = 1.0  # seconds in which a thread that reads may come to its end
NAMES = ("X", "Y", "sample_weight")
_AXES = {"X": (2,), "Y": (1, 2), "sample_weight": (1,)}
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
)  # what libraries raise where rows cannot be read
_IN_MEMORY = (
    "__array_interface__",
    "__cuda_array_interface__",
    "__dlpack__",
    "__arrow_c_stream__",
    "to_numpy",
    "toarray",
)


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


# -- rows that can be sliced
# ---------------------------------------------------------------------------------------------


class _Source(Protocol):
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

    def __init__(self, source: _Source, dtype: DTypeLike = np.float64):
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
                    except _UNREADABLE as error:
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
            except _UNREADABLE as error:
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


def _require_form(
    name: str, shape: tuple[int, ...], dtype: Any, rows: int | None, prefix: str = ""
) -> None:
    """Raise a TypeError or ValueError where an argument cannot be X, Y or sample_weight beside an X
    of `rows` rows.
    """
    if np.dtype(dtype).kind not in "fiub":
        raise TypeError(f"{prefix}{name} must hold real numbers; its dtype is {dtype}")
    if len(shape) not in _AXES[name]:
        raise ValueError(
            f"{prefix}{name} must have {' or '.join(map(str, _AXES[name]))} axes; it has shape "
            f"{tuple(shape)}"
        )
    if not all(
        isinstance(n, int | np.integer) for n in shape
    ):  # Dask's, before its chunks are computed
        raise ValueError(f"{prefix}{name} must know its size; it has shape {tuple(shape)}")
    if 0 in shape:
        raise ValueError(f"{prefix}{name} is empty: shape {tuple(shape)}")
    if rows is not None and shape[0] != rows:
        raise ValueError(f"{prefix}{name} has {shape[0]} rows; X has {rows}")


class _Slices:
    """Arrays that are sliced by rows, each of a kind of its own: mapped files, Zarr, HDF5, NumPy."""

    def __init__(self, X: Any, Y: Any, sample_weight: Any):
        self._arrays: list[Any] = [X]
        for name, value in (("Y", Y), ("sample_weight", sample_weight)):
            self._arrays.append(
                value if value is None or _in_file(value) else _on_host(value, name)
            )
        self.like: Slot = []
        for name, array in zip(NAMES, self._arrays, strict=True):
            if array is not None:
                _require_form(name, array.shape, array.dtype, None if name == "X" else X.shape[0])
            dtype = None if array is None else np.dtype(array.dtype).newbyteorder("=")
            self.like.append(None if array is None else np.empty((0, *array.shape[1:]), dtype))
        self.rows = int(X.shape[0])
        self._maps = [MappedFile.of(array) for array in self._arrays]
        chunks = getattr(X, "chunks", None)
        self.chunk = (
            chunks[0] if isinstance(chunks, tuple) and isinstance(chunks[0], int) else 1
        )  # Dask's are tuples
        self.starts = range(0, self.rows, self.chunk)

    def reader(self) -> Callable[[int, int, Slot], None]:
        """They are read without a state."""
        return self._read

    def _read(self, start: int, stop: int, parts: Slot) -> None:
        for name, array, mapping, part in zip(NAMES, self._arrays, self._maps, parts, strict=True):
            if part is None:
                continue
            rows = np.asarray(array[start:stop])
            if rows.shape != part.shape:
                raise ValueError(
                    f"{name}[{start}:{stop}] must have shape {part.shape}; it has {rows.shape}"
                )
            part[...] = rows
            if mapping is not None:
                mapping.give_back(rows)


class MappedFile:
    """The mapped file behind an array."""

    def __init__(self, pages: mmap.mmap):
        self._pages = pages
        self._address: int = np.frombuffer(pages, np.uint8).__array_interface__["data"][0]

    @classmethod
    def of(cls, array: Any) -> MappedFile | None:
        """That of a memmap or of a view of one, where its pages can be given back; None otherwise."""
        mapped = _memmap(array)
        if (
            mapped is None or mapped.mode == "c" or not hasattr(mmap.mmap, "madvise")
        ):  # "c": what was written is nowhere else
            return None
        return cls(mapped.base)  # type: ignore[arg-type]

    def give_back(self, rows: Array) -> None:
        """Take the pages of these rows out of the process's memory; the system keeps them cached as
        long as it has room.
        """
        low, high = (end - self._address for end in np.lib.array_utils.byte_bounds(rows))
        start = max(0, low - AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        self._pages.madvise(mmap.MADV_DONTNEED, start, high + AROUND - start)


def _memmap(array: Any) -> np.memmap[Any, Any] | None:
    """The memmap that an array is, or is a view of."""
    ma = sys.modules.get("numpy.ma")  # imported by whoever holds a masked array
    while isinstance(array, np.ndarray) and not (ma and isinstance(array, ma.MaskedArray)):
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
            return array
        array = array.base
    return None


def _in_memory(value: Any) -> bool:
    return isinstance(value, np.ndarray | memoryview) or any(
        hasattr(type(value), name) for name in _IN_MEMORY
    )


def _in_file(value: Any) -> bool:
    """Whether it is sliced by rows and not in memory as a whole: a memmap or a view of one, Zarr,
    h5py.
    """
    if isinstance(value, type) or _in_memory(value):
        return _memmap(value) is not None
    described = (
        isinstance(getattr(value, "shape", None), tuple)
        and getattr(value, "dtype", None) is not None
    )
    return described and hasattr(value, "__getitem__")


def _on_host(value: Any, name: str) -> Array:
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(
            f"{name} lies on a GPU; rows that are read block by block must lie on the host"
        )
    if np.ma.is_masked(value):
        raise TypeError(
            f"{name} is a masked array with masked entries; fill them first, e.g. with "
            f"{name}.filled(0)"
        )
    return arrays.host_array(value, name)


# -- Parquet
# -------------------------------------------------------------------------------------------------------------


class Parquet:
    """Parquet files as X and Y: `trainer.fit(mc.Parquet("flights/", target="late"), epochs=3)`.

    Rows are numbered through the files, which come in the order of their names. The blocks of the
    shuffle are row groups: write files with groups of some 10,000 rows, or with their rows mixed.
    Needs pyarrow, whose own memory (a few pages of each column) is outside the plan.

    Args:
        path: a file, a folder (its *.parquet, also in folders of it, but for names that begin with
            "." or "_"), or a list of files.
        target: the column that is Y; a list of columns makes Y (m, k). Booleans become 0 and 1.
        features: the columns of X; None: all others, in the order of the first file, which each
            file must have.
        weight: the column of row weights.

    Attributes:
        rows: of all files together.
        features, target, weight: the columns in use.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        TypeError, ValueError: no Parquet file, no such column, one that is used twice or that does
            not hold numbers (categories that are numbers are refused, too, but in the target), a
            folder `name=value`; names file and column.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        target: str | Sequence[str],
        features: Sequence[str] | None = None,
        weight: str | None = None,
    ) -> None:
        listed = [path] if isinstance(path, str | os.PathLike) else path
        if not isinstance(listed, list | tuple) or not all(
            isinstance(file, str | os.PathLike) for file in listed
        ):
            raise TypeError(f"path must be a file, a folder or a list of files; got {shown(path)}")
        paths = [Path(file) for file in listed]
        if len(paths) == 1 and paths[0].is_dir():
            paths = _files(paths[0])
        if not paths:
            raise FileNotFoundError(f"path: there is no *.parquet in {path!r}")
        if weight is not None and not isinstance(weight, str):
            raise TypeError(f"weight must be the name of a column; got {shown(weight)}")
        labels, weights = _names("target", target), (() if weight is None else (weight,))
        columns = None if features is None else _names("features", features)
        used = [*(columns or ()), *labels, *weights]
        for name, count in Counter(used).items():
            if count > 1:
                raise ValueError(
                    f"column {shown(name)} must be used once, in features, target or weight"
                )
        self.target, self.weight = target, weight
        self.rows = 0
        self.starts: list[int] = []
        self._groups: list[tuple[Path, int]] = []  # file and row group that begin there
        types: dict[str, np.dtype[Any]] = {}
        for file in paths:
            footer = Footer.read(file, _where(file))
            fields: dict[str, list[Any]] = {}
            for field in footer.schema:
                fields.setdefault(field.name, []).append(field.type)
            if columns is None:
                columns = tuple(
                    name for name in footer.schema.names if name not in labels + weights
                )
            of_all = {*columns, *labels, *weights}
            for name in fields if features is None else ():
                if name not in of_all:
                    raise ValueError(
                        f"column {shown(name)} of {str(file)!r} is not in {str(paths[0])!r}; "
                        "features=[…] leaves it out"
                    )
            for name in columns + labels + weights:
                dtype = _numeric(fields, name, file)
                if name in footer.categories and name not in labels:
                    raise TypeError(
                        f"column {shown(name)} of {str(file)!r} must hold numbers; it holds "
                        "categories: encode them, "
                        "or leave the column out by features=[…]"
                    )
                if types.setdefault(name, dtype) != dtype:
                    raise ValueError(
                        f"column {shown(name)} is {types[name]} in {str(paths[0])!r} and {dtype} "
                        f"in {str(file)!r}"
                    )
            for group, rows in enumerate(footer.rows):
                self.starts.append(self.rows)
                self._groups.append((file, group))
                self.rows += rows
        self.features = columns or ()
        self._columns = self.features, labels, weights  # of X, Y and row weights
        for name, missing in (
            ("features", not self.features),
            ("target", not labels),
            ("path", not self.rows),
        ):
            if missing:
                raise ValueError(
                    f"{name}: {'no rows in' if name == 'path' else 'no column of'} {path!r}"
                )
        X, Y = (
            np.empty((0, len(names)), np.result_type(*(types[name] for name in names)))
            for names in (self.features, labels)
        )
        Y = Y.astype(np.uint8) if Y.dtype == np.bool_ else Y
        w = None if weight is None else np.empty(0, types[weight])
        self.like: Slot = [X, Y[:, 0] if isinstance(target, str) else Y, w]
        self.chunk = 1
        self._at_once = max(1, 4 * BLOCK // (len(types) * 8))  # rows that pyarrow decodes at a time

    def __repr__(self) -> str:
        return f"Parquet({self.rows:,} rows, {len(self.features)} features, target={self.target!r}, weight={self.weight!r})"

    def reader(self) -> Callable[[int, int, Slot], None]:
        """A function that reads rows start … stop into arrays for X, Y and row weights; going on
        where it stopped is cheap.
        """
        at, rest = -1, None
        batches: Iterator[Any] = iter(())

        def read(start: int, stop: int, parts: Slot) -> None:
            nonlocal at, rest, batches
            if start != at:
                at, rest, batches = start, None, self._record_batches(start)
            done = 0
            while done < stop - start:
                rest = rest or next(batches)
                count = min(len(rest), stop - at)
                self._copy(
                    rest.slice(0, count),
                    at,
                    [None if x is None else x[done : done + count] for x in parts],
                )
                rest = rest.slice(count)
                done, at = done + count, at + count

        return read

    def _record_batches(self, row: int) -> Iterator[Any]:
        """What pyarrow reads from a row on."""
        columns = list(sum(self._columns, ()))
        for k in range(bisect.bisect_right(self.starts, row) - 1, len(self.starts)):
            (path, group), start = self._groups[k], self.starts[k]
            with opened(path, _where(path), buffer_size=BUFFER, pre_buffer=False) as file:
                for batch in read_batches(file, _where(path), self._at_once, group, columns):
                    skipped = min(max(row - start, 0), len(batch))
                    start += len(batch)
                    if skipped < len(batch):
                        yield batch.slice(skipped)
            if start != ([*self.starts[k + 1 : k + 2], self.rows])[0]:
                raise ValueError(
                    f"{str(path)!r} has changed since it was opened, or is damaged: it holds "
                    "another number of rows"
                )

    def _copy(self, batch: Any, row: int, parts: Slot) -> None:
        """The columns of a record batch that begins with this row, into X, Y and row weights."""
        for names, part in zip(self._columns, parts, strict=True):
            for i, name in enumerate(names):
                column = batch.column(name)
                if column.null_count:
                    at = row + int(column.is_null().to_numpy(zero_copy_only=False).argmax())
                    raise ValueError(
                        f"column {shown(name)} must have a number in every row; row {at} holds null"
                    )
                (part if part.ndim == 1 else part[:, i])[...] = column.to_numpy(
                    zero_copy_only=False
                )


def _files(folder: Path) -> list[Path]:
    """The Parquet files in a folder and its folders, in the order of their names."""
    found = []
    for file in sorted(folder.rglob("*.parquet")):
        parts = file.relative_to(folder).parts
        if (
            any(part.startswith((".", "_")) for part in parts) or not file.is_file()
        ):  # a writer's own
            continue
        for part in parts[:-1]:
            if "=" in part:
                raise ValueError(
                    f"path: the files in {str(folder)!r} lack the column that their folder "
                    f"{part!r} names: write it into the "
                    "files, or pass a list of files to go without"
                )
        found.append(file)
    return found


def _names(argument: str, value: Any) -> tuple[str, ...]:
    """Names of columns, given as one or as a list."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{argument} must be the name of a column or a list of names; got {shown(value)}"
        )
    return tuple(names)


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Raise what pyarrow raises within as a ValueError that begins with `where` and says that the
    file is damaged.

    An OSError of the system stays one, and a MemoryError.
    """
    from pyarrow import ArrowException

    try:
        yield
    except MemoryError as error:
        raise MemoryError(
            f"{where} takes more memory than there is, or is damaged: {line(error)}"
        ) from None
    except (ArrowException, AttributeError, ArithmeticError, *_UNREADABLE) as error:
        if isinstance(error, OSError) and (error.errno or type(error) is not OSError):
            raise type(error)(f"{where} cannot be read: {line(error)}") from None
        raise ValueError(f"{where} is no Parquet file, or a damaged one: {line(error)}") from None


def opened(path: Path, where: str, **options: Any) -> Any:
    """Return a `ParquetFile` that verifies the checksums of pages; `where` as in `readable`."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("mc.Parquet needs pyarrow: pip install pyarrow") from error
    if not path.exists():
        raise FileNotFoundError(f"path: there is no file or folder {str(path)!r}")
    with readable(where):
        return parquet.ParquetFile(arrow_source(path), page_checksum_verification=True, **options)


def arrow_source(path: Path) -> Any:
    """Return what Arrow can open: the path, or an open file where its name is not UTF-8."""
    import pyarrow as pa

    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return pa.OSFile(os.fsencode(path))
    return path


def read_batches(
    file: Any, where: str, rows: int, group: int, columns: Sequence[str]
) -> Iterator[Any]:
    """Yield the validated record batches of a row group, of so many rows at most."""
    with readable(where):
        batches, left = (
            file.iter_batches(rows, [group], columns),
            file.metadata.row_group(group).num_rows,
        )
    while True:
        with readable(where):
            batch = next(batches, None)
            if batch is None:
                require_rows(left, 0)
                return
            batch.validate(full=True)
        left -= len(batch)
        yield batch


def require_rows(promised: int, read: int) -> None:
    """Raise a ValueError unless as many rows were read as the footer promises."""
    if promised != read:
        raise ValueError(
            f"it holds {abs(promised - read):,} rows {'fewer' if read < promised else 'more'} than "
            "it says"
        )


def _where(path: Path) -> str:
    return f"path: {str(path)!r}"


@dataclass(frozen=True)
class Footer:
    """The description of a Parquet file.

    Attributes:
        metadata: as pyarrow has it.
        schema: of Arrow.
        categories: the columns that were written as categories.
        rows: of each row group.
    """

    metadata: Any
    schema: Any
    categories: set[str]
    rows: list[int]

    @classmethod
    def read(cls, path: Path, where: str) -> Footer:
        """Return the footer of a file; `where` as in `readable`."""
        with opened(path, where) as file:
            return cls.of(file, where)

    @classmethod
    def of(cls, file: Any, where: str) -> Footer:
        """Return the footer of an open file."""
        with readable(where):
            metadata = file.metadata
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
                raise ValueError(
                    f"its row groups have {sum(rows):,} rows, itself {metadata.num_rows:,}"
                )
            schema = file.schema_arrow
            return cls(metadata, schema.remove_metadata(), category_columns(metadata), rows)


def category_columns(metadata: Any) -> set[str]:
    """Return the names of a Parquet file's columns that were written as categories, by its footer.

    pandas and Arrow note them there: categories that are numbers are read as numbers.
    """
    import pyarrow as pa

    written = metadata.metadata or {}
    names: set[str] = set()
    if b"ARROW:schema" in written:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(written[b"ARROW:schema"])))
        names |= {field.name for field in schema if pa.types.is_dictionary(field.type)}
    if b"pandas" in written:
        listed = json.loads(written[b"pandas"]).get("columns", ())
        names |= {
            column.get("field_name")
            for column in listed
            if column.get("pandas_type") == "categorical"
        }
    return names


def _numeric(fields: Mapping[str, Sequence[Any]], name: str, path: Path) -> Any:
    """Return the dtype of a column of numbers, given the types of all columns by name."""
    if len(fields.get(name, ())) != 1:
        near = None if name in fields else nearest(name, fields)
        hint = f"did you mean {shown(near)}? Its" if near else "its"
        raise ValueError(
            f"{str(path)!r} must have one column {shown(name)}; {hint} columns: {listed(fields)}"
        )
    from pyarrow import types

    (kind,) = fields[name]
    if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
        raise TypeError(
            f"column {shown(name)} of {str(path)!r} must hold numbers; it holds {cut(kind)}; "
            "features=[…] takes others"
        )
    return np.dtype(kind.to_pandas_dtype())


# -- batches as they come
# ------------------------------------------------------------------------------------------------


class BatchStream(Stream):
    """A stream of ready batches `(X, Y)` or `(X, Y, sample_weight)`, in the order in which they
    come.

    They are copied in the reader thread, so that the source may use its arrays again. Two copies
    are held, outside the plan.
    """

    def __init__(self, source: Any, dtype: DTypeLike = np.float64):
        super().__init__(dtype)
        self._source = source
        self._count = _length(source)
        self._weighted: bool | None = None  # whether batches have row weights
        self._takes_epoch = not hasattr(source, "__iter__") and _takes_epoch(source)
        if isinstance(source, list | tuple):
            given = [self._checked(batch, number) for number, batch in enumerate(source)]
            if not given:
                raise ValueError("X is empty: a list of batches needs at least one")
            self.rows = sum(len(batch[0]) for batch in given)
            self.like = [None if x is None else x[:0] for x in given[0]]

    def batches(self, batch_size: int) -> int | None:
        """As many as the source has, whatever their size; None until they have been counted."""
        return self._count

    def buffers(self, batch_size: int, limit: int | None = None) -> list[Buffer]:
        """None: the size of a batch is the source's affair."""
        return []

    def epoch(
        self, batch_size: int, order: np.random.Generator | None, skip: int, arrays: Mapping[str, Array]
    ) -> Pieces:  # fmt: skip
        """The batches as they come, one a piece, whatever `batch_size` and `order`; skipped ones
        are made but not looked at.
        """
        number, rows = self.epochs, 0
        self.epochs += 1
        batches: Iterator[tuple[int, Any]] | None = None

        def fill(slot: Slot) -> Piece | None:
            nonlocal batches, rows
            if batches is None:
                batches = itertools.islice(enumerate(self._begun(number)), skip, None)
            at, batch = next(batches, (-1, None))
            if at < 0:
                if not rows and not skip:
                    raise ValueError(
                        f"X gave no batches in epoch {number}; it must begin again in each epoch"
                    )
                if not skip:
                    self.rows = rows
                return None
            given = self._checked(batch, at)
            self._require_values(given, f"batch {at}: ")
            X, Y, weights = (_copy_into(slot, i, x) for i, x in enumerate(given))
            rows += len(X)
            self._count = max(self._count or 0, at + 1)
            return Piece(X, Y, weights, [None])

        return self._ahead(fill, ([None] * 3, [None] * 3), threading.Event())

    def _begun(self, number: int) -> Iterator[Any]:
        """The batches of an epoch from the first one on."""
        source = self._source
        if hasattr(source, "__iter__"):
            return iter(source)
        batches = source(epoch=number) if self._takes_epoch else source()
        if not hasattr(batches, "__iter__"):
            raise TypeError(
                "X() must return an iterator of batches (X, Y); it returned "
                f"{type(batches).__name__}"
            )
        return iter(batches)

    def _checked(self, batch: Any, number: int) -> Slot:
        """X, Y and row weights (or None) of a batch."""
        prefix = f"batch {number}: "
        if not isinstance(batch, list | tuple) or len(batch) not in (2, 3):
            raise TypeError(
                f"{prefix}must be (X, Y) or (X, Y, sample_weight); got {type(batch).__name__}"
            )
        X, Y, w = (*batch, None)[:3]
        arrays: Slot = [_on_host(X, prefix + "X"), _on_host(Y, prefix + "Y")]
        arrays.append(None if w is None else _on_host(w, prefix + "sample_weight"))
        for name, array in zip(NAMES, arrays, strict=True):
            if array is not None:
                _require_form(
                    name,
                    array.shape,
                    array.dtype,
                    None if name == "X" else arrays[0].shape[0],
                    prefix,
                )
        self._weighted = w is not None if self._weighted is None else self._weighted
        if self._weighted != (w is not None):
            found, before = ("has no", "have one") if w is None else ("has a", "have none")
            raise TypeError(f"{prefix}{found} sample_weight; those before {before}")
        self.columns = arrays[0].shape[1] if self.columns is None else self.columns
        if arrays[0].shape[1] != self.columns:
            raise ValueError(
                f"{prefix}X has {arrays[0].shape[1]} columns; those before have {self.columns}"
            )
        return arrays


def _length(source: Any) -> int | None:
    """Return how many batches a source says it has; None where it cannot say, as a loader of an
    endless or unknown number.
    """
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def _takes_epoch(function: Callable[..., Any]) -> bool:
    """Whether a function that makes batches takes `epoch`; a TypeError if it needs anything else."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # of what is written in C
        return False
    takes = "epoch" in signature.parameters
    try:
        signature.bind(**({"epoch": 0} if takes else {}))
    except TypeError:
        raise TypeError(
            "X, a function that makes batches, takes nothing or `epoch`; its parameters are "
            f"{signature}"
        ) from None
    return takes


def _copy_into(slot: Slot, i: int, array: Array | None) -> Any:
    """A copy of the array, in the slot's memory where it fits."""
    if array is None:
        return None
    old, dtype = slot[i], array.dtype.newbyteorder("=")
    if (
        old is None
        or old.dtype != dtype
        or old.shape[1:] != array.shape[1:]
        or len(old) < len(array)
    ):
        slot[i] = old = np.empty(array.shape, dtype)
    old[: len(array)] = array
    return slot[i][: len(array)]


# -- the door
# ------------------------------------------------------------------------------------------------------------


def open_stream(
    X: Any, Y: Any = None, sample_weight: Any = None, dtype: DTypeLike = np.float64
) -> Stream | None:
    """The stream of what is read block by block; None for arrays in memory, of whatever library.

    Args:
        X: a memmap or a view of one; an array that is sliced by rows (Zarr, h5py …); `Parquet`;
            with Y None also an iterable of batches that begins anew for each epoch (a list, a
            DataLoader), or a function that returns an iterator of them and may take the number of
            the `epoch`, counted from 0.
        Y, sample_weight: beside the first two, of their kind or in memory.
        dtype: in which numbers must be finite.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """
    if _in_file(X):
        if Y is None:
            raise ValueError(f"Y is missing: X ({type(X).__name__}) holds no targets")
        return RowStream(_Slices(X, Y, sample_weight), dtype)
    known = Y is not None and (
        isinstance(X, Sequence) or hasattr(X, "__array__")
    )  # what NumPy makes an array of
    if known or _in_memory(X) or isinstance(X, str | bytes | Mapping):
        return None
    if not (isinstance(X, Parquet) or callable(X) or hasattr(X, "__iter__")):
        return None
    for name, value in (("Y", Y), ("sample_weight", sample_weight)):
        if value is not None:
            raise TypeError(f"{name} must be None: X ({type(X).__name__}) brings it along")
    if isinstance(X, Parquet):
        return RowStream(X, dtype)
    if hasattr(X, "__next__"):
        raise TypeError(
            f"X is a {type(X).__name__}, which would be empty in the second epoch: pass a function "
            "that returns a new one, "
            "e.g. the generator function itself"
        )
    return BatchStream(X, dtype)
