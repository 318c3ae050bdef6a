"""The command `mlpcore`: train, predict, export, check, plan, info."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mlpcore as mc
from mlpcore import data, labels
from mlpcore.checkpoint import Checkpoints
from mlpcore.core import activations, losses
from mlpcore.core.errors import cut, listed, shown
from mlpcore.core.optimizers import Optimizer
from mlpcore.formats import model_file
from mlpcore.formats.atomic import replacing
from mlpcore.training.plan import human

Array = NDArray[Any]


@dataclass(frozen=True)
class Recipe:
    """Settings that suit a data set; each can be overruled on the command line."""

    hidden: str = "64,64"
    activation: str = "relu"
    epochs: int = 30
    batch: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    patience: int = 5


RECIPES = {
    "flights": Recipe(hidden="128,64", epochs=6, batch=512, weight_decay=1.0, patience=6),
    "digits": Recipe(hidden="256", epochs=60, batch=32, learning_rate=2e-3, weight_decay=0.5, patience=20),
}


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    train = command(
        "train",
        _train,
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

    predict = command("predict", _predict, "Apply a trained model to the rows of a data set.")
    predict.add_argument("model", help="a .safetensors file of mlpcore train")
    predict.add_argument("data", help="a table (the target may be missing), an .npz file with an array X, flights or digits")
    predict.add_argument("--out", default="predictions.csv", metavar="FILE", help="a CSV file (default: %(default)s)")

    export = command("export", _export, "Write a trained model as ONNX; of a table, the network without the table's pipeline.")
    export.add_argument("model", help="a .safetensors file of mlpcore train")
    export.add_argument("onnx", help="the file to write, e.g. model.onnx")

    check = command("check", _check, "Check the gradient of a model by central differences.")
    check.add_argument("model", help="a .safetensors file")
    check.add_argument("data", nargs="?", help="a table, an .npz file, flights or digits; without it, random rows")
    check.add_argument("--rows", type=int, default=256, help="so many rows (default: %(default)s)")

    plan = command("plan", _plan, "Print every array of a training step before any is allocated.")
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

    command("info", _info, "Print device, BLAS and versions.")
    return parser


# -- train -------------------------------------------------------------------------------------------------------------


def _is_table(name: str) -> bool:
    return Path(name).suffix.lower() in (".csv", ".tsv", ".parquet", ".pq")


def _load(name: str, target: bool = True, task: str | None = None) -> data.Dataset:
    if name == "flights":
        return data.load_flights()
    if name == "digits":
        return data.load_digits()
    if not name.endswith(".npz") and not Path(name).exists():
        raise ValueError(f"data {name!r} is neither 'flights' nor 'digits' nor a .csv, .tsv, .parquet or .npz file")
    return data.load_npz(name, target, task)


def _refuse_folder(name: str) -> None:
    if name not in RECIPES and Path(name).is_dir():
        raise ValueError(f"data {name!r} is a folder; the command line reads one file (in Python, mc.Parquet reads folders)")


def _dataset(options: argparse.Namespace) -> tuple[data.Dataset, Recipe]:
    """What to train on, with a recipe that suits it; says what it is."""
    _refuse_folder(options.data)
    if _is_table(options.data):
        return _table_dataset(options)
    for argument in ("target", "groups", "as", "stream"):
        if getattr(options, argument):
            raise ValueError(f"--{argument} is for tables (.csv, .tsv, .parquet); {options.data!r} is none")
    if options.task and options.data in RECIPES:
        raise ValueError(f"--task is for tables and .npz files; {options.data} has classes")
    started = time.perf_counter()
    dataset = _load(options.data, task=options.task)
    rows, columns = dataset.X.shape
    seconds = time.perf_counter() - started
    print(f"{options.data}: {rows:,} rows, {columns} columns, {_kind(dataset)}; read in {seconds:.1f} s")
    if dataset.note:
        print(f"Y: {dataset.note}")
    return dataset, RECIPES.get(options.data, Recipe())


def _kind(dataset: data.Dataset) -> str:
    names = dataset.class_names
    return f"{len(names)} classes ({_some(names)})" if names else "a quantity (regression)"


def _table_dataset(options: argparse.Namespace) -> tuple[data.Dataset, Recipe]:
    from mlpcore import tables  # not at import: pandas and pyarrow
    from mlpcore.big_tables import is_too_big, load

    if not options.target:
        raise ValueError(f"{options.data}: say which column to predict: --target COLUMN")
    wishes = {}
    for wish in getattr(options, "as"):
        column, equals, kind = str(wish).rpartition("=")  # of --as=-- argparse makes an empty list
        if not equals:
            raise ValueError(f"--as takes COLUMN=KIND, such as zip=category; got {wish!r}")
        wishes[column] = kind
    table: tables.Table
    if options.stream or is_too_big(options.data):
        table = load(options.data, options.target, options.task, options.groups, wishes)
        source = f", read in pieces; columns as told from {len(table.X):,} of them"
    else:
        table = tables.load(options.data, options.target, options.task, options.groups, wishes)
        source = ""
    if table.dropped:
        what = f"{'no' if table.infinite < table.dropped else 'an infinite'} {cut(table.target)}"
        part = f" ({table.infinite:,} of them an infinite one)" if 0 < table.infinite < table.dropped else ""
        source += f"; {table.dropped:,} more {_have(table.dropped)} {what}{part} and are not used"
    note = f"\n  {table.note}" if table.note else ""
    print(f"{options.data}: {table.rows:,} rows{source}\nto predict: {cut(table.target)}, {_kind(table)}{note}\nfrom:")
    print(tables.describe(table.columns))
    return table, _suited(table.rows)


def _some(names: Sequence[str]) -> str:
    return listed(names, 6)


def _suited(rows: int) -> Recipe:
    """For a table: a small net, small batches and many epochs where there are few rows (docs/tables.md)."""
    batch = min(512, max(16, 1 << (rows // 50).bit_length()))
    epochs = min(300, max(20, 3000 * batch // max(rows, 1)))
    hidden = "64" if rows < 5000 else "128,64"
    return Recipe(hidden, epochs=epochs, batch=batch, learning_rate=2e-3, weight_decay=1.0, patience=max(5, epochs // 5))


def _widths(text: str, argument: str) -> list[int]:
    try:
        return [] if text == "none" else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{argument} must be widths such as 128,64; got {text!r}") from None


def _train(options: argparse.Namespace) -> None:
    mc.core.inputs.positive_integer(options.splits, "--splits")
    mc.core.inputs.seed(options.seed, "--seed")
    if Path(options.out).suffix.lower() in (".safetensors", ".png", ".csv"):
        raise ValueError(f"--out is a folder, where the model and the picture go; got {options.out!r}")
    dataset, base = _dataset(options)
    chosen = {name: getattr(options, name) for name in vars(base) if getattr(options, name) is not None}
    recipe = Recipe(**{**vars(base), **chosen})
    for argument in ("epochs", "batch"):
        mc.core.inputs.positive_integer(getattr(recipe, argument), f"--{argument}")
    name = Path(options.data).stem
    out = Path(options.out)
    saves = bool(options.checkpoint or options.every or options.resume)
    if saves and options.splits > 1:
        raise ValueError("--checkpoint, --every and --resume are for one run; leave out --splits")
    model, picture = out / f"{name}.safetensors", out / f"{name}.png"
    runs: list[_Run] = []
    for i in range(options.splits):
        if i:
            print()
        runs.append(_Run(dataset, recipe, options, options.seed + i))
        _make_folder(out)  # before the work, and after everything that is wrong with the input
        if saves:
            path = Path(options.checkpoint or out / f"{name}.checkpoint.safetensors")
            _require_other(
                "--checkpoint", path, {"the model goes": model, "the picture goes": picture, "the data are": options.data}
            )
            runs[i].keep(path, options)
        runs[i].train()
        runs[i].report(baselines=options.data == "flights" and not options.no_baselines)
        if not i:
            runs[0].save(model)
            runs[0].draw(picture, name)
        del runs[i].split
    if len(runs) > 1:
        _medians(runs)
    which = f" (seed {options.seed})" if len(runs) > 1 else ""
    print(f"saved {model} and {picture}{which}")
    print(f"to use it: mlpcore predict {model} {'TABLE' if _is_table(options.data) else options.data} --out predictions.csv")


def _limit(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _require_other(argument: str, path: Path, others: dict[str, str | Path]) -> None:
    """Raise a ValueError if writing there would replace what another file is for."""
    for what, other in others.items():
        if path.resolve() == Path(other).resolve():
            raise ValueError(f"{argument} {path} is where {what}; name another file")


def _make_folder(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"--out {out}: the folder cannot be written")


@dataclass(frozen=True)
class _Checkpoint:
    """Where a run is saved meanwhile; a file beside it holds its call, so that another call does not go on with it."""

    path: Path
    every: str
    call: dict[str, Any]

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def begin(self) -> None:
        """Make room for a new run: nothing of an older one is left to go on from; but what is no checkpoint is not touched."""
        if self.path.exists() and not self._holds_run():
            raise ValueError(f"--checkpoint {self.path}: there is a file that is no checkpoint; name another one")
        for path in (self.path, self.note):
            path.unlink(missing_ok=True)
        self.note.write_text(json.dumps(self.call, indent=1))

    def _holds_run(self) -> bool:
        try:
            return "trainer" in model_file.read(self.path)[0]
        except ValueError:  # another format; or a damaged checkpoint, whose note is still there
            return self.note.exists()

    def load(self, device: str) -> mc.Trainer | None:
        """The trainer to go on with; None if there is none. ValueError where the call was another."""
        if not self.path.exists():
            return None
        try:
            before = json.loads(self.note.read_text())
        except (OSError, ValueError):
            raise ValueError(f"--resume: {self.note} is missing or damaged: it says what {self.path} is a run of") from None
        for name, value in json.loads(json.dumps(self.call)).items():
            if before.get(name) != value:
                what = f"was {before.get(name)!r} and is {value!r}" if name.startswith("--") else "are others"
                raise ValueError(f"--resume: {name} {what}; call it as before, or without --resume to begin anew")
        return mc.Trainer.load(self.path, device)


class _Run:
    """One split of a data set: train, report, save."""

    def __init__(self, dataset: data.Dataset, recipe: Recipe, options: argparse.Namespace, seed: int):
        self.dataset, self.recipe, self.seed, self.quiet = dataset, recipe, seed, options.quiet
        self.split = dataset.cut(seed, recipe.batch)
        self.regression = not dataset.class_names
        X, Y = self.split.test
        sizes = [X.shape[1], *_widths(recipe.hidden, "--hidden"), Y.shape[1] if self.regression else len(dataset.class_names)]
        output = "identity" if self.regression else "softmax"
        self.net = mc.MLP(sizes, recipe.activation, output, seed=seed, device=options.device)
        loss = "squared_error" if self.regression else "cross_entropy"
        rows = self.split.counts[0]
        rate = mc.Cosine(recipe.learning_rate, recipe.epochs * -(-rows // recipe.batch))
        optimizer = mc.AdamW(rate, weight_decay=recipe.weight_decay)
        self.trainer = mc.Trainer(self.net, loss, optimizer, memory_limit=options.memory_limit, seed=seed)
        self.plan = self.trainer.plan(min(recipe.batch, rows), rows, True)  # also says whether the limit can be kept
        self.checkpoint: _Checkpoint | None = None
        self.history: dict[str, list[float]] = {}
        self.results: dict[str, dict[str, float]] = {}

    def keep(self, path: Path, options: argparse.Namespace) -> None:
        """Save the run meanwhile, and go on from what was saved, if asked to and there is something."""
        call = {f"--{key.replace('_', '-')}": value for key, value in vars(self.recipe).items()}
        for key in ("target", "task", "groups", "as", "seed", "memory_limit"):
            call[f"--{key.replace('_', '-')}"] = getattr(options, key)
        call["the data"] = self.split.digest
        every = options.every or "1 epoch"
        Checkpoints(path, every)  # whether both are possible
        self.checkpoint = _Checkpoint(path, every, call)
        trainer = self.checkpoint.load(options.device) if options.resume else None
        if trainer is None:
            self.checkpoint.begin()
            return
        self.trainer, self.net = trainer, trainer.net
        print(f"{path}: " + (f"goes on {trainer.unfinished}" if trainer.unfinished else "the run had come to its end"))

    def train(self) -> None:
        """Fit, and say how it went."""
        counts = ", ".join(f"{n:,} {p}" for n, p in zip(self.split.counts, ("training", "validation", "test"), strict=True))
        print(f"seed {self.seed}: {counts} rows{self.split.said}")
        used = set(self.split.preparation.about.get("columns", self.dataset.feature_names))
        for name in self.dataset.feature_names:
            if name not in used:
                print(f"{cut(name)} is left out: no value of it is in enough training rows to get a column")
        print(repr(self.net), flush=True)
        began = time.perf_counter()
        complete = self.checkpoint is not None and bool(self.trainer.history) and not self.trainer.unfinished
        done = self.trainer.progress.step
        self.history = self.trainer.history if complete else self._fit()
        seconds = time.perf_counter() - began
        losses = self.history["validation_loss"]
        seen = min(self.recipe.batch, self.split.counts[0]) * (self.trainer.progress.step - done)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        pace = "" if complete else f"{seconds:.1f} s, {seen / seconds:,.0f} rows/s; "
        print(
            f"best epoch {int(np.argmin(losses)) + 1} of {len(losses)}; {pace}"
            f"the engine's arrays take {human(self.plan.total_bytes)}, the process {human(peak)} at its peak"
        )
        self.seconds = seconds

    def _fit(self) -> dict[str, list[float]]:
        kept = self.checkpoint
        try:
            return self.trainer.fit(
                *self.split.training,
                epochs=self.recipe.epochs,
                batch_size=self.recipe.batch,
                validation=self.split.validation,
                early_stopping=mc.EarlyStopping(self.recipe.patience),
                progress=not self.quiet and sys.stderr.isatty(),  # a log file would get every frame of the bar
                checkpoint=kept.path if kept else None,
                every=kept.every if kept else "1 epoch",
            )
        except (KeyboardInterrupt, SystemExit):
            if kept and kept.path.exists():
                print("the same command with --resume goes on from there", file=sys.stderr)
            raise

    def report(self, baselines: bool) -> None:
        """A table of figures on the test rows, ours first."""
        X, Y = self.split.test
        prediction = self.net.predict(X)
        if self.regression:
            assert self.split.scale is not None
            answers, scale = self.split.answers, self.split.scale
            self.results["mlpcore"] = {**_errors(prediction, answers, scale), "seconds": self.seconds}
            self.results["mean only"] = _errors(np.zeros_like(Y), answers, scale)
        else:
            self.results["mlpcore"] = {**_figures(prediction, Y), "seconds": self.seconds}
            if baselines:
                for name, model, more in _baselines(self.split.validation):
                    print(f"fitting {name}, to compare", flush=True)
                    began = time.perf_counter()
                    model.fit(*self.split.training, **more)
                    seconds = time.perf_counter() - began
                    self.results[name] = {**_figures(model.predict_proba(X), Y), "seconds": seconds}
            shares = np.bincount(self.split.sample, minlength=prediction.shape[1]) / len(self.split.sample)
            self.results["class shares only"] = _figures(np.tile(shares, (len(Y), 1)), Y)
        _table(f"{len(Y):,} test rows", self.results)

    def save(self, path: Path) -> None:
        """The model with what `predict` needs: how its input is made, and names."""
        tensors = self.split.preparation.tensors
        if self.split.scale:
            tensors |= {f"target {name}": tensor for name, tensor in self.split.scale.tensors.items()}
        about = {
            "features": self.dataset.feature_names, "classes": self.dataset.class_names, "labels": self.dataset.labels,
            "loss": self.trainer.loss.name, "target": self.dataset.target, **self.split.preparation.about,
        }  # fmt: skip
        self.net.save(path, tensors=tensors, about=about)

    def draw(self, path: Path, name: str) -> None:
        """The learning curve as a picture."""
        plt = _pyplot()
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        epochs = np.arange(1, len(self.history["loss"]) + 1)
        best = int(np.argmin(self.history["validation_loss"]))
        score = "validation_r2" if self.regression else "validation_accuracy"
        axes[0].plot(epochs, self.history["loss"], "o-", ms=3, label="training rows")
        axes[0].plot(epochs, self.history["validation_loss"], "o-", ms=3, label="held-out validation rows")
        axes[0].set_ylabel("squared error" if self.regression else "cross-entropy")
        axes[1].plot(epochs, self.history[score], "o-", ms=3, color="C1", label="held-out validation rows")
        axes[1].set_ylabel(score.removeprefix("validation_"))
        for axis in axes:
            axis.axvline(epochs[best], color="grey", lw=0.8, ls="--", label="weights kept")
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend()
        figure.suptitle(f"{name}: {'-'.join(map(str, self.net.sizes))}, batch {self.recipe.batch}, seed {self.seed}")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _figures(p: Array, Y: Array) -> dict[str, float]:
    """AUC (two classes), accuracy and log loss of class probabilities (m, classes)."""
    from sklearn.metrics import log_loss, roc_auc_score

    scores = {"AUC": float(roc_auc_score(Y, p[:, 1]))} if p.shape[1] == 2 and len(np.unique(Y)) == 2 else {}
    p = p.astype(np.float64)
    p /= p.sum(axis=1, keepdims=True)
    return {**scores, "accuracy": float(np.mean(p.argmax(1) == Y)), "log loss": log_loss(Y, p, labels=range(p.shape[1]))}


def _errors(Z: Array, Y: Array, scale: data.Standardizer) -> dict[str, float]:
    """Return R2, averaged over the outputs, and RMSE of standardised predictions (m, k), against the targets as they were."""
    truth = scale.exactly(Y)  # in units of the deviation, where differences have the most digits
    squares, spread = np.mean(np.square(truth - Z), axis=0), truth.var(axis=0)
    with np.errstate(all="ignore"):
        r2 = np.mean(np.where(spread > 0, 1 - squares / spread, np.nan))
    largest = scale.scale.max()
    return {"R2": float(r2), "RMSE": float(largest * np.sqrt(np.mean(squares * np.square(scale.scale / largest))))}


def _figure(name: str, value: float) -> str:
    """Return a figure as text; an RMSE has the size of its target."""
    return f"{value:.4f}" if name != "RMSE" or 0.1 <= value < 1e5 or not value else f"{value:.4g}"


def _baselines(validation: tuple[Array, Array]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, model and further arguments of `fit` of what the network is compared with, each tuned a little."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    boosting = HistGradientBoostingClassifier(
        learning_rate=0.15, max_iter=80, min_samples_leaf=200, l2_regularization=10, max_features=0.3, max_bins=63,
        early_stopping=True, random_state=0,
    )  # fmt: skip
    return [
        ("logistic regression", LogisticRegression(C=0.01, max_iter=300), {}),
        ("hist gradient boosting", boosting, {"X_val": validation[0], "y_val": validation[1]}),
    ]


def _table(title: str, results: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(key for figures in results.values() for key in figures))
    print(f"\n{title:<24}" + "".join(f"{column:>11}" for column in columns))
    for name, figures in results.items():
        texts = {c: f"{value:.1f}" if c == "seconds" else _figure(c, value) for c, value in figures.items()}
        cells = [f"{texts.get(c, ''):>11}" for c in columns]
        print(f"{name:<24}" + "".join(cells).rstrip())


def _medians(runs: list[_Run]) -> None:
    names = list(runs[0].results)
    keys = {name: list(runs[0].results[name]) for name in names}
    medians = {n: {k: float(np.median([run.results[n][k] for run in runs])) for k in keys[n]} for n in names}
    _table(f"medians, {len(runs)} splits", medians)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError('the picture needs matplotlib: pip install "mlpcore[cli]"') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# -- the other commands ------------------------------------------------------------------------------------------------


def _load_with(path: str) -> tuple[mc.MLP, dict[str, Array], dict[str, Any]]:
    """As `MLP.load_with`; ValueError where its notes are none, or name no loss that there is."""
    net, tensors, about = mc.MLP.load_with(path)
    if not isinstance(about, dict):
        raise ValueError(f"{path!r}: its notes must be names and values; got {shown(about)}")
    if not data.is_text(json.dumps(about, ensure_ascii=False)):
        raise ValueError(f"{path!r}: its notes hold text that UTF-8 cannot")
    if about.get("loss") is not None:
        try:
            losses.resolve(about["loss"], f"{path!r}: loss")
        except (TypeError, ValueError) as error:
            raise ValueError(cut(error, 500)) from None
    return net, tensors, about


def _require_fitting(path: str, net: mc.MLP, tensors: dict[str, Array], about: dict[str, Any]) -> Any:
    """Return what makes the network's input; ValueError where a note or a scale does not fit."""

    def texts(values: Any) -> bool:
        return isinstance(values, list) and all(map(data.is_text, values))

    classes: Any = about["classes"]
    features: Any = about.get("features")
    kinds = labels.KINDS
    try:
        data.require_format(about)
        fits = texts(classes) and len(set(classes)) == len(classes) in (0, net.sizes[-1])
        data.require(fits, "classes", f"{net.sizes[-1]:,} different names, or none")
        data.require(about.get("labels") in (kinds if classes else ("", *kinds)), "labels", f"one of {', '.join(kinds)}")
        data.require(about.get("loss") is not None, "loss", "the name of a loss")
        data.require(texts(features) and len(features) == net.sizes[0], "features", f"{net.sizes[0]:,} names")
        data.require(data.is_text(about.get("target")), "target", "the name of a column")
        if not classes:
            data.Standardizer.restore(tensors, net.sizes[-1], "target ")
        if "pipeline" not in tensors:
            return data.Standardizer.restore(tensors, net.sizes[0])
        from mlpcore import tables

        return tables.Transformer.restore(tensors, about, net.sizes[0])
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


@dataclass(frozen=True)
class _Model:
    """What `mlpcore train` saved."""

    net: mc.MLP
    tensors: dict[str, Array]
    about: dict[str, Any]
    preparation: Any

    @classmethod
    def load(cls, path: str) -> _Model:
        net, tensors, about = _load_with(path)
        if "classes" not in about or not ({"mean", "scale"} <= set(tensors) or "pipeline" in tensors):
            raise ValueError(f"{path!r} holds a network without its standardisation: it is not from 'mlpcore train'")
        return cls(net, tensors, about, _require_fitting(path, net, tensors, about))

    @property
    def scale(self) -> data.Standardizer | None:
        """Of the target; None for classes."""
        if self.about["classes"]:
            return None
        return data.Standardizer(*(self.tensors[f"target {name}"] for name in ("mean", "scale", "rest")))

    def rows(self, name: str, target: bool) -> tuple[Array, data.Truth | None]:
        """Return the network's input of every row, and its target if there is one; with `target` there must be one."""
        _refuse_folder(name)
        classes, kind, column = self.about["classes"], self.about["labels"], self.about["target"]
        if "pipeline" not in self.tensors:
            dataset = _load(name, target=False)
            if dataset.X.shape[1] != self.net.sizes[0]:
                raise ValueError(f"data {name!r} has {dataset.X.shape[1]} columns; the model takes {self.net.sizes[0]}")
            X = self.preparation.apply(dataset.X)
            if dataset.Y is None:
                truth = data.load_truth(name, len(X), classes, kind, self.net.sizes[-1])
            else:  # flights, digits
                truth = data.Truth.of_names(np.array(dataset.class_names, object)[dataset.Y], classes) if classes else None
            if target and truth is None:
                raise ValueError(f"data {name!r} has no target Y that the model could be checked on")
            return X, truth
        if not _is_table(name):
            raise ValueError(f"data {name!r}: the model takes a table (.csv, .tsv, .parquet)")
        from mlpcore import tables

        frame, table, remarks = self.preparation.read(name, [column] if classes else [])
        for remark in remarks:
            print(f"note: {remark}")
        X = self.preparation.apply(frame)
        if column in table.column_names:
            return X, tables.truth(table.column(column), classes, kind)
        if target:
            raise ValueError(f"data {name!r} has no column {shown(column)}, the target")
        return X, None


def _predict(options: argparse.Namespace) -> None:
    model = _Model.load(options.model)
    X, truth = model.rows(options.data, target=False)
    Z = model.net.predict(X)
    classes = model.about["classes"]
    target = Path(options.out)
    _require_other("--out", target, {"the model is": options.model, "the data are": options.data})
    if target.is_dir():
        raise IsADirectoryError(f"--out {options.out}: is a folder; name a file")
    with replacing(target) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", newline="")
        writer = csv.writer(file)
        if classes:
            writer.writerow(["prediction", *(f"p({name})" for name in classes)])
            writer.writerows([classes[row.argmax()], *(f"{p:.6f}" for p in row)] for row in Z)
        else:
            assert model.scale is not None
            writer.writerow([f"prediction {i}" for i in range(Z.shape[1])] if Z.shape[1] > 1 else ["prediction"])
            writer.writerows(model.scale.invert(Z).tolist())  # in all digits that float64 has
        file.flush()
        file.detach()  # else it would close the file before it is on the disk
    print(f"{len(Z):,} predictions written to {target}")
    if truth is not None:
        column = f"its column {cut(model.about['target'])}" if "pipeline" in model.tensors else "its Y"
        print(f"against {column}: " + "\n  ".join(_against(model, Z, truth)))


def _against(model: _Model, Z: Array, truth: data.Truth) -> list[str]:
    """Return the lines that say the figures of predictions, of how many rows, and what became of the others."""
    count, Z = len(truth.values), Z[truth.rows]
    such = f", such as {truth.such[:60]!r}" if truth.such else ""
    others = [f"{_rows(truth.missing)} {_have(truth.missing)} no value"] if truth.missing else []
    if model.scale and truth.wrong:
        others.append(f"{_rows(truth.wrong)} {_have(truth.wrong)} no finite number{such}")
    left_out = f"; {' and '.join(others)}: not counted" if others else ""
    if not count:
        return [f"no figures, since no row has a {'number' if model.scale else 'label'}{left_out}"]
    of = f"of {_rows(count)}" if count == len(truth.rows) else f"on {count:,} of {_rows(len(truth.rows))}"
    if model.scale:
        return [f"{_said(_errors(Z, truth.values, model.scale))} {of}{left_out}"]
    known = truth.values >= 0
    figures = _figures(Z[known], truth.values[known]) if known.any() else {}
    if not truth.wrong:
        return [f"{_said(figures)} {of}{left_out}"]
    accuracy = np.mean(Z.argmax(1) == truth.values)
    wrong = f"{truth.wrong:,} {_have(truth.wrong)} a label that the model does not know{such}: counted as wrong"
    lines = [f"accuracy {accuracy:.4f} {of}; {wrong}{left_out}"]
    if figures:
        lines.append(f"of the {_rows(int(known.sum()))} with a label that it knows: {_said(figures)}")
    return lines


def _rows(count: int) -> str:
    return f"{count:,} row" + ("s" if count != 1 else "")


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _said(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {_figure(name, value)}" for name, value in figures.items())


def _export(options: argparse.Namespace) -> None:
    from mlpcore.export import export

    if importlib.util.find_spec("onnx") is None:
        raise ImportError('export needs the package onnx: pip install "mlpcore[cli,onnx]"')
    model = _Model.load(options.model)
    export(options.model, options.onnx)
    if "pipeline" in model.tensors:
        print(f"{options.onnx}, the network alone: X takes the {model.preparation.width} columns that the pipeline makes")
        print("(standardised numbers and ones for categories), in this order:")
        for number, name in enumerate(model.preparation.names):
            print(f"  {number:>4}  {name}")
    else:
        names = model.about.get("features", ())
        print(
            f"{options.onnx}: X takes the {model.net.sizes[0]} columns as they are ({_some(names)}), standardisation included"
        )
        _say_rounding(names, model.tensors["mean"], model.tensors["scale"], "X")
    classes = model.about["classes"]
    if not classes:
        outputs = ["the target"] if model.net.sizes[-1] == 1 else [f"output {i}" for i in range(model.net.sizes[-1])]
        _say_rounding(outputs, model.tensors["target mean"], model.tensors["target scale"], "Z")
    print("Z holds " + (f"the probabilities of {_some(classes)}" if classes else "the predictions, in the units of the target"))


def _say_rounding(names: Sequence[str], mean: Array, scale: Array, end: str) -> None:
    """Say where float32, which an ONNX file's ends are in, has too few digits for columns far from 0."""
    far = np.abs(mean) * np.finfo(np.float32).eps > 1e-3 * scale
    if far.any():
        listed = _some([name for name, lost in zip(names, far, strict=True) if lost])
        print(f"note: {end} is float32, too coarse for {listed}, far from 0 for the spread: figures will be worse than here")


def _check(options: argparse.Namespace) -> None:
    count = mc.core.inputs.positive_integer(options.rows, "--rows")
    rng = np.random.default_rng(0)
    if options.data:
        model = _Model.load(options.model)
        net, loss = model.net, model.about["loss"]
        X, truth = model.rows(options.data, target=True)
        assert truth is not None
        X, Y = X[truth.rows], truth.values
        if not model.scale:
            X, Y = X[Y >= 0], Y[Y >= 0]
        if not len(Y):
            raise ValueError(f"data {options.data!r}: no row has a target that the model knows")
        if len(Y) < len(truth.rows):
            print(f"{len(Y):,} of {_rows(len(truth.rows))} have a target that the model knows; the others are left out")
        rows = rng.permutation(len(Y))[:count]
        X, Y = X[rows], model.scale.apply(Y[rows]) if model.scale else Y[rows]
    else:
        net, _, about = _load_with(options.model)
        last = net.activations[-1]
        assert last is not None
        loss = about.get("loss") or mc.core.losses.matching(last)
        X = rng.standard_normal((count, net.sizes[0]))
        Y = rng.integers(0, net.sizes[-1], count) if loss == "cross_entropy" else rng.random((count, net.sizes[-1]))
    print(f"{net!r}\nloss {loss}, {len(X)} {'rows of ' + options.data if options.data else 'random rows'}, in float64")
    result = mc.check_gradients(net, X, Y, loss)
    print(result)
    if not result.ok:
        raise ValueError(f"the gradient is wrong, worst in {result.worst}")


def _plan(options: argparse.Namespace) -> None:
    net = mc.MLP(_widths(options.sizes, "sizes"), options.activation, options.output, dtype=options.dtype, init="zeros")
    last = net.activations[-1]
    assert last is not None
    optimizers: dict[str, Optimizer] = {
        "sgd": mc.SGD(0.1), "momentum": mc.SGD(0.1, momentum=0.9), "adam": mc.Adam(), "adamw": mc.AdamW(),
        "rmsprop": mc.RMSprop(), "lion": mc.Lion(),
    }  # fmt: skip
    trainer = mc.Trainer(
        net,
        options.loss or mc.core.losses.matching(last),
        optimizers[options.optimizer],
        chunk_rows=options.chunk_rows or "auto",
        memory_limit=options.memory_limit,
        workers=options.workers,
    )
    print(trainer.plan(options.batch))


def _info(options: argparse.Namespace) -> None:
    for key, value in mc.info().items():
        if key == "blas":
            for pool in value:
                threads = f"{pool['architecture']} kernels, {pool['num_threads']} threads"
                print(f"blas: {pool['internal_api']} {pool['version']}, {threads}")
        elif isinstance(value, dict):
            print(f"{key}: " + ", ".join(f"{name} {version}" for name, version in value.items()))
        else:
            print(f"{key}: {value}")


if __name__ == "__main__":
    sys.exit(main())
