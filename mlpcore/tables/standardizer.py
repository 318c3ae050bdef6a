"""Scaling of columns to mean 0 and standard deviation 1, and its storage in model files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlpcore.checks.errors import shown

FORMAT = 1  # version of a model file's notes on its input: docs/tables.md promises to read them all
_CHUNK_ROWS = 16_384


@dataclass(frozen=True)
class Standardizer:
    """The map of each column to mean 0 and standard deviation 1, computed in float64.

    Attributes:
        mean, scale: (n,) float64.
        rest: (n,) float64, the part of the mean lost to float64's rounding; 0 except for
            integers from 2^53 on.
    """

    mean: np.ndarray
    scale: np.ndarray
    rest: np.ndarray | float = 0.0

    @classmethod
    def fit(
        cls,
        X: np.ndarray,
        rows: np.ndarray | None = None,
        alike: bool = False,
        names: Sequence[str] = (),
    ) -> Standardizer:
        """Return the standardizer fitted on the given rows of `X` (m, n), of any real dtype.

        Differences from the first row are summed, in float64 and by chunks of rows, in units of the
        largest difference if need be: an offset costs no digits, and nothing over- or underflows.
        A column that is constant on these rows, up to rounding in its own dtype, gets scale 1.

        Args:
            X: numbers, none of them NaN.
            rows: row numbers; None: all rows.
            alike: True if the columns (pixels) share one mean and one scale.
            names: names of the columns, for the error.

        Raises:
            ValueError: there are no rows, or values of a column differ by more than float64 holds.
        """
        count = len(X) if rows is None else len(rows)
        if X.ndim != 2 or count == 0:
            raise ValueError(
                f"Standardizer.fit takes at least one row of a 2-D X; got X {X.shape} and {count} "
                "rows"
            )
        origin = X[0 if rows is None else rows[0]].astype(np.float64)
        if alike:
            origin[:] = origin[0]
        widest, total = np.zeros(len(origin)), np.zeros(len(origin))
        with np.errstate(over="ignore"):
            for D in _differences(X, rows, origin):
                np.maximum(widest, np.maximum(D.max(axis=0), -D.min(axis=0)), out=widest)
                total += D.sum(axis=0)
        _require_bounded(widest, names)
        if alike:
            widest[:] = widest.max(initial=0)
        unit: np.ndarray | None = None
        if not ((widest == 0) | (widest > 1e-100) & (widest < 1e100)).all():  # squares do not fit
            unit = np.where(widest > 0, np.ldexp(0.5, np.frexp(widest)[1]), 1.0)
            total = sum((D.sum(axis=0) for D in _differences(X, rows, origin, unit)), 0 * total)
        mean, variance = total / count, np.zeros(len(origin))
        for D in _differences(X, rows, origin, unit):
            D -= mean
            variance += np.einsum("ij,ij->j", D, D) / count
        if alike:
            variance = np.full_like(variance, variance.mean() + mean.var())
            mean = np.full_like(mean, mean.mean())
        mean, deviation = (x if unit is None else x * unit for x in (mean, np.sqrt(variance)))
        whole = origin + mean
        rounding = np.finfo(X.dtype).eps if X.dtype.kind == "f" else 0.0
        scale = np.where(deviation <= rounding * np.abs(whole), 1.0, deviation)
        return cls(whole, scale, (origin - whole) + mean)

    def exactly(self, X: np.ndarray) -> np.ndarray:
        """Return (X - mean) / scale as a new (m, n) float64 array; ValueError if n differs."""
        if X.ndim != 2 or X.shape[1] != len(self.mean):
            raise ValueError(f"X has shape {X.shape}; the standardizer takes (m, {len(self.mean)})")
        Z = _minus(X, self.mean)
        Z -= self.rest
        Z /= self.scale
        return Z

    def apply(self, X: np.ndarray) -> np.ndarray:
        """Return (X - mean) / scale as a new (m, n) float32 array.

        Raises:
            ValueError: n differs, or a finite number is too far from the mean for float32.
        """
        Z = np.empty(X.shape, np.float32)
        for start in range(0, max(1, len(X)), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            with np.errstate(over="ignore"):
                Z[part] = self.exactly(X[part])
            bad = ~np.isfinite(Z[part]) & np.isfinite(X[part])
            if bad.any():
                row, column = np.argwhere(bad)[0]
                raise ValueError(
                    f"row {start + row + 1}: {X[start + row, column]} in column {column + 1} is "
                    "too far from the training rows to be standardised in float32"
                )
        return Z

    def invert(self, Z: np.ndarray) -> np.ndarray:
        """Return Z · scale + mean (m, n) in float64, infinite if too large."""
        with np.errstate(all="ignore"):
            return np.asarray(Z.astype(np.float64) * self.scale + self.rest + self.mean)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Mean, scale and rest, for a model file."""
        return {
            "mean": self.mean,
            "scale": self.scale,
            "rest": np.broadcast_to(self.rest, self.mean.shape).copy(),
        }

    @property
    def about(self) -> dict[str, Any]:
        """Format of these tensors in a model file."""
        return {"format": FORMAT}

    @classmethod
    def restore(
        cls, tensors: Mapping[str, np.ndarray], size: int, prefix: str = "", exact: bool = True
    ) -> Standardizer:
        """Return a model file's standardizer of `size` columns, with its rest if `exact`.

        Raises:
            ValueError: a tensor is missing or does not fit; the message names it.
        """
        mean, scale, *rest = (
            read_numbers(tensors, prefix + name, size)
            for name in ("mean", "scale", "rest")[: 2 + exact]
        )
        require(bool((scale > 0).all()), f"{prefix}scale", "it must be positive")
        return cls(mean, scale, *rest)


def _differences(
    X: np.ndarray, rows: np.ndarray | None, origin: np.ndarray, unit: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Yield (X - origin) / unit for chunks of the rows."""
    for start in range(0, len(X) if rows is None else len(rows), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        D = _minus(X[part] if rows is None else X[rows[part]], origin)
        if unit is not None:
            D /= unit
        yield D


def _require_bounded(widest: np.ndarray, names: Sequence[str]) -> None:
    """Raise a ValueError that names the first column whose largest difference is not finite."""
    if not np.isfinite(widest).all():
        column = int(np.argmin(np.isfinite(widest)))
        name = shown(names[column]) if names else column
        wanted = "X must be finite and its values less than 1.8e308 apart"
        raise ValueError(f"{wanted}; column {name} is not")


def _minus(X: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return X - shift in float64; exact for 64-bit integers if float64 holds the difference."""
    with np.errstate(over="ignore"):
        D = X.astype(np.float64)
        D -= shift
    if X.dtype.kind in "iu" and X.dtype.itemsize == 8:
        for column in np.flatnonzero(np.abs(shift) >= 2.0**50):
            near = np.abs(D[:, column]) < 2.0**62  # so that modulo 2^64 changes nothing
            whole = math.floor(shift[column])
            wrapped = X[near, column].astype(np.uint64) - np.uint64(whole % 2**64)
            D[near, column] = wrapped.view(np.int64) - (shift[column] - whole)
    return D


def require(right: bool, field: str, wanted: str) -> None:
    """Raise a ValueError that names the field of a model file unless `right`."""
    if not right:
        raise ValueError(
            f"its {field!r} is missing or does not fit: {wanted}. The file is damaged or was "
            "altered; train again"
        )


def require_format(about: Mapping[str, Any]) -> None:
    """Raise a ValueError if only a newer mlpcore can read a model file's notes on its input."""
    version = about.get("format", 1)  # early files of arrays have no format
    require(type(version) is int and version > 0, "format", "it must be a number")
    if version > FORMAT:
        raise ValueError(
            f"its input has format {version}; this mlpcore reads formats up to "
            f"{FORMAT}: upgrade mlpcore"
        )


def read_numbers(tensors: Mapping[str, np.ndarray], name: str, size: int) -> np.ndarray:
    """Return a tensor of a model file: finite numbers (size,) float64."""
    tensor = tensors.get(name)
    fits = (
        tensor is not None
        and tensor.dtype == np.float64
        and tensor.shape == (size,)
        and np.isfinite(tensor).all()
    )
    require(bool(fits), name, f"it must be {size:,} finite numbers in float64")
    return np.asarray(tensor)


def is_unicode(value: object) -> bool:
    """Return True for a text that UTF-8 can hold."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
