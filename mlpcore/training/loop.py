"""One `Trainer.fit`: epochs, validation, early stopping, callbacks, checkpoints; it can be left and
taken up at any batch.

An epoch's row order depends on the trainer's seed and the number of the epoch alone, so that
`State` is all there is to know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks.errors import NonFiniteLoss
from mlpcore.core.ops import Call, make
from mlpcore.core.schedules import Adaptive
from mlpcore.data.batches import Batch, Data, Inputs
from mlpcore.data.epochs import Sample
from mlpcore.data.streams import Stream
from mlpcore.io import kinds
from mlpcore.training.callbacks import Callback, EarlyStopping, Entry
from mlpcore.training.saving import Checkpoints, typed
from mlpcore.training.scores import Metric

if TYPE_CHECKING:
    from mlpcore.trainer import Trainer

Array = NDArray[Any]
History = dict[str, list[float]]
UNREAD = 2048  # losses that may wait on a GPU before they are read


class Source(Protocol):
    """Where a run's batches come from.

    Attributes:
        rows: of an epoch; None where only the first epoch tells.
        lasting: whether a batch's rows are still there when the next one has been asked for.
    """

    rows: int | None
    lasting: bool

    def epoch(
        self, number: int, seeds: list[int] | None, skip: int, together: Callable[[Data], int],
        following: list[int] | None,
    ) -> Generator[tuple[Data, Batch], None, None]:  # fmt: skip
        """Yield an epoch's batches from number `skip` on, shuffled from `seeds` or (None) in order.

        `together` is asked how many whole batches may be yielded as one; the epoch after this one
        is shuffled from the seeds `following`, None if there is none.
        """


@dataclass
class State:
    """How far a run has come: what it takes to go on from there.

    Attributes:
        epochs, batch_size, shuffle, rows, validated, monitor, metrics: what `fit` was called with,
            of metrics the names; a run goes on only with the same, or with more epochs.
        data, held_out: samples of the rows and of the validation's; None: nothing is compared.
        epoch: epochs that are complete.
        batch: batches of the current epoch that are done.
        loss, weight: Σ w J and Σ w of these.
        seconds: that they took.
        history: of the complete epochs.
        best, waited: early stopping: the best figure so far, epochs since then.
        floor, idle: of an `Adaptive` schedule: the same of the figure that it follows.
        widest, given: rows of the largest batch, also of steps before, and its `Inputs`:
            evaluation works on its arrays.
        ended: whether the epochs are over and the best parameters back in their place.
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
        """Return the state that `describe` described; raise TypeError or ValueError if it is of no
        run.
        """
        kept = [name for name in ("data", "held_out") if described.get(name)]
        samples = {name: typed(Sample, described[name]) for name in kept}
        state = typed(cls, {**described, **samples})
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
        """Raise a ValueError that names the first argument of `fit` of whose rows the samples
        differ.
        """
        for mine, theirs, prefix in (
            (self.data, other.data, ""), (self.held_out, other.held_out, "validation: "),
        ):  # fmt: skip
            if mine is not None and theirs is not None:
                mine.require_same(theirs, prefix)

    def require_possible(self) -> None:
        """Raise a ValueError if no run can have come to this, as in a file that somebody has made
        up.
        """
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


class _Unread(NamedTuple):
    """Steps, the last of them of this number, whose losses have not been looked at."""

    step: int
    J: Any
    weight: float | None
    batch: tuple[Data, Batch] | None


class Run:
    """A `fit` that is under way.

    Args:
        trainer: whose network is trained.
        source: the batches.
        state: where it begins.
        held_out: the rows of the validation, or None.
        metrics: of the user's, by name, measured on these rows.
        stopping: when to stop before the last epoch.
        best: where the best parameters are kept, or None.
        observers: the user's callbacks.
        checkpoints: where and when to save, or None.
    """

    def __init__(
        self, trainer: Trainer, source: Source, state: State, held_out: Any, metrics: Mapping[str, Metric],
        stopping: EarlyStopping | None, best: Array | None, observers: Sequence[Callback], checkpoints: Checkpoints | None,
    ) -> None:  # fmt: skip
        self.trainer, self.source, self.state, self.metrics = trainer, source, state, metrics
        self.held_out, self.stopping, self.best = held_out, stopping, best
        self.observers, self.checkpoints = observers[state.told :], checkpoints
        # passes over the data before this run
        self._passes = trainer.progress.epochs - state.epoch - (state.batch > 0)
        self._each_step = any(
            getattr(x.step_end, "__func__", None) is not Callback.step_end for x in self.observers
        )
        self._unread: list[_Unread] = []
        self._fault: Exception | None = None  # found in them, perhaps by a `save` in another thread
        self._waiting = 0  # steps in it
        # a step that is not counted yet: steps before it, Σ w, its rows
        self._begun: tuple[int, float | None, Data, Batch] | None = None
        step = trainer._step
        if state.given is None and step.workspace.allocated is not None and step.workspace.inputs is not None:
            state.widest, state.given = step.workspace.allocated.batch_rows, list(step.workspace.inputs)
        self._schedule: Adaptive | None = None
        self._adaptive()
        self._began = time.perf_counter()

    def go(self, progress: bool) -> History:
        """Train to the end; return the history."""
        from tqdm.auto import tqdm  # not at import: it brings asyncio

        state, trainer = self.state, self.trainer
        for observer in self.observers:
            observer.fit_begin(trainer)
        every = None if state.rows is None else state.epochs * state.rows
        done = (
            0
            if state.rows is None
            else state.epoch * state.rows + min(state.rows, state.batch * state.batch_size)
        )
        with contextlib.ExitStack() as stack:
            shown = {
                "unit": "row",
                "unit_scale": True,
                "disable": not (progress and _is_open(sys.stderr)),
            }
            seen = "ipykernel" in sys.modules or (_is_open(sys.stderr) and sys.stderr.isatty())
            seconds = 0.1 if seen else 10  # between frames: a log file keeps every one
            bar = stack.enter_context(tqdm(total=every, initial=done, mininterval=seconds, **shown))
            if self.checkpoints is not None:
                self.checkpoints.saved(trainer.progress.step)
            for stream in (getattr(self.source, "stream", None), self.held_out):
                if isinstance(stream, Stream):
                    stack.callback(setattr, stream, "waiting", stream.waiting)  # no circle is left
                    stream.waiting = self._waiting_for_rows
            stop = state.ended or self._out_of_patience()
            if state.given is not None:  # a run that goes on, perhaps with a short batch
                shape = state.widest, Inputs(*state.given)
                trainer._step.workspace.keep_only(*shape)
                trainer._step.prepare(*shape)
            while state.epoch < state.epochs and not stop:
                bar.set_description(f"epoch {state.epoch + 1}/{state.epochs}", refresh=False)
                self._epoch(bar)
                entry = self._close()
                bar.set_postfix(
                    {k: f"{entry[k]:.4g}" for k in entry if k.startswith(("loss", "validation"))}
                )
                stop = self._tell(entry)
                if not stop and state.epoch < state.epochs:
                    self._save_if_due(epoch_ended=True)
            self._end()
            with trainer._at_rest(state.history):
                if self.checkpoints is not None:
                    trainer.save(self.checkpoints.path, self.checkpoints.keep)
            if self.checkpoints is not None and self.checkpoints.signals.asked is not None:
                self.checkpoints.leave("at the end of the training")
        return state.history

    def _end(self) -> None:
        """Put the best parameters back and tell the callbacks: once, also where a run is taken up
        here.
        """
        best, state = self.best_so_far(), self.state
        writes = [] if best is None else self.trainer.net.store.writes(best)
        make([*writes, (vars(state).update, {"ended": True})])
        for observer in self.observers:
            observer.fit_end(self.trainer, state.history)
            state.told += 1

    # -- an epoch --

    def _epoch(self, bar: Any) -> None:
        """Train on the batches of an epoch that are left. On a GPU nobody waits for J before the
        end.
        """
        state, trainer = self.state, self.trainer
        self._adaptive()
        self._began = time.perf_counter()
        number = self._passes + state.epoch + 1
        seeds = [trainer._seed, number] if state.shuffle else None
        more = seeds is not None and state.epoch + 1 < state.epochs
        following = [trainer._seed, number + 1] if more else None
        epoch = self.source.epoch(state.epoch, seeds, state.batch, self._together, following)
        with contextlib.closing(epoch) as batches:
            for data, batch in batches:
                trainer.progress.epochs = number  # counted when its first batch is there
                if batch.size > state.widest:
                    state.widest, state.given = batch.size, list(data.inputs)
                self._step(data, batch)
                bar.update(batch.size * batch.steps)
                if self.checkpoints is not None:
                    self._save_if_due(epoch_ended=False)
                if trainer._visitors:
                    with trainer._away():
                        pass

    def _together(self, data: Data) -> int:
        """Return how many of the next batches callbacks and checkpoints allow in one launch."""
        if self._each_step:
            return 1
        most = self.trainer._step.together(self.state.batch_size, data.inputs)
        return (
            most
            if self.checkpoints is None
            else min(most, self.checkpoints.steps_left(self.trainer.progress.step))
        )

    @contextlib.contextmanager
    def _waiting_for_rows(self) -> Iterator[Callable[[], object]]:
        """Let other threads save; yield a function that saves and leaves if a signal has come."""

        def look() -> None:
            if self.checkpoints is not None and self.checkpoints.signals.asked is not None:
                self._save_if_due(epoch_ended=False)

        with self.trainer._away():
            yield look

    def _step(self, data: Data, batch: Batch) -> None:
        trainer = self.trainer
        w = trainer._step.weight(batch)
        if w == 0:  # rows that weigh nothing say nothing
            self.state.batch += batch.steps
            return
        self._begun = trainer.progress.step, w, data, batch
        J = trainer._update(data, batch)
        self._count()
        trainer._step.untouched = not self.observers
        if self._waiting >= UNREAD:
            self._settle()
        if self._each_step:
            for observer in self.observers:
                observer.step_end(trainer, J)

    def _count(self) -> None:
        """Count the step that has begun, with its J, if it was done.

        It is done by one assignment, which no interrupt parts, and can be repeated until then.
        """
        if self._begun is None:
            return
        (before, w, data, batch), state, J = self._begun, self.state, self.trainer._step.J
        done = self.trainer.progress.step - before
        if done <= 0:  # it has failed
            self._begun = None
        elif isinstance(J, float):
            loss, weight = _added(state.loss, state.weight, J, w or 0.0)
            state.batch, state.loss, state.weight, self._begun = (
                state.batch + done,
                loss,
                weight,
                None,
            )
        else:
            if not (self._unread and self._unread[-1].J is J):
                self._unread.append(
                    _Unread(before + done, J, w, (data, batch) if self.source.lasting else None)
                )
            state.batch, self._waiting, self._begun = state.batch + done, self._waiting + done, None

    def _settle(self) -> None:
        """Read the losses that have been left on the device, and add them up."""
        if self._fault is not None:
            raise self._fault
        state, launches = self.state, self._unread
        loss, weight = state.loss, state.weight
        for one in launches:
            try:
                values = one.J.values()
            except NonFiniteLoss as error:
                self._fault = self._explained(error, launches)
                raise self._fault from None
            except ValueError as error:
                self._fault = error
                raise
            for J, w in values:
                loss, weight = _added(loss, weight, J, w if one.weight is None else one.weight)
        state.loss, state.weight, self._unread, self._waiting = loss, weight, [], 0

    def _explained(self, error: NonFiniteLoss, launches: Sequence[_Unread]) -> Exception:
        """Return the error with the layer where it began, if its batch is still there."""
        for one in launches:
            if one.batch is not None and one.step - one.batch[1].steps < error.step <= one.step:
                data, batch = one.batch
                return self.trainer._explained(
                    error, data, batch.single(error.step - one.step + batch.steps - 1)
                )
        return error

    def _close(self) -> Entry:
        """End an epoch; return its line of the history.

        History, early stopping and schedule are brought up to date together, or not at all.
        """
        state, trainer = self.state, self.trainer
        self._settle()
        entry = {"loss": state.loss / state.weight if state.weight else float("nan")}
        entry["learning_rate"] = trainer.optimizer.rate(
            dataclasses.replace(trainer.progress, step=trainer.progress.step - 1)
        )
        if self.held_out is not None:
            figures = trainer._evaluate(self.held_out, self.metrics)
            entry |= {f"validation_{key}": value for key, value in figures.items()}
        if trainer.on_non_finite == "skip":
            entry["skipped"] = float(trainer.skipped)
        self._lap()
        entry["seconds"] = state.seconds
        calls: list[Call] = [
            (state.history.setdefault(key, []).append, value) for key, value in entry.items()
        ]
        ends: dict[str, float | None] = {
            "epoch": state.epoch + 1,
            "batch": 0,
            "loss": 0.0,
            "weight": 0.0,
            "seconds": 0.0,
        }
        adaptive = self._adaptive()
        if adaptive is not None:
            watch = EarlyStopping(
                adaptive.patience, adaptive.monitor, adaptive.tolerance, False, adaptive.mode
            )
            floor, idle = watch.follow(entry, state.floor, state.idle)
            lowers = idle >= adaptive.patience
            ends |= {"floor": floor, "idle": 0 if lowers else idle}
            calls.append(
                (
                    vars(trainer.progress).update,
                    {"reductions": trainer.progress.reductions + lowers},
                )
            )
        if self.stopping is not None:
            ends["best"], ends["waited"] = self.stopping.follow(entry, state.best, state.waited)
            if ends["waited"] == 0 and self.best is not None:
                calls.append((operator.setitem, self.best, ..., trainer.net.store.flat))
        make([*calls, (vars(state).update, ends)])
        return entry

    def _tell(self, entry: Entry) -> bool:
        """Tell the callbacks of an epoch; return whether to stop."""
        # every callback sees every epoch: no short cut
        answers = [observer.epoch_end(self.trainer, entry) for observer in self.observers]
        return self._out_of_patience() or any(
            isinstance(answer, bool | np.bool_) and bool(answer) for answer in answers
        )

    def _out_of_patience(self) -> bool:
        return self.stopping is not None and self.state.waited >= self.stopping.patience

    def _adaptive(self) -> Adaptive | None:
        """Return the schedule, where it follows a figure; another one than before begins at its own
        rate.
        """
        rate, trainer = self.trainer.optimizer.learning_rate, self.trainer
        schedule = rate if isinstance(rate, Adaptive) else None
        if schedule is None or schedule == self._schedule:
            return schedule
        trainer._require_followed(schedule, self.held_out is not None, self.metrics)
        if trainer.progress.followed not in (None, schedule):
            self.state.floor, self.state.idle, trainer.progress.reductions = None, 0, 0
        self._schedule = trainer.progress.followed = schedule
        return schedule

    def _lap(self) -> None:
        now = time.perf_counter()
        self.state.seconds, self._began = self.state.seconds + now - self._began, now

    def _save_if_due(self, epoch_ended: bool) -> None:
        checkpoints, trainer = self.checkpoints, self.trainer
        if checkpoints is None or not checkpoints.due(trainer.progress.step, epoch_ended):
            return
        trainer.save(checkpoints.path, checkpoints.keep)
        checkpoints.saved(trainer.progress.step)
        if checkpoints.signals.asked is not None:
            checkpoints.leave(str(self.state))

    def leave(self, error: KeyboardInterrupt | SystemExit) -> None:
        """Save before this error goes on, if a `fit` in a callback raised it for a signal that
        came.

        A second SIGINT has no message: nothing is saved.
        """
        if (
            error.args
            and self.checkpoints is not None
            and self.checkpoints.signals.asked is not None
        ):
            self._save_if_due(epoch_ended=False)

    def pause(self) -> None:
        """Bring state and progress up to date, so that they can be saved."""
        self.trainer._step.count_launched()
        self._count()
        self._settle()
        self._lap()
        state = self.state  # a pass of which no batch is done begins anew
        self.trainer.progress.epochs = self._passes + state.epoch + (state.batch > 0)

    def best_so_far(self) -> Array | None:
        """Return the best parameters, if there are any that are not in the network already."""
        return self.best if self.state.best is not None and not self.state.ended else None


def _added(loss: float, weight: float, J: float, w: float) -> tuple[float, float]:
    """Return Σ w J and Σ w with those of a further step, unless it was skipped."""
    return (loss + w * J, weight + w) if math.isfinite(J) else (loss, weight)


def _is_open(stream: TextIO | None) -> bool:
    """Return whether a standard stream can be written to; a program without a console has none."""
    return stream is not None and not stream.closed
