"""The target column: its task, its values, and the rows that have a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks.errors import cut, shown
from mlpcore.tables import labels
from mlpcore.tables.arrow import (
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
from mlpcore.tables.datasets import Truth, are_classes, describe_decision

Array = NDArray[Any]

# a whole-number target with more values is a quantity (for archives 100: their dtype is a clue)
MOST_CLASSES = 20


@dataclass(frozen=True)
class Goal:
    """The target of a table, for the rows that have one."""

    Y: Array
    rows: Array
    classes: tuple[str, ...] = ()
    labels: str = ""
    note: str = ""
    infinite: int = 0


def decide_task(values: pa.ChunkedArray, task: str | None) -> tuple[str, str]:
    """Return the task, inferred from the target if not given, and a note on the inference."""
    if task is not None:
        return task, ""
    if not is_number(values.type):  # a category of numbers is not a number either
        return "classification", ""
    filled = with_target(values)
    numbers = to_numbers(values)[filled]
    if not (numbers == np.rint(numbers)).all():
        return "regression", ""
    known = plain(values).filter(pa.array(filled))
    count = len(np.unique(numbers) if pa.types.is_floating(known.type) else known.unique())
    task = "classification" if are_classes(count, len(known), MOST_CLASSES) else "regression"
    return task, describe_decision(count, task)


def find_goal(values: pa.ChunkedArray, name: str, task: str | None) -> Goal:
    """Return a column as a target; raise a ValueError that explains why it cannot be one."""
    task, note = decide_task(values, task)
    values = plain(values)
    require_answers(values.type, name)
    filled, infinite, numbers = with_target(values), is_infinite(values), to_numbers(values)
    if not filled.any():
        raise ValueError(f"--target {shown(name)} has no value in any row")
    if task == "regression":
        require_numbers(values, name)
        Y = quantities(values, filled)
        if (Y[0] == Y).all():
            raise ValueError(
                f"--target {shown(name)} is {Y[0, 0]:.6g} in every row; nothing to learn"
            )
        return Goal(Y, filled, note=note, infinite=int(infinite.sum()))
    names, kind = to_names(values)
    named = np.array([name is not None for name in names])  # excludes infinite text
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
            hint = (
                f"{good:,} of them are numbers; fix the others, such as {shown(odd)}, for --task "
                "regression"
            )
        raise ValueError(
            f"--target {shown(name)}: {len(classes):,} classes in {len(names):,} rows; {hint}"
        )
    return Goal(labels.codes(names, classes), filled, classes, kind, note, int(infinite.sum()))


def is_infinite(values: pa.ChunkedArray) -> Array:
    """Return a mask (m,) of the plain values that are infinite."""
    if not pa.types.is_floating(values.type):
        return np.zeros(len(values), bool)
    return np.asarray(pc.fill_null(pc.is_inf(values), False).to_numpy())


def require_answers(kind: pa.DataType, name: str) -> None:
    """Raise a ValueError if a target of this type cannot be predicted."""
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    if label_kind(held) in ("", "date"):
        raise ValueError(
            f"--target {shown(name)} holds {cut(held)}; expected numbers, text or booleans"
        )


def without_target(values: pa.ChunkedArray) -> tuple[int, int]:
    """Return the numbers of rows without a target and with an infinite one."""
    values = plain(values)
    return values.null_count, int(is_infinite(values).sum())


def with_target(values: pa.ChunkedArray) -> Array:
    """Return a mask (m,) of the rows with a target that is not infinite."""
    values = plain(values)
    return np.asarray(values.is_valid().to_numpy() & ~is_infinite(values))


def require_numbers(values: pa.ChunkedArray, name: str, first: int = 0) -> None:
    """Raise a ValueError that names the first row whose target is not a number.

    `first` is the number of the values' first row.
    """
    values = plain(values)
    if is_text(values.type):
        wrong = np.flatnonzero(values.is_valid().to_numpy() & np.isnan(to_numbers(values)))
        if len(wrong):
            row, text = first + int(wrong[0]) + 1, str(values[int(wrong[0])])
            raise ValueError(
                f"--target {shown(name)} of a regression must be numbers; row {row} has "
                f"{shown(text)}"
            )


def quantities(values: pa.ChunkedArray, rows: Array) -> Array:
    """Return the numbers of these rows (k, 1): 64-bit integers unchanged, others in float64."""
    values = plain(values)
    if pa.types.is_integer(values.type):
        return np.asarray(values.filter(pa.array(rows)).to_numpy())[:, None]
    return to_numbers(values)[rows, None]


def group_codes(values: pa.ChunkedArray, name: str) -> Array:
    """Return each row's group number (m,) int64."""
    codes, _ = pd.factorize(group_names(values, name))
    return np.asarray(codes, np.int64)


def group_names(values: pa.ChunkedArray, name: str) -> Array:
    """Return the name (m,) of each row's group.

    Raises:
        ValueError: a row has no group, or the column's type has no names.
    """
    if not label_kind(plain(values).type):
        raise ValueError(
            f"--groups {shown(name)} holds {cut(values.type)}; expected numbers, text, booleans or "
            "dates"
        )
    names, _ = to_names(values)
    lost = sum(group is None for group in names)
    if lost:
        raise ValueError(f"--groups {shown(name)} has no value in {lost:,} row(s)")
    return names


def distinct(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the distinct values, without missing ones."""
    return pa.chunked_array([plain(values).unique().drop_null()])


def class_names(values: pa.ChunkedArray) -> tuple[tuple[str, ...], str]:
    """Return the class names in order, and their kind, from all values that occur."""
    names, kind = to_names(values)
    return labels.sort_names({name for name in names if name is not None}, kind), kind


def find_truth(values: pa.ChunkedArray, classes: Sequence[str], kind: str) -> Truth:
    """Return the target of another table, for a model with these classes; () for a quantity.

    Raises:
        ValueError: the column does not hold numbers, text, booleans or dates.
    """
    values = plain(values)
    if not label_kind(values.type):
        raise ValueError(
            f"the target column holds {cut(values.type)}; expected numbers, text, booleans or dates"
        )
    if classes:
        return Truth.of_names(to_names(values, kind)[0], classes)
    filled = values.is_valid().to_numpy()
    rows = filled & np.isfinite(to_numbers(values))
    wrong = filled & ~rows
    such = str(values[int(wrong.argmax())]) if wrong.any() else ""
    return Truth(quantities(values, rows), rows, int(np.sum(~filled)), int(wrong.sum()), such)
