"""Callbacks of `Trainer.fit`, and early stopping."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import FOLLOWED, Progress

Entry = dict[str, float]
_CHECKS: dict[str, values.Check] = {
    **FOLLOWED,
    "minimum_change": functools.partial(values.number, least=0),
    "restore_best": values.boolean,
}


class Session(Protocol):
    """The parts of `mc.Trainer` that callbacks of `fit` use."""

    progress: Progress
    history: dict[str, list[float]]

    @property
    def net(self) -> Any:
        """The network in training."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's settings, which may be changed."""

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""

    def step(self, X: Any, Y: Any = None, sample_weight: Any = None, *, rows: Any = None) -> Any:
        """Take an extra step on these rows."""

    def evaluate(
        self,
        X: Any,
        Y: Any = None,
        sample_weight: Any = None,
        *,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
    ) -> Entry:
        """Return the loss and the scores of these rows."""

    def save(self, path: str | os.PathLike[str], keep: int = 1) -> None:
        """Write the trainer, including the current run, to a file."""


class Callback:
    """A base class for callbacks of `fit`; its methods do nothing, override those you need.

    Each method gets the trainer and may call its `step`, `evaluate` and `save`, but not `fit`. A
    plain function `f(trainer, entry)` in `callbacks` is called as `epoch_end`.
    """

    def fit_begin(self, trainer: Any) -> None:
        """Run before the first step of `fit`, also when it resumes a run."""

    def step_end(self, trainer: Any, J: float) -> None:
        """Run after each step; `J` is its loss, a float, on a GPU a `DeviceLoss`.

        Overriding it makes `fit` launch steps one at a time.
        """

    def epoch_end(self, trainer: Any, entry: Entry) -> object:
        """Run after each epoch; return True to stop the training.

        Args:
            trainer: the trainer.
            entry: the epoch's entry in the history, e.g. {"loss": 0.31, "learning_rate": 0.001}.
        """

    def fit_end(self, trainer: Any, history: dict[str, list[float]]) -> None:
        """Run once at the end, after early stopping as well, with the best parameters restored.

        It is not repeated if only the final save has to be.
        """


class _Function(Callback):
    def __init__(self, function: Callable[[Any, Entry], object]):
        self.function = function

    def epoch_end(self, trainer: Any, entry: Entry) -> object:
        return self.function(trainer, entry)


def resolve(callbacks: Any) -> list[Callback]:
    """Return the callbacks in a user's list, with functions wrapped as `epoch_end`.

    Raises:
        TypeError: it is not a list of callbacks and functions.
    """
    if not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks must be a list; got {type(callbacks).__name__}")
    found = []
    for i, callback in enumerate(callbacks):
        if isinstance(callback, type) or not (isinstance(callback, Callback) or callable(callback)):
            raise TypeError(
                f"callbacks[{i}] must be an mc.Callback or a function (trainer, entry); got "
                f"{shown(callback)}"
            )
        found.append(callback if isinstance(callback, Callback) else _Function(callback))
    return found


@dataclass(frozen=True)
class EarlyStopping:
    """A rule that stops training when a score has not improved for `patience` epochs.

    Args:
        patience: epochs without an improvement after which training stops.
        monitor: "loss" or a validation key of the history, e.g. "validation_loss",
            "validation_accuracy".
        minimum_change: a change must be larger than this to count as an improvement.
        restore_best: True to restore the parameters of the best epoch at the end.
        mode: "min" if lower is better, "max" if higher is; None takes "max" for accuracy and r2,
            "min" for losses. Required for your own metrics.

    Raises:
        TypeError, ValueError: invalid argument; the message says what was expected.
    """

    patience: int = 3
    monitor: str = "validation_loss"
    minimum_change: float = 0.0
    restore_best: bool = True
    mode: str | None = None

    def __post_init__(self) -> None:
        values.settle(self, _CHECKS, "EarlyStopping: ")

    @property
    def sign(self) -> float:
        """1 if larger is better, else -1."""
        largest = (
            self.monitor.endswith(("accuracy", "r2")) if self.mode is None else self.mode == "max"
        )
        return 1.0 if largest else -1.0

    def follow(self, entry: Entry, best: float | None, waited: int) -> tuple[float | None, int]:
        """Return the best score so far and the epochs since, updated with one more epoch."""
        value = entry[self.monitor]
        return (value, 0) if self.improves(value, best) else (best, waited + 1)

    def improves(self, value: float, best: float | None) -> bool:
        """Return True if a score improves on the best so far (None if there is none yet)."""
        if best is None:
            return not math.isnan(value)
        return self.sign * (value - best) > self.minimum_change
