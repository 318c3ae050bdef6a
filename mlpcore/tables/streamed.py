"""Parquet files larger than memory: rows held out by a hash, the pipeline fitted on a sample.

    row number, seed → u in [0, 1):     u < 0.2 test,   u < 0.3 validation,   else training row

If rows come in groups, u is computed from the group's name. The parts are samples of the whole
file, however it is sorted and cut. `mlpcore.data.windows` reads the training rows and mixes those
of eight places in the file. Memory holds the sample, a limited number of held-out rows and two
windows, whatever the file's size.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlpcore.backends import devices
from mlpcore.checks.errors import cut, shown
from mlpcore.data.row_groups import Footer, follow_rows, read_group
from mlpcore.data.streams import Block
from mlpcore.data.windows import Source
from mlpcore.tables import arrow, files, targets
from mlpcore.tables.datasets import Truth
from mlpcore.tables.splits import Split
from mlpcore.tables.standardizer import Standardizer
from mlpcore.tables.table import Table, Transformer, make_table, require_columns

Array = NDArray[Any]
SAMPLE = 100_000  # rows that the pipeline is fitted on, approximately
HELD_OUT = 200_000  # most rows in each of validation and test, approximately
PIECE = 65_536  # rows read at a time in a pass over the whole file
WAYS = 8  # places in the file whose rows are mixed
SHARES = (0.2, 0.1)  # shares of test and validation
_FEW = 1_000  # with at least so many target values, a sample is enough to decide the task
_READ = 4_096  # rows read from the file at a time in training
_MADE = 1_024  # fewest rows that are prepared at a time
_CELL = 32  # rough number of bytes per table value in memory
# separate hashes assign parts, thin them out and pick the first sample
_THIN, _LOOK = 0x5EED, 0x100C


@dataclass(frozen=True)
class StreamedTable(Table):
    """A `Table` whose `X` and `Y` are a sample.

    Attributes:
        path: path of the file.
        total: number of rows in the file.
        by: name of the groups' column, or "".
        units: (k,) uint64, the hashes of the groups' names, ascending; empty without groups.
    """

    path: str = ""
    total: int = 0
    by: str = ""
    units: Any = None

    @property
    def rows(self) -> int:
        """Number of rows in the file that have a target."""
        return self.total - self.dropped

    def split(self, seed: int) -> Split:
        """Return the split of the table: a fifth for test, a tenth for validation.

        The remaining rows are streamed for training.
        """
        footer = Footer.read(Path(self.path), _where(self.path))
        parts, reader = _Parts.of(self, seed), _Reader(self, footer)
        held: tuple[list[Any], ...] = ([], [], [])  # test, validation, training sample
        shares = (*SHARES, 1 - sum(SHARES))
        totals = np.zeros(len(shares), np.int64)
        training = np.zeros(len(footer.rows), np.int64)  # rows of each row group
        content = hashlib.sha256()
        for group, first, piece in reader.everything():
            _add(content, piece)
            part_of = parts.codes(first, piece)
            part_of[~reader.truth(piece).rows] = len(shares)
            totals += np.bincount(part_of, minlength=len(shares) + 1)[:-1]
            training[group] += np.sum(part_of == 2)
            thin = _uniform(seed ^ _THIN, np.arange(first, first + len(piece))) * self.rows
            for part, most in enumerate((HELD_OUT, HELD_OUT, SAMPLE)):
                chosen = (part_of == part) & (thin * shares[part] < most)
                if chosen.any():
                    held[part].append(piece.filter(pa.array(chosen)))
        for name, pieces in zip(("test", "validation", "training"), held, strict=True):
            if not pieces:
                raise ValueError(
                    f"{self.path}: no {name} row has a {cut(self.target)}; {self.rows:,} "
                    "rows are too few"
                )
        test_rows, validation_rows, sample = map(pa.concat_tables, held)
        frame, Y = reader.frame(sample)
        transformer = Transformer.fit(frame, np.arange(len(frame)), self.columns)
        scale = None if self.class_names else Standardizer.fit(Y, names=[self.target])
        made = _Maker(reader, transformer, scale, parts)
        validation, test = made.whole(validation_rows), made.whole(test_rows)
        counts = (int(totals[2]), len(validation[1]), len(test[1]))
        description = parts.description
        if counts[1:] != (totals[1], totals[0]):
            description += (
                f", with validation and test rows sampled from {totals[1]:,} and "
                f"{totals[0]:,} held out"
            )
        told = np.array(footer.rows), np.frombuffer(content.digest(), np.uint8)
        return Split(
            training=(_TrainingRows(made, training, Block(*validation).rows(0, 0)),),
            validation=validation,
            test=test,
            answers=reader.frame(test_rows)[1],
            sample=Y,
            counts=counts,
            description=description,
            preparation=transformer,
            scale=scale,
            digest=self.digest(transformer, scale, *validation, *test, *told),
        )


def _add(content: Any, piece: Any) -> None:
    """Add a piece of a table to a digest: types, positions of missing values, and values."""
    content.update(str(piece.schema.types).encode())
    for values in map(arrow.decoded, piece.columns):
        known = values.drop_null().combine_chunks()
        if pa.types.is_boolean(known.type):
            known = known.cast(pa.uint8())  # the unused bits of the last byte are undefined
        content.update(np.packbits(values.is_valid().to_numpy()).data)
        content.update(pa.record_batch([known], ["values"]).serialize())


def _where(path: str | Path) -> str:
    return f"{path}: cannot be read: it"


def is_too_big(path: str | Path) -> bool:
    """Return True if the table is known to need more than a quarter of the free memory."""
    if Path(path).suffix.lower() in (".csv", ".tsv") or not Path(path).is_file():
        return False
    with contextlib.suppress(ValueError, OSError, MemoryError):  # reading it reports the error
        metadata = Footer.read(Path(path), _where(path)).metadata
        return bool(
            metadata.num_rows * metadata.num_columns * _CELL > devices.find("cpu").free_bytes() / 4
        )
    return False


def stream_table(
    path: str | Path,
    target: str,
    task: str | None = None,
    groups: str | None = None,
    wishes: Mapping[str, str] | None = None,
) -> StreamedTable:
    """Return the table, with the use of its columns decided from a sample of the rows.

    The arguments are those of `load_table`.

    Raises:
        FileNotFoundError, OSError, ValueError: as `load_table`; or the file is not Parquet, or has
            fewer than 5 row groups.
    """
    files.require_file(path)
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        raise ValueError(
            f"{path}: only Parquet can be streamed; write it as Parquet, in row groups of some "
            "100,000 rows"
        )
    footer = Footer.read(Path(path), _where(path))
    count, total = len(footer.rows), sum(footer.rows)
    if count < 5:
        raise ValueError(
            f"{path}: has {count} row group(s); to mix rows it needs at least 5, better 100 "
            "(row_group_size=100_000)"
        )
    names = footer.schema.names
    files.require_different(path, names)
    require_columns(path, names, target, groups, wishes or {})
    targets.require_answers(footer.schema.field(target).type, target)
    whole = _Reader(
        StreamedTable(None, None, (), (), path=str(path), target=target, by=groups or ""),
        footer,
        all_columns=True,
    )
    chosen, numbers, seen = [], [], set[Any]()
    for _, first, piece in whole.everything():
        rows = _uniform(_LOOK, np.arange(first, first + len(piece))) * total < SAMPLE
        # the first row of each target value, so that the sample has every class
        if len(seen) < _FEW:
            rows[_firsts(piece.column(target), seen)] = True
        if rows.any():
            chosen.append(piece.filter(pa.array(rows)))
            numbers.append(first + np.flatnonzero(rows))
    sample = files.with_categories(pa.concat_tables(chosen), footer.categories)
    table = make_table(sample, path, target, task, groups, wishes, np.concatenate(numbers))
    given = {name: getattr(table, name) for name in table.__dataclass_fields__}
    return replace(
        StreamedTable(**given), path=str(path), total=total, by=groups or "", **whole.survey(table)
    )


def _firsts(values: Any, seen: set[Any]) -> list[int]:
    """Return the first position of each value not yet in `seen`, and add the values to it."""
    coded = arrow.plain(values).combine_chunks().dictionary_encode()
    codes, firsts = np.unique(coded.indices.fill_null(-1).to_numpy(), return_index=True)
    found = dict(zip(codes.tolist(), firsts.tolist(), strict=True))
    texts = [str(value) for value in coded.dictionary.to_pylist()]
    new = [found[code] for code, text in enumerate(texts) if code in found and text not in seen]
    seen.update(texts)
    return new if len(seen) < _FEW else []


def _uniform(seed: int, numbers: Array) -> Array:
    """Return a number in [0, 1) for each of `numbers`: SplitMix64 (Steele, Lea, Flood, 2014)."""
    z = np.asarray(numbers).astype(np.uint64)
    for start in (np.uint64(seed % 2**64), np.uint64(0)):
        z = (z ^ start) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.asarray((z >> np.uint64(11)) * 2.0**-53)


def _hashes(column: Any, name: str) -> Array:
    """Return a hash (m,) uint64 of each row's group."""
    names = targets.group_names(column, name)
    known = {
        group: int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little")
        for group in set(names)
    }
    return np.array([known[group] for group in names], np.uint64)


@dataclass(frozen=True)
class _Parts:
    """The assignment of rows to parts: 0 for test, 1 for validation, 2 for training."""

    seed: int
    by: str
    ends: tuple[float, float]
    description: str = ""

    @classmethod
    def of(cls, table: StreamedTable, seed: int) -> _Parts:
        """Return the parts of a table: shares of its rows, or of its groups, which stay whole."""
        if not table.by:
            return cls(seed, "", (SHARES[0], sum(SHARES)))
        places = np.append(np.sort(_uniform(seed, table.units)), 1.0)
        count = len(table.units)
        tests, validations = (max(1, round(share * count)) for share in SHARES)
        if tests + validations >= count:
            raise ValueError(
                f"--groups {shown(table.by)} has {count} value(s); holding some out needs 3"
            )
        description = f" of {count - tests - validations} + {validations} + {tests} {table.unit}"
        ends = float(places[tests]), float(places[tests + validations])
        return cls(seed, table.by, ends, description)

    def codes(self, first: int, piece: Any) -> Array:
        """Return the part (m,) of each row of a piece, given the number of its first row."""
        units = (
            _hashes(piece.column(self.by), self.by)
            if self.by
            else np.arange(first, first + len(piece))
        )
        return np.searchsorted(self.ends, _uniform(self.seed, units), side="right")


class _Reader:
    """Reader of the used columns of a table's file, by row groups."""

    def __init__(self, table: StreamedTable, footer: Footer, all_columns: bool = False):
        self.table = table
        used = [column.name for column in table.columns if column.kind]
        by = [table.by] if table.by else []
        self.columns = footer.schema.names if all_columns else [*used, table.target, *by]
        self.starts = np.cumsum([0, *footer.rows])[:-1].tolist()

    def pieces(
        self, group: int, columns: Sequence[str] | None = None, rows: int = _READ
    ) -> Iterator[tuple[int, Any]]:
        """Yield each piece of a row group with the number of its first row."""
        first, path = self.starts[group], self.table.path
        for batch in read_group(Path(path), _where(path), rows, group, columns or self.columns):
            yield first, files.without_views(pa.Table.from_batches([batch]))
            first += len(batch)

    def everything(self, columns: Sequence[str] | None = None) -> Iterator[tuple[int, int, Any]]:
        """Yield row group, number of the first row, and rows for each piece of the file."""
        for group in range(len(self.starts)):
            for first, piece in self.pieces(group, columns, PIECE):
                yield group, first, piece

    def survey(self, table: Table) -> dict[str, Any]:
        """Return what a sample cannot show: all classes and groups, and the number of lost rows."""
        target, by = self.table.target, self.table.by
        values, units = list[Any](), [np.empty(0, np.uint64)]
        dropped = infinite = 0
        for _, first, piece in self.everything([target, *([by] if by else [])]):
            column = piece.column(target)
            if table.class_names:
                values = targets.distinct(
                    pa.chunked_array([*values, *targets.distinct(column).chunks])
                ).chunks
            else:
                targets.require_numbers(column, target, first)
            missing, unbounded = targets.without_target(column)
            dropped, infinite = dropped + missing + unbounded, infinite + unbounded
            if by:
                units.append(np.unique(_hashes(piece.column(by), by)))
                if sum(map(len, units[1:])) > len(units[0]) + PIECE:  # rare, so it is cheap
                    units = [np.unique(np.concatenate(units))]
        found: dict[str, Any] = {
            "dropped": dropped,
            "infinite": infinite,
            "units": np.unique(np.concatenate(units)),
        }
        if table.class_names:
            found["class_names"], found["labels"] = targets.class_names(pa.chunked_array(values))
        return found

    def truth(self, piece: Any) -> Truth:
        """Return the target of a piece."""
        column = piece.column(self.table.target)
        return targets.find_truth(column, self.table.class_names, self.table.labels)

    def frame(self, piece: Any) -> tuple[Any, Array]:
        """Return the frame and Y of the rows that have a target."""
        truth = self.truth(piece)
        used = [column for column in self.table.columns if column.kind]
        return arrow.as_frame(piece.filter(pa.array(truth.rows)), used), truth.values


@dataclass(frozen=True)
class _Maker:
    """Conversion of a table's rows to X and Y as the network is trained on them."""

    reader: _Reader
    transformer: Transformer
    scale: Standardizer | None
    parts: _Parts

    def whole(self, piece: Any) -> tuple[Array, Array]:
        """Return X and Y of all rows that have a target."""
        frame, Y = self.reader.frame(piece)
        return self.transformer.apply(frame), self.scale.apply(Y) if self.scale else Y

    def training(self, group: int) -> Iterator[Any]:
        """Yield the training rows of a row group."""
        for first, piece in self.reader.pieces(group):
            chosen = (self.parts.codes(first, piece) == 2) & self.reader.truth(piece).rows
            yield piece.filter(pa.array(chosen))


class _TrainingRows(Source):
    """Training rows of a table, in the form that the network takes.

    Args:
        made: converts a table's rows.
        counts: number of training rows in each row group.
        like: an empty block.
    """

    chunk = _MADE
    ways = WAYS

    def __init__(self, made: _Maker, counts: Array, like: Block):
        self._made, self.like = made, like
        self._groups = np.flatnonzero(counts).tolist()
        ends = np.cumsum(counts[self._groups]).tolist()
        self.rows = ends[-1]
        self.starts = [0, *ends[:-1]]

    def __repr__(self) -> str:
        return f"{self.rows:,} training rows of {self._made.reader.table.path}"

    def reader(self) -> Callable[[int, int, Block], None]:
        """Return a function that reads rows start … stop; continuing from `stop` is cheap."""
        where = _where(self._made.reader.table.path)
        return follow_rows(self, self._read_group, self._copy, lambda k: where)

    def _read_group(self, k: int) -> Iterator[Any]:
        return self._made.training(self._groups[k])

    def _copy(self, piece: Any, row: int, block: Block) -> None:
        block.X[...], block.Y[...] = self._made.whole(piece)
