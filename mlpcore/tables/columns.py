"""The use of each column of a table, decided once in training and stored with the model.

number     standardised; a missing value becomes the median of the training rows, and an extra
           column marks it
category   one column per value, "missing" included; rare and unknown values share a column
left out   dates, row numbers, a single value, no values, a different text in nearly every row
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks.errors import cut, listed, shown
from mlpcore.tables import labels
from mlpcore.tables.arrow import (
    choose_origin,
    is_date,
    is_number,
    is_text,
    label_kind,
    pa,
    pc,
    pd,
    plain,
    to_names,
    to_numbers,
)
from mlpcore.tables.pipeline import LEAST_ROWS, MOST_CATEGORIES, Column

Array = NDArray[Any]
KINDS = ("number", "category", "out")
_DAY = "(0?[1-9]|[12][0-9]|3[01])"  # or a month
_ZONE = "( ?(Z|UTC|[+-][0-9]{2}(:?[0-9]{2})?))?"
_TIME = f"[ T]+[0-9]{{1,2}}(:[0-9]{{2}}){{0,2}}([.,][0-9]+)?( ?[AaPp][Mm])?{_ZONE}"
# 2021-02-14, 2021/02/14, 14/02/2021, 2/14/21, 14.02.2021, 14-02-2021, with or without a time
_DATE = (
    f"^([0-9]{{4}}-{_DAY}-{_DAY}|[0-9]{{4}}/{_DAY}/{_DAY}|{_DAY}/{_DAY}/([0-9]{{2}}){{1,2}}"
    f"|{_DAY}[.]{_DAY}[.][0-9]{{4}}|{_DAY}-{_DAY}-[0-9]{{4}})({_TIME})?$"
)


def decide(name: str, values: pa.ChunkedArray, wish: str | None, numbering: Array) -> Column:
    """Return one column with its kind, from its type and values, or as requested."""
    is_category = pa.types.is_dictionary(values.type)
    values = plain(values)
    kind, rows = values.type, len(values)
    known_rows = rows - values.null_count
    if wish == "out":
        return Column(name, "", "as asked")
    if pa.types.is_null(kind) or not known_rows:
        return Column(name, "", "no value in any row")
    if wish is None and is_text(kind):
        dates = values.filter(pc.match_substring_regex(values, _DATE))
        if len(dates) >= 0.95 * known_rows:
            return Column(name, "", f"dates as text, such as {shown(str(dates[0]))}")
    if not label_kind(kind) or (is_date(kind) and wish != "category"):
        what = "a date or time" if pa.types.is_temporal(kind) else f"of type {cut(kind)}"
        if wish:
            raise ValueError(f"--as {cut(name)}={wish}: the column is {what}")
        return Column(name, "", what)
    if wish == "category":
        return _category(name, "category", *to_names(values))
    if is_category and wish is None:
        return _category(name, "category", *to_names(values), names_rows=True)
    numbers = to_numbers(values) if wish or not pa.types.is_boolean(kind) else np.full(rows, np.nan)
    known = np.isfinite(numbers)
    if known.any() and (wish or is_number(kind) or known.sum() >= 0.95 * known_rows):
        return _number(name, numbers, values, wish, numbering)
    if wish:
        raise ValueError(
            f"--as {cut(name)}=number: the column holds no number: the first value is "
            f"{shown(str(values.drop_null()[0]))}"
        )
    if is_number(kind):
        return Column(name, "", "no finite number in any row")
    names, made_of = to_names(values)
    return _category(
        name, "boolean" if made_of == "boolean" else "category", names, made_of, names_rows=True
    )


def _number(
    name: str, numbers: Array, values: pa.ChunkedArray, wish: str | None, numbering: Array
) -> Column:
    known = np.isfinite(numbers)
    origin = choose_origin(numbers, values)
    apart = to_numbers(values, origin) if origin else numbers
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
        return Column(name, "", f"row numbers, {low:.0f} to {high:.0f}")
    note = f"{low:.6g} to {high:.6g}"
    if origin:
        note = f"{int(origin) + int(first)} to {int(origin) + int(last)}"
    elif note.count(f"{low:.6g}") > 1:
        note = f"{low:.12g} to {high:.12g}"
    if not known.all():
        note += f"; {np.sum(~known):,} missing"
    wrong = pc.filter(values, pc.and_kleene(pc.is_valid(values), pa.array(~known)))
    if len(wrong):
        what = f"text such as {shown(str(wrong[0]))}" if is_text(values.type) else "infinite or NaN"
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
        return Column(name, "", f"{note}, none of them in {LEAST_ROWS} rows or more")
    if len(counts) <= 4:
        note += ": " + listed(labels.sort_names(counts.index, made_of))
    elif apart > MOST_CATEGORIES:
        note += f", own columns for the {MOST_CATEGORIES - 1} most frequent"
    elif apart < len(counts):
        note += f", own columns for those in {LEAST_ROWS} training rows or more, {apart} at most"
    return Column(name, kind, note + (f"; {missing:,} missing" if missing else ""), made_of)


def describe(columns: Sequence[Column], most: int = 60) -> str:
    """Return one line per column with its name, kind and note, for at most `most` columns."""
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
