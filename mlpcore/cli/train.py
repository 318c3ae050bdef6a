"""The command `mlpcore train`.

The model is saved as soon as it is trained. The figures and the picture come last: if they fail,
the finished training does not.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import mlpcore as mc
from mlpcore.backends.compiled import compiler
from mlpcore.cli import outputs
from mlpcore.cli.messages import on_terminal, printable, reason, say
from mlpcore.cli.places import EVERY, Checkpoint, Places
from mlpcore.cli.recipes import RECIPES, Recipe, require_settings, widths
from mlpcore.cli.report import baseline_models, class_figures, draw, print_table, quantity_figures
from mlpcore.cli.sources import is_table, naming, read_dataset, refuse_folder, require_target
from mlpcore.engine.plan import human
from mlpcore.io import atomic, kinds
from mlpcore.io.kinds import kind
from mlpcore.tables.splits import Dataset

# raised by scikit-learn and matplotlib if they, their fonts, their settings or the disk fail
FAILURES = (
    ImportError,
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    MemoryError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


def train(options: argparse.Namespace) -> None:
    """Train on a data set, save the model, report on held-out rows, draw the learning curve."""
    require_settings(options)
    refuse_folder(options.data)
    require_target(options)
    places = Places.of(options)
    places.require(describe_call(options, RECIPES.get(options.data)), options)
    dataset, base = read_dataset(options)
    chosen = {name: value for name in vars(base) if (value := getattr(options, name)) is not None}
    recipe = Recipe(**{**vars(base), **chosen})
    runs: list[_Run] = []
    done: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(kinds.overwriting(options.force))
        stack.enter_context(_noting_saved(done))
        for i in range(options.splits):
            if i:
                say("")
            runs.append(_Run(dataset, recipe, options, options.seed + i))
            if not i:
                call = {**describe_call(options, recipe), "the data": runs[0].split.digest}
                places.require(call, options)
                # after all checks of the input
                places.out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(atomic.claimed(places.model))
                if places.checkpoint:
                    runs[0].keep(places.checkpoint, call, options)
            _complete(runs[i], None if i else places, call, options, done)
    if len(runs) > 1:
        _print_medians(runs)
    source = "TABLE" if is_table(options.data) else shlex.quote(options.data)
    say(f"to use it: mlpcore predict {shlex.quote(done[0])} {source} --out predictions.csv")
    if runs[0].failed:
        raise OSError("; ".join(runs[0].failed))


@contextlib.contextmanager
def _noting_saved(done: list[str]) -> Iterator[None]:
    """Add a note of the saved files, if any, to an interrupt."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if done:
            stop.add_note(f"{' and '.join(done)} already saved")
        raise


def _complete(
    run: _Run,
    places: Places | None,
    call: outputs.Call,
    options: argparse.Namespace,
    done: list[str],
) -> None:
    """Train and report; if `places` is given, save and draw, and add the files to `done`."""
    run.train()
    if places:
        done.append(str(_save(run, places.model, call, options.force)))
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


def _save(run: _Run, path: Path, call: outputs.Call, force: bool) -> Path:
    """Save a model, under a free name if another file took its place; return the path."""
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
    """Run an optional step of a finished training; print the reason if it fails."""
    try:
        action()
    except FAILURES as error:
        say(f"note: no {what}: {printable(reason(error), 300)}")
        return False
    return True


def describe_call(options: argparse.Namespace, recipe: Recipe | None) -> dict[str, Any]:
    """Return the options that a run depends on; a table's recipe needs its rows."""
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


class _Run:
    """One split of a data set: train, report, save.

    Attributes:
        failed: errors that did not end the work.
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
        # raises if the memory limit is too small
        self.plan = self.trainer.plan(min(recipe.batch, rows), rows, True)
        self.checkpoint: Checkpoint | None = None
        self.failed: list[str] = []
        self.history: dict[str, list[float]] = {}
        self.results: dict[str, dict[str, float]] = {}

    def keep(self, path: Path, call: outputs.Call, options: argparse.Namespace) -> None:
        """Save the run while it trains; with --resume, continue from the saved run."""
        self.checkpoint = Checkpoint.at(path, options.every or EVERY)
        if options.resume and self.checkpoint.before and kind(path).name != "empty":
            self.trainer = mc.Trainer.load(path, options.device)
            self.net, unfinished = self.trainer.net, self.trainer.unfinished
            say(
                f"{path}: "
                + (f"resuming {unfinished}" if unfinished else "the run is already complete")
            )
        self.trainer.about = {"call": dict(call)}

    def train(self) -> None:
        """Fit, and print how it went."""
        counts = ", ".join(
            f"{n:,} {p}"
            for n, p in zip(self.split.counts, ("training", "validation", "test"), strict=True)
        )
        say(f"seed {self.seed}: {counts} rows{printable(self.split.description)}")
        used = set(self.split.preparation.about.get("columns", self.dataset.feature_names))
        for name in self.dataset.feature_names:
            if name not in used:
                say(
                    f"{printable(name, 60)} is left out: none of its values is in enough "
                    "training rows for a column"
                )
        say(repr(self.net))
        began = time.perf_counter()
        complete = (
            self.checkpoint is not None
            and bool(self.trainer.history)
            and not self.trainer.unfinished
        )
        done, (passes, _, compiling) = self.trainer.progress.step, compiler.counts()
        self.history = self.trainer.history if complete else self._fit()
        seconds = time.perf_counter() - began
        losses = self.history["validation_loss"]
        seen = min(self.recipe.batch, self.split.counts[0]) * (self.trainer.progress.step - done)
        early = ", stopped early" if len(losses) < self.recipe.epochs else ""
        made, _, compiled = compiler.counts()
        once = f" (and {compiled - compiling:.1f} s to compile, once)" if made > passes else ""
        seconds -= compiled - compiling
        rate = f"{seen / max(seconds, 1e-9):,.0f} rows/s"
        pace = "" if complete else f"{seconds:.1f} s{once}, {rate}; "
        say(
            f"best epoch {int(np.argmin(losses)) + 1} of {len(losses)}{early}; {pace}"
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
            progress=not self.quiet and on_terminal(),  # a log would keep every frame
        )
        try:
            return fit(checkpoint=kept.path, every=kept.every) if kept else fit()
        except OSError as error:
            if not self.trainer.unsaved:
                raise
            self.failed.append(reason(error))
            return fit()  # the run is complete: this returns the history
        except (KeyboardInterrupt, SystemExit) as stop:
            if kept and kept.written:
                where = kind(kept.path).where or "at the end"
                stop.add_note(
                    f"stopped {where}, saved in {kept.path}; to continue, repeat the "
                    "command with --resume"
                )
            else:
                stop.add_note("nothing was saved")
            raise

    def report(self, baselines: bool) -> None:
        """Print a table of figures on the test rows, ours first."""
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
                for name, model, more in baseline_models(self.split.validation):
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
        """Write the model with everything `predict` needs, and the call that made it."""
        tensors = self.split.preparation.tensors
        if self.split.scale:
            tensors |= {
                f"target {name}": tensor for name, tensor in self.split.scale.tensors.items()
            }
        about = {
            "features": self.dataset.feature_names,
            "classes": self.dataset.class_names,
            "labels": self.dataset.labels,
            "loss": self.trainer.loss.name,
            "target": self.dataset.target,
            "call": call,
            **self.split.preparation.about,
        }
        self.net.save(path, tensors=tensors, about=about)

    def draw(self, path: Path, name: str, call: outputs.Call) -> None:
        """Draw the learning curve, with the call stored in the picture."""
        sizes = "-".join(map(str, self.net.sizes))
        title = f"{printable(name, 40)}: {sizes}, batch {self.recipe.batch}, seed {self.seed}"
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
    """Return the process's peak memory in words, or "" if the system does not count it."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return f", the process {human(peak)} at its peak"


def _print_medians(runs: list[_Run]) -> None:
    """Print the median of each figure over the splits that have it: one class has no AUC."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, figures in run.results.items():
            for key, figure in figures.items():
                found.setdefault(name, {}).setdefault(key, []).append(figure)
    medians = {
        name: {key: float(np.median(figures)) for key, figures in lists.items()}
        for name, lists in found.items()
    }
    print_table(f"medians, {len(runs)} splits", medians)
