"""The command `mlpcore`: what it can be told, and its exit status."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

import mlpcore as mc
from mlpcore.cli import commands, messages
from mlpcore.cli.messages import complain, printable, reason
from mlpcore.cli.train import train as run_train
from mlpcore.core import activations

TERMINATED = 128 + signal.SIGTERM
ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    MemoryError,
    mc.NonFiniteLoss,
    mc.DeviceUnavailable,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0    done: the files that the command writes are whole. Messages that nobody reads any more do
    not count. 2    a wrong call, input or output; one line on standard error says which 130
    interrupted (SIGINT, Ctrl-C) 141  nobody reads standard output, or the pipe, that the results go
    to 143  terminated (SIGTERM), as SystemExit
    """
    with messages.opened() as output, _ended_by_exception():
        try:
            options = _parsed(arguments)
            options.run(options)
        except BrokenPipeError:
            return 141
        except ERRORS as error:
            complain(f"mlpcore: {printable(reason(error), 2000)}")
            return 2
        except KeyboardInterrupt as stop:
            complain(_ending("interrupted", stop))
            return 130
        except SystemExit as stop:
            if stop.code == TERMINATED:
                complain(_ending("terminated", stop))
            raise
    if output.lost is None or (options.writes and isinstance(output.lost, BrokenPipeError)):
        return 0
    if isinstance(output.lost, BrokenPipeError):
        return 141
    complain(f"mlpcore: standard output takes no more: {reason(output.lost)}")
    return 0 if options.writes else 2


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value == [] and name != "as":  # what argparse makes of --hidden=--
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    return options


def _ending(how: str, stop: BaseException) -> str:
    """Return the line that says how the command ended, and what was saved."""
    return "; ".join(
        [f"mlpcore: {how}", *(printable(note) for note in getattr(stop, "__notes__", ()))]
    )


@contextlib.contextmanager
def _ended_by_exception() -> Iterator[None]:
    """Have SIGTERM end the command like Ctrl-C, by an exception; a handler that somebody else has
    set stays.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(TERMINATED)

    mine = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if mine:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


# -- what it can be told
# -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are short, and do not command the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, 500))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "mlpcore", description="Train multilayer perceptrons, use them, and look inside."
    )
    parser.add_argument("--version", action="version", version=f"mlpcore {mc.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None], writes: bool, text: str
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, writes=writes)
        return sub

    _tell_train(
        command(
            "train", run_train, True,
            "Train on a table (CSV or Parquet), an .npz file with arrays X and Y, flights or "
            "digits; report on held-out rows.",
        )
    )  # fmt: skip

    predict = command(
        "predict", commands.predict, True, "Apply a trained model to the rows of a data set."
    )
    predict.add_argument("model", help="a .safetensors file of mlpcore train")
    predict.add_argument(
        "data",
        help="a table (the target may be missing), an .npz file with an array X, flights or digits",
    )
    predict.add_argument(
        "--out", default="predictions.csv", metavar="FILE",
        help="the CSV file to write (default: %(default)s); - is standard output",
    )  # fmt: skip
    predict.add_argument(
        "--force", action="store_true", help="write over FILE even if it holds something else"
    )

    export = command(
        "export",
        commands.export,
        True,
        "Write a trained model as ONNX; of a table, the network without the table's pipeline.",
    )
    export.add_argument("model", help="a .safetensors file of mlpcore train")
    export.add_argument("onnx", help="the file to write, e.g. model.onnx")
    export.add_argument(
        "--force", action="store_true", help="write over it even if it holds something else"
    )

    check = command(
        "check", commands.check, False, "Check the gradient of a model by central differences."
    )
    check.add_argument("model", help="a .safetensors file")
    check.add_argument(
        "data", nargs="?", help="a table, an .npz file, flights or digits (default: random rows)"
    )
    check.add_argument(
        "--rows", type=_whole, default=256, help="number of rows to check on (default: %(default)s)"
    )

    plan = command(
        "plan",
        commands.plan,
        False,
        "Print every array of a training step, before any is allocated.",
    )
    plan.add_argument("sizes", help="widths from input to output, e.g. 784,512,10")
    plan.add_argument(
        "--batch", type=_whole, default=256, help="rows of a batch (default: %(default)s)"
    )
    plan.add_argument(
        "--activation",
        default="relu",
        help="activation of the hidden layers (default: %(default)s)",
    )
    plan.add_argument(
        "--output", default="softmax", help="activation of the output (default: %(default)s)"
    )
    plan.add_argument(
        "--loss", default=None, help="loss (default: the one that matches the output)"
    )
    plan.add_argument(
        "--optimizer", default="adamw", choices=["sgd", "momentum", "adam", "adamw", "rmsprop", "lion"],
        help="optimizer (default: %(default)s)",
    )  # fmt: skip
    plan.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "float64"],
        help="number type (default: %(default)s)",
    )
    plan.add_argument(
        "--chunk-rows",
        type=_whole,
        help="most rows that a worker takes at a time (default: chosen)",
    )
    plan.add_argument(
        "--workers", type=_whole, help="most threads that share a batch (default: chosen)"
    )
    plan.add_argument(
        "--memory-limit",
        type=_limit,
        metavar="BYTES",
        help="maximum bytes of all arrays, e.g. '64 MiB'",
    )

    command("info", commands.info, False, "Print device, BLAS and versions.")
    return parser


def _tell_train(train: argparse.ArgumentParser) -> None:
    """Add the options of `mlpcore train`."""
    train.add_argument(
        "data", help="a file such as table.csv, table.parquet or data.npz; or flights, digits"
    )
    table = train.add_argument_group("tables")
    table.add_argument("--target", metavar="COLUMN", help="the column to predict")
    table.add_argument(
        "--task", choices=["classification", "regression"],
        help="kind of prediction, also of an .npz file (default: decided from the target, and printed)",
    )  # fmt: skip
    table.add_argument(
        "--groups",
        metavar="COLUMN",
        help="hold out whole groups of rows, those of one value in this column",
    )
    table.add_argument(
        "--as", action="append", default=[], metavar="COLUMN=KIND",
        help="treat a column as number or category, or leave it out (COLUMN=out); may be repeated",
    )  # fmt: skip
    table.add_argument(
        "--stream",
        action="store_true",
        help="read a Parquet file in pieces (default: where memory is short)",
    )
    net = train.add_argument_group("network and training")
    net.add_argument(
        "--hidden", help="widths of the hidden layers, e.g. 128,64; 'none' for a linear model"
    )
    net.add_argument(
        "--activation",
        help=f"activation of the hidden layers (default: relu): {', '.join(activations.names())}",
    )
    net.add_argument(
        "--epochs",
        type=_whole,
        help="maximum passes over the rows (default: 30; flights 6, digits 60, tables by rows)",
    )
    net.add_argument(
        "--batch",
        type=_whole,
        help="rows of a mini-batch (default: 256; flights 512, digits 32, tables by rows)",
    )
    net.add_argument(
        "--learning-rate",
        type=_number,
        help="first learning rate of a cosine schedule (default: 0.001; digits, tables 0.002)",
    )
    net.add_argument(
        "--weight-decay",
        type=_number,
        help="weight decay of AdamW (default: 0.01; flights and tables 1, digits 0.5)",
    )
    net.add_argument(
        "--patience",
        type=_whole,
        help="stop after this many epochs without a better validation loss",
    )
    net.add_argument(
        "--seed", type=_whole, default=0,
        help="random seed for the split, the initial weights and the shuffling (default: %(default)s)",
    )  # fmt: skip
    net.add_argument(
        "--splits",
        type=_whole,
        default=1,
        help="train with this many seeds, and report the medians (default: 1)",
    )
    net.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: %(default)s)"
    )
    net.add_argument(
        "--memory-limit",
        type=_limit,
        metavar="BYTES",
        help="maximum bytes of the engine's arrays, e.g. '64 MiB'",
    )
    net.add_argument(
        "--no-baselines", action="store_true", help="flights: leave out scikit-learn's models"
    )
    files = train.add_argument_group("files")
    files.add_argument(
        "--out",
        default=".",
        metavar="FOLDER",
        help="folder for the model and its picture (default: here)",
    )
    files.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="save the run there meanwhile (default with --every or --resume: in --out)",
    )
    files.add_argument(
        "--every",
        metavar="SPAN",
        help="how often, e.g. '5 min', '1000 steps' or '1 epoch' (the default)",
    )
    files.add_argument(
        "--resume", action="store_true",
        help="continue from the checkpoint, if there is one; all other options must be those it was begun with",
    )  # fmt: skip
    files.add_argument(
        "--force", action="store_true",
        help="write over models and pictures of other calls, and other files; without --resume also over an unfinished run",
    )  # fmt: skip
    files.add_argument(
        "--quiet", action="store_true", help="show no progress bar (default: shown on a terminal)"
    )


def _whole(text: str) -> int:
    """Return an option's whole number."""
    try:
        return int(text)
    except ValueError:  # also of more digits than Python converts
        raise argparse.ArgumentTypeError(f"expected a whole number; got {text!r:.60}") from None


def _number(text: str) -> float:
    """Return an option's number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number; got {text!r:.60}") from None


def _limit(text: str) -> int | str:
    if len(text) > 60:
        raise argparse.ArgumentTypeError(f"expected bytes, such as '64 MiB'; got {text!r:.60}")
    return int(text) if text.isdecimal() else text
