"""One training step: X, Y → forward → loss → backward → reduce → update.

J = Σ_rows w ℓ / Σ_rows w + l1 Σ|W| + ½ l2 Σ W²,    flat gradient g = ∂J/∂parameters,    w ←
update(w, g, state)
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import queue
import time
from _thread import start_new_thread
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mlpcore.backends.numpy import blas
from mlpcore.checks.errors import NonFiniteLoss
from mlpcore.core.activations import Activation
from mlpcore.core.layout import Layout, Parameters
from mlpcore.core.losses import Objective
from mlpcore.core.ops import Array, Buffer, Call, EagerOps, EagerRecording, make
from mlpcore.core.optimizers import Layer, Optimizer, Segment
from mlpcore.core.program import Program, program
from mlpcore.core.schedules import Progress
from mlpcore.data.batches import Batch, Inputs, weight_of
from mlpcore.engine import plan as planning
from mlpcore.engine.chunks import Chunk, Worker, cut, even
from mlpcore.engine.plan import Plan
from mlpcore.engine.workspace import Parts, PlannedStep, Settings, log

T = TypeVar("T")
WORKER_ROWS = 256  # a worker's rows, per other worker
WORKER_FLOP = 4e8  # of a step that is worth handing work over to another thread
LANE_ENTRIES = 1 << 18  # of the flat vector from which workers share the passes over it as well
BLAS_ROWS = 64  # rows for each thread of BLAS, where a core's cache holds the parameters
TRIED = 1 << 15  # entries of an update that is tried on copies before it takes place
ORDINARY = 2.0**50  # slopes and state up to which bounds are looked at once, not at each step
BLAS_ALONE = 1 << 18  # multiplications of a GEMM up to which BLAS uses one thread by itself


@dataclass
class Update:
    """One pass, the optimizer's or the penalties', over a range of the flat vectors, recorded lane
    by lane; scalars are 0-d.

    `rate` is a factor of the learning rate; `decay` stands in place of the optimizer's unless it is
    None; `t` is less by the updates `missed`.
    """

    program: Program
    vectors: dict[str, Array]
    scalars: dict[str, Array]
    lanes: list[EagerRecording]
    rate: float = 1.0
    decay: float | None = None
    missed: int = 0
    values: dict[str, float] | None = None

    def refresh(self, scalars: dict[str, float]) -> None:
        """Set the scalars, where those that the rule reads have changed."""
        values = {name: scalars[name] for name in self.program.reads}
        if self.decay is not None and "decay" in values:
            values["decay"] = self.decay
        if self.rate != 1 and "rate" in values:
            values["rate"] *= self.rate
        if self.missed and "t" in values:
            values["t"] = max(
                1.0, values["t"] - self.missed
            )  # somebody may have set the count back
        if values != self.values:
            self.values = None  # an interrupt may leave some of the old ones
            for key, value in self.program.fold(values).items():
                self.scalars[key][...] = value
            self.values = values

    def overflows(self, ops: EagerOps) -> bool:
        """Return whether a number that the pass would write is not finite; nothing is written."""
        size = self.vectors["w"].size
        for start in range(0, size, TRIED):
            copies = {
                name: vector[start : start + TRIED].copy() for name, vector in self.vectors.items()
            }
            ops.map(self.program, copies, self.scalars)
            if not all(
                bool(ops.xp.isfinite(copy).all()) for name, copy in copies.items() if name != "g"
            ):
                return True
        return False


class Threads:
    """Threads that do jobs, and end with this.

    They are handed over in queues written in C: in `concurrent.futures`, or in
    `threading.Thread.start`, an interrupt may leave a lock held, for which a thread then waits for
    ever.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        for _ in range(count):
            start_new_thread(_work, (self.jobs,))

    def __del__(self) -> None:
        for _ in range(self._count):
            self.jobs.put(None)


def _work(jobs: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    """Do jobs until there is None."""
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds arrays


class Step(PlannedStep):
    """A step whose operations run as they are called, on threads of its own where the batch is
    large.

    Args: as `PlannedStep`.
    """

    ops: EagerOps
    new_ops: Callable[[], EagerOps]

    def __init__(
        self, layout: Layout, store: Parameters, activations: tuple[Activation | None, ...], objective: Objective,
        optimizer: Optimizer, settings: Settings, new_ops: Callable[[], EagerOps],
    ) -> None:  # fmt: skip
        super().__init__(layout, store, activations, objective, optimizer, settings, new_ops)
        self.scale = self.ops.xp.ones((), self.dtype)
        self._weight: float | None = 1.0  # whose inverse it is
        here = self.ops.xp is np
        self.threads = blas.threads() if here else 1
        self._most_threads = blas.most() if here else 1  # of BLAS by itself
        self.lanes = (
            self.threads if layout.size >= LANE_ENTRIES else 1
        )  # that the optimizer's pass is cut into
        self._largest = max(a * b for a, b in itertools.pairwise(layout.sizes))
        self._in_cache = layout.size * np.dtype(self.dtype).itemsize <= planning.CACHE
        self.workers: list[Worker] = []
        self.additions: list[
            list[EagerRecording]
        ] = []  # of each further worker's gradient, lane by lane
        self.penalty: Update | None = None
        self.lane_ops = [new_ops() for _ in range(self.lanes)]
        self._threads: tuple[int, Threads] | None = None  # and the process that it belongs to
        dtype = np.finfo(self.dtype)
        self._halves = (
            float(dtype.max) * float(dtype.eps) / 512
        )  # what the largest number swallows, 128 times over
        self._roots = math.sqrt(float(dtype.max)) / 2  # a square of it, kept as a mean, is finite
        self._proved: tuple[dict[str, float], float] = (
            {},
            -1.0,
        )  # settings and the largest rate that cannot overflow
        self._floor = 2 * math.sqrt(
            float(dtype.tiny)
        )  # a bound of what is lost where squares are 0

    # -- the plan --

    def _state_buffers(self) -> list[Buffer]:
        (registers,) = self.ops.map_scratch(self._program(), self.layout.size, self.dtype)
        return self._vectors() + [
            registers._replace(name=f"registers {lane}") for lane in range(self.lanes)
        ]

    def _workspace(self, rows: int, workers: int, batch_rows: int, inputs: Inputs) -> Parts:
        accumulates = rows * workers < batch_rows
        buffers = planning.chunk_buffers(
            self.ops,
            self.layout,
            self.dtype,
            self.activations,
            self.objective,
            inputs,
            rows,
            accumulates,
        )
        parts: Parts = {"workspace": buffers}
        for i in range(1, workers):
            gradient = Buffer("gradient", (self.layout.size,), self.dtype, f"of worker {i + 1}")
            parts[f"workspace {i + 1}"] = [*buffers, gradient]
        return parts

    def _choose(self, batch_rows: int, inputs: Inputs) -> tuple[int, int]:
        def workspace(rows: int) -> int:
            return planning.part_bytes(self._workspace(rows, 1, batch_rows, inputs)["workspace"])

        itemsize = np.dtype(self.dtype).itemsize
        rows = self.settings.most_rows or planning.choose_rows(
            workspace, self.layout, itemsize, batch_rows
        )
        workers = min(batch_rows, self.settings.workers or self._choose_workers(batch_rows))
        return min(rows, -(-batch_rows // workers)), workers

    def _choose_workers(self, batch_rows: int) -> int:
        """As many threads as BLAS would use, each with rows of its own, or one.

        Adding up two gradients costs about as much as 15 rows of the GEMMs: with 256 rows a worker
        and more for each further one, that is 6% at most, less than what the passes between the
        GEMMs gain from several threads. Handing work over and waiting for it takes 0.1 ms, so that
        a step of less than 0.4 GFLOP stays on one.
        """
        threads = self.threads
        enough = batch_rows >= threads * WORKER_ROWS * (threads - 1)
        return threads if enough and 6 * batch_rows * self.layout.weights >= WORKER_FLOP else 1

    def _allocate(self, plan: Plan, inputs: Inputs) -> None:
        for i in range(plan.workers):
            self._add_worker(plan.parts[f"workspace {i + 1}" if i else "workspace"])

    def _bind_optimizer(self) -> None:
        """State vectors, zero, and the recorded update for the optimizer's rule as it is now."""
        self._drop_workspace()
        buffers = self._state_buffers()
        self.state.clear()
        self.state = planning.allocate(self.ops, buffers)
        for vector in self.state.values():
            vector[...] = 0
        self.gradient = self.state.pop("gradient")
        for lane, ops in enumerate(self.lane_ops):
            ops.use({"registers": self.state.pop(f"registers {lane}")})
        self.lane_gradients = [
            self.gradient[begin:end] for begin, end in itertools.pairwise(self._lane_edges())
        ]
        self.by_layer = dict(self.optimizer.layers)
        self.penalty, self.updates = None, self._record_updates()
        self._proved = {}, -1.0
        edges = [*itertools.pairwise(self._lane_edges())]
        self._frozen = [
            [self.gradient[max(begin, x.start) : max(begin, min(end, x.stop))] for x in self.frozen]
            for begin, end in edges
        ]
        self.rule = self.optimizer.row
        self._plans.clear()

    def _drop_workspace(self) -> None:
        super()._drop_workspace()
        self.workers, self.additions = [], []

    def _first_chunk(self) -> Chunk:
        return self.workers[0]

    def _to_host(self, array: Array) -> np.ndarray:
        host: np.ndarray = array if self.ops.xp is np else self.ops.xp.asnumpy(array)
        return host

    def count_skipped(self, progress: Progress) -> None:
        """Nothing to do: each step counts itself."""

    def count_launched(self) -> None:
        """Nothing to do: each step counts itself."""

    def _facts(self) -> dict[str, Any]:
        return {"threads": self.threads}

    def _take(self, facts: Mapping[str, Any]) -> None:
        if facts.get("threads") != self.threads:
            log.warning(
                "the run was saved with %s threads of BLAS and goes on with %s: not equal to the "
                "bit",
                facts.get("threads"),
                self.threads,
            )

    def _add_worker(self, buffers: Sequence[Buffer]) -> None:
        ops = self.new_ops()
        arrays = planning.allocate(ops, buffers)
        gradient = arrays.pop("gradient", self.gradient)
        if gradient is not self.gradient:
            sum_ = program("g = g + h", frozenset())
            self.additions.append(self._record_lanes(sum_, {"g": self.gradient, "h": gradient}, {}))
        dW, db = self.layout.views(gradient)
        activations = self._bound(gradient)
        worker = Worker(
            ops,
            self.W,
            self.b,
            activations,
            self.objective,
            dW,
            db,
            arrays,
            self.scale,
            self.layout.repeats,
        )
        self.workers.append(worker)

    # -- the step --

    def run(self, batch: Batch, plan: Plan, progress: Progress) -> float:
        """X, Y → forward → loss → backward → reduce → update. Returns J; a J that is not finite
        changes no parameter.
        """
        threads = self._blas_threads(batch.size, plan.workers)
        with blas.limited(threads) if threads < self._most_threads else blas.NOTHING:
            J: float = self.ops.quietly(self._run, batch, plan, progress)
        return J

    def _run(self, batch: Batch, plan: Plan, progress: Progress) -> float:
        if self.settings.dropout:
            self._draw(progress.step + 1)
        pool = self._pool() if plan.workers > 1 else None
        J, squares = self._loss_and_gradient(batch, plan, pool)
        self._update(J, squares, progress, pool)
        return J

    def loss_and_gradient(self, batch: Batch, plan: Plan, number: int = 1) -> float:
        """J of a batch, its gradient in `self.gradient`: forward → loss → backward by chunks →
        reduce, and the penalties.
        """
        self._draw(number)
        J: float = self.ops.quietly(self._loss_and_gradient, batch, plan, None)[0]
        return J

    def renew(self) -> None:
        """Give up what another thread was doing here when the process was forked."""
        super().renew()
        for ops in (self.ops, *self.lane_ops):
            ops.renew()

    def _draw(self, number: int) -> None:
        """The masks of dropout are those of this step from now on."""
        for worker in self.workers:
            worker.ops.step = number

    def _loss_and_gradient(
        self, batch: Batch, plan: Plan, pool: Threads | None
    ) -> tuple[float, float]:
        """J, and the squared norm of its gradient."""
        self.set_scale(batch)
        self._set_penalty()
        shares = cut(batch.size, plan.rows, plan.workers)
        self._forward_loss_backward(batch, shares, pool)
        J = sum(float(worker.J) for worker in self.workers[: len(shares)])
        squares = sum(self._lane_by_lane(functools.partial(self._reduce_lane, len(shares)), pool))
        return J + self._penalty_value(), squares

    def evaluate(self, batch: Batch, plan: Plan, see: Callable[[Array, int, int], None]) -> float:
        """The mean loss of a batch, without penalties; `see(output, start, stop)` gets each chunk's
        output, S[L] if matched.
        """
        J: float = self.ops.quietly(self._evaluate, batch, plan, see)
        return J

    def _evaluate(self, batch: Batch, plan: Plan, see: Callable[[Array, int, int], None]) -> float:
        worker = self.workers[0]
        self.set_scale(batch)
        worker.J[...] = 0
        for start, stop in even(0, batch.size, plan.rows):
            output = worker.forward(batch, start, stop)
            see(self._to_host(output), start, stop)
            worker.loss(batch, start, stop)
        return float(worker.J)

    def weight(self, batch: Batch) -> float:
        """Σ w over the rows of a batch."""
        return weight_of(batch)

    def set_scale(self, batch: Batch) -> None:
        """1 / Σ w of the batch, where every worker reads it."""
        weight = weight_of(batch)
        if weight == self._weight:
            return
        largest = float(np.finfo(self.dtype).max)
        if not 1 / largest < weight < largest:
            raise ValueError(
                f"sample_weight sums to {weight:g}, out of the range of {self.dtype}: rescale the "
                "weights"
            )
        self._weight = None  # an interrupt may come before the new one is noted
        self.scale[...] = 1 / weight
        self._weight = weight

    def _blas_threads(self, rows: int, workers: int) -> int:
        """Threads that BLAS may use during a step.

        One beside workers, for the *whole* step: a thread of BLAS's own that still spun would be
        one too many. Where a core's cache holds the parameters, few rows cost more than they gain:
        half of dW then lies in another core's cache.
        """
        if workers > 1:
            return 1
        if not self._in_cache or rows * self._largest <= BLAS_ALONE:
            return self.threads
        return max(1, min(self.threads, rows // BLAS_ROWS))

    def _pool(self) -> Threads:
        """The threads of this step, which wait in between and end with it; a forked process has its
        own.
        """
        if self._threads is None or self._threads[0] != os.getpid():
            self._threads = os.getpid(), Threads(max(1, self.threads - 1, len(self.workers) - 1))
        return self._threads[1]

    def _forward_loss_backward(
        self, batch: Batch, shares: list[list[tuple[int, int]]], pool: Threads | None
    ) -> None:
        """Each worker's share of the chunks, side by side, or one after the other without a pool."""
        if pool is None:
            for worker, chunks in zip(self.workers, shares, strict=False):
                worker.gradient(batch, chunks)
            return
        jobs = [
            functools.partial(worker.ops.quietly, worker.gradient, batch, share)
            for worker, share in zip(self.workers, shares, strict=False)
        ]
        self._side_by_side(jobs[0], jobs[1:], pool)

    def _lane_by_lane(self, do: Callable[[int], T], pool: Threads | None) -> list[T]:
        """What `do(lane)` returns for each lane."""
        if pool is None:
            return [do(lane) for lane in range(self.lanes)]
        jobs = [functools.partial(ops.quietly, do, lane) for lane, ops in enumerate(self.lane_ops)]
        return self._side_by_side(jobs[0], jobs[1:], pool)

    def _side_by_side(
        self, here: Callable[[], T], there: Sequence[Callable[[], T]], pool: Threads
    ) -> list[T]:
        """What the jobs return, the first done by this thread, the others by those of the pool. All
        have ended when it ends.
        """
        ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        found, errors = dict[int, T](), list[BaseException]()
        sent, over, left = list[int](), list[int](), list[bool]()

        def do(number: int) -> None:
            try:
                if not left:
                    found[number] = there[number]()
            except BaseException as error:
                errors.append(error)
            finally:
                over.append(number)
                ended.put(None)

        numbers = range(len(there))
        calls = [(pool.jobs.put, functools.partial(do, number)) for number in numbers]
        try:
            make([*calls, (sent.extend, numbers)])
            first = here()
            for _ in numbers:
                ended.get()
        except (
            BaseException
        ):  # an interrupt, say: no thread may go on writing into the next step's arrays
            left.append(True)
            self._drop_workspace()
            while len(over) < len(sent):
                time.sleep(0.0001)
            raise
        if errors:
            raise errors[0]
        return [first, *(found[number] for number in numbers)]

    def _reduce_lane(self, count: int, lane: int) -> float:
        """Add up the gradients of the `count` workers that had rows, and the penalties'. Returns Σ
        g².
        """
        for addition in self.additions[: count - 1]:
            addition[lane].replay()
        if self.penalty is not None:
            self.penalty.lanes[lane].replay()
        return self._lane_squares(lane)

    def _lane_squares(self, lane: int) -> float:
        """Return Σ g², where g of frozen layers is 0 from now on. Without clipping its digits do
        not matter, only its size.
        """
        for part in self._frozen[lane]:
            part[...] = 0
        gradient = self.lane_gradients[lane]
        if self.settings.clip_norm is None and math.isfinite(
            squares := float(self.ops.xp.dot(gradient, gradient))
        ):
            return squares
        return self.lane_ops[lane].sum_squares(gradient)

    def _penalty_value(self) -> float:
        """l1 Σ|W| + ½ l2 Σ W² of the weights as they are."""
        l1, l2 = self.settings.l1, self.settings.l2
        if not l1 and not l2:
            return 0.0
        w = self.parameters[: self.layout.weights]
        return (l1 * self.ops.sum_abs(w) if l1 else 0.0) + (
            0.5 * l2 * self.ops.sum_squares(w) if l2 else 0.0
        )

    def apply(self, gradient: Array, progress: Progress) -> None:
        """One update by a gradient of the caller's, flat, which is not written to."""
        self.settle()
        self.ops.quietly(self._apply, gradient, progress)

    def _apply(self, gradient: Array, progress: Progress) -> None:
        if gradient is not self.gradient:
            self.gradient[...] = gradient
        squares = sum(map(self._lane_squares, range(self.lanes)))
        self._update(0.0, squares, progress, None)

    def _update(self, J: float, squares: float, progress: Progress, pool: Threads | None) -> None:
        """Check, clip, and one pass of the optimizer over the flat vectors, its lanes side by side."""
        self.J = J
        values = self.optimizer.scalars(progress)
        rate = values["rate"]
        norm = math.sqrt(squares) if math.isfinite(squares) else self._norm()
        if not (math.isfinite(J) and math.isfinite(norm)):
            what = f"the loss is {J}" if not math.isfinite(J) else "the gradient is not finite"
            return self._leave_out(what, progress, rate)
        clip_norm = self.settings.clip_norm
        if clip_norm is not None:
            values["clip"] = min(1.0, clip_norm / norm) if norm else 1.0
            norm = min(norm, clip_norm)
        for update in self.updates:
            update.refresh(values)
        largest = 2 * norm + self._floor
        if self.by_layer:  # the largest of each
            values["rate"] = rate * max((update.rate for update in self.updates), default=0.0)
            values["decay"] = max(
                [values["decay"], *(update.decay or 0.0 for update in self.updates)]
            )
        certain, reach = self._excludes_overflow(values, largest)
        if not certain and any(update.overflows(self.lane_ops[0]) for update in self.updates):
            return self._leave_out("the update is not finite", progress, rate)
        try:
            self._write(progress, pool, reach, rate or self.rate)
        finally:
            self.store.torn = self.torn
        return None

    def _write(self, progress: Progress, pool: Threads | None, reach: float, rate: float) -> None:
        """Update parameters and state, and count the step: all of it, also where an interrupt
        comes.

        What C does in a row is not interrupted. Of several threads' lanes those that have begun are
        waited for, and the others are done here. Until all is done the step is `torn`.
        """
        step = progress.step + 1
        begin: Call = (setattr, self, "torn", step)
        end: list[Call] = [
            (setattr, progress, "step", step), (setattr, self, "done", step - progress.skipped),
            (setattr, self, "reach", reach), (setattr, self, "rate", rate), (setattr, self, "torn", 0),
        ]  # fmt: skip
        calls = [
            [call for update in self.updates for call in update.lanes[lane].calls]
            for lane in range(self.lanes)
        ]
        if pool is None:
            make([begin, *itertools.chain(*calls), *end])
            return
        left, done = [*range(self.lanes)], list[int]()

        def do(lane: int) -> None:
            make([(left.remove, lane), begin, *calls[lane], (done.append, lane)])

        def finish() -> None:
            for lane in [*left]:
                do(lane)
            if len(done) == self.lanes:  # else one of them ran out of memory, say
                make(end)

        try:
            self._lane_by_lane(do, pool)
            finish()
        except BaseException:
            finish()
            raise

    def _excludes_overflow(self, values: Mapping[str, float], largest: float) -> tuple[bool, float]:
        """Return whether the row's bounds exclude it where no |g| is above `largest`, and `reach`
        afterwards.

        They grow with the rate, the slope and the reach. So it is enough to have looked once, with
        these settings, at a rate, a slope and a reach that are as large.
        """
        settings = {**values, "rate": 0.0, "t": 0.0, "clip": 1.0}
        if values["rate"] > self._proved[1] or settings != self._proved[0]:
            reach, change = self.optimizer.bounds(values, ORDINARY, ORDINARY)
            closed = reach <= ORDINARY and change < self._halves
            self._proved = settings, values["rate"] if closed else -1.0
        if max(largest, self.reach) <= ORDINARY and values["rate"] <= self._proved[1]:
            return True, ORDINARY
        reach, change = self.optimizer.bounds(values, largest, self.reach)
        return largest < self._roots and change < self._halves, reach

    def _norm(self) -> float:
        """Return the gradient's norm where the squares overflow, or what is not finite in it."""
        largest = float(abs(self.gradient).max())
        return (
            largest * math.sqrt(self.ops.sum_squares(self.gradient / largest))
            if math.isfinite(largest)
            else largest
        )

    def _leave_out(self, what: str, progress: Progress, rate: float) -> None:
        """Count a step that changes nothing, or raise it as a NonFiniteLoss."""
        if self.settings.tolerant:
            vars(progress).update(step=progress.step + 1, skipped=progress.skipped + 1)
            return
        message = f"step {progress.step + 1}: {what} at learning rate {rate:g}; the parameters are as before it"
        raise NonFiniteLoss(message, progress.step + 1, rate)

    # -- recordings --

    def _program(self) -> Program:
        statements = self.optimizer.statements
        if self.settings.clip_norm is not None:
            statements = f"g = clip * g; {statements}"
        return program(statements, frozenset({"clip", "rate", "t", *self.optimizer.constants()}))

    def _lane_edges(self) -> list[int]:
        """Where the lanes of the flat vector begin, and its end."""
        return [self.layout.size * lane // self.lanes for lane in range(self.lanes + 1)]

    def _record_lanes(
        self, compiled: Program, vectors: Mapping[str, Array], scalars: Mapping[str, Array], part: slice = slice(None)
    ) -> list[EagerRecording]:  # fmt: skip
        """A pass over a part of flat vectors, recorded lane by lane. An entry is in the same lane
        in every pass.
        """
        start, stop, _ = part.indices(self.layout.size)
        recordings = []
        for ops, (begin, end) in zip(
            self.lane_ops, itertools.pairwise(self._lane_edges()), strict=True
        ):
            lane = slice(max(start, begin), max(start, begin, min(stop, end)))
            arrays = {name: vector[lane] for name, vector in vectors.items()}
            recordings.append(ops.record(functools.partial(ops.map, compiled, arrays, scalars)))
        return recordings

    def _set_penalty(self) -> None:
        """The penalties' gradient with l1 and l2 as they are now, recorded anew where another one
        of them is zero.
        """
        if not self.settings.l1 and not self.settings.l2:
            self.penalty = None
            return
        values = {
            key: value
            for key, value in (("l2", self.settings.l2), ("l1", self.settings.l1))
            if value
        }
        if self.penalty is None or set(self.penalty.program.reads) != set(values):
            compiled = program(
                f"g = {' + '.join(['g', *self.settings.penalty_terms])}", frozenset({"l1", "l2"})
            )
            scalars = {key: self.ops.xp.zeros((), self.dtype) for key in compiled.folded}
            vectors = {"g": self.gradient, "w": self.parameters}
            lanes = self._record_lanes(compiled, vectors, scalars, slice(self.layout.weights))
            self.penalty = Update(compiled, vectors, scalars, lanes)
        self.penalty.refresh(values)

    def _record_updates(self) -> list[Update]:
        """One pass over all parameters, or one over each part of them that has settings of its own,
        as weights that decay.
        """
        state = {name: self.state[f"state {name}"] for name in self.optimizer.states}
        vectors = {"w": self.parameters, "g": self.gradient, **state}
        compiled, decays = self._program(), hasattr(self.optimizer, "weight_decay")
        whole = [Segment(0, self.layout.size, False, Layer())]
        updates = []
        for segment in self.segments if decays or self.by_layer or self.missed else whole:
            if segment.layer.frozen:
                continue
            part = slice(segment.start, segment.stop)
            scalars = {key: self.ops.xp.zeros((), self.dtype) for key in compiled.folded}
            lanes = self._record_lanes(compiled, vectors, scalars, part)
            parts = {name: vector[part] for name, vector in vectors.items()}
            updates.append(
                Update(
                    compiled,
                    parts,
                    scalars,
                    lanes,
                    segment.layer.rate,
                    segment.decay,
                    segment.missed,
                )
            )
        return updates
