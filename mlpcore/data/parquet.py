"""Parquet files, read by row groups."""

from __future__ import annotations

import base64
import bisect
import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlpcore.checks.errors import cut, line, listed, nearest, shown
from mlpcore.data.streams import BLOCK, UNREADABLE, Slot

BUFFER = 64 << 10  # bytes that pyarrow reads of a column at a time


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


def _where(path: Path) -> str:
    return f"path: {str(path)!r}"


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
    except (ArrowException, AttributeError, ArithmeticError, *UNREADABLE) as error:
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
