"""Parquet files larger than memory: some row groups held out, the pipeline fitted on a sample, batches made as they are read.

    row groups in a new order each epoch → pieces of eight of them → a window of rows, transformed and mixed → batches

Memory holds the sample, the held-out rows (so many at most) and a window, whatever the file's size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from mlpcore import tables
from mlpcore.backends import device as devices
from mlpcore.data import Split, Standardizer, digest
from mlpcore.tables import Table, Transformer

Array = NDArray[Any]
SAMPLE = 100_000  # rows that the pipeline is fitted on, at most
HELD_OUT = 200_000  # rows of the validation and of the test, at most
WINDOW = 65_536  # rows that are mixed with each other
WAYS = 8  # row groups that are read side by side
_PIECE = 4_096  # rows of one of them at a time
_CELL = 32  # bytes that a value of a table in memory takes, roughly


@dataclass(frozen=True)
class BigTable(Table):
    """A `Table` of which `X` and `Y` are a sample."""

    path: str = ""
    total: int = 0

    @property
    def rows(self) -> int:
        """Of the file."""
        return self.total

    def cut(self, seed: int, batch_size: int) -> Split:
        """A fifth of the row groups for the test, a tenth for the validation, the others as a function that gives batches."""
        metadata = parquet.read_metadata(self.path)
        order = np.random.default_rng(seed).permutation(metadata.num_row_groups)
        tests, validations = (max(1, round(share * len(order))) for share in (0.2, 0.1))
        parts = [np.sort(part).tolist() for part in np.split(order, [tests, tests + validations])]
        reader = _Reader(self, metadata)
        frame, Y = reader.frame(reader.sample(parts[2], SAMPLE))
        transformer = Transformer.fit(frame, np.arange(len(frame)), self.columns)
        scale = None if self.class_names else Standardizer.fit(Y)
        made = _Maker(reader, transformer, scale)
        test, validation = (made(reader.sample(part, HELD_OUT)) for part in parts[:2])
        for name, part in (("validation", validation), ("test", test)):
            if not len(part[1]):
                raise ValueError(f"{self.path}: no row of the {name}'s row groups has a {self.target}")
        rows = sum(metadata.row_group(group).num_rows for group in parts[2])
        said = f" of {len(parts[2])} + {len(parts[1])} + {len(parts[0])} row groups"
        return Split(
            (batches(made, parts[2], batch_size, seed),), validation, test, Y, (rows, len(validation[1]), len(test[1])), said,
            transformer, scale, digest(*validation, *test, np.array([rows, metadata.serialized_size])),
        )  # fmt: skip


def is_too_big(path: str | Path) -> bool:
    """Whether the table would take more than a quarter of the memory that is free; False where that is not known."""
    if Path(path).suffix.lower() in (".csv", ".tsv") or not Path(path).is_file():
        return False
    with contextlib.suppress(ValueError, OSError):  # reading it will say what is wrong
        metadata = parquet.read_metadata(path)
        return bool(metadata.num_rows * metadata.num_columns * _CELL > devices.free_bytes("cpu") / 4)
    return False


def load(path: str | Path, target: str, task: str | None = None, wishes: Mapping[str, str] | None = None) -> BigTable:
    """The table, what its columns are taken as being told from a sample of its row groups; arguments as in `tables.load`.

    Raises:
        FileNotFoundError, OSError, ValueError: as `tables.load`; or the file is not Parquet, or has fewer than 5 row groups.
    """
    tables.require_file(path)
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        raise ValueError(f"{path}: only Parquet can be streamed; write it as Parquet, in row groups of some 100,000 rows")
    try:
        metadata = parquet.read_metadata(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    groups = metadata.num_row_groups
    if groups < 5:
        raise ValueError(f"{path}: has {groups} row group(s); to hold some out it takes 5, better 100 (row_group_size=100_000)")
    whole = _Reader(BigTable(None, None, (), (), path=str(path), target=target), metadata, everything=True)
    table = tables.take(whole.sample(range(groups), SAMPLE), path, target, task, None, wishes)
    names = set(table.class_names)
    if names:
        for group in range(groups):
            for piece in whole.pieces(group, [target]):
                names |= {text for text in tables.as_texts(pa.chunked_array([piece.column(0).unique()])) if text is not None}
    numeric = tables.is_number(metadata.schema.to_arrow_schema().field(target).type)
    classes = tuple(sorted(names, key=float if numeric else None))
    given = {name: getattr(table, name) for name in table.__dataclass_fields__}
    return replace(BigTable(**given), class_names=classes, path=str(path), total=metadata.num_rows)


class _Reader:
    """Reads the columns in use, by row groups; a new file handle for each, so that several can be read side by side."""

    def __init__(self, table: BigTable, metadata: Any, everything: bool = False):
        self.table, self.metadata = table, metadata
        used = [column.name for column in table.columns if column.kind]
        self.columns = metadata.schema.to_arrow_schema().names if everything else [*used, table.target]

    def pieces(self, group: int, columns: Sequence[str] | None = None, rows: int = _PIECE) -> Iterator[Any]:
        with parquet.ParquetFile(self.table.path, metadata=self.metadata, pre_buffer=False, buffer_size=1 << 16) as file:
            yield from file.iter_batches(rows, [group], columns or self.columns)

    def sample(self, groups: Sequence[int], most: int) -> Any:
        """The first rows of each of the groups, at most so many together."""
        each = max(1, most // len(groups))
        firsts = (next(self.pieces(group, rows=each), None) for group in groups[:most])
        return pa.Table.from_batches([first for first in firsts if first is not None])

    def frame(self, table: Any) -> tuple[Any, Array]:
        """Frame and Y of the rows that have a target."""
        Y, known = tables.targets(table.column(self.table.target), self.table.class_names)
        used = [column for column in self.table.columns if column.kind]
        return tables.as_frame(table.filter(pa.array(known)), used), Y


@dataclass(frozen=True)
class _Maker:
    """Makes X and Y, as the network is trained on them, of a table's rows."""

    reader: _Reader
    transformer: Transformer
    scale: Standardizer | None

    def __call__(self, table: Any) -> tuple[Array, Array]:
        frame, Y = self.reader.frame(table)
        return self.transformer.apply(frame), self.scale.apply(Y) if self.scale else Y


def batches(made: _Maker, groups: Sequence[int], size: int, seed: int) -> Callable[[int], Iterator[tuple[Array, Array]]]:
    """A function that gives the batches (X, Y) of an epoch: each row once, in an order of seed and epoch, the last smaller."""

    def rows(epoch: int) -> Iterator[tuple[Array, Array]]:
        rng = np.random.default_rng([seed, epoch])
        rest: tuple[Array, Array] | None = None
        for window in _windows(made.reader, rng.permutation(groups).tolist()):
            X, Y = made(window)
            if rest is not None:
                X, Y = np.concatenate([rest[0], X]), np.concatenate([rest[1], Y])
            order = rng.permutation(len(Y))
            whole = len(Y) // size * size
            for start in range(0, whole, size):
                picked = order[start : start + size]
                yield X[picked], Y[picked]
            rest = X[order[whole:]], Y[order[whole:]]
        if rest is not None and len(rest[1]):
            yield rest

    return rows


def _windows(reader: _Reader, groups: Sequence[int]) -> Iterator[Any]:
    """Tables of `WINDOW` rows or more, from several row groups at a time."""
    waiting, reading = iter(groups), list[Iterator[Any]]()
    window: list[Any] = []
    while True:
        while len(reading) < WAYS and (group := next(waiting, None)) is not None:
            reading.append(reader.pieces(group))
        if not reading:
            break
        for source in list(reading):
            piece = next(source, None)
            if piece is None:
                reading.remove(source)
            else:
                window.append(piece)
        if sum(len(piece) for piece in window) >= WINDOW:
            yield pa.Table.from_batches(window)
            window = []
    if window:
        yield pa.Table.from_batches(window)
