"""Parquet files as a source of training rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlpcore.checks.errors import cut, listed, nearest, shown
from mlpcore.data.row_groups import Footer, follow_rows, read_group
from mlpcore.data.streams import Block
from mlpcore.data.windows import BLOCK, Source


class Parquet(Source):
    """Parquet files as X and Y: `trainer.fit(mc.Parquet("flights/", target="late"), epochs=3)`.

    Rows are numbered across all files; the files of a folder are sorted by name. Shuffling moves
    whole row groups: write files with groups of about 10,000 rows, or with their rows already
    mixed. Needs pyarrow, whose own memory (a few pages per column) is outside `memory_limit`.

    Args:
        path: a file, a list of files, or a folder, searched for *.parquet with its subfolders;
            names that begin with "." or "_" are skipped.
        target: the column of Y, (m,); a list of k columns makes Y (m, k). Booleans become 0 and 1.
        features: the columns of X. None takes all other columns, in the order of the first file;
            every file must then have the same columns.
        weight: the column of row weights, or None.

    Attributes:
        rows: number of rows of all files together.
        features, target, weight: the columns in use.

    Raises:
        FileNotFoundError: there is no such file, or no Parquet file in the folder.
        TypeError, ValueError: a file is not Parquet; a column is missing, used twice or not numeric
            (categorical columns of numbers are accepted only as the target); or a subfolder is
            named `name=value`. The message names file and column.
        ImportError: pyarrow is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        target: str | Sequence[str],
        features: Sequence[str] | None = None,
        weight: str | None = None,
    ) -> None:
        paths = _paths(path)
        if weight is not None and not isinstance(weight, str):
            raise TypeError(f"weight must be the name of a column; got {shown(weight)}")
        labels, weights = _names("target", target), (() if weight is None else (weight,))
        columns = None if features is None else _names("features", features)
        for name, count in Counter([*(columns or ()), *labels, *weights]).items():
            if count > 1:
                raise ValueError(
                    f"column {shown(name)} must be used once, in features, target or weight"
                )
        self.target, self.weight = target, weight
        self.rows = 0
        self.starts: list[int] = []
        self._groups: list[tuple[Path, int]] = []  # file and row group at each start
        types: dict[str, np.dtype[Any]] = {}
        for file in paths:
            footer = Footer.read(file, _where(file))
            if columns is None:
                known = labels + weights
                columns = tuple(name for name in footer.schema.names if name not in known)
            self._columns = columns, labels, weights  # of X, Y and row weights
            self._check_columns(file, footer, types, paths[0], features is None)
            for group, rows in enumerate(footer.rows):
                self.starts.append(self.rows)
                self._groups.append((file, group))
                self.rows += rows
        self.features = columns or ()
        for argument, missing, what in (
            ("features", not self.features, "column of"),
            ("target", not labels, "column of"),
            ("path", not self.rows, "rows in"),
        ):
            if missing:
                raise ValueError(f"{argument}: no {what} {path!r}")
        X, Y = (
            np.empty((0, len(names)), np.result_type(*(types[name] for name in names)))
            for names in (self.features, labels)
        )
        Y = Y.astype(np.uint8) if Y.dtype == np.bool_ else Y
        w = None if weight is None else np.empty(0, types[weight])
        self.like = Block(X, Y[:, 0] if isinstance(target, str) else Y, w)
        self._at_once = max(1, 4 * BLOCK // (len(types) * 8))  # rows that pyarrow decodes at a time

    def _check_columns(
        self,
        file: Path,
        footer: Footer,
        types: dict[str, np.dtype[Any]],
        first: Path,
        all_columns: bool,
    ) -> None:
        """Raise an error unless a file has the columns in use, of the same types as the others."""
        used = dict.fromkeys(name for names in self._columns for name in names)
        fields: dict[str, list[Any]] = {}
        for field in footer.schema:
            fields.setdefault(field.name, []).append(field.type)
        for name in fields if all_columns else ():
            if name not in used:
                raise ValueError(
                    f"column {shown(name)} of {str(file)!r} is not in {str(first)!r}; "
                    "pass features=[…] without it"
                )
        for name in used:
            dtype = _numeric(fields, name, file)
            if name in footer.categories and name not in self._columns[1]:
                raise TypeError(
                    f"column {shown(name)} of {str(file)!r} must hold numbers; it holds "
                    "categories: encode them, or pass features=[…] without it"
                )
            if types.setdefault(name, dtype) != dtype:
                raise ValueError(
                    f"column {shown(name)} is {types[name]} in {str(first)!r} and {dtype} in "
                    f"{str(file)!r}"
                )

    def __repr__(self) -> str:
        return (
            f"Parquet({self.rows:,} rows, {len(self.features)} features, target={self.target!r}, "
            f"weight={self.weight!r})"
        )

    def reader(self) -> Callable[[int, int, Block], None]:
        """Return a function that reads rows start … stop; sequential reads are cheap."""
        return follow_rows(self, self._read_group, self._copy, lambda k: _where(self._groups[k][0]))

    def _read_group(self, k: int) -> Iterator[Any]:
        """Yield the record batches of a row group."""
        file, group = self._groups[k]
        return read_group(file, _where(file), self._at_once, group, sum(self._columns, ()))

    def _copy(self, batch: Any, row: int, block: Block) -> None:
        """Copy the columns of a record batch, whose first row has this number, into a block."""
        for names, part in zip(self._columns, block, strict=True):
            for i, name in enumerate(names):
                column = batch.column(name)
                if column.null_count:
                    at = row + int(column.is_null().to_numpy(zero_copy_only=False).argmax())
                    raise ValueError(
                        f"column {shown(name)} must have a number in every row; row {at} holds null"
                    )
                assert part is not None
                place = part if part.ndim == 1 else part[:, i]
                place[...] = column.to_numpy(zero_copy_only=False)


def _paths(path: Any) -> list[Path]:
    """Return the files that `path` names."""
    given = [path] if isinstance(path, str | os.PathLike) else path
    if not isinstance(given, list | tuple) or not all(
        isinstance(file, str | os.PathLike) for file in given
    ):
        raise TypeError(f"path must be a file, a folder or a list of files; got {shown(path)}")
    paths = [Path(file) for file in given]
    if len(paths) == 1 and paths[0].is_dir():
        paths = _files(paths[0])
    if not paths:
        raise FileNotFoundError(f"path: there is no *.parquet file in {path!r}")
    return paths


def _files(folder: Path) -> list[Path]:
    """Return the Parquet files in a folder and its subfolders, sorted by name."""
    found = []
    for file in sorted(folder.rglob("*.parquet")):
        parts = file.relative_to(folder).parts
        if any(part.startswith((".", "_")) for part in parts) or not file.is_file():
            continue  # files that writers keep for themselves
        for part in parts[:-1]:
            if "=" in part:
                raise ValueError(
                    f"path: the files in {str(folder)!r} lack the column that their folder name "
                    f"{part!r} stands for: write it into the files, or pass a list of files to "
                    "train without it"
                )
        found.append(file)
    return found


def _names(argument: str, value: Any) -> tuple[str, ...]:
    """Return the column names of an argument that is one name or a list."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{argument} must be the name of a column or a list of names; got {shown(value)}"
        )
    return tuple(names)


def _where(path: Path) -> str:
    return f"path: {str(path)!r}"


def _numeric(fields: Mapping[str, Sequence[Any]], name: str, path: Path) -> Any:
    """Return the dtype of a numeric column; `fields` holds the Arrow types by column name."""
    if len(fields.get(name, ())) != 1:
        near = None if name in fields else nearest(name, fields)
        hint = f"did you mean {shown(near)}? Its" if near else "its"
        raise ValueError(
            f"{str(path)!r} must have one column {shown(name)}; {hint} columns: {listed(fields)}"
        )
    from pyarrow import types

    (kind,) = fields[name]
    if not (types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind)):
        raise TypeError(
            f"column {shown(name)} of {str(path)!r} must hold numbers; it holds {cut(kind)}; "
            "choose others with features=[…]"
        )
    return np.dtype(kind.to_pandas_dtype())
