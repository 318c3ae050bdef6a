"""The command `mlpcore train`.

The model is saved, and reported, as soon as it is trained. Then come the figures and, last, the
picture: a training that has come to its end does not fail for them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mlpcore as mc
from mlpcore.cli import outputs
from mlpcore.cli.messages import on_terminal, printable, reason, say
from mlpcore.cli.recipes import RECIPES, Recipe, require_settings, widths
from mlpcore.cli.report import baselines_of, class_figures, draw, print_table, quantity_figures
from mlpcore.cli.sources import dataset_of, is_table, naming
from mlpcore.engine.plan import human
from mlpcore.io import atomic, kinds
from mlpcore.io.kinds import VACANT, kind
from mlpcore.tables.splits import Dataset
from mlpcore.training.saving import interval

# what scikit-learn and matplotlib raise where they, their fonts, their settings or the disk fail
FAILURES = (
    ImportError, OSError, ValueError, TypeError, RuntimeError, MemoryError, LookupError, AttributeError, ArithmeticError,
)  # fmt: skip
EVERY = "1 epoch"  # a run is saved unless told otherwise


def train(options: argparse.Namespace) -> None:
    """Train on a data set, save the model, report on held-out rows, and draw the learning curve."""
    require_settings(options)
    places = _Places.of(options)
    places.require(_call(options, RECIPES.get(options.data)), options)
    dataset, base = dataset_of(options)
    chosen = {name: value for name in vars(base) if (value := getattr(options, name)) is not None}
    recipe = Recipe(**{**vars(base), **chosen})
    runs: list[_Run] = []
    done: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(kinds.overwriting(options.force))
        stack.enter_context(_saying(done))
        for i in range(options.splits):
            if i:
                say("")
            runs.append(_Run(dataset, recipe, options, options.seed + i))
            if not i:
                call = {**_call(options, recipe), "the data": runs[0].split.digest}
                places.require(call, options)
                places.out.mkdir(
                    parents=True, exist_ok=True
                )  # after everything that is wrong with the input
                stack.enter_context(atomic.claimed(places.model))
                if places.checkpoint:
                    runs[0].keep(places.checkpoint, call, options)
            _complete(runs[i], None if i else places, call, options, done)
    if len(runs) > 1:
        _medians(runs)
    source = "TABLE" if is_table(options.data) else shlex.quote(options.data)
    say(f"to use it: mlpcore predict {shlex.quote(done[0])} {source} --out predictions.csv")
    if runs[0].failed:
        raise OSError("; ".join(runs[0].failed))


@contextlib.contextmanager
def _saying(done: list[str]) -> Iterator[None]:
    """Have an interrupt say which files had been saved, if any."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if done:
            stop.add_note(f"{' and '.join(done)} had been saved")
        raise


def _complete(
    run: _Run,
    places: _Places | None,
    call: outputs.Call,
    options: argparse.Namespace,
    done: list[str],
) -> None:
    """Train, and leave behind what there is to be left, which `done` lists; of splits after the
    first the figures alone.
    """
    run.train()
    if places:
        done.append(str(_saved(run, places.model, call, options.force)))
        say(f"saved {done[0]}" + (f" (seed {run.seed})" if options.splits > 1 else ""))
    with_baselines = options.data == "flights" and not options.no_baselines
    _try("figures", lambda: run.report(with_baselines))
    if places:

        def draw_picture() -> None:
            outputs.require_picture_place(places.picture, call, options.force)
            run.draw(places.picture, places.name, call)

        if _try("picture of the learning curve", draw_picture):
            done.append(str(places.picture))
            say(f"saved {places.picture}")
    del run.split


def _saved(run: _Run, path: Path, call: outputs.Call, force: bool) -> Path:
    """Save a model, under a free name if its place was taken during the training; return where."""
    try:
        outputs.require_model_place(path, call, force)
        run.save(path, call)
    except (ValueError, OSError) as error:
        places = (atomic.numbered(path, number) for number in itertools.count(1))
        path = next(place for place in places if not os.path.lexists(place))
        run.save(path, call)
        run.failed.append(f"{reason(error)}; the model is in {printable(str(path))}")
    return path


def _try(what: str, action: Callable[[], None]) -> bool:
    """Do what a finished training can do without; say why if it fails."""
    try:
        action()
    except FAILURES as error:
        say(f"note: no {what}: {printable(reason(error), 300)}")
        return False
    return True


def _call(options: argparse.Namespace, recipe: Recipe | None) -> dict[str, Any]:
    """Return the options that a run depends on, as far as they are known: those of a table's recipe
    depend on its rows.
    """
    call = {}
    for key in vars(Recipe()):
        value = getattr(options, key)
        if value is None and recipe is not None:
            value = getattr(recipe, key)
        if value is not None:
            call[f"--{key.replace('_', '-')}"] = value
    for key in ("target", "task", "groups", "as", "seed", "memory_limit"):
        call[f"--{key.replace('_', '-')}"] = getattr(options, key)
    return call


@dataclass(frozen=True)
class _Places:
    """The files that a training writes.

    Attributes:
        out: the folder of model and picture.
        name: of the data.
        checkpoint: None where the run is not saved meanwhile.
    """

    out: Path
    name: str
    model: Path
    picture: Path
    checkpoint: Path | None

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Places:
        """Return the places that a call means."""
        out, name = Path(options.out), Path(options.data).stem
        checkpoint = None
        if options.checkpoint or options.every or options.resume:
            if options.checkpoint == "-":
                raise ValueError("--checkpoint: '-' is no file name; name a file")
            if options.splits > 1:
                raise ValueError(
                    "--checkpoint, --every and --resume are for one run; leave out --splits"
                )
            checkpoint = Path(options.checkpoint or out / f"{name}.checkpoint.safetensors")
        return cls(out, name, out / f"{name}.safetensors", out / f"{name}.png", checkpoint)

    def require(self, call: outputs.Call, options: argparse.Namespace) -> None:
        """Raise an error that names the place and what is there, if something would be lost that
        --force does not give up.
        """
        outputs.require_folder(self.out, f"--out {printable(str(self.out))}")
        others = {"the data are": options.data}
        for argument, path, what in (
            ("the model", self.model, "the model goes"), ("the picture", self.picture, "the picture goes"),
            ("--checkpoint", self.checkpoint, ""),
        ):  # fmt: skip
            if path is not None:
                outputs.require_distinct(argument, path, others)
                others[what] = str(path)
        outputs.require_model_place(self.model, call, options.force)
        outputs.require_picture_place(self.picture, call, options.force)
        if self.checkpoint is not None:
            interval(options.every or EVERY)
            name, folder = f"--checkpoint {printable(str(self.checkpoint))}", self.checkpoint.parent
            if not folder.exists() and folder != self.out:
                raise FileNotFoundError(
                    f"{name}: the folder {printable(str(folder))} does not exist"
                )
            outputs.require_folder(folder, name)
            _require_checkpoint_place(self.checkpoint, call, options.resume, options.force)


def _require_checkpoint_place(path: Path, call: outputs.Call, resume: bool, force: bool) -> None:
    """Raise a ValueError unless a run that is to begin may replace what is there, or one to resume
    can go on from it.
    """
    found = kind(path)
    name = f"--checkpoint {printable(str(path))}"
    if found.name == "folder":
        raise IsADirectoryError(f"{name}: is a folder; name a file")
    if not force:
        outputs.require_writable(path, found)
    if found.name not in ("checkpoint", "unfinished"):
        if found.name not in VACANT and (resume or not force):
            remedy = (
                "name another file"
                if resume
                else "name another file, or write over it with --force"
            )
            raise ValueError(
                f"{name}: there is {found.text}, not a checkpoint of mlpcore train; {remedy}"
            )
        return
    before = outputs.saved_call(path)
    other = (
        "it does not say which call began it"
        if before is None
        else outputs.difference(before, call)
    )
    if resume:
        if other:
            raise ValueError(
                f"--resume: {printable(str(path))}: {other}; call it as before, or with --force "
                "alone to begin anew"
            )
    elif not force and found.name == "unfinished":
        advice = "--resume goes on with it, --force begins anew"
        raise ValueError(f"{name}: there is an unfinished run ({found.where}); {advice}")
    elif not force and other:
        raise ValueError(
            f"{name}: there is the checkpoint of another call: {other}; name another file, or "
            "write over it with --force"
        )


@dataclass(frozen=True)
class _Checkpoint:
    """The place of a run's checkpoints, and how often it is saved there.

    Attributes:
        before: of the file that was there when the run began; None if there was none.
    """

    path: Path
    every: str
    before: tuple[int, ...] | None

    @classmethod
    def at(cls, path: Path, every: str) -> _Checkpoint:
        """Return the checkpoint of a run that begins now."""
        return cls(path, every, _identity(path))

    @property
    def written(self) -> bool:
        """Return whether this run has been saved."""
        return _identity(self.path) not in (None, self.before)


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


class _Run:
    """One split of a data set: train, report, save.

    Attributes:
        failed: the errors that did not end the work.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe, options: argparse.Namespace, seed: int):
        self.dataset, self.recipe, self.seed, self.quiet = dataset, recipe, seed, options.quiet
        with naming(options.data):
            self.split = dataset.split(seed)
        self.regression = not dataset.class_names
        X, Y = self.split.test
        sizes = [
            X.shape[1],
            *widths(recipe.hidden, "--hidden"),
            Y.shape[1] if self.regression else len(dataset.class_names),
        ]
        output = "identity" if self.regression else "softmax"
        self.net = mc.MLP(sizes, recipe.activation, output, seed=seed, device=options.device)
        loss = "squared_error" if self.regression else "cross_entropy"
        rows = self.split.counts[0]
        rate = mc.Cosine(recipe.learning_rate, recipe.epochs * -(-rows // recipe.batch))
        optimizer = mc.AdamW(rate, weight_decay=recipe.weight_decay)
        self.trainer = mc.Trainer(
            self.net, loss, optimizer, memory_limit=options.memory_limit, seed=seed
        )
        self.plan = self.trainer.plan(
            min(recipe.batch, rows), rows, True
        )  # also says whether the limit can be kept
        self.checkpoint: _Checkpoint | None = None
        self.failed: list[str] = []
        self.history: dict[str, list[float]] = {}
        self.results: dict[str, dict[str, float]] = {}

    def keep(self, path: Path, call: outputs.Call, options: argparse.Namespace) -> None:
        """Save the run meanwhile, and go on from what was saved, if asked to and there is
        something.
        """
        self.checkpoint = _Checkpoint.at(path, options.every or EVERY)
        if options.resume and self.checkpoint.before and kind(path).name != "empty":
            self.trainer = mc.Trainer.load(path, options.device)
            self.net, unfinished = self.trainer.net, self.trainer.unfinished
            say(
                f"{path}: "
                + (f"goes on {unfinished}" if unfinished else "the run had come to its end")
            )
        self.trainer.about = {"call": dict(call)}

    def train(self) -> None:
        """Fit, and say how it went."""
        counts = ", ".join(
            f"{n:,} {p}"
            for n, p in zip(self.split.counts, ("training", "validation", "test"), strict=True)
        )
        say(f"seed {self.seed}: {counts} rows{printable(self.split.description)}")
        used = set(self.split.preparation.about.get("columns", self.dataset.feature_names))
        for name in self.dataset.feature_names:
            if name not in used:
                say(
                    f"{printable(name, 60)} is left out: no value of it is in enough training rows "
                    "to get a column"
                )
        say(repr(self.net))
        began = time.perf_counter()
        complete = (
            self.checkpoint is not None
            and bool(self.trainer.history)
            and not self.trainer.unfinished
        )
        done = self.trainer.progress.step
        self.history = self.trainer.history if complete else self._fit()
        seconds = time.perf_counter() - began
        losses = self.history["validation_loss"]
        seen = min(self.recipe.batch, self.split.counts[0]) * (self.trainer.progress.step - done)
        pace = "" if complete else f"{seconds:.1f} s, {seen / max(seconds, 1e-9):,.0f} rows/s; "
        say(
            f"best epoch {int(np.argmin(losses)) + 1} of {len(losses)}; {pace}"
            f"the engine's arrays take {human(self.plan.total_bytes)}{_peak()}"
        )
        self.seconds = seconds

    def _fit(self) -> dict[str, list[float]]:
        kept = self.checkpoint
        fit = partial(
            self.trainer.fit,
            *self.split.training,
            epochs=self.recipe.epochs,
            batch_size=self.recipe.batch,
            validation=self.split.validation,
            early_stopping=mc.EarlyStopping(self.recipe.patience),
            progress=not self.quiet and on_terminal(),  # a log keeps every frame
        )
        try:
            return fit(checkpoint=kept.path, every=kept.every) if kept else fit()
        except OSError as error:
            left = self.trainer._unfinished
            if left is None or not left[0].ended:
                raise
            self.failed.append(reason(error))
            return fit()  # nothing is left to do but to give the history
        except (KeyboardInterrupt, SystemExit) as stop:
            if kept and kept.written:
                where = kind(kept.path).where or "at the end"
                stop.add_note(
                    f"stopped {where}, saved in {kept.path}; the same command with --resume goes "
                    "on from there"
                )
            else:
                stop.add_note("nothing had been saved")
            raise

    def report(self, baselines: bool) -> None:
        """A table of figures on the test rows, ours first."""
        X, Y = self.split.test
        prediction = self.net.predict(X)
        if self.regression:
            assert self.split.scale is not None
            answers, scale = self.split.answers, self.split.scale
            self.results["mlpcore"] = {
                **quantity_figures(prediction, answers, scale),
                "seconds": self.seconds,
            }
            self.results["mean only"] = quantity_figures(np.zeros_like(Y), answers, scale)
        else:
            self.results["mlpcore"] = {**class_figures(prediction, Y), "seconds": self.seconds}
            if baselines:
                for name, model, more in baselines_of(self.split.validation):
                    say(f"fitting {name}, to compare")
                    began = time.perf_counter()
                    model.fit(*self.split.training, **more)
                    seconds = time.perf_counter() - began
                    self.results[name] = {
                        **class_figures(model.predict_proba(X), Y),
                        "seconds": seconds,
                    }
            shares = np.bincount(self.split.sample, minlength=prediction.shape[1]) / len(
                self.split.sample
            )
            self.results["class shares only"] = class_figures(np.tile(shares, (len(Y), 1)), Y)
        print_table(f"{len(Y):,} test rows", self.results)

    def save(self, path: Path, call: outputs.Call) -> None:
        """Write the model with all that `predict` needs, and the call that made it."""
        tensors = self.split.preparation.tensors
        if self.split.scale:
            tensors |= {
                f"target {name}": tensor for name, tensor in self.split.scale.tensors.items()
            }
        about = {
            "features": self.dataset.feature_names, "classes": self.dataset.class_names, "labels": self.dataset.labels,
            "loss": self.trainer.loss.name, "target": self.dataset.target, "call": call, **self.split.preparation.about,
        }  # fmt: skip
        self.net.save(path, tensors=tensors, about=about)

    def draw(self, path: Path, name: str, call: outputs.Call) -> None:
        """Draw the learning curve as a picture, which notes the call."""
        title = f"{printable(name, 40)}: {'-'.join(map(str, self.net.sizes))}, batch {self.recipe.batch}, seed {self.seed}"
        score = "r2" if self.regression else "accuracy"
        draw(
            path,
            title,
            self.history,
            "squared error" if self.regression else "cross-entropy",
            score,
            call,
        )


def _peak() -> str:
    """Return in words how much memory the process had at its peak, where the system counts it."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return f", the process {human(peak)} at its peak"


def _medians(runs: list[_Run]) -> None:
    names = list(runs[0].results)
    keys = {name: list(runs[0].results[name]) for name in names}
    medians = {
        n: {k: float(np.median([run.results[n][k] for run in runs])) for k in keys[n]}
        for n in names
    }
    print_table(f"medians, {len(runs)} splits", medians)
