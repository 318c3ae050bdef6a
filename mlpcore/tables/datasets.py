"""Data sets of the command line, NumPy archives and digits, and the targets to compare with.

Rows are samples. Nothing here needs a network.
"""

from __future__ import annotations

import contextlib
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from mlpcore.checks.errors import cut, line, listed, shown
from mlpcore.tables import labels
from mlpcore.tables.splits import Dataset
from mlpcore.tables.standardizer import is_unicode

_INSTALL = 'pip install "mlpcore[cli]"'


_DEFLATED = 1032  # the highest compression ratio of deflate
_DAMAGES = (  # raised by zipfile and NumPy for a damaged archive
    ValueError,
    OSError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
)
MOST_CLASSES = 100  # an archive's Y with more different whole numbers is a quantity


def load_digits() -> Dataset:
    """Return scikit-learn's handwritten digits: X (1797, 64), pixels from 0 to 1; ten classes."""
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
    """Return the data set of a NumPy archive: `X` (m, n) numbers and, if `target`, `Y` of m rows.

    `Y` (m,) of booleans, strings or few different integers (at most 100, and at most about a fifth
    of the rows) becomes class indices, with the labels in order as `class_names`; other numbers
    (m,) or (m, k) are kept, as (m, k). A `task`, "classification" or "regression", overrides this
    choice. With `target=False` no `Y` is read, and `Dataset.Y` is None. Pickles are never loaded.

    Raises:
        FileNotFoundError, ValueError: the message names the file, what was expected and what was
            found.
    """
    if not Path(path).is_file():  # a device may have no end
        what = "is not a regular file" if Path(path).exists() else "no such file"
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
            task = "classification" if are_classes(count, len(Y), MOST_CLASSES) else "regression"
            note = describe_decision(count, task)
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
        if not is_unicode(name):
            raise ValueError(
                f"{path}: Y: the label {shown(name)} is not valid Unicode, so a model "
                "file cannot store it"
            )
    return Dataset(X, labels.codes(found, classes), names, classes, labels=kind, note=note)


def are_classes(values: int, rows: int, most: int) -> bool:
    """Return True if whole numbers are classes: at most `most`, with about five rows each."""
    return values <= min(most, rows / 5 + 2)


def describe_decision(values: int, task: str) -> str:
    """Return a sentence on how whole numbers are treated, and how to override it."""
    taken, other = (
        ("classes", "a quantity") if task == "classification" else ("a quantity", "classes")
    )
    option = "regression" if task == "classification" else "classification"
    return f"{values:,} different whole numbers: treated as {taken} (for {other}: --task {option})"


@dataclass(frozen=True)
class Truth:
    """A file's target in a model's terms.

    Attributes:
        values: class indices (m,) int64 of `rows`, -1 for a label that the model does not know; or
            numbers (m, k).
        rows: (all,) bool, True for the rows that have a label or a finite number.
        missing: number of rows without a value.
        wrong: number of labels that the model does not know, or of values that are not finite
            numbers.
        such: the first such value, as text.
    """

    values: np.ndarray
    rows: np.ndarray
    missing: int = 0
    wrong: int = 0
    such: str = ""

    @classmethod
    def of_names(cls, names: np.ndarray, classes: Sequence[str]) -> Truth:
        """Return the truth for label names (m,), None for a row without one."""
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
    """Return the target of an archive, for a model with these classes; None if it has no Y.

    Raises:
        FileNotFoundError, ValueError: as `load_npz`; or Y is not what the model predicts.
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
            f"{path}: Y must be numbers, {outputs} per row, as the model predicts; got "
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
    """Return Y of an archive, which must have this many rows."""
    Y = _read(path, "Y")
    if Y.shape[:1] != (rows,):
        raise ValueError(
            f"{path}: Y must have one entry for each of the {rows} rows of X; got shape {Y.shape}"
        )
    return Y


@contextlib.contextmanager
def _archive(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz archive; turn the errors of a damaged one into a ValueError that names it."""
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except MemoryError:
            raise MemoryError(f"{path}: needs more memory than there is, or is damaged") from None
        except _DAMAGES as error:
            raise ValueError(
                f"{path}: expected an .npz archive of plain arrays (np.savez); this file is "
                f"something else, or damaged: {line(error)}"
            ) from None


def _read(path: str | Path, key: str) -> np.ndarray:
    """Return one array of an .npz archive; raise a ValueError if it has no such plain array."""
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
                    f"{key} cannot be {member.file_size:,} bytes, or is not packed as NumPy does"
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
    if version not in readers:  # NumPy writes another version for non-ASCII field names
        raise ValueError(f"an array in version {version} of NumPy's format, which is not supported")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(
            f"an array of shape {cut(shape)} and {cut(dtype)} has {size - file.tell():,} bytes"
        )


def _numbers(values: np.ndarray, path: str | Path, name: str) -> np.ndarray:
    """Return the values unchanged; raise a ValueError unless all are finite numbers."""
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {name} must be numbers; got dtype {cut(values.dtype)}")
    bad = ~np.isfinite(values)
    if bad.any():
        place = tuple(np.argwhere(bad)[0].tolist())
        raise ValueError(
            f"{path}: {name} must be finite; at (row, column) {place} it is {values[place]}"
        )
    return values
