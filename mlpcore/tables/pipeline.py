"""The map from a table's columns to the network's input: fitted, applied, stored in models.

    number     (x - mean) / scale, with a missing x replaced by the median of the training rows
    missing    for each number with gaps in training, one more column that marks them, standardised
    category   one column per frequent value (which may be "missing"), and one for all rare values

In a model file the fitted numbers are float64 tensors, the names of categories are JSON in UTF-8
(the tensor `pipeline`), and the notes list the columns. The format depends on no other library.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks.errors import shown
from mlpcore.tables import labels
from mlpcore.tables.standardizer import FORMAT, Standardizer, is_unicode, read_numbers, require

__all__ = ["LEAST_ROWS", "MOST_CATEGORIES", "Category", "Column", "Pipeline"]

Array = NDArray[Any]
Name = str | None
MOST_CATEGORIES = 100  # most columns for one category
LEAST_ROWS = 5  # fewest rows of a value with its own column
_CHUNK_ROWS = 16_384
_KEYS = {"kind", "labels", "origin", "missing"}  # of a column in a model file


@dataclass(frozen=True)
class Column:
    """A column of the file and how it is used.

    Attributes:
        kind: "number", "category" or "boolean"; "" if it is left out.
        note: the reason, in words.
        labels: the kind of a category's names (`mlpcore.tables.labels`).
        origin: subtracted from a number before conversion to float64; nonzero only for integers
            beyond 2^53 that are close to each other.
    """

    name: str
    kind: str
    note: str = ""
    labels: str = ""
    origin: float = 0.0

    @classmethod
    def restore(cls, name: str, told: Any) -> Column:
        """Return a column as described in a model file; raise a ValueError if malformed."""
        wanted = f"{shown(name)} must have kind, labels, origin and missing"
        require(isinstance(told, dict) and set(told) == _KEYS, "columns", wanted)
        kind, origin = told["kind"], told["origin"]
        kinds = ("",) if kind == "number" else labels.KINDS
        known = kind in ("number", "category", "boolean")
        require(known, "columns", f"{shown(name)} has an unknown kind")
        require(
            told["labels"] in kinds, "columns", f"{shown(name)} has labels that do not fit its kind"
        )
        finite = type(origin) in (int, float) and abs(origin) < 1e300
        require(finite, "columns", f"the origin of {shown(name)} must be a number")
        marked = type(told["missing"]) is bool
        require(marked, "columns", f"'missing' of {shown(name)} must be true or false")
        return cls(name, kind, labels=told["labels"], origin=float(origin))


@dataclass(frozen=True)
class Category:
    """The values of a category in training, None for "missing".

    Attributes:
        apart: the values with their own columns, in the order of the columns.
        rare: the values that share one column, which exists only if there are any.
    """

    apart: tuple[Name, ...]
    rare: tuple[Name, ...]

    @classmethod
    def fit(cls, values: Array) -> Category:
        """Return the category of these training rows.

        It has at most `MOST_CATEGORIES` columns, each for at least `LEAST_ROWS` rows. Among equally
        frequent values, those later in the order of names get their own columns first.
        """
        counts = Counter(values.tolist())
        names: list[Name] = sorted(name for name in counts if name is not None)
        names += [None] if None in counts else []
        rows = np.array([counts[name] for name in names])
        apart = rows >= LEAST_ROWS
        if apart.sum() >= MOST_CATEGORIES:
            apart[np.argsort(rows, kind="stable")[: 1 - MOST_CATEGORIES]] = False
        parts = (
            [name for name, kept in zip(names, apart, strict=True) if kept == which]
            for which in (True, False)
        )
        return cls(*map(tuple, parts))

    @classmethod
    def restore(cls, name: str, told: Any) -> Category:
        """Return a category as described in a model file; raise a ValueError if malformed."""
        where = f"the values of {shown(name)}"
        both = isinstance(told, dict) and set(told) == {"apart", "rare"}
        require(both, "pipeline", f"{where} must be listed as 'apart' and 'rare'")
        parts = [told["apart"], told["rare"]]
        lists = all(isinstance(part, list) for part in parts)
        require(lists, "pipeline", f"{where} must be lists of texts")
        values = [*parts[0], *parts[1]]
        texts = all(value is None or is_unicode(value) for value in values)
        require(texts, "pipeline", f"{where} must be text")
        require(
            len(set(values)) == len(values) > 0,
            "pipeline",
            f"{where} must be distinct, and at least one",
        )
        return cls(*map(tuple, parts))

    @property
    def width(self) -> int:
        """Number of columns that it makes."""
        return len(self.apart) + bool(self.rare)

    @property
    def known(self) -> frozenset[Name]:
        """All values seen in training."""
        return frozenset(self.apart + self.rare)

    def names(self, column: str) -> list[str]:
        """Return the names of its columns, for a category of this name."""
        return [f"{column}_{value}" for value in self.apart] + [
            f"{column}_infrequent_sklearn"
        ] * bool(self.rare)

    def write(self, values: Array, out: Array) -> None:
        """Write ones into `out` (m, width), which holds zeros; unknown values count as rare."""
        places = labels.codes(values, self.apart)
        if self.rare:
            places[places < 0] = len(self.apart)
        rows = np.flatnonzero(places >= 0)
        out[rows, places[rows]] = 1


@dataclass(frozen=True)
class Pipeline:
    """Fitted numbers of a table's columns.

    Attributes:
        columns: numbers, then categories, each in the order of the table.
        median: (k,) float64, of the numbers.
        gaps: which of the k numbers have a column that marks missing values.
        scaler: the standardisation of the k numbers, then of the columns for gaps.
        categories: one for each column that is a category.
    """

    columns: tuple[Column, ...]
    median: Array
    gaps: tuple[bool, ...]
    scaler: Standardizer
    categories: tuple[Category, ...]

    @classmethod
    def fit(cls, X: Mapping[str, Any], rows: Array, columns: Sequence[Column]) -> Self:
        """Return the pipeline fitted on the given rows of `X`.

        Args:
            X: columns by name: numbers (m,) float64 with NaN if missing, or texts (m,) with None.
            rows: the training rows.
            columns: their uses. A category with only rare values is left out.

        Raises:
            ValueError: no column is left.
        """
        numbers = [column for column in columns if column.kind == "number"]
        found = [
            (c, Category.fit(np.asarray(X[c.name])[rows]))
            for c in columns
            if c.kind not in ("", "number")
        ]
        found = [(column, category) for column, category in found if category.apart]
        if not numbers and not found:
            raise ValueError(
                f"no column is left to predict from: none has a value that is in "
                f"{LEAST_ROWS} training rows"
            )
        values = np.empty((len(rows), len(numbers)))
        for j, column in enumerate(numbers):
            values[:, j] = np.asarray(X[column.name])[rows]
        missing = np.isnan(values)
        gaps = np.asarray(missing.any(axis=0))
        median = np.zeros(len(numbers))
        for j in range(len(numbers)):
            median[j] = _median(values[~missing[:, j], j])
            values[missing[:, j], j] = median[j]
        scaler = Standardizer(np.empty(0), np.empty(0))
        if numbers:
            names = [column.name for column in numbers]
            scaler = Standardizer.fit(np.hstack([values, missing[:, gaps]]), names=names)
        used = (*numbers, *(column for column, _ in found))
        return cls(
            used, median, tuple(gaps.tolist()), scaler, tuple(category for _, category in found)
        )

    @property
    def width(self) -> int:
        """Number of columns that it makes."""
        return len(self.scaler.mean) + sum(category.width for category in self.categories)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns that it makes, in order."""
        numbers = [column.name for column in self.columns[: len(self.median)]]
        gaps = [
            f"missingindicator_{name}" for name, gap in zip(numbers, self.gaps, strict=True) if gap
        ]
        ones = [name for column, category in self.coded() for name in category.names(column.name)]
        return (*numbers, *gaps, *ones)

    def coded(self) -> list[tuple[Column, Category]]:
        """Return each category column with its values."""
        return list(zip(self.columns[len(self.median) :], self.categories, strict=True))

    def apply(self, X: Mapping[str, Any]) -> Array:
        """Return the network's input (m, width) float32.

        Raises:
            ValueError: a number is too large to be standardised.
        """
        columns = [np.asarray(X[column.name]) for column in self.columns]
        rows, count = len(columns[0]), len(self.median)
        out = np.zeros((rows, self.width), np.float32)
        places = np.cumsum(
            [len(self.scaler.mean), *(category.width for category in self.categories)]
        ).tolist()
        for start in range(0, rows, _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            self._write_numbers([column[part] for column in columns[:count]], out[part])
            for column, category, first in zip(
                columns[count:], self.categories, places, strict=False
            ):
                category.write(column[part], out[part, first : first + category.width])
        bad = np.argwhere(~np.isfinite(out))
        if len(bad):
            row, place = bad[0]
            raise ValueError(
                f"row {row + 1}: {shown(self.names[place])} is too far from the other rows to be "
                "standardised in float32"
            )
        return out

    def _write_numbers(self, columns: Sequence[Array], out: Array) -> None:
        mean, scale = self.scaler.mean, self.scaler.scale
        at = len(columns)
        with np.errstate(all="ignore"):  # `apply` reports overflow
            for j, values in enumerate(columns):
                missing = np.isnan(values)
                out[:, j] = (np.where(missing, self.median[j], values) - mean[j]) / scale[j]
                if self.gaps[j]:
                    out[:, at] = (missing - mean[at]) / scale[at]
                    at += 1

    # -- in a model file --

    @property
    def tensors(self) -> dict[str, Array]:
        """Tensors to store in a model file."""
        told = {
            column.name: {"apart": category.apart, "rare": category.rare}
            for column, category in self.coded()
        }
        numbers = {"median": self.median, "mean": self.scaler.mean, "scale": self.scaler.scale}
        text = json.dumps(told, ensure_ascii=False).encode()
        tensors = {f"pipeline {key}": value for key, value in numbers.items()}
        return {"pipeline": np.frombuffer(text, np.uint8), **tensors}

    @property
    def about(self) -> dict[str, Any]:
        """Notes to store in a model file."""
        gaps = [*self.gaps, *[False] * len(self.categories)]
        columns = {
            c.name: {"kind": c.kind, "labels": c.labels, "origin": c.origin, "missing": gap}
            for c, gap in zip(self.columns, gaps, strict=True)
        }
        return {"format": FORMAT, "features": self.names, "columns": columns}

    @classmethod
    def restore(cls, tensors: Mapping[str, Array], about: Mapping[str, Any], width: int) -> Self:
        """Return the pipeline of a model file whose network takes `width` columns.

        Raises:
            ValueError: it has another format or does not fit; the message names the field. Time and
                memory are linear in the file's size.
        """
        text = tensors["pipeline"]
        require(text.dtype == np.uint8 and text.ndim == 1, "pipeline", "it must be text, as bytes")
        if text[:4].tobytes() == b"PK\3\4" or "format" not in about:
            raise ValueError(
                "its table pipeline was written by an older development version of mlpcore; train "
                "again"
            )
        told: Any = about.get("columns")
        named = isinstance(told, dict) and bool(told) and all(map(is_unicode, told))
        require(named, "columns", "they must have names")
        columns = [Column.restore(name, value) for name, value in told.items()]
        gaps = tuple(bool(value["missing"]) for value in told.values() if value["kind"] == "number")
        numbers = [column for column in columns if column.kind == "number"]
        others = [column for column in columns if column.kind != "number"]
        marked = any(told[column.name]["missing"] for column in others)
        require(not marked, "columns", "'missing' can be true only for numbers")
        median = read_numbers(tensors, "pipeline median", len(gaps))
        scaler = Standardizer.restore(tensors, len(gaps) + sum(gaps), "pipeline ", exact=False)
        found = _categories(text.tobytes(), [column.name for column in others])
        made = cls((*numbers, *others), median, gaps, scaler, found)
        wanted = f"it makes {made.width:,} columns; the network takes {width:,}"
        require(made.width == width, "pipeline", wanted)
        right = about.get("features") == list(made.names)
        require(right, "features", "they must be the columns that the pipeline makes")
        return made


def _categories(text: bytes, names: Sequence[str]) -> tuple[Category, ...]:
    """Return the categories in a model file's text; raise a ValueError if it is malformed."""
    try:
        told = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        told = error
    right = isinstance(told, dict) and list(told) == list(names)
    require(right, "pipeline", "it must be JSON of the categories' values")
    return tuple(Category.restore(name, told[name]) for name in names)


def _median(values: Array) -> float:
    """Return the median; 0 if there are no values."""
    if not len(values):
        return 0.0
    with np.errstate(over="ignore"):
        median = float(np.median(values))
    return median if math.isfinite(median) else 2 * float(np.median(values / 2))
