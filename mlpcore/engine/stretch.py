"""Stretches of steps: a small net's steps, many in one call of compiled code.

rows → X, Y → forward → loss → backward → norm → update, k times, without the interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import is_not

import numpy as np

from mlpcore.backends.compiled import steps
from mlpcore.backends.compiled.ops import CompiledOps
from mlpcore.backends.compiled.steps import StepLoop
from mlpcore.core.ops import Array, Call, make
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import Progress, Schedule
from mlpcore.data.batches import Batch, Inputs
from mlpcore.engine.chunks import Chunk
from mlpcore.engine.lanes import Lanes
from mlpcore.engine.problem import Problem
from mlpcore.engine.state import State
from mlpcore.engine.worker import Worker

SECONDS = 0.02  # of a stretch, about: interrupts and other threads wait for its end
FLOP_PER_SECOND = 2e10
CALL = 1e-7  # seconds of a pass apart from its arithmetic
MOST = 4096  # steps of a stretch


def choose_length(problem: Problem, rows: int) -> int:
    """Return the number of steps on this many rows that one call may make."""
    layers, weights = problem.layout.layers, problem.layout.weights
    flop = 6 * rows * weights + 20 * problem.layout.size
    return max(1, min(MOST, int(SECONDS / (flop / FLOP_PER_SECOND + 10 * layers * CALL))))


class Losses:
    """The losses of the steps of one batch, so far.

    Args:
        weight: Σ w of each step.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.found: list[float] = []

    def values(self) -> list[tuple[float, float]]:
        """Return J and Σ w of each step, in order."""
        return [(J, self.weight) for J in self.found]


class Stretch:
    """The steps on batches of one size, in one call.

    Args:
        problem, state, lanes: of the step.
        worker: its only worker.
        rows: rows of a batch, all in one chunk.

    Raises:
        NotCompiled: part of a step is not compiled.
    """

    def __init__(
        self, problem: Problem, state: State, lanes: Lanes, worker: Worker, rows: int
    ) -> None:
        self.problem, self.state, self.lanes, self.rows = problem, state, lanes, rows
        self._buffers, self._J = worker.buffers, worker.J  # not the worker, which refers to this
        self.length = choose_length(problem, rows)
        self._sources: tuple[Array, Array] | None = None
        ops = worker.ops
        assert isinstance(ops, CompiledOps)
        self._places = ops.places
        chunk = Chunk(
            ops, worker.W, worker.b, worker.activations, worker.objective, worker.dW, worker.db,
            worker.buffers, worker.scale, worker.J, worker.repeats,
        )  # fmt: skip
        ops.in_one_call = True
        try:
            calls = ops.record(lambda: chunk.run("step", rows, False, False)).calls
        finally:
            ops.in_one_call = False
        settings, self._calls = problem.settings, [*calls]
        if lanes.penalty is not None:
            w = problem.parameters[: problem.layout.weights]
            self._calls += lanes.penalty.lanes[0].calls
            self._calls.append(steps.penalize(w, worker.J, settings.l1, settings.l2))

    def loop(self, batch: Batch) -> StepLoop | None:
        """Return the loop over steps on rows of a batch's arrays, or None if these are unusual."""
        sources = self._sources
        if sources is None or not (sources[0] is batch.X and sources[1] is batch.Y):
            self._sources = None
            try:
                self._loop: StepLoop | None = self._make_loop(batch)
            except steps.NotCompiled:
                self._loop = None
            self._sources = batch.X, batch.Y
        return self._loop

    def _make_loop(self, batch: Batch) -> StepLoop:
        lanes, optimizer = self.lanes, self.problem.optimizer
        gathers = [
            steps.gather(source, self._buffers[name][: self.rows], self._places)
            for name, source in (("X", batch.X), ("Y", batch.Y))
        ]
        constants, bounds, updates = optimizer.constants(), lanes.bounds, lanes.updates
        segments = [
            steps.Segment(
                update.lanes[0].calls,
                [update.scalars[key] for key in update.program.folded],
                update.rate,
                constants["decay"] if update.decay is None else update.decay,
                update.missed,
            )
            for update in updates
        ]
        rule = steps.Rule(
            updates[0].program, [*updates[0].vectors], constants, optimizer.bounds_of_row,
            bounds.floor, bounds.roots, bounds.halves,
        )  # fmt: skip
        return StepLoop(
            [*gathers, *self._calls], segments, rule, self.state.gradient, self._J, self._places,
            self.rows, self.problem.settings.clip_norm, self.length,
        )  # fmt: skip

    def calls(self, loop: StepLoop, batch: Batch, first: int, progress: Progress) -> list[Call]:
        """Return the calls that run a batch's steps from number `first` on; `done` counts them.

        No interrupt can come between them.
        """
        state = self.state
        assert batch.rows is not None
        count = min(batch.steps - first, self.length)
        rows, rates = batch.rows[first * self.rows :], self._rates(progress, count)
        for update in self.lanes.updates:
            update.values = None  # the loop overwrites the scalars
        loop.set(rows, progress.step + 1, progress.step - progress.skipped, rates, state.reach)
        torn = progress.step + 1
        return [(setattr, state, "torn", torn), loop.call, (setattr, state, "torn", 0)]

    def _rates(self, progress: Progress, count: int) -> list[float]:
        rate = self.problem.optimizer.learning_rate
        if not isinstance(rate, Schedule):
            return [float(rate)] * count
        ahead, rates = dataclasses.replace(progress), []
        for _ in range(count):
            rates.append(rate.at(ahead))
            ahead.step += 1
        return rates


class Stretches:
    """The stretches of a step, and the count of their steps.

    Args:
        problem, state, lanes: of the step.

    Attributes:
        launched: the progress, the steps before, the loop and the losses of a call whose steps are
            not counted yet, as after an interrupt; else None.
    """

    def __init__(self, problem: Problem, state: State, lanes: Lanes) -> None:
        self.problem, self.state, self.lanes = problem, state, lanes
        self.launched: tuple[Progress, int, StepLoop, Losses] | None = None

    def length(self, worker: Worker, rows: int, inputs: Inputs) -> int:
        """Return the number of steps on batches of this size that one call may make."""
        lanes, settings = self.lanes, self.problem.settings
        if settings.l1 or settings.l2 or lanes.penalty is not None:
            lanes.set_penalty()
        made_of = lanes.updates, lanes.settings, lanes.penalty, settings, (rows, inputs)
        known = worker.stretch_of
        if known is None or made_of[-1] != known[-1] or any(map(is_not, made_of[:-1], known)):
            worker.stretch, worker.stretch_of = self._find(worker, rows, inputs), made_of
        return 1 if worker.stretch is None else worker.stretch.length

    def _find(self, worker: Worker, rows: int, inputs: Inputs) -> Stretch | None:
        """Return the stretch of steps on such batches, or None if they run one by one."""
        problem, lanes = self.problem, self.lanes
        kind, settings = type(problem.optimizer), problem.settings
        own = ("scalars", "constants", "rate", "bounds")
        varies = any(getattr(kind, name) is not getattr(Optimizer, name) for name in own)
        frozen = any(layer.frozen for layer in problem.optimizer.layers.values())
        alone = frozen or settings.tolerant or inputs.w_dtype or lanes.count > 1
        copied = all(np.dtype(x).name in steps.SOURCES for x in (inputs.x_dtype, inputs.y_dtype))
        if varies or alone or not copied or not isinstance(worker.ops, CompiledOps):
            return None
        if choose_length(problem, rows) == 1:
            return None
        try:
            return Stretch(problem, self.state, lanes, worker, rows)
        except steps.NotCompiled:
            return None

    def run(
        self,
        stretch: Stretch | None,
        batch: Batch,
        progress: Progress,
        losses: Losses,
        run_alone: Callable[[Batch], float],
    ) -> None:
        """Run the steps of a batch in stretches, and alone each that may not be finite.

        Args:
            stretch: the stretch of the worker, if it has one.
            batch: the rows.
            progress: counts the steps.
            losses: receives their losses.
            run_alone: runs a single step and returns its loss.
        """
        before = progress.step
        while (done := progress.step - before) < batch.steps:
            loop = None if stretch is None else stretch.loop(batch)
            if stretch is not None and loop is not None:
                calls = stretch.calls(loop, batch, done, progress)
                self.launched = progress, progress.step, loop, losses
                make(calls)
                self.count()
            now = progress.step - before
            if stretch is None or loop is None or now < min(batch.steps, done + stretch.length):
                losses.found.append(run_alone(batch.single(now)))

    def count(self) -> None:
        """Count the steps of the last call, if an interrupt kept them from being counted."""
        if self.launched is None:
            return
        progress, before, loop, losses = self.launched
        done, state = int(loop.done[0]), self.state
        step, rates = before + done, [float(rate) for rate in loop.rates[:done] if rate]
        make(
            [
                (setattr, progress, "step", step),
                (setattr, state, "done", step - progress.skipped),
                (setattr, state, "reach", float(loop.reach[0])),
                (setattr, state, "rate", rates[-1] if rates else state.rate),
                (losses.found.extend, loop.losses[:done].tolist()),
                (setattr, self, "_launched", None),
            ]
        )
