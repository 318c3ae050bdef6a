"""Tables with named columns, CSV or Parquet: how they are read, and what each column is taken as.

    number     standardised; a missing value becomes the median of the training rows, and a column
    says so category   one column a value; missing is a value like another; rare values share a
    column, with those never seen left out   dates, row numbers, one value only, no value at all,
    another text in nearly every row

What a column is taken as is told once, in training, and kept with the model: other files are read
by it. Arrow reads (its types tell integers with gaps from floats);
`mlpcore.tables.columns.pipeline` makes the network's input.
"""

from __future__ import annotations

import codecs
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks.errors import cut, line, listed, nearest, shown, unknown
from mlpcore.data.parquet import Footer, arrow_source, opened, readable, require_rows
from mlpcore.tables import labels
from mlpcore.tables.datasets import Dataset, Standardizer, Truth, decided, few
from mlpcore.tables.pipeline import LEAST_ROWS, MOST_CATEGORIES, Column, Pipeline

try:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv
except ImportError as error:
    raise ImportError(f'tables need {error.name}: pip install "mlpcore[cli]"') from error

__all__ = ["SUFFIXES", "Column", "Table", "Transformer", "describe", "load"]

Array = NDArray[Any]
SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
KINDS = ("number", "category", "out")
# a target of whole numbers with more values is a quantity (an archive's dtype says more: 100 there)
MOST_CLASSES = 20
_SEPARATE = "separate columns by commas (.csv) or tabs (.tsv)"
_DAY = "(0?[1-9]|[12][0-9]|3[01])"  # or a month
_TIME = "[ T]+[0-9]{1,2}(:[0-9]{2}){0,2}([.,][0-9]+)?( ?[AaPp][Mm])?( ?(Z|UTC|[+-][0-9]{2}(:?[0-9]{2})?))?"
# 2021-02-14, 2021/02/14, 14/02/2021, 2/14/21, 14.02.2021, 14-02-2021, with or without a time
_DATE = (
    f"^([0-9]{{4}}-{_DAY}-{_DAY}|[0-9]{{4}}/{_DAY}/{_DAY}|{_DAY}/{_DAY}/([0-9]{{2}}){{1,2}}"
    f"|{_DAY}[.]{_DAY}[.][0-9]{{4}}|{_DAY}-{_DAY}-[0-9]{{4}})({_TIME})?$"
)
_FULL = f"^({labels.NUMBER}|{labels.HEXADECIMAL})$"


@dataclass(frozen=True)
class Table(Dataset):
    """A `Dataset` whose `X` is a frame: float64 numbers with NaN, texts with None, one column for
    each of `columns` in use.

    `dropped` rows had no target, or `infinite` ones.
    """

    columns: tuple[Column, ...] = ()
    dropped: int = 0
    infinite: int = 0

    @property
    def rows(self) -> int:
        """That have a target."""
        return len(self.X)

    def prepare(self, rows: Array) -> Transformer:
        """The transformer of these training rows."""
        return Transformer.fit(self.X, rows, self.columns)


# -- reading
# ---------------------------------------------------------------------------------------------------------------


def read(path: str | Path, texts: Sequence[str] = ()) -> pa.Table:
    """The table of a file, `.csv`, `.tsv` or Parquet; columns named in `texts` are read as text
    ("007" stays what it is).

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is not such a file, has no rows, two columns of one name, or lines of unequal
            length.
    """
    source = require_file(path)
    if _is_csv(source):
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
        raise ValueError(f"{path}: has a header ({listed(names, 5)}) and no rows")
    return table


def _csv_table(path: str | Path, source: Path, texts: Sequence[str]) -> pa.Table:
    """Return the table of a CSV file, with the whole numbers beyond int64 as such."""
    with open(source, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path}: is UTF-16 text; save it as UTF-8")
    try:
        table = _read_csv(source, texts)
        names = table.column_names
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from None
    except (ValueError, NotImplementedError, OSError) as error:  # Arrow's errors are such
        hint = f"; {_SEPARATE}" if _separated_otherwise(source) else ""
        raise ValueError(f"{path}: cannot be read: {line(error)}{hint}") from None
    require_different(path, names)
    for field in table.schema:
        if pa.types.is_binary(field.type):
            raise ValueError(
                f"{path}: column {shown(field.name)} is not UTF-8 text; save the file as UTF-8"
            )
    return _with_digits(table, source)


def require_different(path: str | Path, names: Sequence[str]) -> None:
    """Raise a ValueError where two columns have one name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(
                f"{path}: {count} columns are named {shown(name)}; which one is meant?"
            )


def require_file(path: str | Path) -> Path:
    """The path of a file that is there; FileNotFoundError where it is not, or a folder."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(
            f"{path}: " + ("is a folder; name a file" if source.is_dir() else "no such file")
        )
    return source


def _is_csv(source: Path) -> bool:
    return source.suffix.lower() in (".csv", ".tsv")


def _read_csv(source: Path, texts: Sequence[str], only: Sequence[str] = ()) -> pa.Table:
    size = source.stat().st_size
    if not size:
        raise ValueError("the file is empty")
    if size >= (1 << 31) - 1:
        raise ValueError(f"{size:,} bytes of text; from 2 GiB on, write Parquet")
    return csv.read_csv(
        arrow_source(source),
        read_options=csv.ReadOptions(
            use_threads=False, block_size=size + 1
        ),  # types from all rows, not from the first ones
        parse_options=csv.ParseOptions(delimiter=_delimiter(source), newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            strings_can_be_null=True,
            column_types=dict.fromkeys(texts, pa.string()),
            include_columns=only,
        ),
    )


def _with_digits(table: pa.Table, source: Path) -> pa.Table:
    """Return the table of a CSV file with the whole numbers beyond int64 as such, which Arrow reads
    as floats.
    """
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    large = [
        name
        for name in floats
        if pc.any(pc.greater_equal(pc.abs(table.column(name)), 2.0**63)).as_py()
    ]
    if not large:
        return table
    texts = _read_csv(source, large, only=large)
    found = {}
    for name in large:
        values = plain(texts.column(name))
        if pc.all(pc.match_substring_regex(values, "^[+-]?[0-9]{1,76}$")).as_py():
            integers = values.cast(pa.decimal256(76, 0))
            low, high = pc.min_max(integers).as_py().values()
            found[name] = integers.cast(pa.uint64()) if low >= 0 and high < 2**64 else integers
    return _changed(table, lambda field, values: found.get(field.name, values))


def _changed(
    table: pa.Table, change: Callable[[pa.Field, pa.ChunkedArray], pa.ChunkedArray]
) -> pa.Table:
    """Return the table with what `change` makes of each column."""
    columns = [
        change(field, values) for field, values in zip(table.schema, table.columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, names=table.column_names)


def without_views(table: pa.Table) -> pa.Table:
    """Return the table with its views of texts and bytes as such, which Arrow can filter."""

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

    return _changed(table, change)


def with_categories(table: pa.Table, names: Collection[str]) -> pa.Table:
    """Return the table with these columns as categories: Arrow reads those of numbers as numbers."""

    def change(field: pa.Field, values: pa.ChunkedArray) -> pa.ChunkedArray:
        coded = field.name in names and not pa.types.is_dictionary(field.type)
        return values.dictionary_encode() if coded else values

    return _changed(table, change) if names else table


def _separated_otherwise(source: Path) -> bool:
    """Whether the header of a text file has more semicolons, or the like, than what separates
    columns.
    """
    if not _is_csv(source):
        return False
    with open(source, encoding="utf-8", errors="replace") as file:
        header = file.readline(1 << 16)
    mine = _delimiter(source)
    return any(header.count(mark) > header.count(mine) for mark in ",;\t|" if mark != mine)


def _delimiter(source: Path) -> str:
    return "\t" if source.suffix.lower() == ".tsv" else ","


def decoded(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values themselves, of a column that lists the different ones apart."""
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values decoded, without spaces around texts; NaN and what CSV takes as missing are
    missing.

    Decimals have 128 bits at least and times with a zone are in UTC: Arrow does little with others.
    """
    values = decoded(values)
    kind = values.type
    if pa.types.is_decimal(kind) and kind.bit_width < 128:
        values = values.cast(pa.decimal128(kind.precision, kind.scale))
    if pa.types.is_timestamp(kind) and kind.tz:
        values = values.cast(pa.timestamp(kind.unit, "UTC"))
    if _is_text(values.type):
        values = pc.utf8_trim_whitespace(values.cast(pa.large_string()))
        missing = pc.is_in(values, pa.array([*csv.ConvertOptions().null_values], values.type))
        values = pc.if_else(missing, pa.scalar(None, values.type), values)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    return values


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def _is_date(kind: pa.DataType) -> bool:
    return bool(pa.types.is_date(kind) or pa.types.is_timestamp(kind))


def _source(kind: pa.DataType) -> str:
    """Return the kind of `mlpcore.tables.labels` that an Arrow type is; "" for one that has no
    names.
    """
    if _is_text(kind) or pa.types.is_null(kind):
        return "text"
    if _is_number(kind):
        return "number"
    if pa.types.is_boolean(kind):
        return "boolean"
    return "date" if _is_date(kind) else ""


def _numbers(values: pa.ChunkedArray, origin: float = 0.0) -> Array:
    """Return the numbers less `origin`, float64 (m,); NaN where there is no finite one."""
    values = plain(values)
    if _is_text(values.type):
        numeric = pc.fill_null(pc.match_substring_regex(values, _FULL), False)
        texts = pc.if_else(numeric, values, pa.scalar(None, values.type))
        if origin or pc.any(pc.match_substring_regex(texts, "[xX]")).as_py():
            numbers = np.array([_exactly(text, origin) for text in texts.to_pylist()])
        else:
            numbers = texts.cast(pa.float64()).to_numpy()
    elif origin and pa.types.is_integer(values.type):
        whole = values.fill_null(0).to_numpy()[:, None]
        numbers = Standardizer(np.array([origin]), np.ones(1)).exactly(whole)[:, 0]
        numbers[values.is_null().to_numpy()] = np.nan
    elif origin and pa.types.is_decimal(values.type):
        numbers = np.array([_exactly(value, origin) for value in values.to_pylist()])
    elif (
        _is_number(values.type) or pa.types.is_boolean(values.type) or pa.types.is_null(values.type)
    ):
        numbers = values.cast(pa.float64(), safe=False).to_numpy() - origin
    else:
        numbers = np.full(len(values), np.nan)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _exactly(value: str | Decimal | None, origin: float) -> float:
    """Return the number less `origin`, rounded once."""
    if value is None:
        return math.nan
    number = (
        Decimal(int(value, 16))
        if isinstance(value, str) and value[:2] in ("0x", "0X")
        else Decimal(value)
    )
    return (
        float(number - Decimal(origin)) if abs(number.adjusted()) < 300 else float(number) - origin
    )


def _origin(numbers: Array, values: pa.ChunkedArray) -> float:
    """Return a float64 amid the numbers, where they are close together and have more digits than
    float64; else 0.
    """
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    size = max(abs(low), abs(high))
    if pa.types.is_floating(values.type) or not 2.0**53 <= size < 1e300 or high - low > size:
        return 0.0
    return float(np.floor(low + (high - low) / 2))


def _names(values: pa.ChunkedArray, kind: str = "") -> tuple[Array, str]:
    """Return the names (m,) of the values, None for a missing one, and their kind, told from them
    where not given.

    Among numbers that are text, infinite ones are missing, as they are among numbers.
    """
    values = plain(values)
    source = _source(values.type)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))
    coded = (
        values.combine_chunks().dictionary_encode()
        if values.num_chunks != 1
        else values.chunk(0).dictionary_encode()
    )
    texts = coded.dictionary.cast(pa.large_string()).drop_null().to_pylist()
    finite = texts
    if source == "text":
        finite = [text for text in texts if not labels.INFINITE.fullmatch(text)]
    kind = kind or (labels.kind_of(finite) if source == "text" else source)
    kept = set(finite if kind == "number" else texts)
    named = [labels.name_of(text, kind, source) if text in kept else None for text in texts]
    names = np.array([*named, None], object)
    return names[pc.fill_null(coded.indices, len(texts)).to_numpy()], kind


def as_frame(table: pa.Table, columns: Sequence[Column]) -> pd.DataFrame:
    """Return the columns as their kinds: float64 with NaN, or Python strings with None."""
    return _frame(_arrays(table, columns))


def _arrays(table: pa.Table, columns: Sequence[Column]) -> dict[str, Array]:
    return {
        c.name: _numbers(table.column(c.name), c.origin)
        if c.kind == "number"
        else _names(table.column(c.name), c.labels)[0]
        for c in columns
    }


def _frame(arrays: Mapping[str, Array]) -> pd.DataFrame:
    return pd.DataFrame(
        {name: pd.Series(array, dtype=array.dtype) for name, array in arrays.items()}
    )


# -- what a column is taken as
# ---------------------------------------------------------------------------------------------


def _take(name: str, values: pa.ChunkedArray, wish: str | None, numbering: Array) -> Column:
    """The kind of one column, from its type and values, or as wished."""
    is_category = pa.types.is_dictionary(values.type)
    values = plain(values)
    kind, rows = values.type, len(values)
    known_rows = rows - values.null_count
    if wish == "out":
        return Column(name, "", "as asked")
    if pa.types.is_null(kind) or not known_rows:
        return Column(name, "", "no value in any row")
    if wish is None and _is_text(kind):
        dates = values.filter(pc.match_substring_regex(values, _DATE))
        if len(dates) >= 0.95 * known_rows:
            return Column(name, "", f"dates as text, such as {shown(str(dates[0]))}")
    if not _source(kind) or (_is_date(kind) and wish != "category"):
        what = "a date or time" if pa.types.is_temporal(kind) else f"of type {cut(kind)}"
        if wish:
            raise ValueError(f"--as {cut(name)}={wish}: the column is {what}")
        return Column(name, "", what)
    if wish == "category":
        return _category(name, "category", *_names(values))
    if is_category and wish is None:
        return _category(name, "category", *_names(values), names_rows=True)
    numbers = _numbers(values) if wish or not pa.types.is_boolean(kind) else np.full(rows, np.nan)
    known = np.isfinite(numbers)
    if known.any() and (wish or _is_number(kind) or known.sum() >= 0.95 * known_rows):
        return _number(name, numbers, values, wish, numbering)
    if wish:
        raise ValueError(
            f"--as {cut(name)}=number: the column holds no number: the first value is "
            f"{shown(str(values.drop_null()[0]))}"
        )
    if _is_number(kind):
        return Column(name, "", "no finite number in any row")
    names, made_of = _names(values)
    return _category(
        name, "boolean" if made_of == "boolean" else "category", names, made_of, names_rows=True
    )


def _number(
    name: str, numbers: Array, values: pa.ChunkedArray, wish: str | None, numbering: Array
) -> Column:
    known = np.isfinite(numbers)
    origin = _origin(numbers, values)
    apart = _numbers(values, origin) if origin else numbers
    low, high = numbers[known].min(), numbers[known].max()
    first, last = apart[known].min(), apart[known].max()
    if known.all() and first == last:
        return Column(name, "", f"{low:.6g} in every row")
    if (
        not wish
        and pa.types.is_integer(values.type)
        and known.all()
        and len(numbers) > 9
        and np.mean(np.diff(apart) == np.diff(numbering)) > 0.8
    ):
        return Column(name, "", f"counts the rows, {low:.0f} to {high:.0f}")
    note = f"{low:.6g} to {high:.6g}"
    if origin:
        note = f"{int(origin) + int(first)} to {int(origin) + int(last)}"
    elif note.count(f"{low:.6g}") > 1:
        note = f"{low:.12g} to {high:.12g}"
    if not known.all():
        note += f"; {np.sum(~known):,} missing"
    wrong = pc.filter(values, pc.and_kleene(pc.is_valid(values), pa.array(~known)))
    if len(wrong):
        what = (
            f"text such as {shown(str(wrong[0]))}" if _is_text(values.type) else "infinite or NaN"
        )
        note += f", {'all' if len(wrong) == np.sum(~known) else f'{len(wrong):,}'} of them {what}"
    return Column(name, "number", note, origin=origin)


def _category(name: str, kind: str, texts: Array, made_of: str, names_rows: bool = False) -> Column:
    counts = pd.Series(texts).value_counts()
    missing = len(texts) - int(counts.sum())
    if len(counts) == 1 and not missing:
        return Column(name, "", f"{shown(counts.index[0])} in every row")
    if names_rows and len(counts) > max(2, counts.sum() / 2):
        what = "text" if made_of == "text" else "a category"
        return Column(name, "", f"{what} with {len(counts):,} values in {counts.sum():,} rows")
    note = f"{len(counts):,} value{'s' if len(counts) > 1 else ''}"
    apart = int(np.sum(counts >= LEAST_ROWS)) + (missing >= LEAST_ROWS)
    if not apart:
        return Column(name, "", f"{note}, none of them in {LEAST_ROWS} rows")
    if len(counts) <= 4:
        note += ": " + listed(labels.sort_names(counts.index, made_of))
    elif apart > MOST_CATEGORIES:
        note += f", the {MOST_CATEGORIES - 1} most frequent apart"
    elif apart < len(counts):
        note += f", those in {LEAST_ROWS} training rows apart, {apart} at most"
    return Column(name, kind, note + (f"; {missing:,} missing" if missing else ""), made_of)


def describe(columns: Sequence[Column], most: int = 60) -> str:
    """The columns as lines of name, kind and note, at most so many."""
    wide = min(32, max(len(column.name) for column in columns))
    lines = [
        f"  {cut(column.name) or '(no name)':<{wide}}  {column.kind or 'left out':<9} {column.note}"
        for column in columns[:most]
    ]
    if len(columns) > most:
        rest = [column.kind or "left out" for column in columns[most:]]
        lines.append(
            f"  and {len(rest):,} more: "
            + ", ".join(f"{rest.count(k):,} {k}" for k in dict.fromkeys(rest))
        )
    return "\n".join(lines)


# -- a table to train on
# ---------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    target: str,
    task: str | None = None,
    groups: str | None = None,
    wishes: Mapping[str, str] | None = None,
) -> Table:
    """A table with its target; rows without a target are dropped and counted.

    Args:
        path: a `.csv`, `.tsv` or Parquet file.
        target: the column to predict.
        task: "classification" or "regression"; None tells it from the target: text, booleans and at
            most 20 different whole numbers are classes, other numbers a quantity.
        groups: a column whose values must not be split between training and test.
        wishes: column: "number", "category" or "out", where the choice made from the values does
            not suit.

    Raises:
        FileNotFoundError, OSError, ValueError: names the file or the column, what was expected and
            what came.
    """
    as_text = [name for name, wish in (wishes or {}).items() if wish == "category"]
    table = read(path, as_text if groups is None else [*as_text, groups])
    require_columns(path, table.column_names, target, groups, wishes or {})
    if not _is_csv(Path(path)):
        return take(table, path, target, task, groups, wishes)
    values = plain(table.column(target))
    told, note = _task(values, task)
    if _is_text(values.type) or (told == "regression" and not pa.types.is_temporal(values.type)):
        return take(table, path, target, task, groups, wishes)
    infinite = _infinite(values)  # which no text is
    texts = _read_csv(Path(path), [target], only=[target]).column(target)
    texts = pc.if_else(pa.array(infinite), pa.scalar(None, texts.type), texts)
    table = _changed(table, lambda field, values: texts if field.name == target else values)
    taken = take(table, path, target, told, groups, wishes)
    return replace(
        taken, note=note if taken.labels == "number" else "", infinite=int(infinite.sum())
    )


def take(
    table: pa.Table, path: str | Path, target: str, task: str | None, groups: str | None, wishes: Mapping[str, str] | None,
    numbering: Array | None = None,
) -> Table:  # fmt: skip
    """`load`, of a table that has been read; `path` is for messages, `numbering` (m,) the rows'
    numbers in the file.
    """
    wishes = wishes or {}
    names = table.column_names
    require_columns(path, names, target, groups, wishes)
    goal = _target(table.column(target), target, task)
    numbering = (np.arange(len(table)) if numbering is None else numbering)[goal.rows]
    table = table.filter(pa.array(goal.rows))
    codes = None if groups is None else _groups(table.column(groups), groups)
    columns = tuple(
        Column(name, "", "groups")
        if name == groups
        else _take(name, table.column(name), wishes.get(name), numbering)
        for name in names
        if name != target
    )
    frame = as_frame(table, [column for column in columns if column.kind])
    if not frame.shape[1]:
        why = (
            "; ".join(f"{cut(c.name)} is left out ({c.note})" for c in columns[:5])
            or "there is no other"
        )
        raise ValueError(f"{path}: no column is left to predict {shown(target)} from: {why}")
    return Table(
        frame, goal.Y, tuple(frame.columns), goal.classes, codes, unit=f"groups of {cut(groups)}", target=target,
        labels=goal.labels, note=goal.note, columns=columns, dropped=int(np.sum(~goal.rows)), infinite=goal.infinite,
    )  # fmt: skip


def _no_column(where: str, name: str, names: Sequence[str]) -> ValueError:
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        return ValueError(
            f"{where} {shown(name)}: the header is one column, {shown(names[0])}; {_SEPARATE}"
        )
    near = nearest(name, names)
    hint = f"; did you mean {shown(near)}?" if near else "."
    there = [*([near] if near else []), *(other for other in names if other != near)]
    return ValueError(f"{where}: there is no column {shown(name)}{hint} There are {listed(there)}")


def require_columns(
    path: str | Path, names: Sequence[str], target: str, groups: str | None, wishes: Mapping[str, str]
) -> None:  # fmt: skip
    """Raise a ValueError where a column that is named is not there, or is asked to be two things."""
    known = set(names)
    for argument, name in (
        ("--target", target),
        ("--groups", groups),
        *(("--as", name) for name in wishes),
    ):
        if name is not None and name not in known:
            raise _no_column(f"{path}: {argument}", name, names)
    for name, wish in wishes.items():
        if wish not in KINDS:
            raise unknown(f"--as {cut(name)}", wish, KINDS)
    if groups == target:
        raise ValueError(f"{path}: --groups and --target both name {shown(target)}")


@dataclass(frozen=True)
class _Goal:
    """The target of a table: `Y` of the `rows` that have one, their class names and kind, and how
    the task was told.
    """

    Y: Array
    rows: Array
    classes: tuple[str, ...] = ()
    labels: str = ""
    note: str = ""
    infinite: int = 0


def _task(values: pa.ChunkedArray, task: str | None) -> tuple[str, str]:
    """Return the task, told from the target where it is not given, and how whole numbers were
    taken.
    """
    if task is not None:
        return task, ""
    if not _is_number(values.type):  # nor a category of numbers
        return "classification", ""
    filled = with_target(values)
    numbers = _numbers(values)[filled]
    if not (numbers == np.rint(numbers)).all():
        return "regression", ""
    known = plain(values).filter(pa.array(filled))
    count = len(np.unique(numbers) if pa.types.is_floating(known.type) else known.unique())
    task = "classification" if few(count, len(known), MOST_CLASSES) else "regression"
    return task, decided(count, task)


def _target(values: pa.ChunkedArray, name: str, task: str | None) -> _Goal:
    task, note = _task(values, task)
    values = plain(values)
    require_answers(values.type, name)
    filled, infinite, numbers = with_target(values), _infinite(values), _numbers(values)
    if not filled.any():
        raise ValueError(f"--target {shown(name)} has no value in any row")
    if task == "regression":
        require_numbers(values, name)
        Y = quantities(values, filled)
        if (Y[0] == Y).all():
            raise ValueError(
                f"--target {shown(name)} is {Y[0, 0]:.6g} in every row; nothing to learn"
            )
        return _Goal(Y, filled, note=note, infinite=int(infinite.sum()))
    names, kind = _names(values)
    named = np.array([name is not None for name in names])  # of numbers that are text as well
    infinite, filled = infinite | (filled & ~named), filled & named
    names = names[filled]
    if kind == "date":
        raise ValueError(
            f"--target {shown(name)} holds dates, such as {shown(names[0])}; expected numbers, "
            "text or booleans"
        )
    classes = labels.sort_names(set(names), kind)
    if len(classes) == 1:
        raise ValueError(
            f"--target {shown(name)} is {shown(classes[0])} in every row; nothing to tell apart"
        )
    if len(classes) > max(2, len(names) / 2):
        good = int(np.isfinite(numbers[filled]).sum())
        hint = "it looks like an identifier"
        if good == len(names):
            hint = "is it a quantity (--task regression)?"
        elif good > 0.9 * len(names):
            odd = names[~np.isfinite(numbers[filled])][0]
            hint = f"{good:,} of them are numbers; mend the others, such as {shown(odd)}, for --task regression"
        raise ValueError(
            f"--target {shown(name)}: {len(classes):,} classes in {len(names):,} rows; {hint}"
        )
    return _Goal(labels.codes(names, classes), filled, classes, kind, note, int(infinite.sum()))


def _infinite(values: pa.ChunkedArray) -> Array:
    """Return which rows (m,) of plain values hold an infinite number."""
    if not pa.types.is_floating(values.type):
        return np.zeros(len(values), bool)
    return np.asarray(pc.fill_null(pc.is_inf(values), False).to_numpy())


def require_answers(kind: pa.DataType, name: str) -> None:
    """Raise a ValueError where a target of this type cannot be predicted."""
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    if _source(held) in ("", "date"):
        raise ValueError(
            f"--target {shown(name)} holds {cut(held)}; expected numbers, text or booleans"
        )


def without_target(values: pa.ChunkedArray) -> tuple[int, int]:
    """Return how many rows have no target, and how many an infinite one."""
    values = plain(values)
    return values.null_count, int(_infinite(values).sum())


def with_target(values: pa.ChunkedArray) -> Array:
    """Return which rows (m,) have a target that is not infinite."""
    values = plain(values)
    return np.asarray(values.is_valid().to_numpy() & ~_infinite(values))


def require_numbers(values: pa.ChunkedArray, name: str, first: int = 0) -> None:
    """Raise a ValueError that names the first row whose target is no number; `first` is the number
    of the values' first row.
    """
    values = plain(values)
    if _is_text(values.type):
        wrong = np.flatnonzero(values.is_valid().to_numpy() & np.isnan(_numbers(values)))
        if len(wrong):
            row, text = first + int(wrong[0]) + 1, str(values[int(wrong[0])])
            raise ValueError(
                f"--target {shown(name)} of a regression must be numbers; row {row} has "
                f"{shown(text)}"
            )


def quantities(values: pa.ChunkedArray, rows: Array) -> Array:
    """Return the numbers of these rows (k, 1): 64-bit integers as such, others in float64."""
    values = plain(values)
    if pa.types.is_integer(values.type):
        return np.asarray(values.filter(pa.array(rows)).to_numpy())[:, None]
    return _numbers(values)[rows, None]


def _groups(values: pa.ChunkedArray, name: str) -> Array:
    codes, _ = pd.factorize(group_names(values, name))
    return np.asarray(codes, np.int64)


def group_names(values: pa.ChunkedArray, name: str) -> Array:
    """Return the names (m,) of the groups that the rows are of.

    Raises:
        ValueError: a row has none, or the type has no names.
    """
    if not _source(plain(values).type):
        raise ValueError(
            f"--groups {shown(name)} holds {cut(values.type)}; expected numbers, text, booleans or "
            "dates"
        )
    names, _ = _names(values)
    lost = sum(group is None for group in names)
    if lost:
        raise ValueError(f"--groups {shown(name)} has no value in {lost:,} row(s)")
    return names


def distinct(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the different values, without missing ones."""
    return pa.chunked_array([plain(values).unique().drop_null()])


def class_names(values: pa.ChunkedArray) -> tuple[tuple[str, ...], str]:
    """Return the names of classes in order, and their kind, from all values that occur."""
    names, kind = _names(values)
    return labels.sort_names({name for name in names if name is not None}, kind), kind


def truth(values: pa.ChunkedArray, classes: Sequence[str], kind: str) -> Truth:
    """Return the target of another table, for a model with these classes of this kind; () where it
    predicts a quantity.

    Raises:
        ValueError: the column holds what is neither numbers nor text nor booleans nor dates.
    """
    values = plain(values)
    if not _source(values.type):
        raise ValueError(
            f"the column of the target holds {cut(values.type)}; expected numbers, text, booleans "
            "or dates"
        )
    if classes:
        return Truth.of_names(_names(values, kind)[0], classes)
    filled = values.is_valid().to_numpy()
    rows = filled & np.isfinite(_numbers(values))
    wrong = filled & ~rows
    such = str(values[int(wrong.argmax())]) if wrong.any() else ""
    return Truth(quantities(values, rows), rows, int(np.sum(~filled)), int(wrong.sum()), such)


# -- the pipeline
# ----------------------------------------------------------------------------------------------------------


def _unfit(path: str | Path, column: Column, held: str) -> ValueError:
    was = f"it was a {column.kind} in training"
    return ValueError(f"{path}: column {shown(column.name)} holds {held}; {was}")


class Transformer(Pipeline):
    """A `Pipeline` that reads other files by what their columns were in training."""

    def read(
        self, path: str | Path, texts: Sequence[str] = ()
    ) -> tuple[pd.DataFrame, pa.Table, list[str]]:
        """Return another file's frame, its table, and remarks: values never seen in training.

        Each column is read as what it was in training; `texts` names others that are read as text,
        where the file is.

        Raises:
            ValueError: a column is missing, or holds nothing of its kind; and as `tables.read`.
        """
        table = read(
            path, [*texts, *(column.name for column in self.columns if column.kind != "number")]
        )
        known = set(table.column_names)
        for column in self.columns:
            if column.name not in known:
                raise _no_column(
                    f"{path}: the model needs a column", column.name, table.column_names
                )
            held = plain(table.column(column.name)).type
            fits = _source(held) or pa.types.is_time(held)
            if column.kind == "number":
                fits = _source(held) not in ("", "date")
            if not fits:
                raise _unfit(path, column, cut(held))
        arrays = _arrays(table, self.columns)
        for column, category in self.coded():
            arrays[column.name] = labels.matched(arrays[column.name], category.known)
        for column in self.columns[: len(self.median)]:
            values = plain(table.column(column.name)).drop_null()
            if _is_text(values.type) and len(values) and np.isnan(arrays[column.name]).all():
                raise _unfit(
                    path, column, f"no numbers, but text such as {shown(values[0].as_py())}"
                )
        return _frame(arrays), table, list(self._remarks(arrays, table))

    def _remarks(self, arrays: Mapping[str, Array], table: pa.Table) -> Iterator[str]:
        for column in self.columns[: len(self.median)]:
            lost = (
                int(np.isnan(arrays[column.name]).sum())
                - plain(table.column(column.name)).null_count
            )
            if lost:
                yield f"{cut(column.name)}: no finite number in {lost:,} of the rows: taken as missing"
        for column, category in self.coded():
            known = category.known
            new = [name for name in arrays[column.name].tolist() if name not in known]
            if new:
                such = "no value" if new[0] is None else f"such as {shown(new[0])}"
                values = f"values that training never saw, {such}, in {len(new):,} of the rows"
                yield f"{cut(column.name)}: {values}: taken as rare"
