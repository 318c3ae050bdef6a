"""The command `mlpcore train`."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mlpcore as mc
from mlpcore import data
from mlpcore.checkpoint import Checkpoints
from mlpcore.cli.recipes import Recipe, widths
from mlpcore.cli.report import baselines_of, class_figures, print_table, pyplot, quantity_figures
from mlpcore.cli.sources import dataset_of, is_table, require_other
from mlpcore.formats import model_file
from mlpcore.training.plan import human


def train(options: argparse.Namespace) -> None:
    """Train on a data set, report on held-out rows, and save the model and its learning curve."""
    mc.core.inputs.positive_integer(options.splits, "--splits")
    mc.core.inputs.positive_integer(options.seed, "--seed", least=0)
    if Path(options.out).suffix.lower() in (".safetensors", ".png", ".csv"):
        raise ValueError(f"--out is a folder, where the model and the picture go; got {options.out!r}")
    dataset, base = dataset_of(options)
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
            require_other(
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
    print(f"to use it: mlpcore predict {model} {'TABLE' if is_table(options.data) else options.data} --out predictions.csv")


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
        sizes = [X.shape[1], *widths(recipe.hidden, "--hidden"), Y.shape[1] if self.regression else len(dataset.class_names)]
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
        used = self.split.preparation.about.get("columns", self.dataset.feature_names)
        for name in self.dataset.feature_names:
            if name not in used:
                print(f"{name} is left out: no value of it is in enough training rows to get a column")
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
            self.results["mlpcore"] = {**quantity_figures(prediction, answers, scale), "seconds": self.seconds}
            self.results["mean only"] = quantity_figures(np.zeros_like(Y), answers, scale)
        else:
            self.results["mlpcore"] = {**class_figures(prediction, Y), "seconds": self.seconds}
            if baselines:
                for name, model, more in baselines_of(self.split.validation):
                    print(f"fitting {name}, to compare", flush=True)
                    began = time.perf_counter()
                    model.fit(*self.split.training, **more)
                    seconds = time.perf_counter() - began
                    self.results[name] = {**class_figures(model.predict_proba(X), Y), "seconds": seconds}
            shares = np.bincount(self.split.sample, minlength=prediction.shape[1]) / len(self.split.sample)
            self.results["class shares only"] = class_figures(np.tile(shares, (len(Y), 1)), Y)
        print_table(f"{len(Y):,} test rows", self.results)

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
        plt = pyplot()
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


def _medians(runs: list[_Run]) -> None:
    names = list(runs[0].results)
    keys = {name: list(runs[0].results[name]) for name in names}
    medians = {n: {k: float(np.median([run.results[n][k] for run in runs])) for k in keys[n]} for n in names}
    print_table(f"medians, {len(runs)} splits", medians)
