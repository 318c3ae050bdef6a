"""The loop of one `fit`: epochs, validation, early stopping, callbacks; resumable at any batch.

The row order of an epoch depends only on the trainer's seed and the number of the epoch, so `State`
is enough to resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks.errors import NonFiniteLoss
from mlpcore.core.ops import Call, make
from mlpcore.core.schedules import Adaptive
from mlpcore.data.batches import Batch, Data, Inputs
from mlpcore.data.streams import Stream
from mlpcore.training import scores
from mlpcore.training.callbacks import Callback, EarlyStopping, Entry, Session
from mlpcore.training.checkpoints import Checkpoints
from mlpcore.training.learner import Learner
from mlpcore.training.scores import Metric
from mlpcore.training.state import History, State, Unfinished

Array = NDArray[Any]
UNREAD = 2048  # losses that may stay on a GPU before they are read


class Source(Protocol):
    """The batches of a run.

    Attributes:
        rows: rows of an epoch; None until the first epoch has been read.
        lasting: True if a batch's rows stay valid after the next batch has been requested.
    """

    rows: int | None
    lasting: bool

    def epoch(
        self,
        number: int,
        seeds: list[int] | None,
        skip: int,
        together: Callable[[Data, int], int],
        following: list[int] | None,
    ) -> Generator[tuple[Data, Batch], None, None]:
        """Yield an epoch's batches from number `skip` on, shuffled from `seeds` or (None) in order.

        `together` returns how many of the full batches that are left are yielded as one.
        `following` holds the seeds of the next epoch; None if there is none.
        """


class Terms(NamedTuple):
    """Options of a run besides its steps: validation, stopping, callbacks, checkpoints.

    Attributes:
        held_out: the validation rows, or None.
        metrics: the user's metrics over these rows, by name.
        stopping: the early stopping, or None.
        observers: the user's callbacks.
        checkpoints: where and when to save, or None.
    """

    held_out: Data | Stream | None
    metrics: Mapping[str, Metric]
    stopping: EarlyStopping | None
    observers: Sequence[Callback]
    checkpoints: Checkpoints | None


class _Unread(NamedTuple):
    """One launch of steps whose losses are not read yet; `step` is the number of the last one."""

    step: int
    J: Any
    weight: float | None
    batch: tuple[Data, Batch] | None


class Run:
    """A run of `fit` in progress.

    Args:
        learner: the network in training.
        session: the user's trainer, for callbacks and saving.
        state: the state from which the run begins or resumes.
        source: the batches.
        best: array for the best parameters, or None.
        terms: validation, early stopping, callbacks and checkpoints.
    """

    def __init__(
        self,
        learner: Learner,
        session: Session,
        state: State,
        source: Source,
        best: Array | None,
        terms: Terms,
    ) -> None:
        self.learner, self.session, self.state, self.source = learner, session, state, source
        self.best, self.terms, self.checkpoints = best, terms, terms.checkpoints
        self.observers = terms.observers[state.told :]
        progress, step = learner.progress, learner.step
        self._passes = progress.epochs - state.epoch - (state.batch > 0)  # before this run
        self._each_step = any(
            getattr(x.step_end, "__func__", None) is not Callback.step_end for x in self.observers
        )
        self._unread: list[_Unread] = []
        self._fault: Exception | None = None  # of `_unread`, perhaps met by another thread's `save`
        self._waiting = 0  # steps in `_unread`
        # a step not yet counted: the steps before it, Σ w, data, batch
        self._begun: tuple[int, float | None, Data, Batch] | None = None
        there, given = step.workspace.allocated, step.workspace.inputs
        if state.given is None and there is not None and given is not None:
            state.widest, state.given = there.batch_rows, list(given)
        self._schedule: Adaptive | None = None
        self._follow_schedule()
        self._began = time.perf_counter()

    def go(self, progress: bool) -> History:
        """Train to the end; return the history."""
        state, learner = self.state, self.learner
        for observer in self.observers:
            observer.fit_begin(self.session)
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(_open_bar(state, progress))
            if self.checkpoints is not None:
                self.checkpoints.note_saved(learner.progress.step)
            for stream in (getattr(self.source, "stream", None), self.terms.held_out):
                if isinstance(stream, Stream):
                    stack.callback(setattr, stream, "waiting", stream.waiting)  # avoids a cycle
                    stream.waiting = self._wait_for_rows
            stop = state.ended or self._is_out_of_patience()
            if state.given is not None:  # a resumed run may begin with a short batch
                shape = state.widest, Inputs(*state.given)
                learner.step.workspace.keep_only(*shape)
                learner.step.prepare(*shape)
            while state.epoch < state.epochs and not stop:
                bar.set_description(f"epoch {state.epoch + 1}/{state.epochs}", refresh=False)
                self._train_epoch(bar)
                entry = self._end_epoch()
                bar.set_postfix(
                    {k: f"{entry[k]:.4g}" for k in entry if k.startswith(("loss", "validation"))}
                )
                stop = self._tell(entry)
                if not stop and state.epoch < state.epochs:
                    self._save_if_due(epoch_ended=True)
            self._end()
            with learner.at_rest(state.history):
                if self.checkpoints is not None:
                    self.session.save(self.checkpoints.path, self.checkpoints.keep)
            if self.checkpoints is not None and self.checkpoints.signals.asked is not None:
                self.checkpoints.leave("at the end of the training")
        return state.history

    def _end(self) -> None:
        """Restore the best parameters and call each `fit_end` once, even if the run is resumed."""
        best, state = self.unfinished().best, self.state
        writes = [] if best is None else self.learner.net.store.writes(best)
        make([*writes, (vars(state).update, {"ended": True})])
        for observer in self.observers:
            observer.fit_end(self.session, state.history)
            state.told += 1

    # -- an epoch --

    def _train_epoch(self, bar: Any) -> None:
        """Train on the remaining batches of an epoch, without waiting for J on a GPU."""
        state, learner = self.state, self.learner
        self._follow_schedule()
        self._began = time.perf_counter()
        number, seed = self._passes + state.epoch + 1, learner.step.problem.settings.seed
        seeds = [seed, number] if state.shuffle else None
        more = seeds is not None and state.epoch + 1 < state.epochs
        following = [seed, number + 1] if more else None
        epoch = self.source.epoch(state.epoch, seeds, state.batch, self._together, following)
        with contextlib.closing(epoch) as batches:
            for data, batch in batches:
                learner.progress.epochs = number  # counted once its first batch has come
                if batch.size > state.widest:
                    state.widest, state.given = batch.size, list(data.inputs)
                self._step(data, batch)
                bar.update(batch.size * batch.steps)
                if self.checkpoints is not None:
                    self._save_if_due(epoch_ended=False)
                if learner.turns.visitors:
                    with learner.turns.away():
                        pass

    def _together(self, data: Data, most: int) -> int:
        """Return how many of the next `most` batches go in one launch."""
        if self._each_step:
            return 1
        step, clock = self.learner.step, self.learner.progress
        if self.checkpoints is not None:
            most = min(most, self.checkpoints.steps_left(clock.step))
        return step.together(self.state.batch_size, data.inputs, most)

    @contextlib.contextmanager
    def _wait_for_rows(self) -> Iterator[Callable[[], object]]:
        """Let other threads save; yield a function that saves and stops if a signal has arrived."""

        def look() -> None:
            if self._is_asked_to_stop():
                self._save_if_due(epoch_ended=False)

        with self.learner.turns.away():
            yield look

    def _step(self, data: Data, batch: Batch) -> None:
        learner = self.learner
        w = learner.step.weight(batch)
        if w == 0:  # nothing to learn from rows of weight 0
            self.state.batch += batch.steps
            return
        self._begun = learner.progress.step, w, data, batch
        J = learner.update(data, batch)
        self._count()
        learner.step.untouched = not self.observers
        if self._waiting >= UNREAD:
            self._collect_losses()
        if self._each_step:
            for observer in self.observers:
                observer.step_end(self.session, J)

    def _count(self) -> None:
        """Count the step that has begun, with its J, if it succeeded.

        A single assignment does it, which no interrupt can split; until then it can be repeated.
        """
        if self._begun is None:
            return
        (before, w, data, batch), state, J = self._begun, self.state, self.learner.step.J
        done = self.learner.progress.step - before
        if done <= 0:  # it failed
            self._begun = None
        elif isinstance(J, float):
            self._collect_losses()  # of the steps before it: the sum is in the order of the steps
            own = (w or 0.0) if math.isfinite(J) else 0.0  # not if it was skipped
            loss = state.loss + own * J if own else state.loss
            counted = (state.batch + done, loss, state.weight + own, None)
            state.batch, state.loss, state.weight, self._begun = counted
        else:
            if not (self._unread and self._unread[-1].J is J):
                rows = (data, batch) if self.source.lasting else None
                self._unread.append(_Unread(before + done, J, w, rows))
            state.batch, self._waiting, self._begun = state.batch + done, self._waiting + done, None

    def _collect_losses(self) -> None:
        """Read the losses still on the device, and add them up."""
        if self._fault is not None:
            raise self._fault
        state, launches = self.state, self._unread
        loss, weight = state.loss, state.weight
        for one in launches:
            try:
                losses, weights = one.J.values()
            except NonFiniteLoss as error:
                self._fault = self._explain(error, launches)
                raise self._fault from None
            except ValueError as error:
                self._fault = error
                raise
            w = weights if one.weight is None else np.full_like(losses, one.weight)
            loss, weight = _add(loss, weight, losses, w)
        state.loss, state.weight, self._unread, self._waiting = loss, weight, [], 0

    def _explain(self, error: NonFiniteLoss, launches: Sequence[_Unread]) -> Exception:
        """Return the error, naming the layer where it began if its batch is still available."""
        for one in launches:
            if one.batch is not None and one.step - one.batch[1].steps < error.step <= one.step:
                data, batch = one.batch
                number = error.step - one.step + batch.steps - 1
                return self.learner.explain(error, data, batch.single(number))
        return error

    def _end_epoch(self) -> Entry:
        """End an epoch; return its entry in the history.

        History, early stopping and schedule are updated together or not at all.
        """
        state, stopping = self.state, self.terms.stopping
        self._collect_losses()
        entry = self._measure()
        history = state.history
        calls: list[Call] = [(history.setdefault(k, []).append, x) for k, x in entry.items()]
        ends: dict[str, float | None] = {
            "epoch": state.epoch + 1, "batch": 0, "loss": 0.0, "weight": 0.0, "seconds": 0.0
        }  # fmt: skip
        adaptive, clock = self._follow_schedule(), self.learner.progress
        if adaptive is not None:
            floor, idle = _watch(adaptive).follow(entry, state.floor, state.idle)
            lowers = idle >= adaptive.patience
            ends |= {"floor": floor, "idle": 0 if lowers else idle}
            calls.append((vars(clock).update, {"reductions": clock.reductions + lowers}))
        if stopping is not None:
            ends["best"], ends["waited"] = stopping.follow(entry, state.best, state.waited)
            if ends["waited"] == 0 and self.best is not None:
                calls.append((operator.setitem, self.best, ..., self.learner.net.store.flat))
        make([*calls, (vars(state).update, ends)])
        return entry

    def _measure(self) -> Entry:
        """Return the history entry of the epoch that has just ended."""
        state, learner = self.state, self.learner
        entry = {"loss": state.loss / state.weight if state.weight else float("nan")}
        last = dataclasses.replace(learner.progress, step=learner.progress.step - 1)
        entry["learning_rate"] = learner.step.problem.optimizer.rate(last)
        if self.terms.held_out is not None:
            figures = learner.evaluation.evaluate(self.terms.held_out, self.terms.metrics)
            entry |= {f"validation_{key}": value for key, value in figures.items()}
        if learner.step.problem.settings.on_non_finite == "skip":
            entry["skipped"] = float(learner.count_skipped())
        self._update_clock()
        entry["seconds"] = state.seconds
        return entry

    def _tell(self, entry: Entry) -> bool:
        """Call every `epoch_end`; return True to stop."""
        # every callback sees every epoch: no short-circuit
        answers = [observer.epoch_end(self.session, entry) for observer in self.observers]
        wishes = [isinstance(x, bool | np.bool_) and bool(x) for x in answers]
        return self._is_out_of_patience() or any(wishes)

    def _is_out_of_patience(self) -> bool:
        stopping = self.terms.stopping
        return stopping is not None and self.state.waited >= stopping.patience

    def _follow_schedule(self) -> Adaptive | None:
        """Return the schedule if it is adaptive; a new one begins at its own rate."""
        learner, terms = self.learner, self.terms
        rate = learner.step.problem.optimizer.learning_rate
        schedule = rate if isinstance(rate, Adaptive) else None
        if schedule is None or schedule == self._schedule:
            return schedule
        scores.require_followed(schedule, learner.loss, terms.held_out is not None, terms.metrics)
        if learner.progress.followed not in (None, schedule):
            self.state.floor, self.state.idle, learner.progress.reductions = None, 0, 0
        self._schedule = learner.progress.followed = schedule
        return schedule

    def _update_clock(self) -> None:
        now = time.perf_counter()
        self.state.seconds, self._began = self.state.seconds + now - self._began, now

    def _save_if_due(self, epoch_ended: bool) -> None:
        checkpoints, clock = self.checkpoints, self.learner.progress
        if checkpoints is None or not checkpoints.due(clock.step, epoch_ended):
            return
        self.session.save(checkpoints.path, checkpoints.keep)
        checkpoints.note_saved(clock.step)
        if checkpoints.signals.asked is not None:
            checkpoints.leave(str(self.state))

    def leave(self, error: KeyboardInterrupt | SystemExit) -> None:
        """Save before this error propagates, if a `fit` in a callback raised it for a signal.

        The KeyboardInterrupt of a second SIGINT has no message: then nothing is saved.
        """
        if error.args and self._is_asked_to_stop():
            self._save_if_due(epoch_ended=False)

    def _is_asked_to_stop(self) -> bool:
        return self.checkpoints is not None and self.checkpoints.signals.asked is not None

    def pause(self) -> None:
        """Update state and progress, so that they can be saved."""
        self.learner.step.count_launched()
        self._count()
        self._collect_losses()
        self._update_clock()
        state = self.state  # an epoch without a finished batch restarts
        self.learner.progress.epochs = self._passes + state.epoch + (state.batch > 0)

    def unfinished(self) -> Unfinished:
        """Return the run as it is saved, with the best parameters if still needed."""
        needed = self.state.best is not None and not self.state.ended
        return Unfinished(self.state, self.best if needed else None)


def _watch(adaptive: Adaptive) -> EarlyStopping:
    """Return the rule that tracks the score that a schedule follows."""
    return EarlyStopping(
        adaptive.patience, adaptive.monitor, adaptive.tolerance, False, adaptive.mode
    )


def _open_bar(state: State, progress: bool) -> Any:
    """Return the run's progress bar, disabled if stderr is closed."""
    from tqdm.auto import tqdm  # not at import: it brings asyncio

    every, done = None, 0
    if state.rows is not None:
        every = state.epochs * state.rows
        done = state.epoch * state.rows + min(state.rows, state.batch * state.batch_size)
    seen = "ipykernel" in sys.modules or (_is_open(sys.stderr) and sys.stderr.isatty())
    return tqdm(
        total=every,
        initial=done,
        mininterval=0.1 if seen else 10,  # seconds between frames: a log file keeps every one
        unit="row",
        unit_scale=True,
        disable=not (progress and _is_open(sys.stderr)),
    )


def _add(loss: float, weight: float, J: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Return Σ w J and Σ w with more steps added, one after the other, unless skipped."""
    there = np.isfinite(J)
    w, sums = w[there], w[there] * J[there]
    if not len(w):
        return loss, weight
    sums[0] += loss
    w[0] += weight
    # `cumsum` adds in order, so that the sum does not depend on how many steps come at once
    return float(sums.cumsum()[-1]), float(w.cumsum()[-1])


def _is_open(stream: TextIO | None) -> bool:
    """Return True if a standard stream can be written to; without a console it is None."""
    return stream is not None and not stream.closed
