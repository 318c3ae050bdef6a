"""The command `mlpcore`: what it can be told, and its exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import mlpcore as mc
from mlpcore.cli import commands
from mlpcore.cli.train import train as run_train
from mlpcore.core import activations


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 2 for a wrong call or input, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if value == [] and name != "as":  # what argparse makes of --hidden=--
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, mc.NonFiniteLoss, mc.DeviceUnavailable) as error:
        print(f"mlpcore: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mlpcore: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mlpcore", description="Train multilayer perceptrons, and look at how it is done.")
    parser.add_argument("--version", action="version", version=f"mlpcore {mc.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    train = command(
        "train",
        run_train,
        "Train on a table (CSV or Parquet), an .npz file with arrays X and Y, flights or digits; report on held-out rows.",
    )
    train.add_argument("data", help="a file such as table.csv, table.parquet or data.npz; or flights, digits")
    train.add_argument("--target", metavar="COLUMN", help="of a table: the column to predict")
    train.add_argument("--task", choices=["classification", "regression"], help="default: told from the target, and said")
    train.add_argument("--groups", metavar="COLUMN", help="of a table: rows of one value stay together when rows are held out")
    train.add_argument("--stream", action="store_true", help="read a Parquet table in pieces (by itself where memory is short)")
    train.add_argument(
        "--as", action="append", default=[], metavar="COLUMN=KIND",
        help="of a table: take a column as number, category or out (left out); may be repeated",
    )  # fmt: skip
    train.add_argument("--hidden", help="widths of the hidden layers, e.g. 128,64; 'none' for a linear model")
    train.add_argument("--activation", help=f"of the hidden layers (default: relu): {', '.join(activations.names())}")
    train.add_argument(
        "--epochs",
        type=int,
        help="passes over the training rows, at most (default: 30; flights 6, digits 60, tables by their rows)",
    )
    train.add_argument(
        "--batch", type=int, help="rows of a mini-batch (default: 256; flights 512, digits 32, tables by their rows)"
    )
    train.add_argument(
        "--learning-rate", type=float, help="at the start of its cosine (default: 0.001; digits and tables 0.002)"
    )
    train.add_argument("--weight-decay", type=float, help="of AdamW (default: 0.01; flights and tables 1, digits 0.5)")
    train.add_argument("--patience", type=int, help="epochs without a better validation loss before it stops")
    train.add_argument("--seed", type=int, default=0, help="of the split, the initial weights and the row order")
    train.add_argument("--splits", type=int, default=1, help="repeat for so many seeds and report the medians")
    train.add_argument("--out", default=".", metavar="FOLDER", help="where the model and the picture go (default: here)")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    train.add_argument("--memory-limit", type=_limit, metavar="BYTES", help="that the engine's arrays may take, e.g. '64 MiB'")
    train.add_argument(
        "--checkpoint", metavar="FILE", help="save the run there meanwhile (default with --every or --resume: in --out)"
    )
    train.add_argument("--every", metavar="SPAN", help="how often, e.g. '5 min', '1000 steps', '1 epoch' (the default)")
    train.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint, if there is one; the call must be the same"
    )
    train.add_argument("--no-baselines", action="store_true", help="flights: leave out scikit-learn's models")
    train.add_argument("--quiet", action="store_true", help="no progress bar (nor is there one where stderr is no terminal)")

    predict = command("predict", commands.predict, "Apply a trained model to the rows of a data set.")
    predict.add_argument("model", help="a .safetensors file of mlpcore train")
    predict.add_argument("data", help="a table (the target may be missing), an .npz file with an array X, flights or digits")
    predict.add_argument("--out", default="predictions.csv", metavar="FILE", help="a CSV file (default: %(default)s)")

    export = command(
        "export",
        commands.export,
        "Write a trained model as ONNX; of a table, the network without the table's pipeline.",
    )
    export.add_argument("model", help="a .safetensors file of mlpcore train")
    export.add_argument("onnx", help="the file to write, e.g. model.onnx")

    check = command("check", commands.check, "Check the gradient of a model by central differences.")
    check.add_argument("model", help="a .safetensors file")
    check.add_argument("data", nargs="?", help="a table, an .npz file, flights or digits; without it, random rows")
    check.add_argument("--rows", type=int, default=256, help="so many rows (default: %(default)s)")

    plan = command("plan", commands.plan, "Print every array of a training step before any is allocated.")
    plan.add_argument("sizes", help="widths from input to output, e.g. 784,512,10")
    plan.add_argument("--batch", type=int, default=256, help="rows of a batch (default: %(default)s)")
    plan.add_argument("--activation", default="relu")
    plan.add_argument("--output", default="softmax")
    plan.add_argument("--loss", default=None, help="default: the one that matches the output")
    plan.add_argument("--optimizer", default="adamw", choices=["sgd", "momentum", "adam", "adamw", "rmsprop", "lion"])
    plan.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    plan.add_argument("--chunk-rows", type=int, help="at most so many rows at a time and worker (default: chosen)")
    plan.add_argument("--workers", type=int, help="threads with rows of their own (default: chosen)")
    plan.add_argument("--memory-limit", type=_limit, help="e.g. '64 MiB'")

    command("info", commands.info, "Print device, BLAS and versions.")
    return parser


def _limit(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
