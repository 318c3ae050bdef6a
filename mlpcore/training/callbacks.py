"""What `Trainer.fit` does around the steps: early stopping, progress, and what users add."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core.schedules import FOLLOWED

if TYPE_CHECKING:
    from mlpcore.trainer import Trainer

Entry = dict[str, float]
_CHECKS: dict[str, values.Check] = {
    **FOLLOWED,
    "minimum_change": functools.partial(values.number, least=0),
    "restore_best": values.boolean,
}


class Callback:
    """Called by `fit`; override what you need. A plain function `f(trainer, entry)` is taken as an
    `epoch_end`.
    """

    def fit_begin(self, trainer: Trainer) -> None:
        """Before the first step."""

    def step_end(self, trainer: Trainer, J: float) -> None:
        """After each step; `J` is its loss."""

    def epoch_end(self, trainer: Trainer, entry: Entry) -> object:
        """After each epoch; `entry` is its line of the history. Returning True stops the training."""

    def fit_end(self, trainer: Trainer, history: dict[str, list[float]]) -> None:
        """After the last epoch, also when it was stopped early; not again if the last save is
        repeated.
        """


class _Function(Callback):
    def __init__(self, function: Callable[[Trainer, Entry], object]):
        self.function = function

    def epoch_end(self, trainer: Trainer, entry: Entry) -> object:
        return self.function(trainer, entry)


def resolve(callbacks: Any) -> list[Callback]:
    """The callbacks that a user's list of callbacks and functions means. Raises TypeError for
    anything else.
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
    """Stop when the monitored figure has not improved for `patience` epochs; the best weights come
    back.

    Args:
        patience: epochs without an improvement before the training stops.
        monitor: a key of the history, e.g. "validation_loss", "validation_accuracy", "loss".
        minimum_change: an improvement is more than this.
        restore_best: whether the parameters of the best epoch are put back at the end.
        mode: "min" or "max", which is better; None: as accuracy and r2 (max) and losses (min) want
            it. A metric of one's own needs it.
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
        """The best figure and the epochs since then, with one more epoch taken in; 0 epochs: it is
        the best one.
        """
        value = entry[self.monitor]
        return (value, 0) if self.improves(value, best) else (best, waited + 1)

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is an improvement on the best so far (None: there is none yet)."""
        if best is None:
            return not math.isnan(value)
        return self.sign * (value - best) > self.minimum_change
