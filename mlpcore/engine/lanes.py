"""The update by lanes: passes over the flat vectors, split into lanes that threads share.

norm → finite? → clip → can it overflow? → w, state ← update(w, g, state), and its count, in one go
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mlpcore.backends.numpy import blas
from mlpcore.checks.errors import NonFiniteLoss
from mlpcore.core.ops import Array, Buffer, Call, EagerOps, EagerRecording, make
from mlpcore.core.optimizers import Layer, Optimizer, Segment
from mlpcore.core.program import Program, program
from mlpcore.core.schedules import Progress, Schedule
from mlpcore.engine import plan as planning
from mlpcore.engine.problem import Problem
from mlpcore.engine.state import State
from mlpcore.engine.threads import Spread

T = TypeVar("T")
LANE_ENTRIES = 1 << 18  # entries of the flat vector from which the workers share its passes
TRIED = 1 << 15  # entries of an update that is first tried on copies
ORDINARY = 2.0**50  # slopes and state up to which bounds are checked once, not at each step


@dataclass
class Update:
    """One pass, the optimizer's or the penalties', over a range of the flat vectors.

    Attributes:
        program: the pass's statements.
        vectors: vectors by name, cut to the range; `scalars` are 0-d arrays for the folded scalars.
        lanes: the recording of each lane.
        rate: factor of the learning rate.
        decay: overrides the optimizer's weight decay; None: the optimizer's.
        missed: number of missed updates, subtracted from the range's `t`.
        values: the scalars as last set; None if uncertain.
    """

    program: Program
    vectors: dict[str, Array]
    scalars: dict[str, Array]
    lanes: list[EagerRecording]
    rate: float = 1.0
    decay: float | None = None
    missed: int = 0
    values: dict[str, float] | None = None

    def overflows(self, ops: EagerOps) -> bool:
        """Return True if the pass would write a number that is not finite; write nothing."""
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


class Bounds:
    """A proof, from the rule's bounds, that an update cannot overflow.

    Args:
        optimizer: the optimizer with the rule.
        dtype: dtype of the parameters.

    Attributes:
        roots, halves: limits of |g|, and of a parameter's change.
        floor: bounds what underflowing squares lose of the gradient's norm.
    """

    def __init__(self, optimizer: Optimizer, dtype: str) -> None:
        self.optimizer = optimizer
        limits = np.finfo(dtype)
        # a change that adding to the largest number leaves it unchanged, with a margin of 128
        self.halves = float(limits.max) * float(limits.eps) / 512
        self.roots = math.sqrt(float(limits.max)) / 2  # its square, kept as a mean, is finite
        self.floor = 2 * math.sqrt(float(limits.tiny))
        self._proved: tuple[dict[str, float], float] = {}, -1.0

    def exclude_overflow(
        self, values: Mapping[str, float], largest: float, reach: float
    ) -> tuple[bool, float]:
        """Return True if no update with |g| ≤ `largest` can overflow, and the reach after it.

        The bounds grow with the rate, the slope and the reach. So one check with these settings, at
        a rate, slope and reach at least as large, is enough.
        """
        settings = {**values, "rate": 0.0, "t": 0.0, "clip": 1.0}
        if values["rate"] > self._proved[1] or settings != self._proved[0]:
            after, change = self.optimizer.bounds(values, ORDINARY, ORDINARY)
            closed = after <= ORDINARY and change < self.halves
            self._proved = settings, values["rate"] if closed else -1.0
        if max(largest, reach) <= ORDINARY and values["rate"] <= self._proved[1]:
            return True, ORDINARY
        after, change = self.optimizer.bounds(values, largest, reach)
        return largest < self.roots and change < self.halves, after


def refresh(updates: Sequence[Update], scalars: Mapping[str, float]) -> None:
    """Set the scalars of passes if those that the rule reads have changed."""
    for update in updates:
        values = {name: scalars[name] for name in update.program.reads}
        if update.decay is not None and "decay" in values:
            values["decay"] = update.decay
        if update.rate != 1 and "rate" in values:
            values["rate"] *= update.rate
        if update.missed and "t" in values:
            values["t"] = max(1.0, values["t"] - update.missed)  # the count may have been reset
        if values != update.values:
            update.values = None  # an interrupt may leave some of the old ones
            for key, value in update.program.folded.items():
                update.scalars[key][...] = value(values)
            update.values = values


class Lanes:
    """The passes over gradient, parameters and state, each recorded lane by lane.

    Args:
        problem, state: the owners of the vectors.

    Attributes:
        threads: number of threads of BLAS, and of a step.
        count: number of lanes.
        ops: operations for each lane.
        updates: the optimizer's passes.
        penalty: the penalties' pass, or None.
        additions: passes that add the gradients of further workers.
        settings: the optimizer's settings that all this is made for, compared to `vars(optimizer)`.
        bounds: proves that updates cannot overflow.
    """

    def __init__(self, problem: Problem, state: State, xp: object) -> None:
        self.problem, self.state = problem, state
        self.threads = blas.threads() if xp is np else 1
        self.count = self.threads if problem.layout.size >= LANE_ENTRIES else 1
        self.ops: list[EagerOps] = [problem.new_ops() for _ in range(self.count)]
        self.updates: list[Update] = []
        self.penalty: Update | None = None
        self.additions: list[list[EagerRecording]] = []
        self.bounds = Bounds(problem.optimizer, problem.dtype)
        self.settings: dict[str, Any] | None = None
        self._constants: dict[str, float] | None = None

    # -- recordings --

    def settle(self) -> None:
        """Store the optimizer's settings, and the scalars that do not change with the step."""
        optimizer = self.problem.optimizer
        settings = {**vars(optimizer), "layers": dict(optimizer.layers)}
        kind, own = type(optimizer), ("scalars", "constants", "rate")
        varies = any(getattr(kind, name) is not getattr(Optimizer, name) for name in own)
        self.settings = None  # an interrupt may leave only one of the two
        self._constants = None if varies else optimizer.constants()
        self.settings = settings

    def buffers(self) -> list[Buffer]:
        """List the registers of each lane."""
        size, dtype = self.problem.layout.size, self.problem.dtype
        (registers,) = self.ops[0].map_scratch(self._program(), size, dtype)
        return [registers._replace(name=f"registers {lane}") for lane in range(self.count)]

    def bind(self) -> None:
        """Allocate the state as zeros, and record the update for the optimizer's current rule."""
        state, optimizer = self.state, self.problem.optimizer
        buffers = [*state.buffers(), *self.buffers()]
        state.vectors.clear()
        arrays = planning.allocate(self.ops[0], buffers)
        for lane, ops in enumerate(self.ops):
            ops.use({"registers": arrays.pop(f"registers {lane}")})
        state.begin(arrays)
        edges = [*itertools.pairwise(self._edges())]
        self._gradients = [state.gradient[begin:end] for begin, end in edges]
        self._frozen = [
            [
                state.gradient[max(begin, x.start) : max(begin, min(end, x.stop))]
                for x in state.frozen
            ]
            for begin, end in edges
        ]
        self.penalty, self.updates = None, self._record_updates()
        self.bounds = Bounds(optimizer, self.problem.dtype)

    def add(self, gradient: Array) -> None:
        """Record the pass that adds a further worker's gradient."""
        added = program("g = g + h", frozenset())
        self.additions.append(self._record(added, {"g": self.state.gradient, "h": gradient}, {}))

    def _program(self) -> Program:
        optimizer = self.problem.optimizer
        statements = optimizer.statements
        if self.problem.settings.clip_norm is not None:
            statements = f"g = clip * g; {statements}"
        return program(statements, frozenset({"clip", "rate", "t", *optimizer.constants()}))

    def _edges(self) -> list[int]:
        """Return the entries at which the lanes of the flat vector begin, and the vector's end."""
        return [self.problem.layout.size * lane // self.count for lane in range(self.count + 1)]

    def _record(
        self,
        compiled: Program,
        vectors: Mapping[str, Array],
        scalars: Mapping[str, Array],
        part: slice = slice(None),
    ) -> list[EagerRecording]:
        """Record a pass over a part of flat vectors, lane by lane.

        Each entry is in the same lane in every pass.
        """
        start, stop, _ = part.indices(self.problem.layout.size)
        recordings = []
        for ops, (begin, end) in zip(self.ops, itertools.pairwise(self._edges()), strict=True):
            lane = slice(max(start, begin), max(start, begin, min(stop, end)))
            arrays = {name: vector[lane] for name, vector in vectors.items()}
            recordings.append(ops.record(functools.partial(ops.map, compiled, arrays, scalars)))
        return recordings

    def _scalars(self, compiled: Program) -> dict[str, Array]:
        xp, dtype = self.ops[0].xp, self.problem.dtype
        return {key: xp.zeros((), dtype) for key in compiled.folded}

    def _record_updates(self) -> list[Update]:
        """Record one pass over all parameters, or one over each part with its own settings."""
        problem, state = self.problem, self.state
        vectors = {"w": problem.parameters, "g": state.gradient, **state.own}
        compiled, decays = self._program(), hasattr(problem.optimizer, "weight_decay")
        whole = [Segment(0, problem.layout.size, False, Layer())]
        updates = []
        for segment in state.segments if decays or state.layers or state.missed else whole:
            if segment.layer.frozen:
                continue
            part = slice(segment.start, segment.stop)
            scalars = self._scalars(compiled)
            lanes = self._record(compiled, vectors, scalars, part)
            parts = {name: vector[part] for name, vector in vectors.items()}
            rate, decay, missed = segment.layer.rate, segment.decay, segment.missed
            updates.append(Update(compiled, parts, scalars, lanes, rate, decay, missed))
        return updates

    def set_penalty(self) -> None:
        """Record the penalties' pass if a penalty has become zero or nonzero; set l1 and l2."""
        problem = self.problem
        factors = {"l2": problem.settings.l2, "l1": problem.settings.l1}
        values = {key: value for key, value in factors.items() if value}
        if not values:
            self.penalty = None
            return
        if self.penalty is None or {*self.penalty.program.reads} != {*values}:
            terms = " + ".join(["g", *problem.settings.penalty_terms])
            compiled = program(f"g = {terms}", frozenset({"l1", "l2"}))
            scalars = self._scalars(compiled)
            vectors = {"g": self.state.gradient, "w": problem.parameters}
            lanes = self._record(compiled, vectors, scalars, slice(problem.layout.weights))
            self.penalty = Update(compiled, vectors, scalars, lanes)
        refresh([self.penalty], values)

    def penalty_value(self) -> float:
        """Return l1 Σ|W| + ½ l2 Σ W² of the current weights."""
        settings, ops = self.problem.settings, self.ops[0]
        w = self.problem.parameters[: self.problem.layout.weights]
        first = settings.l1 * ops.sum_abs(w) if settings.l1 else 0.0
        return first + (0.5 * settings.l2 * ops.sum_squares(w) if settings.l2 else 0.0)

    # -- a step --

    def jobs(self, do: Callable[[int], T]) -> list[Callable[[], T]]:
        """Return one job per lane, which calls `do(lane)` on a thread."""
        return [functools.partial(ops.quietly, do, lane) for lane, ops in enumerate(self.ops)]

    def squares(self, before: Sequence[Sequence[EagerRecording]], lane: int) -> float:
        """Run these passes over a lane; return Σ g², in which frozen layers do not count.

        Without clipping only its order of magnitude matters.
        """
        for recordings in before:
            recordings[lane].replay()
        for part in self._frozen[lane]:
            part[...] = 0
        gradient, ops = self._gradients[lane], self.ops[lane]
        if self.problem.settings.clip_norm is None:
            squares = float(ops.xp.dot(gradient, gradient))
            if math.isfinite(squares):
                return squares
        return ops.sum_squares(gradient)

    def update(
        self,
        J: float,
        squares: float,
        progress: Progress,
        spread: Spread | None = None,
    ) -> None:
        """Check the gradient, clip it, and update the parameters and the state.

        Args:
            J: the loss.
            squares: Σ g².
            progress: counts the update.
            spread: runs the lanes in parallel; None: one after another.
        """
        settings, state, optimizer = self.problem.settings, self.state, self.problem.optimizer
        if self._constants is None:  # a custom optimizer
            values = optimizer.scalars(progress)
        else:
            given = optimizer.learning_rate
            values = {**self._constants, "t": progress.step - progress.skipped + 1.0}
            values["rate"] = given.at(progress) if isinstance(given, Schedule) else given
        rate = values["rate"]
        norm = math.sqrt(squares) if math.isfinite(squares) else self._norm()
        if not (math.isfinite(J) and math.isfinite(norm)):
            what = f"the loss is {J}" if not math.isfinite(J) else "the gradient is not finite"
            return self._leave_out(what, progress, rate)
        if settings.clip_norm is not None:
            values["clip"] = min(1.0, settings.clip_norm / norm) if norm else 1.0
            norm = min(norm, settings.clip_norm)
        updates = self.updates
        refresh(updates, values)
        if state.layers:  # the largest of all segments
            values["rate"] = rate * max((update.rate for update in updates), default=0.0)
            decays = (update.decay or 0.0 for update in updates)
            values["decay"] = max([values["decay"], *decays])
        largest = 2 * norm + self.bounds.floor
        certain, reach = self.bounds.exclude_overflow(values, largest, state.reach)
        if not certain and any(update.overflows(self.ops[0]) for update in updates):
            return self._leave_out("the update is not finite", progress, rate)
        try:
            self._write(progress, reach, rate or state.rate, spread)
        finally:
            self.problem.store.torn = state.torn
        return None

    def _write(self, progress: Progress, reach: float, rate: float, spread: Spread | None) -> None:
        """Update parameters and state, and count the step, completely even if an interrupt comes.

        Consecutive calls in C are not interrupted. If several threads run lanes, lanes that have
        begun are waited for, and the others are run here. Until all are done the step is `torn`.
        """
        step, state = progress.step + 1, self.state
        begin: Call = (setattr, state, "torn", step)
        end: list[Call] = [
            (setattr, progress, "step", step),
            (setattr, state, "done", step - progress.skipped),
            (setattr, state, "reach", reach),
            (setattr, state, "rate", rate),
            (setattr, state, "torn", 0),
        ]
        calls = [
            [call for update in self.updates for call in update.lanes[lane].calls]
            for lane in range(self.count)
        ]
        if spread is None:
            make([begin, *itertools.chain(*calls), *end])
            return
        left, done = [*range(self.count)], list[int]()

        def do(lane: int) -> None:
            make([(left.remove, lane), begin, *calls[lane], (done.append, lane)])

        def finish() -> None:
            for lane in [*left]:
                do(lane)
            if len(done) == self.count:  # else a lane failed, for lack of memory for instance
                make(end)

        try:
            spread(self.jobs(do))
            finish()
        except BaseException:
            finish()
            raise

    def _norm(self) -> float:
        """Return the gradient's norm if the squares overflow, or a non-finite entry's magnitude."""
        gradient = self.state.gradient
        largest = float(abs(gradient).max())
        if not math.isfinite(largest):
            return largest
        return largest * math.sqrt(self.ops[0].sum_squares(gradient / largest))

    def _leave_out(self, what: str, progress: Progress, rate: float) -> None:
        """Count a step that changes nothing, or raise a NonFiniteLoss."""
        if self.problem.settings.tolerant:
            vars(progress).update(step=progress.step + 1, skipped=progress.skipped + 1)
            return
        step = progress.step + 1
        message = f"step {step}: {what} at learning rate {rate:g}; the parameters are unchanged"
        raise NonFiniteLoss(message, step, rate)
