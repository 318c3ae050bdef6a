"""A table to train on, and the conversion of it and of other tables to a network's input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks.errors import cut, listed, nearest, shown, unknown
from mlpcore.tables import labels
from mlpcore.tables.arrow import (
    as_frame,
    is_text,
    label_kind,
    pa,
    pc,
    pd,
    plain,
    to_arrays,
    to_frame,
)
from mlpcore.tables.columns import KINDS, decide
from mlpcore.tables.files import SEPARATE, is_csv, map_columns, read_csv, read_table
from mlpcore.tables.pipeline import Column, Pipeline
from mlpcore.tables.splits import Dataset
from mlpcore.tables.targets import decide_task, find_goal, group_codes, is_infinite

Array = NDArray[Any]


@dataclass(frozen=True)
class Table(Dataset):
    """A `Dataset` whose `X` is a frame of the columns in use.

    Numbers are float64 with NaN, texts have None.

    `dropped` counts the rows without a finite target, `infinite` those with an infinite one.
    """

    columns: tuple[Column, ...] = ()
    dropped: int = 0
    infinite: int = 0

    @property
    def rows(self) -> int:
        """Number of rows that have a target."""
        return len(self.X)

    def prepare(self, rows: Array) -> Transformer:
        """Return the transformer fitted on these training rows."""
        return Transformer.fit(self.X, rows, self.columns)


def load_table(
    path: str | Path,
    target: str,
    task: str | None = None,
    groups: str | None = None,
    wishes: Mapping[str, str] | None = None,
) -> Table:
    """Return a table with its target; drop and count rows without a target.

    Args:
        path: a `.csv`, `.tsv` or Parquet file.
        target: the column to predict.
        task: "classification" or "regression"; None infers it from the target: text, booleans and
            at most 20 different whole numbers are classes, other numbers a quantity.
        groups: a column whose values must not be split between training and test.
        wishes: {column: "number", "category" or "out"}, to override the automatic choice.

    Raises:
        FileNotFoundError, OSError, ValueError: the message names the file or the column, what was
            expected and what was found.
    """
    as_text = [name for name, wish in (wishes or {}).items() if wish == "category"]
    table = read_table(path, as_text if groups is None else [*as_text, groups])
    require_columns(path, table.column_names, target, groups, wishes or {})
    if not is_csv(Path(path)):
        return make_table(table, path, target, task, groups, wishes)
    values = plain(table.column(target))
    told, note = decide_task(values, task)
    if is_text(values.type) or (told == "regression" and not pa.types.is_temporal(values.type)):
        return make_table(table, path, target, task, groups, wishes)
    infinite = is_infinite(values)  # text is never infinite
    texts = read_csv(Path(path), [target], only=[target]).column(target)
    texts = pc.if_else(pa.array(infinite), pa.scalar(None, texts.type), texts)
    table = map_columns(table, lambda field, values: texts if field.name == target else values)
    taken = make_table(table, path, target, told, groups, wishes)
    return replace(
        taken, note=note if taken.labels == "number" else "", infinite=int(infinite.sum())
    )


def make_table(
    read: pa.Table,
    path: str | Path,
    target: str,
    task: str | None,
    groups: str | None,
    wishes: Mapping[str, str] | None,
    numbering: Array | None = None,
) -> Table:
    """Return the result of `load_table` for a table that has already been read.

    `path` is used in messages; `numbering` (m,) holds the rows' numbers in the file.
    """
    wishes = wishes or {}
    names = read.column_names
    require_columns(path, names, target, groups, wishes)
    goal = find_goal(read.column(target), target, task)
    numbering = (np.arange(len(read)) if numbering is None else numbering)[goal.rows]
    read = read.filter(pa.array(goal.rows))
    codes = None if groups is None else group_codes(read.column(groups), groups)
    columns = tuple(
        Column(name, "", "groups")
        if name == groups
        else decide(name, read.column(name), wishes.get(name), numbering)
        for name in names
        if name != target
    )
    frame = as_frame(read, [column for column in columns if column.kind])
    if not frame.shape[1]:
        why = (
            "; ".join(f"{cut(c.name)} is left out ({c.note})" for c in columns[:5])
            or "there is no other column"
        )
        raise ValueError(f"{path}: no column is left to predict {shown(target)} from: {why}")
    return Table(
        frame,
        goal.Y,
        tuple(frame.columns),
        goal.classes,
        codes,
        unit=f"groups of {cut(groups)}",
        target=target,
        labels=goal.labels,
        note=goal.note,
        columns=columns,
        dropped=int(np.sum(~goal.rows)),
        infinite=goal.infinite,
    )


def _no_column(where: str, name: str, names: Sequence[str]) -> ValueError:
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        return ValueError(
            f"{where} {shown(name)}: the header is one column, {shown(names[0])}; {SEPARATE}"
        )
    near = nearest(name, names)
    hint = f"; did you mean {shown(near)}?" if near else "."
    there = [*([near] if near else []), *(other for other in names if other != near)]
    return ValueError(f"{where}: there is no column {shown(name)}{hint} There are {listed(there)}")


def require_columns(
    path: str | Path,
    names: Sequence[str],
    target: str,
    groups: str | None,
    wishes: Mapping[str, str],
) -> None:
    """Raise a ValueError if a named column is missing, or has two conflicting uses."""
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


def _unfit(path: str | Path, column: Column, held: str) -> ValueError:
    was = f"it was a {column.kind} in training"
    return ValueError(f"{path}: column {shown(column.name)} holds {held}; {was}")


class Transformer(Pipeline):
    """A `Pipeline` that reads other files with the column kinds of training."""

    def read(
        self, path: str | Path, texts: Sequence[str] = ()
    ) -> tuple[pd.DataFrame, pa.Table, list[str]]:
        """Return another file's frame, its table, and remarks on values not seen in training.

        Each column is read with its kind of training; `texts` names others to read as text if
        the file is text.

        Raises:
            ValueError: a column is missing or is not of its kind; and as `read_table`.
        """
        table = read_table(
            path, [*texts, *(column.name for column in self.columns if column.kind != "number")]
        )
        known = set(table.column_names)
        for column in self.columns:
            if column.name not in known:
                raise _no_column(
                    f"{path}: the model needs a column", column.name, table.column_names
                )
            held = plain(table.column(column.name)).type
            fits = label_kind(held) or pa.types.is_time(held)
            if column.kind == "number":
                fits = label_kind(held) not in ("", "date")
            if not fits:
                raise _unfit(path, column, cut(held))
        arrays = to_arrays(table, self.columns)
        for column, category in self.coded():
            arrays[column.name] = labels.matched(arrays[column.name], category.known)
        for column in self.columns[: len(self.median)]:
            values = plain(table.column(column.name)).drop_null()
            if is_text(values.type) and len(values) and np.isnan(arrays[column.name]).all():
                raise _unfit(
                    path, column, f"no numbers, but text such as {shown(values[0].as_py())}"
                )
        return to_frame(arrays), table, list(self._remarks(arrays, table))

    def _remarks(self, arrays: Mapping[str, Array], table: pa.Table) -> Iterator[str]:
        for column in self.columns[: len(self.median)]:
            lost = (
                int(np.isnan(arrays[column.name]).sum())
                - plain(table.column(column.name)).null_count
            )
            if lost:
                rows = f"{lost:,} row(s) without a finite number"
                yield f"{cut(column.name)}: {rows}, treated as missing"
        for column, category in self.coded():
            known = category.known
            new = [name for name in arrays[column.name].tolist() if name not in known]
            if new:
                such = "no value" if new[0] is None else f"such as {shown(new[0])}"
                values = f"values not seen in training, {such}, in {len(new):,} row(s)"
                as_what = "rare" if category.rare else "none of the known ones"
                yield f"{cut(column.name)}: {values}: treated as {as_what}"
