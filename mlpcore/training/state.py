"""The state of a run of `fit`: all that it takes to go on from there."""

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
    """The place that a run has come to: all that it takes to go on from there.

    Attributes:
        epochs, batch_size, shuffle, rows, validated, monitor, metrics: the arguments of `fit`, of
            metrics the names; a run goes on only with the same, or with more epochs.
        data, held_out: samples of the rows and of the validation's; None: nothing is compared.
        epoch: epochs that are complete.
        batch: batches of the current epoch that are done.
        loss, weight: Σ w J and Σ w of these.
        seconds: time that they took.
        history: of the complete epochs.
        best, waited: early stopping: the best figure so far, epochs since then.
        floor, idle: the same of the figure that an `Adaptive` schedule follows.
        widest, given: rows of the largest batch, also of steps before, and its `Inputs`:
            evaluation works on its arrays.
        ended: True once the epochs are over and the best parameters back in their place.
        told: callbacks whose `fit_end` has returned, the first ones of the list.
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
            TypeError, ValueError: it is of no run.
        """
        kept = [name for name in ("data", "held_out") if described.get(name)]
        samples = {name: values.typed(Sample, described[name]) for name in kept}
        state = values.typed(cls, {**described, **samples})
        state.require_possible()
        return state

    def describe(self) -> dict[str, Any]:
        """Return the state as what JSON holds."""
        kept = {"data": self.data, "held_out": self.held_out}
        samples = {name: vars(sample) for name, sample in kept.items() if sample is not None}
        return {**vars(self), "history": dict(self.history), **samples}

    def require_same(self, other: State) -> None:
        """Raise a ValueError that names the first argument of `fit` by which another call differs.

        Another number of epochs is no difference if it is not below what is done. A run that has
        ended goes on to more only from its last epoch, and where early stopping has not put back
        others.
        """
        begun = self.epochs if self.ended else self.epoch + (self.batch > 0)
        restored = self.monitor is not None and self.monitor.get("restore_best", False)
        fixed = self.ended and (self.epoch < self.epochs or restored)
        if other.epochs < begun or (fixed and other.epochs != begun):
            raise ValueError(
                f"epochs: the unfinished run is {self}; got {other.epochs}. "
                f"Pass {'' if fixed else 'at least '}{begun}, or begin anew after trainer.abandon()"
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
                    "it had, "
                    "or begin anew after trainer.abandon()"
                )

    def require_same_rows(self, other: State) -> None:
        """Raise a ValueError that names the first argument of `fit` with other rows."""
        for mine, theirs, prefix in (
            (self.data, other.data, ""), (self.held_out, other.held_out, "validation: "),
        ):  # fmt: skip
            if mine is not None and theirs is not None:
                mine.require_same(theirs, prefix)

    def require_possible(self) -> None:
        """Raise a ValueError if no run can be like this, as in a file that somebody made up."""
        most = math.inf if self.rows is None else self.rows  # a list's batches may be of a row each
        if not (
            self.batch_size >= 1
            and self.epoch <= self.epochs
            and self.batch <= most
            and (self.given or not self.widest)
        ):
            raise ValueError(
                f"run: no run is {self} with batches of {self.batch_size} of {self.rows} rows"
            )
        if self.given is not None:
            Inputs.read(self.given)
        for sample in (self.data, self.held_out):
            if sample is not None:
                sample.require_possible()
        if not (self.weight >= 0 and {*map(len, self.history.values())} <= {self.epoch}):
            raise ValueError(
                f"run: weight or history is not that of a run after {self.epoch} epochs"
            )

    def __str__(self) -> str:
        return kinds.progress(self.epochs, self.epoch, self.batch, self.ended)


class Unfinished(NamedTuple):
    """A run that the same call of `fit` goes on with: of a file, or one that has broken off.

    Attributes:
        state: how far it has come.
        best: the best parameters so far, on the host; None where none are kept.
    """

    state: State
    best: NDArray[Any] | None = None
