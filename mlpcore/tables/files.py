"""Files with named columns, CSV or Parquet, read as Arrow tables."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mlpcore.checks.errors import line, listed, shown
from mlpcore.data.row_groups import Footer, arrow_source, opened, readable, require_rows
from mlpcore.tables.arrow import csv, pa, pc, plain

SEPARATE = "separate columns by commas (.csv) or tabs (.tsv)"


def read_table(path: str | Path, texts: Sequence[str] = ()) -> pa.Table:
    """Return the table of a file; columns named in `texts` are read as text ("007" is kept).

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is not such a file, has no rows, two columns with the same name, or lines of
            unequal length.
    """
    source = require_file(path)
    if is_csv(source):
        table = _csv_table(path, source, texts)
    else:
        where = f"{path}: cannot be read: it"
        with opened(source, where) as file:
            categories = Footer.of(file, where).categories
            with readable(where):
                table = file.read()
                table.validate(full=True)
                require_rows(file.metadata.num_rows, table.num_rows)
        table = with_categories(without_views(table), categories)
    names = table.column_names
    require_different(path, names)
    if not table.num_rows:
        raise ValueError(f"{path}: has a header ({listed(names, 5)}) but no rows")
    return table


def _csv_table(path: str | Path, source: Path, texts: Sequence[str]) -> pa.Table:
    """Return the table of a CSV file, with whole numbers beyond int64 kept exact."""
    with open(source, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path}: is UTF-16 text; save it as UTF-8")
    try:
        table = read_csv(source, texts)
        names = table.column_names
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from None
    except (ValueError, NotImplementedError, OSError) as error:  # Arrow raises these
        hint = f"; {SEPARATE}" if _separated_otherwise(source) else ""
        raise ValueError(f"{path}: cannot be read: {line(error)}{hint}") from None
    require_different(path, names)
    for field in table.schema:
        if pa.types.is_binary(field.type):
            raise ValueError(
                f"{path}: column {shown(field.name)} is not UTF-8 text; save the file as UTF-8"
            )
    return _with_digits(table, source)


def require_different(path: str | Path, names: Sequence[str]) -> None:
    """Raise a ValueError if two columns have the same name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{path}: {count} columns are named {shown(name)}; rename all but one")


def require_file(path: str | Path) -> Path:
    """Return the path of a file; raise a FileNotFoundError if it does not exist or is a folder."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(
            f"{path}: " + ("is a folder; name a file" if source.is_dir() else "no such file")
        )
    return source


def is_csv(source: Path) -> bool:
    """Return True if a file's name is that of a CSV or TSV file."""
    return source.suffix.lower() in (".csv", ".tsv")


def read_csv(source: Path, texts: Sequence[str], only: Sequence[str] = ()) -> pa.Table:
    """Return the table of a CSV file, or some of its columns, with those in `texts` as text."""
    size = source.stat().st_size
    if not size:
        raise ValueError("the file is empty")
    if size >= (1 << 31) - 1:
        raise ValueError(f"{size:,} bytes of text; use Parquet from 2 GiB on")
    return csv.read_csv(
        arrow_source(source),
        # types from all rows, not from the first ones
        read_options=csv.ReadOptions(use_threads=False, block_size=size + 1),
        parse_options=csv.ParseOptions(delimiter=_delimiter(source), newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            strings_can_be_null=True,
            column_types=dict.fromkeys(texts, pa.string()),
            include_columns=only,
        ),
    )


def _with_digits(table: pa.Table, source: Path) -> pa.Table:
    """Return the table of a CSV file with whole numbers beyond int64 exact; Arrow rounds them."""
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    large = [
        name
        for name in floats
        if pc.any(pc.greater_equal(pc.abs(table.column(name)), 2.0**63)).as_py()
    ]
    if not large:
        return table
    texts = read_csv(source, large, only=large)
    found = {}
    for name in large:
        values = plain(texts.column(name))
        if pc.all(pc.match_substring_regex(values, "^[+-]?[0-9]{1,76}$")).as_py():
            integers = values.cast(pa.decimal256(76, 0))
            low, high = pc.min_max(integers).as_py().values()
            found[name] = integers.cast(pa.uint64()) if low >= 0 and high < 2**64 else integers
    return map_columns(table, lambda field, values: found.get(field.name, values))


def map_columns(
    table: pa.Table, change: Callable[[pa.Field, pa.ChunkedArray], pa.ChunkedArray]
) -> pa.Table:
    """Return the table with `change` applied to each column."""
    columns = [
        change(field, values) for field, values in zip(table.schema, table.columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, names=table.column_names)


def without_views(table: pa.Table) -> pa.Table:
    """Return the table with string and binary views cast to plain types, which Arrow can filter."""

    def whole(kind: pa.DataType) -> pa.DataType | None:
        if pa.types.is_string_view(kind):
            return pa.large_string()
        return pa.large_binary() if pa.types.is_binary_view(kind) else None

    def change(field: pa.Field, values: pa.ChunkedArray) -> pa.ChunkedArray:
        if not pa.types.is_dictionary(field.type):
            kind = whole(field.type)
            return values.cast(kind) if kind else values
        kind = whole(field.type.value_type)
        if not kind:
            return values
        chunks = [part.dictionary.cast(kind).take(part.indices) for part in values.chunks]
        return pa.chunked_array(chunks, kind).dictionary_encode()

    return map_columns(table, change)


def with_categories(table: pa.Table, names: Collection[str]) -> pa.Table:
    """Return the table with these columns as categories, even if they hold numbers."""

    def change(field: pa.Field, values: pa.ChunkedArray) -> pa.ChunkedArray:
        coded = field.name in names and not pa.types.is_dictionary(field.type)
        return values.dictionary_encode() if coded else values

    return map_columns(table, change) if names else table


def _separated_otherwise(source: Path) -> bool:
    """Return True if a text file's header has another mark more often than the separator."""
    if not is_csv(source):
        return False
    with open(source, encoding="utf-8", errors="replace") as file:
        header = file.readline(1 << 16)
    mine = _delimiter(source)
    return any(header.count(mark) > header.count(mine) for mark in ",;\t|" if mark != mine)


def _delimiter(source: Path) -> str:
    return "\t" if source.suffix.lower() == ".tsv" else ","
