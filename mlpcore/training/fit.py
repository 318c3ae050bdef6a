"""A call of `Trainer.fit`: its arguments, the run that it begins or resumes, its arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from mlpcore.backends import devices
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.checks import values
from mlpcore.checks.errors import NonFiniteLoss, shown
from mlpcore.core.ops import Buffer
from mlpcore.core.schedules import Progress
from mlpcore.data.batches import Data
from mlpcore.data.epochs import Rows, Sample, Streamed, inputs_of
from mlpcore.data.intake import with_all_weights
from mlpcore.data.streams import Stream
from mlpcore.engine import plan as planning
from mlpcore.io import model_file
from mlpcore.training import callbacks as hooks
from mlpcore.training import saving, scores
from mlpcore.training.callbacks import EarlyStopping, Session
from mlpcore.training.checkpoints import Checkpoints
from mlpcore.training.learner import Learner
from mlpcore.training.loop import Run, Terms
from mlpcore.training.scores import Metric
from mlpcore.training.state import History, State, Unfinished

Array = NDArray[Any]
log = logging.getLogger("mlpcore")


class Fit:
    """One call of `fit`, with its arguments checked; nothing changes until `go`.

    Args:
        learner: the network in training.
        session: the user's trainer.
        rows: X, Y and sample_weight.
        about: the user's notes, stored in checkpoints.
        others: as in `Trainer.fit`.

    Raises:
        TypeError, ValueError, OSError: as `Trainer.fit`.
    """

    def __init__(
        self,
        learner: Learner,
        session: Session,
        rows: tuple[Any, Any, Any],
        about: Mapping[str, Any],
        epochs: object,
        batch_size: object,
        validation: Any,
        metrics: object,
        early_stopping: object,
        callbacks: object,
        shuffle: object,
        progress: object,
        checkpoint: object,
        every: object,
        keep: object,
    ) -> None:
        learner.step.require_whole()
        self.learner, self.session = learner, session
        self.table = learner.intake.open_rows(*rows)
        held_out = learner.intake.open_validation(validation)
        validated = held_out is not None
        measures = scores.require_metrics(metrics, learner.loss, held_out)
        if measures and not validated:
            raise ValueError(
                "metrics are measured on the validation rows, but fit was given no validation=(Xv, "
                "Yv)"
            )
        stopping = self._check_stopping(early_stopping, validated, measures)
        observers = hooks.resolve(callbacks)
        shuffle, self.bar = values.boolean(shuffle, "shuffle"), values.boolean(progress, "progress")
        epochs = values.positive_integer(epochs, "epochs")
        size = values.positive_integer(batch_size, "batch_size")
        checkpoints = None if checkpoint is None else Checkpoints(checkpoint, every, keep)
        if checkpoints is not None:  # raise now what the first save would raise
            saving.describe(learner.step.problem.optimizer)
            model_file.as_json(about, "about")
        elif every != "1 epoch":
            log.warning("every=%s has no effect without checkpoint=…", shown(every))
        rate = learner.step.problem.optimizer.learning_rate
        scores.require_followed(rate, learner.loss, validated, measures)
        self.terms = Terms(held_out, measures, stopping, observers, checkpoints)
        monitor = None if stopping is None else dataclasses.asdict(stopping)
        count = len(self.table.X) if isinstance(self.table, Data) else self.table.rows
        self.size = size if count is None else min(size, count)
        self._begin(State(epochs, self.size, shuffle, count, validated, monitor, sorted(measures)))

    def _check_stopping(
        self, stopping: object, validated: bool, metrics: Mapping[str, Metric]
    ) -> EarlyStopping | None:
        if stopping is None:
            return None
        if not isinstance(stopping, EarlyStopping):
            raise TypeError(
                f"early_stopping must be mc.EarlyStopping(patience=…); got {shown(stopping)}"
            )
        scores.require_figure("early_stopping", stopping, self.learner.loss, validated, metrics)
        return stopping

    def _begin(self, new: State) -> None:
        """Set the state, best parameters and clock from which this call begins or resumes.

        Raises:
            ValueError: the call differs from that of the unfinished run; names the argument.
        """
        learner = self.learner
        left, best = learner.left or (None, None)
        if left is not None and not (left.epoch or left.batch):  # any call restarts such a run
            left, best = None, None
        if left is not None:
            left.require_same(new)
        self._take_samples(new, left)
        if left is None:
            table, size = self.table, self.size
            steps = -(-len(table.X) // size) if isinstance(table, Data) else table.batches(size)
            left, begun = new, learner.progress.step
        else:
            left.require_same_rows(new)
            total, begun = learner.progress.total, learner.progress.begun
            steps = None if total is None else total // left.epochs
        if steps is not None and new.epochs * steps > values.LARGEST:
            raise ValueError(
                f"epochs must be at most {values.LARGEST // steps}, with {steps} batches in each; "
                f"got {new.epochs}"
            )
        state = dataclasses.replace(left, epochs=new.epochs)
        if new.epochs > left.epochs:
            state.ended, state.told = False, 0
        state.data, state.held_out = left.data or new.data, left.held_out or new.held_out
        total = None if steps is None else new.epochs * steps
        clock = dataclasses.replace(learner.progress, begun=begun, total=total)
        if state.epoch < state.epochs:  # a schedule that fails does so before any change
            self._require_rate(clock, starts=state.batch == 0)
        self.state, self.best, self.clock = state, best, clock

    def _require_rate(self, clock: Progress, starts: bool) -> None:
        """Raise the schedule's error if it gives no rate for the first step."""
        first = dataclasses.replace(clock, epochs=clock.epochs + starts)
        self.learner.step.problem.optimizer.rate(first)

    def _take_samples(self, new: State, left: State | None) -> None:
        """Take the samples of the rows, at the same places as those of the unfinished run."""
        loss, dtype, device = self.learner.loss, self.learner.net.dtype, self.learner.net.device
        with devices.find(device).active():
            for name, rows in (("data", self.table), ("held_out", self.terms.held_out)):
                like = getattr(left, name, None)
                setattr(new, name, Sample.of(rows, loss, dtype, device, like))

    def go(self) -> History:
        """Train to the end; return the history."""
        learner, checkpoints = self.learner, self.terms.checkpoints
        with contextlib.ExitStack() as leaving:
            if checkpoints is not None:
                leaving.enter_context(checkpoints.signals)  # obeyed after all that is below
            leaving.callback(learner.rest)
            leaving.enter_context(devices.find(learner.net.device).active())
            if checkpoints is not None:
                leaving.enter_context(checkpoints.claimed(learner, learner.id))
            arrays, source = self._open_source()
            keeper = arrays.get("best")
            if self.best is not None and keeper is not None:
                keeper[...] = devices.find(learner.net.device).to_device(self.best)
            run = Run(learner, self.session, self.state, source, keeper, self.terms)
            learner.run = run
            learner.left = None if checkpoints is None else Unfinished(self.state, self.best)
            learner.progress.begun, learner.progress.total = self.clock.begun, self.clock.total
            return self._go(run)

    def _go(self, run: Run) -> History:
        """Train to the end; with a checkpoint, keep an interrupted run as unfinished."""
        learner = self.learner
        try:
            try:
                return run.go(self.bar)
            except (KeyboardInterrupt, SystemExit) as error:
                run.leave(error)
                raise
            finally:
                if learner.left is not None:
                    run.pause()
                    learner.keep(run.unfinished())
        except NonFiniteLoss:
            learner.left = None  # the step would overflow again
            raise

    # -- arrays --

    def _open_source(self) -> tuple[dict[str, Array], Rows | Streamed]:
        """Return the arrays that `fit` adds to those of the steps, and the source of batches."""
        stopping = self.terms.stopping
        keeps_best = stopping is not None and stopping.restore_best
        if isinstance(self.table, Data):
            return self._open_arrays(with_all_weights(self.table), keeps_best)
        return self._open_stream(self.table, keeps_best)

    def _open_arrays(self, table: Data, keeps_best: bool) -> tuple[dict[str, Array], Rows]:
        step, intake = self.learner.step, self.learner.intake
        rows = 0 if table.inputs.host else len(table.X)
        buffers, weights = step.workspace.fit_buffers(rows, keeps_best), intake.weight_buffers(rows)
        copies = self._plan_copies(table, [*buffers, *weights])
        if intake.on_host:
            arrays = step.workspace.reserve([*buffers, *copies.values()], weights)
        else:  # copies are on the host
            arrays = step.workspace.reserve(buffers, weights)
            arrays |= planning.allocate(NumpyOps(), list(copies.values()))
        made: dict[str, Any] = {name: arrays[buffer.name] for name, buffer in copies.items()}
        for name, array in made.items():
            array[...] = getattr(table, name)
        order = arrays.get("row order")
        return arrays, Rows(table._replace(**made), self.size, order, intake.device)

    def _plan_copies(self, table: Data, reserved: Sequence[Buffer]) -> dict[str, Buffer]:
        """Return buffers for row-major copies of strided arrays, by name: epochs read them faster.

        There are none if `memory_limit` leaves no room for them without smaller chunks.
        """
        step, why = self.learner.step, "a copy that rows are gathered from faster"
        copies = {
            name: Buffer(f"{name} row-major", x.shape, dtype.str, why)
            for name, (x, dtype) in table.strided().items()
        }
        limited = step.problem.settings.memory_limit is not None and self.learner.intake.on_host
        if not (limited and copies):
            return copies
        alone = step.workspace.make_plan(self.size, table.inputs, reserved)
        try:
            beside = step.workspace.make_plan(
                self.size, table.inputs, [*reserved, *copies.values()]
            )
        except MemoryError:
            return {}
        return copies if (beside.rows, beside.workers) == (alone.rows, alone.workers) else {}

    def _open_stream(self, table: Stream, keeps_best: bool) -> tuple[dict[str, Array], Streamed]:
        step, intake = self.learner.step, self.learner.intake
        given = inputs_of(table, intake.loss, intake.dtype.str)
        buffers, limit = (
            step.workspace.fit_buffers(0, keeps_best),
            step.problem.settings.memory_limit,
        )
        if limit is not None and given is not None and intake.on_host:
            limit = max(0, limit - step.workspace.make_plan(1, given, buffers).total_bytes) // 2
        windows = table.buffers(self.size, limit)
        windows += intake.weight_buffers(windows[0].shape[0] if windows else 0)
        if intake.on_host:
            arrays = step.workspace.reserve([*buffers, *windows])
        else:  # windows are on the host
            arrays = step.workspace.reserve(buffers) | planning.allocate(NumpyOps(), windows)
        load = functools.partial(intake.load_piece, place=arrays.get("row weights"))
        return arrays, Streamed(table, self.size, arrays, load)
