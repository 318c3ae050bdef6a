"""Stretches of steps: a small net's steps, many in one call of compiled code.

rows → X, Y → forward → loss → backward → norm → update, k times, without the interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from operator import is_not
from typing import Any

import numpy as np

from mlpcore.backends.compiled import steps
from mlpcore.backends.compiled.ops import CompiledOps
from mlpcore.backends.compiled.steps import StepLoop
from mlpcore.core.ops import Array, Call, EagerRecording, make
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import Progress, Schedule
from mlpcore.data.batches import Batch, Inputs
from mlpcore.engine.chunks import SHAPES, Chunk, cut
from mlpcore.engine.lanes import Lanes
from mlpcore.engine.problem import Problem
from mlpcore.engine.state import State
from mlpcore.engine.worker import Worker

FIRST = 4  # steps of a first call
TRIED = 32  # calls after which another number of threads is tried again
SECONDS = 0.05  # of a stretch, about: interrupts and other threads wait for its end
FLOP_PER_SECOND = 5e10
LARGEST = 1e9  # operations of a step from which its own calls, with BLAS's threads, are as fast
SHARED = 1e7  # operations of a step for each thread
CALL = 1e-7  # seconds of a pass apart from its arithmetic
CHUNKS = 16  # most chunks of a worker in a step
MOST = 4096  # steps of a stretch


def choose_length(problem: Problem, rows: int) -> int:
    """Return the number of steps on this many rows that one call may make; 1: none."""
    layers, weights = problem.layout.layers, problem.layout.weights
    flop = 6 * rows * weights + 20 * problem.layout.size
    if flop > LARGEST:
        return 1
    return max(1, min(MOST, int(SECONDS / (flop / FLOP_PER_SECOND + 10 * layers * CALL))))


def choose_threads(problem: Problem, rows: int, lanes: Lanes, workers: int) -> int:
    """Return the number of threads of a step: one for each worker.

    A single worker's calls are shared by BLAS's number of threads, if they are long enough.
    """
    if workers > 1:
        return min(lanes.threads, workers)
    flop = 6 * rows * problem.layout.weights
    return max(1, min(lanes.threads, int(flop / SHARED)))


def possible(problem: Problem, ops: object, rows: int, inputs: Inputs, chunk_rows: int) -> bool:
    """Return True if steps on batches of this size can be in one call, if their passes can.

    Args:
        problem, ops: of the step.
        rows: rows of a batch.
        inputs: dtypes of its arrays.
        chunk_rows: the maximum rows of a chunk, times the workers.
    """
    kind, settings = type(problem.optimizer), problem.settings
    own = ("scalars", "constants", "rate", "bounds")
    varies = any(getattr(kind, name) is not getattr(Optimizer, name) for name in own)
    frozen = any(layer.frozen for layer in problem.optimizer.layers.values())
    # a limit leaves no room for the calls' own objects, which no plan counts
    limited = settings.memory_limit is not None
    alone = varies or frozen or limited or settings.tolerant or bool(inputs.w_dtype)
    if alone or not isinstance(ops, CompiledOps) or rows > CHUNKS * chunk_rows:
        return False
    return choose_length(problem, rows) > 1


class Losses:
    """The losses of the steps of one batch, so far.

    Args:
        weight: Σ w of each step.

    Attributes:
        parts: losses, each with the number of those that are there.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.parts: list[tuple[Array, Array]] = []

    def values(self) -> tuple[Array, Array]:
        """Return J and Σ w of each step, in order."""
        found = (losses[: count[0]] for losses, count in self.parts)
        J = np.concatenate([np.empty(0), *found])  # there is none if an interrupt came first
        return J, np.full_like(J, self.weight)


class Stretch:
    """The steps on batches of one size, in one call.

    Args:
        problem, state, lanes: of the step.
        workers: its workers.
        rows: rows of a batch.
        chunk_rows: the maximum rows of a chunk.
        inputs: dtypes of the batch's arrays.

    Raises:
        NotCompiled: part of a step is not compiled.
    """

    def __init__(
        self,
        problem: Problem,
        state: State,
        lanes: Lanes,
        workers: Sequence[Worker],
        rows: int,
        chunk_rows: int,
        inputs: Inputs,
    ) -> None:
        self.problem, self.state, self.lanes, self.rows = problem, state, lanes, rows
        self._most = choose_length(problem, rows)
        self.length = min(FIRST, self._most)
        self.threads = choose_threads(problem, rows, lanes, len(workers))
        # seconds of a step by the number of threads, as last measured
        self._seconds: dict[int, float] = {}
        self._runs = 0
        self._gathers: list[tuple[Call, int]] = []  # each with the position of its array in a batch
        cuts = cut(rows, chunk_rows, len(workers))
        shared = len(workers) == 1 and self.threads > 1
        self.loop = self._make_loop(
            [self._share(*each, inputs, shared) for each in zip(workers, cuts, strict=False)]
        )

    def _share(
        self, worker: Worker, chunks: Sequence[tuple[int, int]], inputs: Inputs, shared: bool
    ) -> steps.Share:
        """Record a worker's part of a step, on these chunks of a batch.

        The worker itself, which refers to the stretch, is not kept.
        """
        ops = worker.ops
        assert isinstance(ops, CompiledOps)
        chunk = Chunk(
            ops, worker.W, worker.b, worker.activations, worker.objective, worker.dW, worker.db,
            worker.buffers, worker.scale, worker.J, worker.repeats,
        )  # fmt: skip
        calls: list[Call] = []
        ops.in_one_call, ops.shared = True, shared
        recorded: dict[tuple[int, bool], list[Call]] = {}  # chunks of one size have the same calls
        try:
            for start, stop in chunks:
                size, more = kind = stop - start, start > chunks[0][0]
                if kind not in recorded:
                    gathers = [
                        steps.gather(np.dtype(dtype), worker.buffers[name][:size], ops.places)
                        for name, dtype in (("X", inputs.x_dtype), ("Y", inputs.y_dtype))
                    ]
                    self._gathers += zip(gathers, (0, 1), strict=True)
                    run = functools.partial(chunk.run, "step", size, False, more)
                    then = steps.advance(ops.places, size)
                    recorded[kind] = [*gathers, *ops.record(run).calls, then]
                calls += recorded[kind]
        finally:
            ops.in_one_call = ops.shared = False
        return steps.Share(calls, ops.places, worker.J, chunks[0][0])

    def read(self, batch: Batch) -> bool:
        """Read rows of a batch's arrays in the next calls; return False if they are unusual."""
        rows = batch.rows
        if rows is not None and not (rows.dtype == np.int64 and rows.flags.c_contiguous):
            return False
        return all(steps.point(call, batch[number]) for call, number in self._gathers)

    def _make_loop(self, shares: Sequence[steps.Share]) -> StepLoop:
        lanes, optimizer, settings = self.lanes, self.problem.optimizer, self.problem.settings
        then = [call for one in lanes.additions[: len(shares) - 1] for call in _calls(one)]
        if lanes.penalty is not None:
            w = self.problem.parameters[: self.problem.layout.weights]
            then += _calls(lanes.penalty.lanes)
            then.append(steps.penalize(w, shares[0].J, settings.l1, settings.l2))
        constants, bounds, updates = optimizer.constants(), lanes.bounds, lanes.updates
        segments = [
            steps.Segment(
                _calls(update.lanes),
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
        gradient = self.state.gradient
        return StepLoop(shares, then, segments, rule, gradient, self.rows, settings.clip_norm)

    def run(
        self,
        batch: Batch,
        first: int,
        rates: Sequence[float],
        progress: Progress,
        losses: Losses,
    ) -> bool:
        """Run a batch's steps from number `first` on, as far as they are certainly finite.

        No interrupt can come between the call and the counts. Returns True if the next step has to
        run alone.

        Args:
            batch: the rows.
            first: number of steps of the batch that are done.
            rates: a learning rate for each step of the call.
            progress: counts the steps.
            losses: receives their losses.
        """
        loop, state, before, count = self.loop, self.state, progress.step, len(rates)
        rows = None if batch.rows is None else batch.rows[first * self.rows :]
        for update in self.lanes.updates:
            update.values = None  # the loop overwrites the scalars
        updates, threads = before - progress.skipped, self._choose_threads()
        found, done, _table = loop.set(rows, before + 1, updates, rates, state.reach, threads)
        losses.parts.append((found, done))
        calls = itertools.chain(
            [(setattr, state, "torn", before + 1), loop.call],
            _set_later(progress, "step", map(before.__add__, map(int, done))),
            _set_later(state, "done", map(updates.__add__, map(int, done))),
            _set_later(state, "reach", map(float, loop.reach)),
            [(setattr, state, "torn", 0)],
        )
        begin = time.perf_counter()
        make(calls)
        self._measure(threads, (time.perf_counter() - begin) / max(1, done[0]))
        state.rate = next((rate for rate in reversed(rates[: done[0]]) if rate), state.rate)
        return bool(done[0] < count)

    def _choose_threads(self) -> int:
        """Return the faster number of threads, which depends on what else the machine does."""
        ways = dict.fromkeys((self.threads, 1))
        untried = [way for way in ways if way not in self._seconds]
        if untried:
            return untried[0]
        best, *others = sorted(ways, key=self._seconds.__getitem__)
        return others[0] if others and self._runs % TRIED == 0 else best

    def _measure(self, threads: int, seconds: float) -> None:
        """Note the seconds of a step, and choose the length of the next calls by them."""
        self._runs += 1
        if self._runs > 1:  # the first one finds nothing in the caches
            self._seconds[threads] = seconds
        self.length = max(1, min(self._most, int(SECONDS / seconds)))

    def rates(self, progress: Progress, count: int) -> list[float]:
        """Return the learning rates of the next steps, up to the first that has none.

        Raises:
            ValueError: the very first has none.
        """
        rate = self.problem.optimizer.learning_rate
        if not isinstance(rate, Schedule):
            return [float(rate)] * count
        ahead, found = dataclasses.replace(progress), [rate.at(progress)]
        with contextlib.suppress(ValueError):  # raised when it is this step's turn
            while len(found) < count:
                ahead.step += 1
                found.append(rate.at(ahead))
        return found


def _calls(lanes: Sequence[EagerRecording]) -> list[Call]:
    """Return the calls of a pass over all lanes."""
    return [call for recording in lanes for call in recording.calls]


def _set_later(owner: object, name: str, value: Iterator[object]) -> Iterator[Call]:
    """Return the call that sets an attribute, with the value that the iterator then yields.

    All of it is C, which no interrupt splits.
    """
    return zip((setattr,), (owner,), (name,), value, strict=True)


class Stretches:
    """The stretches of a step.

    Args:
        problem, state, lanes: of the step.
    """

    def __init__(self, problem: Problem, state: State, lanes: Lanes) -> None:
        self.problem, self.state, self.lanes = problem, state, lanes
        self._settings: dict[str, Any] | None = None
        self._constants: dict[str, float] = {}

    def find(
        self, workers: Sequence[Worker], rows: int, chunk_rows: int, inputs: Inputs
    ) -> Stretch | None:
        """Return the stretch of steps on batches of this size, or None if they run one by one."""
        worker = workers[0]
        lanes, settings = self.lanes, self.problem.settings
        if settings.l1 or settings.l2 or lanes.penalty is not None:
            lanes.set_penalty()
        if lanes.settings is not self._settings:
            constants = self.problem.optimizer.constants()
            if constants != self._constants:  # not only the learning rate has changed
                self._constants = constants
            self._settings = lanes.settings
        made_of = lanes.updates, self._constants, lanes.penalty, settings
        if worker.stretches_of is None or any(map(is_not, made_of, worker.stretches_of)):
            worker.stretches, worker.stretches_of = {}, made_of
        key = rows, chunk_rows, inputs, len(workers)
        if key not in worker.stretches:
            if len(worker.stretches) >= SHAPES:
                worker.stretches.clear()
            worker.stretches[key] = self._make(workers, rows, chunk_rows, inputs)
        found: Stretch | None = worker.stretches[key]
        return found

    def _make(
        self, workers: Sequence[Worker], rows: int, chunk_rows: int, inputs: Inputs
    ) -> Stretch | None:
        problem, lanes = self.problem, self.lanes
        if not possible(problem, workers[0].ops, rows, inputs, len(workers) * chunk_rows):
            return None
        try:
            return Stretch(problem, self.state, lanes, workers, rows, chunk_rows, inputs)
        except steps.NotCompiled:
            return None


def run(
    stretch: Stretch,
    batch: Batch,
    progress: Progress,
    losses: Losses,
    run_alone: Callable[[Batch], float],
) -> None:
    """Run the steps of a batch in stretches, and alone each that may not be finite.

    Args:
        stretch: the stretch of such batches.
        batch: the rows.
        progress: counts the steps.
        losses: receives their losses.
        run_alone: runs a single step and returns its loss.
    """
    before, readable = progress.step, stretch.read(batch)
    rates: list[float] = []
    while (done := progress.step - before) < batch.steps:
        if readable:
            if done >= len(rates):
                rates += stretch.rates(progress, batch.steps - done)
            next_ones = rates[done : done + stretch.length]
            if not stretch.run(batch, done, next_ones, progress, losses):
                continue
        J = run_alone(batch.single(progress.step - before))
        losses.parts.append((np.array([J]), np.ones(1, np.int64)))
