"""The names of classes and categories: one text per value, whatever its type in a file.

    number   3, 3.0, 3.00 and "+3" are "3"; -0.0 is "0"; 1e20 is written out in digits
    boolean  True, "true", "TRUE" and 1 are "True"
    date     2024-05-01 and 2024-05-01T00:00:00 are "2024-05-01"
    text     unchanged except for surrounding spaces: "01" is not "1"

The kind is inferred once, from the values of the training file, and stored with the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, time
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "KINDS",
    "array_kind",
    "array_names",
    "codes",
    "kind_of",
    "matched",
    "name_of",
    "sort_names",
]

Array = NDArray[Any]
KINDS = ("number", "boolean", "date", "text")
NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?"  # text that counts as a number
INFINITE = re.compile("[+-]?inf(inity)?", re.IGNORECASE)
HEXADECIMAL = "0[xX][0-9a-fA-F]{1,16}"
_NUMBER, _HEXADECIMAL = re.compile(NUMBER), re.compile(HEXADECIMAL)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}.*)?")
_CODE = re.compile(r"[+-]?0[0-9]|[^xX]*[eE][0-9]")
_FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]*[1-9]0*")
_WHOLE = re.compile(r"-?[0-9]+\.0+")
_MOST_DIGITS = 40  # longest number that is written without an exponent
_TRUTHS = {"true": "True", "1": "True", "false": "False", "0": "False"}


def name_of(text: str, kind: str, source: str = "text") -> str:
    """Return the name of a value in a column of this kind.

    Args:
        text: the value as its file prints it.
        kind: the column's kind in training, one of `KINDS`.
        source: the value's type in its own file, one of `KINDS`.
    """
    text = text.strip()
    if source == "boolean":
        text = text.capitalize()
    if kind == "number":
        text = {"true": "1", "false": "0"}.get(text.lower(), text)
    if kind in ("number", "boolean") or source == "number":
        text = _number(text)
    if kind == "boolean":
        text = _TRUTHS.get(text.lower(), text)
    return _date(text) if "date" in (kind, source) else text


def kind_of(texts: Iterable[str]) -> str:
    """Return the kind of a column with these texts: all booleans, dates or numbers, or text.

    Codes are text: digits with a leading zero (007, 00.5), an exponent without a sign (1E5), or two
    fractions that differ only in trailing zeros (the versions 1.1 and 1.10); 1, 1.0 and +1 are one
    number, and so are 0 and -0.0.
    """
    distinct = {text.strip() for text in texts}
    if not distinct:
        return "text"
    if all(text.lower() in ("true", "false") for text in distinct):
        return "boolean"
    if all(_DATE.fullmatch(text) and _is_date(text) for text in distinct):
        return "date"
    if not all(
        (_NUMBER.fullmatch(text) or _HEXADECIMAL.fullmatch(text)) and not _CODE.match(text)
        for text in distinct
    ):
        return "text"
    endings = {
        (_number(text), len(text) - len(text.rstrip("0")))
        for text in distinct
        if _FRACTION.fullmatch(text)
    }
    return "number" if len(endings) == len({number for number, _ in endings}) else "text"


def sort_names(names: Iterable[str], kind: str) -> tuple[str, ...]:
    """Return the names in ascending order, with numbers by value: "2" before "10"."""
    return tuple(sorted(names, key=Decimal if kind == "number" else None))


def matched(names: Array, known: Iterable[str | None]) -> Array:
    """Return the names, with "3.0" as "3" if only "3" is known: gaps turn integers into floats."""
    known = set(known)
    other = {
        name: whole
        for name in set(names) - known
        if name is not None
        and (whole := name.partition(".")[0]) in known
        and _WHOLE.fullmatch(name)
    }
    return np.array([other.get(name, name) for name in names], object) if other else names


def codes(names: Array, classes: Sequence[str | None]) -> Array:
    """Return the index (m,) int64 of each name among the classes; -1 for others and for None."""
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index.get(name, -1) for name in names], np.int64)


def array_kind(values: Array) -> str:
    """Return the kind of a NumPy array's values."""
    if values.dtype.kind in "US":
        return kind_of(np.unique(values.astype(str)).tolist())
    return "boolean" if values.dtype.kind == "b" else "number"


def array_names(values: Array, kind: str) -> Array:
    """Return the names of a NumPy array's values (m,): texts, booleans or finite numbers."""
    texts = values.dtype.kind in "US"
    distinct, places = np.unique(values.astype(str) if texts else values, return_inverse=True)
    source = "text" if texts else array_kind(values)
    names = np.array([name_of(str(value), kind, source) for value in distinct], object)
    return np.asarray(names[places.reshape(values.shape)])


def _number(text: str) -> str:
    """Return a number in its one form, without redundant zeros; any other text unchanged."""
    if _HEXADECIMAL.fullmatch(text):
        return str(int(text, 16))
    if not _NUMBER.fullmatch(text):
        return text
    sign, figures, exponent = Decimal(text).as_tuple()
    digits = "".join(map(str, figures)).lstrip("0")
    kept = digits.rstrip("0")
    if not kept:
        return "0"
    assert isinstance(exponent, int)
    places = exponent + len(digits) - len(kept)
    size = places + len(kept) - 1
    if -_MOST_DIGITS < size < _MOST_DIGITS:
        return format(Decimal((sign, tuple(map(int, kept)), places)), "f")
    fraction = f".{kept[1:]}" if len(kept) > 1 else ""
    return f"{'-' * sign}{kept[0]}{fraction}e{size:+d}"


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _date(text: str) -> str:
    """Return a date in its one form, times with a zone in UTC; any other text unchanged."""
    try:
        moment = datetime.fromisoformat(text)
        zone = "" if moment.tzinfo is None else "Z"
        moment = moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        return text
    if moment.time() == time():
        return f"{moment.date()}{zone}"
    return (
        moment.isoformat(" ").rstrip("0").rstrip(".") + zone
        if moment.microsecond
        else moment.isoformat(" ") + zone
    )
