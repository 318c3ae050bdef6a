"""The state of a run of `fit`: all that is needed to resume it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mlpcore.checks import values
from mlpcore.data.batches import Inputs
from mlpcore.data.epochs import Sample
from mlpcore.io import kinds

History = dict[str, list[float]]


@dataclass
class State:
    """The state of a run: all that is needed to resume it.

    Attributes:
        epochs, batch_size, shuffle, rows, validated, monitor, metrics: the arguments of `fit`
            (metrics: their names); a run resumes only with equal ones, except for epochs.
        data, held_out: samples of the training and validation rows; None if nothing is compared.
        epoch: number of completed epochs.
        batch: number of batches done in the current epoch.
        loss, weight: Σ w J and Σ w over these batches.
        seconds: time spent on the current epoch.
        history: history of the completed epochs.
        best, waited: for early stopping, the best score so far and the epochs since.
        floor, idle: the same for the score that an `Adaptive` schedule follows.
        widest, given: rows of the largest batch, including earlier steps, and its `Inputs`;
            evaluation uses its arrays.
        ended: True once the epochs are over and the best parameters restored.
        told: number of callbacks whose `fit_end` has returned, counted from the first.
    """

    epochs: int
    batch_size: int
    shuffle: bool
    rows: int | None
    validated: bool
    monitor: dict[str, Any] | None
    metrics: list[str] = field(default_factory=list)
    data: Sample | None = None
    held_out: Sample | None = None
    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    weight: float = 0.0
    seconds: float = 0.0
    history: History = field(default_factory=dict)
    best: float | None = None
    waited: int = 0
    floor: float | None = None
    idle: int = 0
    widest: int = 0
    given: list[Any] | None = None
    ended: bool = False
    told: int = 0

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> State:
        """Return the state that `describe` described.

        Raises:
            TypeError, ValueError: it does not describe a possible run.
        """
        kept = [name for name in ("data", "held_out") if described.get(name)]
        samples = {name: values.typed(Sample, described[name]) for name in kept}
        state = values.typed(cls, {**described, **samples})
        state.require_possible()
        return state

    def describe(self) -> dict[str, Any]:
        """Return the state as JSON types."""
        kept = {"data": self.data, "held_out": self.held_out}
        samples = {name: vars(sample) for name, sample in kept.items() if sample is not None}
        return {**vars(self), "history": dict(self.history), **samples}

    def require_same(self, other: State) -> None:
        """Raise a ValueError that names the first argument of `fit` in which another call differs.

        The number of epochs may differ, unless it is below the number begun. A run that has ended
        can be extended only if it did not stop early and early stopping has not restored earlier
        parameters.
        """
        begun = self.epochs if self.ended else self.epoch + (self.batch > 0)
        restored = self.monitor is not None and self.monitor.get("restore_best", False)
        fixed = self.ended and (self.epoch < self.epochs or restored)
        if other.epochs < begun or (fixed and other.epochs != begun):
            raise ValueError(
                f"epochs: the unfinished run is {self}; got {other.epochs}. Pass "
                f"{'' if fixed else 'at least '}{begun}, or call trainer.abandon() to start over"
            )
        for name in ("batch_size", "shuffle", "rows", "validated", "monitor", "metrics"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                what = {"rows": "X", "validated": "validation", "monitor": "early_stopping"}.get(
                    name, name
                )
                unit = {"rows": " rows"}.get(name, "")
                if name == "validated":
                    mine, theirs = (("none", "some")[one] for one in (mine, theirs))
                raise ValueError(
                    f"{what}: the unfinished run had {mine}{unit}; got {theirs}{unit}. Pass what "
                    "it had, or call trainer.abandon() to start over"
                )

    def require_same_rows(self, other: State) -> None:
        """Raise a ValueError that names the first argument of `fit` whose rows differ."""
        for mine, theirs, prefix in (
            (self.data, other.data, ""), (self.held_out, other.held_out, "validation: "),
        ):  # fmt: skip
            if mine is not None and theirs is not None:
                mine.require_same(theirs, prefix)

    def require_possible(self) -> None:
        """Raise a ValueError if no run can have this state, as in a forged file."""
        most = math.inf if self.rows is None else self.rows  # batches may have one row each
        if not (
            self.batch_size >= 1
            and self.epoch <= self.epochs
            and self.batch <= most
            and (self.given or not self.widest)
        ):
            raise ValueError(
                f"run: impossible state: {self}, with batches of {self.batch_size} of {self.rows} "
                "rows"
            )
        if self.given is not None:
            Inputs.read(self.given)
        for sample in (self.data, self.held_out):
            if sample is not None:
                sample.require_possible()
        if not (self.weight >= 0 and {*map(len, self.history.values())} <= {self.epoch}):
            raise ValueError(f"run: weight or history does not match {self.epoch} completed epochs")

    def __str__(self) -> str:
        return kinds.progress(self.epochs, self.epoch, self.batch, self.ended)


class Unfinished(NamedTuple):
    """An interrupted run, here or from a file, that the same call of `fit` resumes.

    Attributes:
        state: the state to resume from.
        best: the best parameters so far, on the host; None if none are kept.
    """

    state: State
    best: NDArray[Any] | None = None
