"""The options of each command, as a table, and their parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import mlpcore as mc
from mlpcore.cli import commands
from mlpcore.cli.messages import printable
from mlpcore.cli.train import train
from mlpcore.core import activations

DTYPES = ["float32", "float64"]
Option = tuple[str, dict[str, Any]]  # a name and the further arguments of `add_argument`


class Command(NamedTuple):
    """A command of `mlpcore`.

    Attributes:
        run: function that runs it, given the options.
        writes: True if its result is a file.
        text: its description in the help.
        options: its options by the title of their group; "" for those without a group.
    """

    run: Callable[[argparse.Namespace], None]
    writes: bool
    text: str
    options: Mapping[str, Sequence[Option]] = {}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a call; exit with status 2 if they are wrong."""
    parser = _Parser("mlpcore", description="Train, use and inspect multilayer perceptrons.")
    parser.add_argument("--version", action="version", version=f"mlpcore {mc.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, writes, text, groups) in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, writes=writes)
        for title, options in groups.items():
            group = command.add_argument_group(title) if title else command
            for option, more in options:
                group.add_argument(option, **more)
    found = parser.parse_args(arguments)
    for name, value in vars(found).items():
        if value == [] and name != "as":  # argparse's value for --hidden=--
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    return found


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are short and cannot control the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, 500))


def _option(name: str, text: str, kind: Any = None, default: Any = None, **more: Any) -> Option:
    """Return an option that takes a value; its help shows a default that is not None."""
    if default is not None:
        text += " (default: %(default)s)"
    return name, {"help": text, "type": kind, "default": default, **more}


def _flag(name: str, text: str) -> Option:
    return name, {"help": text, "action": "store_true"}


def _place(name: str, text: str, **more: Any) -> Option:
    return name, {"help": text, **more}


def _whole(text: str) -> int:
    """Return the whole number in an option's text."""
    try:
        return int(text)
    except ValueError:  # also for more digits than Python converts
        raise argparse.ArgumentTypeError(f"expected a whole number; got {text!r:.60}") from None


def _number(text: str) -> float:
    """Return the number in an option's text."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number; got {text!r:.60}") from None


def _limit(text: str) -> int | str:
    """Return the bytes in an option's text."""
    if len(text) > 60:
        raise argparse.ArgumentTypeError(f"expected bytes, such as '64 MiB'; got {text!r:.60}")
    return int(text) if text.isdecimal() else text


TRAIN = {
    "": [_place("data", "a file such as table.csv, table.parquet or data.npz; or flights, digits")],
    "tables": [
        _option("--target", "the column to predict", metavar="COLUMN"),
        _option(
            "--task",
            "kind of prediction, also for .npz files (default: inferred from the target "
            "and printed)",
            choices=["classification", "regression"],
        ),
        _option(
            "--groups",
            "hold out whole groups of rows: those with the same value in this column",
            metavar="COLUMN",
        ),
        _place(
            "--as",
            "treat a column as a number or category, or leave it out (COLUMN=out); may be repeated",
            action="append",
            default=[],
            metavar="COLUMN=KIND",
        ),
        _flag("--stream", "read a Parquet file in pieces (default: only if memory is short)"),
    ],
    "network and training": [
        _option("--hidden", "widths of the hidden layers, e.g. 128,64; 'none' for a linear model"),
        _option(
            "--activation",
            f"activation of the hidden layers (default: relu): {', '.join(activations.names())}",
        ),
        _option(
            "--epochs",
            "maximum number of passes over the rows (default: 30; flights 6, digits 60, "
            "tables by size)",
            _whole,
        ),
        _option(
            "--batch",
            "rows per mini-batch (default: 256; flights 512, digits 32, tables by size)",
            _whole,
        ),
        _option(
            "--learning-rate",
            "initial learning rate of a cosine schedule (default: 0.001; digits, tables 0.002)",
            _number,
        ),
        _option(
            "--weight-decay",
            "weight decay of AdamW (default: 0.01; flights and tables 1, digits 0.5)",
            _number,
        ),
        _option(
            "--patience", "stop after this many epochs without a better validation loss", _whole
        ),
        _option(
            "--seed", "random seed for the split, the initial weights and the shuffling", _whole, 0
        ),
        _option("--splits", "train with this many seeds and report the medians", _whole, 1),
        _option("--device", "auto, cpu, cuda or cuda:1", default="auto"),
        _option(
            "--memory-limit",
            "maximum bytes of the engine's arrays, e.g. '64 MiB'",
            _limit,
            metavar="BYTES",
        ),
        _flag("--no-baselines", "flights only: skip the comparison with scikit-learn's models"),
    ],
    "files": [
        _place(
            "--out",
            "folder for the model and its picture (default: here)",
            default=".",
            metavar="FOLDER",
        ),
        _option(
            "--checkpoint",
            "save the unfinished run here (default with --every or --resume: a file in --out)",
            metavar="FILE",
        ),
        _option(
            "--every",
            "how often to save it, e.g. '5 min', '1000 steps' or '1 epoch' (the default)",
            metavar="SPAN",
        ),
        _flag(
            "--resume",
            "continue from the checkpoint, if there is one; all other options must be as in the "
            "first call",
        ),
        _flag(
            "--force",
            "overwrite existing files, such as the model of another call; without --resume also an "
            "unfinished run",
        ),
        _flag("--quiet", "show no progress bar (default: shown on a terminal)"),
    ],
}
PREDICT = [
    _place("model", "a .safetensors file of mlpcore train"),
    _place(
        "data",
        "a table (the target may be missing), an .npz file with an array X, flights or digits",
    ),
    _place(
        "--out",
        "the CSV file to write (default: %(default)s); - is standard output",
        default="predictions.csv",
        metavar="FILE",
    ),
    _flag("--force", "overwrite FILE even if it holds something else"),
]
EXPORT = [
    _place("model", "a .safetensors file of mlpcore train"),
    _place("onnx", "the file to write, e.g. model.onnx"),
    _flag("--force", "overwrite the file even if it holds something else"),
]
CHECK = [
    _place("model", "a .safetensors file"),
    _place("data", "a table, an .npz file, flights or digits (default: random rows)", nargs="?"),
    _option("--rows", "number of rows to check on", _whole, 256),
]
PLAN = [
    _place("sizes", "widths from input to output, e.g. 784,512,10"),
    _option("--batch", "rows per batch", _whole, 256),
    _option("--activation", "activation of the hidden layers", default="relu"),
    _option("--output", "activation of the output layer", default="softmax"),
    _option("--loss", "loss (default: the one that matches the output)"),
    _option("--optimizer", "optimizer", default="adamw", choices=list(commands.OPTIMIZERS)),
    _option("--dtype", "number type", default="float32", choices=DTYPES),
    _option(
        "--chunk-rows", "most rows per worker at a time (default: chosen automatically)", _whole
    ),
    _option("--workers", "most threads that share a batch (default: chosen automatically)", _whole),
    _option(
        "--memory-limit", "maximum bytes of all arrays, e.g. '64 MiB'", _limit, metavar="BYTES"
    ),
]
INFO = [
    _flag("--compile", "compile the CPU's passes now, for this and later processes"),
    _option("--dtype", "number type of --compile", default="float32", choices=DTYPES),
]
COMMANDS = {
    "train": Command(
        train,
        True,
        "Train on a table (CSV or Parquet), an .npz file with arrays X and Y, or "
        "the built-in data sets flights and digits; report on held-out rows.",
        TRAIN,
    ),
    "predict": Command(
        commands.predict,
        True,
        "Apply a trained model to the rows of a data set.",
        {"": PREDICT},
    ),
    "export": Command(
        commands.export,
        True,
        "Write a trained model as ONNX; for a table, the network without the table's pipeline.",
        {"": EXPORT},
    ),
    "check": Command(
        commands.check,
        False,
        "Check the gradient of a model against central differences.",
        {"": CHECK},
    ),
    "plan": Command(
        commands.plan,
        False,
        "Print every array that a training step needs, without allocating any.",
        {"": PLAN},
    ),
    "info": Command(commands.info, False, "Print device, BLAS and versions.", {"": INFO}),
}
