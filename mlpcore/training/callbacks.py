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

    net: Any
    progress: Progress
    history: dict[str, list[float]]

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer's settings, which may be changed."""

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""

    def step(self, X: Any, Y: Any = None, sample_weight: Any = None, *, rows: Any = None) -> Any:
        """Update the parameters by these rows, in addition."""

    def evaluate(
        self,
        X: Any,
        Y: Any = None,
        sample_weight: Any = None,
        *,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
    ) -> Entry:
        """Return the loss and the figures of these rows."""

    def save(self, path: str | os.PathLike[str], keep: int = 1) -> None:
        """Write the trainer, with the run that is under way, to a file."""


class Callback:
    """A user's part in `fit`, whose methods do nothing until a subclass overrides them.

    Each is given the trainer. A plain function `f(trainer, entry)` serves as an `epoch_end`.
    """

    def fit_begin(self, trainer: Any) -> None:
        """Act before the first step."""

    def step_end(self, trainer: Any, J: float) -> None:
        """Act after each step; `J` is its loss."""

    def epoch_end(self, trainer: Any, entry: Entry) -> object:
        """Act after each epoch, whose line of the history is `entry`; return True to stop."""

    def fit_end(self, trainer: Any, history: dict[str, list[float]]) -> None:
        """Act after the last epoch, also after early stopping; not again if a save is repeated."""


class _Function(Callback):
    def __init__(self, function: Callable[[Any, Entry], object]):
        self.function = function

    def epoch_end(self, trainer: Any, entry: Entry) -> object:
        return self.function(trainer, entry)


def resolve(callbacks: Any) -> list[Callback]:
    """Return the callbacks of a user's list of callbacks and functions.

    Raises:
        TypeError: it is no list, or holds anything else.
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
    """An end of the training after `patience` epochs in which a figure has not improved.

    Args:
        patience: epochs without an improvement before the training stops.
        monitor: a key of the history, e.g. "validation_loss", "validation_accuracy", "loss".
        minimum_change: an improvement is more than this.
        restore_best: True to put the parameters of the best epoch back at the end.
        mode: "min" or "max", the better side; None takes "max" for accuracy and r2, "min" for
            losses. A metric of the user's own needs it.
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
        """1 where larger is better, else -1."""
        largest = (
            self.monitor.endswith(("accuracy", "r2")) if self.mode is None else self.mode == "max"
        )
        return 1.0 if largest else -1.0

    def follow(self, entry: Entry, best: float | None, waited: int) -> tuple[float | None, int]:
        """Return the best figure so far and the epochs since then, after one more epoch."""
        value = entry[self.monitor]
        return (value, 0) if self.improves(value, best) else (best, waited + 1)

    def improves(self, value: float, best: float | None) -> bool:
        """Return True for an improvement on the best so far (None: there is none yet)."""
        if best is None:
            return not math.isnan(value)
        return self.sign * (value - best) > self.minimum_change
