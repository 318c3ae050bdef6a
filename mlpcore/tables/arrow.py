"""Arrow columns as NumPy arrays: numbers in float64, and names as texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.tables import labels
from mlpcore.tables.pipeline import Column
from mlpcore.tables.standardizer import Standardizer

try:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv
except ImportError as error:
    raise ImportError(f'tables need {error.name}: pip install "mlpcore[cli]"') from error

__all__ = [
    "as_frame",
    "choose_origin",
    "csv",
    "decoded",
    "is_date",
    "is_number",
    "is_text",
    "label_kind",
    "pa",
    "pc",
    "pd",
    "plain",
    "to_arrays",
    "to_frame",
    "to_names",
    "to_numbers",
]

Array = NDArray[Any]
_FULL = f"^({labels.NUMBER}|{labels.HEXADECIMAL})$"


def decoded(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column's values, with a dictionary-encoded column decoded."""
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values decoded, with text stripped and NaN and CSV's blanks as null.

    Decimals get at least 128 bits and times with a zone are in UTC: Arrow supports little else.
    """
    values = decoded(values)
    kind = values.type
    if pa.types.is_decimal(kind) and kind.bit_width < 128:
        values = values.cast(pa.decimal128(kind.precision, kind.scale))
    if pa.types.is_timestamp(kind) and kind.tz:
        values = values.cast(pa.timestamp(kind.unit, "UTC"))
    if is_text(values.type):
        values = pc.utf8_trim_whitespace(values.cast(pa.large_string()))
        missing = pc.is_in(values, pa.array([*csv.ConvertOptions().null_values], values.type))
        values = pc.if_else(missing, pa.scalar(None, values.type), values)
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    return values


def is_text(kind: pa.DataType) -> bool:
    """Return True for a text type."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_number(kind: pa.DataType) -> bool:
    """Return True for a type of integer, float or decimal."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def is_date(kind: pa.DataType) -> bool:
    """Return True for a date type, with or without a time."""
    return bool(pa.types.is_date(kind) or pa.types.is_timestamp(kind))


def label_kind(kind: pa.DataType) -> str:
    """Return the kind of label (`labels.KINDS`) for an Arrow type; "" for one without names."""
    if is_text(kind) or pa.types.is_null(kind):
        return "text"
    if is_number(kind):
        return "number"
    if pa.types.is_boolean(kind):
        return "boolean"
    return "date" if is_date(kind) else ""


def to_numbers(values: pa.ChunkedArray, origin: float = 0.0) -> Array:
    """Return the numbers minus `origin`, float64 (m,); NaN for a missing or infinite one."""
    values = plain(values)
    if is_text(values.type):
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
        is_number(values.type) or pa.types.is_boolean(values.type) or pa.types.is_null(values.type)
    ):
        numbers = values.cast(pa.float64(), safe=False).to_numpy() - origin
    else:
        numbers = np.full(len(values), np.nan)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _exactly(value: str | Decimal | None, origin: float) -> float:
    """Return the number minus `origin`, rounded once."""
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


def choose_origin(numbers: Array, values: pa.ChunkedArray) -> float:
    """Return a float64 near the numbers if they are close and exceed float64's digits; else 0."""
    low, high = np.nanmin(numbers), np.nanmax(numbers)
    size = max(abs(low), abs(high))
    if pa.types.is_floating(values.type) or not 2.0**53 <= size < 1e300 or high - low > size:
        return 0.0
    return float(np.floor(low + (high - low) / 2))


def to_names(values: pa.ChunkedArray, kind: str = "") -> tuple[Array, str]:
    """Return the names (m,) of the values, None for a missing one, and their kind.

    The kind is inferred from the values unless given.

    Infinite numbers count as missing, also when written as text.
    """
    values = plain(values)
    source = label_kind(values.type)
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
    """Return the columns converted to their kinds: float64 with NaN, or strings with None."""
    return to_frame(to_arrays(table, columns))


def to_arrays(table: pa.Table, columns: Sequence[Column]) -> dict[str, Array]:
    """Return the columns by name, converted to their kinds."""
    return {
        c.name: to_numbers(table.column(c.name), c.origin)
        if c.kind == "number"
        else to_names(table.column(c.name), c.labels)[0]
        for c in columns
    }


def to_frame(arrays: Mapping[str, Array]) -> pd.DataFrame:
    """Return a frame of the named arrays."""
    return pd.DataFrame(
        {name: pd.Series(array, dtype=array.dtype) for name, array in arrays.items()}
    )
