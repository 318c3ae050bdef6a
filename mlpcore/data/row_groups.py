"""Parquet files, read by row groups: footers, checked record batches, and readers of rows."""

from __future__ import annotations

import base64
import bisect
import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlpcore.checks.errors import line
from mlpcore.data.streams import UNREADABLE, Block
from mlpcore.data.windows import Source

BUFFER = 64 << 10  # bytes of a column that pyarrow reads at a time
FOOTERS = 64  # number of footers in the cache


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn errors of pyarrow into a ValueError that begins with `where` and names the damage.

    The system's OSErrors and MemoryErrors keep their types.
    """
    from pyarrow import ArrowException

    try:
        yield
    except MemoryError as error:
        raise MemoryError(
            f"{where} needs more memory than is available, or is damaged: {line(error)}"
        ) from None
    except (ArrowException, AttributeError, ArithmeticError, *UNREADABLE) as error:
        if isinstance(error, OSError) and (error.errno or type(error) is not OSError):
            raise type(error)(f"{where} cannot be read: {line(error)}") from None
        raise ValueError(f"{where} is not a Parquet file, or is damaged: {line(error)}") from None


def opened(path: Path, where: str, **options: Any) -> Any:
    """Return a `ParquetFile` that verifies page checksums; `where` as in `readable`."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("mc.Parquet needs pyarrow: pip install pyarrow") from error
    if not path.exists():
        raise FileNotFoundError(f"path: there is no file or folder {str(path)!r}")
    with readable(where):
        return parquet.ParquetFile(arrow_source(path), page_checksum_verification=True, **options)


def arrow_source(path: Path) -> Any:
    """Return the path, or an open file if its name is not UTF-8, which Arrow cannot open."""
    import pyarrow as pa

    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return pa.OSFile(os.fsencode(path))
    return path


def read_batches(
    file: Any, where: str, rows: int, group: int, columns: Sequence[str]
) -> Iterator[Any]:
    """Yield the validated record batches of a row group, each of at most `rows` rows."""
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
    """Raise a ValueError unless the number of rows read is the one in the footer."""
    if promised != read:
        raise ValueError(
            f"it holds {abs(promised - read):,} rows {'fewer' if read < promised else 'more'} than "
            "its footer promises"
        )


@dataclass(frozen=True)
class Footer:
    """The description of a Parquet file.

    Attributes:
        metadata: pyarrow's metadata.
        schema: the Arrow schema.
        categories: names of the columns that were written as categories.
        rows: number of rows of each row group.
    """

    metadata: Any
    schema: Any
    categories: set[str]
    rows: list[int]

    @classmethod
    def read(cls, path: Path, where: str) -> Footer:
        """Return the footer of a file, from a cache while the file is unchanged."""
        status = path.stat() if path.exists() else None
        stamp = status and (status.st_ino, status.st_size, status.st_mtime_ns)
        return _parse_footer(path, where, stamp)

    @classmethod
    def of(cls, file: Any, where: str) -> Footer:
        """Return the footer of an open file."""
        with readable(where):
            metadata = file.metadata
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
                raise ValueError(
                    f"its row groups have {sum(rows):,} rows, its footer says {metadata.num_rows:,}"
                )
            schema = file.schema_arrow
            return cls(metadata, schema.remove_metadata(), category_columns(metadata), rows)


@functools.lru_cache(maxsize=FOOTERS)
def _parse_footer(path: Path, where: str, stamp: tuple[int, ...] | None) -> Footer:
    """Return the footer of a file; `stamp` (inode, size, mtime) is a cache key."""
    with opened(path, where) as file:
        return Footer.of(file, where)


def read_group(
    path: Path, where: str, rows: int, group: int, columns: Sequence[str]
) -> Iterator[Any]:
    """Yield the record batches of a row group as `read_batches` does, from its own handle."""
    metadata = Footer.read(path, where).metadata
    options = {"metadata": metadata, "buffer_size": BUFFER, "pre_buffer": False}
    with opened(path, where, **options) as file:
        yield from read_batches(file, where, rows, group, columns)


def follow_rows(
    source: Source,
    read: Callable[[int], Iterator[Any]],
    copy: Callable[[Any, int, Block], None],
    where: Callable[[int], str],
) -> Callable[[int, int, Block], None]:
    """Return the `reader` of a source whose stretches can only be read from their beginnings.

    A read that begins where one of the last `ways` reads stopped is cheap.

    Args:
        source: the table.
        read: yields the rows of a stretch, given its number, as parts that Arrow can slice.
        copy: writes a part, given the number of its first row, into a block.
        where: names the file of a stretch, for errors.
    """
    starts = source.starts
    going: dict[int, tuple[Any, Iterator[Any]]] = {}  # by next row: rest of a part, other parts

    def parts(row: int) -> Iterator[Any]:
        for k in range(bisect.bisect_right(starts, row) - 1, len(starts)):
            at, end = starts[k], ([*starts[k + 1 : k + 2], source.rows])[0]
            for part in read(k):
                skipped = min(max(row - at, 0), len(part))
                at += len(part)
                if skipped < len(part):
                    yield part.slice(skipped)
            if at != end:
                raise ValueError(
                    f"{where(k)} has changed since it was opened, or is damaged: its number "
                    "of rows is different"
                )

    def follow(start: int, stop: int, block: Block) -> None:
        rest, others = going.pop(start, None) or (None, parts(start))
        at = start
        while at < stop:
            rest = rest or next(others)
            count = min(len(rest), stop - at)
            copy(rest.slice(0, count), at, block.rows(at - start, at - start + count))
            rest, at = rest.slice(count), at + count
        going[stop] = rest, others
        if len(going) > source.ways:
            del going[next(iter(going))]

    return follow


def category_columns(metadata: Any) -> set[str]:
    """Return the names of the columns that a Parquet file's footer lists as categories.

    pandas and Arrow note them there; without that, categories that are numbers look like numbers.
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
