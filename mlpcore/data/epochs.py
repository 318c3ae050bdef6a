"""The batches of a run, from arrays in memory or from a stream that is read as needed."""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import arrays
from mlpcore.core.losses import Loss
from mlpcore.data.batches import Batch, Data, Inputs
from mlpcore.data.streams import NAMES, Stream
from mlpcore.data.windows import RowStream

Array = NDArray[Any]
Seeds = list[int]
PLACES, PLACE = 16, 64 << 10  # blocks of rows by which a run recognizes its data; their bytes
AHEAD = 8192  # rows from which drawing their order takes longer than starting a thread
Batches = Generator[tuple[Data, Batch], None, None]


class Rows:
    """The batches of arrays in memory: a shuffled row order, cut into pieces.

    Args:
        data: the arrays.
        size: rows of a batch.
        place: array for the order, on the data's device; None allocates one on the host.
        device: device of the network.
    """

    lasting = True

    def __init__(self, data: Data, size: int, place: Array | None, device: str):
        self.data, self.size, self.place, self.device = data, size, place, device
        self.rows: int | None = len(data.X)
        self._order = np.empty(self.rows, np.int64) if place is None or device != "cpu" else place
        self._drawn: Seeds | None = None  # seeds of the order drawn ahead
        self._ahead: threading.Thread | None = None  # the thread that draws it

    def _draw(self, seeds: Seeds | None) -> None:
        rows = self._order
        rows[...] = 1
        # 0, 1, 2, … without a second array of that size
        np.subtract(np.cumsum(rows, out=rows), 1, out=rows)
        if seeds is not None:
            np.random.default_rng(seeds).shuffle(rows)
        self._drawn = seeds

    def epoch(
        self,
        number: int,
        seeds: Seeds | None,
        skip: int,
        together: Callable[[Data, int], int] = lambda *_: 1,
        following: Seeds | None = None,
    ) -> Batches:
        """Yield an epoch's batches from number `skip` on, shuffled from `seeds` or (None) in order.

        `together` returns how many of the full batches that are left are yielded as one. If the
        order is copied to a device, a thread meanwhile draws the next epoch's order from the seeds
        `following`.
        """
        rows = self._order
        if self._ahead is not None:
            self._ahead.join()
        if seeds is None or seeds != self._drawn:
            self._draw(seeds)
        self._drawn = self._ahead = None  # an interrupted thread may never finish
        if self.place is not None and self.place is not rows:
            self.place[...] = devices.find(self.device).to_device(rows)
            if following is not None and len(rows) >= AHEAD:
                self._ahead = threading.Thread(target=self._draw, args=(following,))
                self._ahead.start()
            rows = self.place
        start = skip * self.size
        while start < len(rows):
            whole = (len(rows) - start) // self.size
            steps = together(self.data, whole) if whole > 1 else 1
            yield self.data, self.data.batch(rows[start : start + steps * self.size], steps)
            start += steps * self.size


class Streamed:
    """The batches of a stream.

    Args:
        stream: the rows.
        size: rows of a batch.
        arrays: host arrays, by the names in the stream's `buffers`.
        load: turns a piece's X, Y and row weights into `Data`.
    """

    lasting = False  # the next window overwrites this one

    def __init__(
        self,
        stream: Stream,
        size: int,
        arrays: Mapping[str, Array],
        load: Callable[[Array, Array, Array | None], Data],
    ) -> None:
        self.stream, self.size, self.arrays, self.load = stream, size, arrays, load
        self.rows = stream.rows

    def epoch(
        self,
        number: int,
        seeds: Seeds | None,
        skip: int,
        together: Callable[[Data, int], int] | None = None,
        following: Seeds | None = None,
    ) -> Batches:
        """Yield an epoch's batches from number `skip` on, shuffled from `seeds` or (None) in order.

        Raises:
            ValueError: at the end, if all row weights of the epoch are 0.
        """
        with contextlib.closing(self.windows(number, seeds, skip)) as windows:
            for data, batches in windows:
                for rows in batches:
                    yield data, data.batch(rows)

    def windows(
        self, number: int, seeds: Seeds | None, skip: int
    ) -> Generator[tuple[Data, Sequence[Array | None]], None, None]:
        """Yield an epoch's windows and the row numbers of their batches; see `epoch`."""
        self.stream.epochs = number
        order = None if seeds is None else np.random.default_rng(seeds)
        weighs, by_class = skip > 0, False  # skipped rows may have weight
        with contextlib.closing(self.stream.epoch(self.size, order, skip, self.arrays)) as pieces:
            for piece in pieces:
                data = self.load(piece.X, piece.Y, piece.weights)
                weighs = weighs or data.weights is None or bool(data.weights.any())
                by_class = data.by_class is not None
                yield data, piece.batches
        if not weighs:
            raise ValueError(
                f"sample_weight{', times class_weight,' if by_class else ''} must not be all zero"
            )


def inputs_of(stream: Stream, loss: Loss, dtype: str) -> Inputs | None:
    """Return a stream's inputs for the plan on a CPU; None if they are unknown before reading.

    Row weights have this dtype if they depend on the class.
    """
    if stream.like is None:
        return None
    X, Y, weights = stream.like
    classes = loss.takes_classes and Y.ndim == 1
    given = "" if weights is None else weights.dtype.str
    return Inputs(X.dtype.str, Y.dtype.str, given if loss.class_weight is None else dtype, classes)


@dataclass(frozen=True)
class Sample:
    """Digests of sampled rows, by which a resumed run recognizes its data.

    Values are digested in the network's dtype, whatever their container and dtype.

    Attributes:
        rows: number of rows in the data.
        places: [start, stop] of the sampled blocks: all rows up to 1 MiB, beyond that up to 16
            blocks of 64 KiB.
        X, Y, sample_weight: the digests; None without weights.
    """

    rows: int
    places: list[list[int]]
    X: str
    Y: str
    sample_weight: str | None

    @classmethod
    def of(
        cls,
        held: Data | Stream | None,
        loss: Loss,
        dtype: DTypeLike,
        device: str,
        like: Sample | None,
    ) -> Sample | None:
        """Return the sample of these rows, at the places of `like`; None for a `BatchStream`."""
        if not isinstance(held, Data | RowStream):
            return None
        rows = len(held.X) if isinstance(held, Data) else held.rows
        assert rows is not None
        places = like.places if like is not None and like.rows == rows else _places(held, rows)
        found = [hashlib.blake2b(digest_size=16) for _ in NAMES]
        weighted = False
        for parts in _read(held, places, device):
            weighted = parts[2] is not None
            classes = loss.takes_classes and parts[1].ndim == 1
            kinds = (dtype, np.int64 if classes else dtype, dtype)
            for digest, part, kind in zip(found, parts, kinds, strict=True):
                if part is not None:
                    with np.errstate(over="ignore", under="ignore"):  # fit names the row
                        digest.update(part.astype(np.dtype(kind).newbyteorder("<")).tobytes())
        X, Y, weight = (digest.hexdigest() for digest in found)
        return cls(rows, places, X, Y, weight if weighted else None)

    def require_same(self, other: Sample, prefix: str = "") -> None:
        """Raise a ValueError that names the first argument of `fit` whose rows differ."""
        for name in ("rows", *NAMES):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                argument = "X" if name == "rows" else name
                had = f"{mine} rows, not {theirs}" if name == "rows" else "other values"
                had = "none" if mine is None else "some" if theirs is None else had
                raise ValueError(
                    f"{prefix}{argument}: the unfinished run had {had}; pass what it had, or call "
                    "trainer.abandon() to start over"
                )

    def require_possible(self) -> None:
        """Raise a ValueError if no rows have these places."""
        if not all(
            len(place) == 2 and 0 <= place[0] < place[1] <= self.rows for place in self.places
        ):
            raise ValueError(f"run: {self.places!r:.100} are not ranges of {self.rows} rows")


def _places(held: Data | RowStream, rows: int) -> list[list[int]]:
    """Return up to `PLACES` blocks [start, stop], spread evenly; they cover small data wholly."""
    parts = (held.X, held.Y) if isinstance(held, Data) else held.like or ()
    row = sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in parts if x is not None)
    length = max(1, PLACE // row)
    if rows <= PLACES * length:
        return [[start, min(start + length, rows)] for start in range(0, rows, length)]
    starts = range(rows) if isinstance(held, Data) else held.starts
    last = min(PLACES, len(starts)) - 1
    chosen = [starts[i * (len(starts) - 1) // max(1, last)] for i in range(last + 1)]
    return [[start, start + length] for start in (min(start, rows - length) for start in chosen)]


def _read(held: Data | RowStream, places: list[list[int]], device: str) -> Iterator[Sequence[Any]]:
    """Yield X, Y and the user's row weights (or None) for each place, on the host."""
    if isinstance(held, RowStream):
        yield from held.read(places)
        return
    for start, stop in places:
        parts = [None if x is None else x[start:stop] for x in (held.X, held.Y, held.given)]
        yield [
            x if x is None or arrays.on_host(x) else devices.find(device).to_host(x) for x in parts
        ]
