"""The data that a command names: reading it and describing it."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mlpcore.checks.errors import listed
from mlpcore.cli.messages import printable, say
from mlpcore.cli.recipes import RECIPES, Recipe, suited
from mlpcore.cli.report import have
from mlpcore.tables.datasets import load_digits, load_npz
from mlpcore.tables.flights import load_flights
from mlpcore.tables.splits import Dataset


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Prefix a ValueError raised in the block with the name of the data."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{name}:"):
            raise
        raise ValueError(f"{name}: {error}") from None


def is_table(name: str) -> bool:
    """Return True if a file's name is that of a table."""
    return Path(name).suffix.lower() in (".csv", ".tsv", ".parquet", ".pq")


def load(name: str, target: bool = True, task: str | None = None) -> Dataset:
    """Return the data set flights, digits or an .npz file."""
    if name == "flights":
        return load_flights()
    if name == "digits":
        return load_digits()
    if not name.endswith(".npz") and not Path(name).exists():
        raise ValueError(
            f"data {name!r}: expected a .csv, .tsv, .parquet or .npz file, 'flights' or 'digits'"
        )
    return load_npz(name, target, task)


def refuse_folder(name: str) -> None:
    """Raise a ValueError if the data is a folder."""
    if name not in RECIPES and Path(name).is_dir():
        raise ValueError(
            f"data {name!r} is a folder; the command line reads one file (in Python, mc.Parquet "
            "reads folders)"
        )


def require_target(options: argparse.Namespace) -> None:
    """Raise a ValueError if the data is a table and no target is named."""
    if is_table(options.data) and not options.target:
        raise ValueError(f"{options.data}: name the column to predict with --target COLUMN")


def read_dataset(options: argparse.Namespace) -> tuple[Dataset, Recipe]:
    """Return the data to train on and a recipe that suits them; print a description."""
    if is_table(options.data):
        return _read_table(options)
    for argument in ("target", "groups", "as", "stream"):
        if getattr(options, argument):
            raise ValueError(
                f"--{argument} is for tables (.csv, .tsv, .parquet); got {options.data!r}"
            )
    if options.task and options.data in RECIPES:
        raise ValueError(f"--task is for tables and .npz files; {options.data} has classes")
    started = time.perf_counter()
    dataset = load(options.data, task=options.task)
    rows, columns = dataset.X.shape
    seconds = time.perf_counter() - started
    say(
        f"{options.data}: {rows:,} rows, {columns} columns, {_kind(dataset)}; read in "
        f"{seconds:.1f} s"
    )
    if dataset.note:
        say(f"Y: {dataset.note}")
    return dataset, RECIPES.get(options.data, Recipe())


def _kind(dataset: Dataset) -> str:
    names = dataset.class_names
    return f"{len(names)} classes ({some(names)})" if names else "a quantity (regression)"


def _read_table(options: argparse.Namespace) -> tuple[Dataset, Recipe]:
    from mlpcore.tables.columns import describe  # not at import: pandas, pyarrow
    from mlpcore.tables.streamed import is_too_big, stream_table
    from mlpcore.tables.table import load_table

    wishes = {}
    for wish in getattr(options, "as"):
        column, equals, kind = str(wish).rpartition("=")  # argparse turns --as=-- into a list
        if not equals:
            raise ValueError(f"--as takes COLUMN=KIND, such as zip=category; got {wish!r}")
        if column in wishes:
            raise ValueError(f"--as names the column {column!r} twice")
        for argument in ("target", "groups"):
            if column == getattr(options, argument):
                raise ValueError(
                    f"--as {wish}: the column is that of --{argument}, which is no input"
                )
        wishes[column] = kind
    streams = options.stream or is_too_big(options.data)
    read = stream_table if streams else load_table
    table = read(options.data, options.target, options.task, options.groups, wishes)
    source = ""
    if streams:
        source = f", read in pieces; column kinds decided from {len(table.X):,} of them"
    target = printable(table.target, 60)
    if table.dropped:
        what = f"no {target}" if table.infinite < table.dropped else f"an infinite {target}"
        part = (
            f" (infinite in {table.infinite:,} of them)"
            if 0 < table.infinite < table.dropped
            else ""
        )
        source += f"; {table.dropped:,} more {have(table.dropped)} {what}{part}; these are not used"
    note = f"\n  {printable(table.note)}" if table.note else ""
    say(
        f"{options.data}: {table.rows:,} rows{source}\nto predict: {target}, "
        f"{_kind(table)}{note}\nfrom:"
    )
    shown = [
        replace(column, name=printable(column.name, 60), note=printable(column.note))
        for column in table.columns
    ]
    say(describe(shown))
    return table, suited(table.rows)


def some(names: Sequence[str]) -> str:
    """Return the first few names as text."""
    return listed(map(printable, names), 6)
