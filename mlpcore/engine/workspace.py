"""What a training step needs before it runs: settings, the plan, and the arrays that the plan
lists.

A step comes in two kinds: `step.Step` runs its operations one by one, on several threads if that
pays; `graph_step.GraphStep` captures them and launches them together. Both plan, reserve and
allocate here.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlpcore.checks.errors import DeviceUnavailable
from mlpcore.core import dropout
from mlpcore.core.activations import Activation, bind
from mlpcore.core.layout import Layout, Parameters
from mlpcore.core.losses import Objective
from mlpcore.core.ops import Array, Buffer, Ops
from mlpcore.core.optimizers import Layer, Optimizer, Segment, segments
from mlpcore.core.program import Program
from mlpcore.core.schedules import Progress
from mlpcore.core.sheet import PENALTIES, UPDATES
from mlpcore.data.batches import Batch, Inputs
from mlpcore.engine import plan as planning
from mlpcore.engine.chunks import Chunk
from mlpcore.engine.parts import StepParts
from mlpcore.engine.plan import Plan

log = logging.getLogger("mlpcore")
Parts = dict[str, Sequence[Buffer]]
SHARED_ROWS = 64  # of a chunk from which several workers are worth their memory where it is limited


@dataclass(frozen=True)
class Settings:
    """Settings of a trainer that its steps need, with the values that users give."""

    l1: float = 0.0
    l2: float = 0.0
    clip_norm: float | None = None
    chunk_rows: int | str = "auto"
    memory_limit: int | None = None
    workers: int | None = None  # None: chosen
    on_non_finite: str = "raise"
    dropout: tuple[float, ...] | None = None  # of each hidden layer
    seed: int = 0  # of its masks, and of the row order

    @property
    def tolerant(self) -> bool:
        """True if a step that is not finite is left out instead of raised."""
        return self.on_non_finite == "skip"

    @property
    def most_rows(self) -> int | None:
        """Most rows of a chunk; None where the step chooses."""
        return None if isinstance(self.chunk_rows, str) else self.chunk_rows

    @property
    def penalty_terms(self) -> list[str]:
        """The penalties' terms of a weight's slope, where they are not 0."""
        return [term.slope for name, term in PENALTIES.items() if getattr(self, name)]


class PlannedStep(ABC):
    """Gradient and update of one network, on buffers planned beforehand.

    Args:
        layout, store: the network's flat vector and how it is cut.
        activations: index 0 None, then one a layer.
        objective: the loss on top of the output activation.
        optimizer: the update rule's settings.
        new_ops: makes the operations of one more worker.
    """

    def __init__(
        self, layout: Layout, store: Parameters, activations: tuple[Activation | None, ...], objective: Objective,
        optimizer: Optimizer, settings: Settings, new_ops: Callable[[], Ops],
    ) -> None:  # fmt: skip
        self.layout, self.store, self.parameters = layout, store, store.flat
        self.activations = bind(
            dropout.behind(activations, settings.dropout or (), settings.seed), store.a
        )
        self.objective, self.optimizer, self.settings, self.new_ops = (
            objective,
            optimizer,
            settings,
            new_ops,
        )
        self.ops = new_ops()
        self.dtype = str(store.flat.dtype)
        self.W, self.b = store.W, store.b
        self.rule = ""  # the sheet's update that the state vectors belong to
        self.state: dict[str, Array] = {}
        self.reach = 0.0  # bound of the first state vector's entries
        self.rate = 0.0  # the last learning rate that was not 0
        self.by_layer: dict[int, Layer] = {}  # settings of layers that the update was bound for
        self.done = 0  # updates, as far as the host knows
        self.kept: dict[int, int] = {}  # updates that the state of each frozen layer has seen
        self.missed: dict[
            int, int
        ] = {}  # updates that a layer missed while it was frozen, where the rule reads t
        self.reserved: Sequence[Buffer] = ()
        self._plans: dict[tuple[int, Inputs], Plan] = {}
        self._settled: dict[
            tuple[int, Inputs], tuple[int, int]
        ] = {}  # rows and workers of a run that is continued
        self._most_rows: int | None = None  # of a chunk, since memory ran out
        self.allocated: Plan | None = None
        self._covered: Plan | None = (
            None  # the last plan for which the arrays that are allocated will do
        )
        self.gradient: Array = None  # of the last batch, flat
        self.untouched = (
            False  # whether nobody else has written the parameters since the last update
        )
        self.inputs: Inputs | None = None
        self.J: Any = None  # of the last step that was begun
        self.torn = 0  # the number of the step whose update has begun and not ended

    # -- what the kinds of step differ in --

    @abstractmethod
    def _state_buffers(self) -> list[Buffer]:
        """Gradient, optimizer state and what else lasts from step to step."""

    def _vectors(self) -> list[Buffer]:
        """The gradient and the state vectors: the optimizer's, and those that it may want again."""
        size = self.layout.size
        names = dict.fromkeys([*(f"state {name}" for name in self.optimizer.states), *self.state])
        buffers = [Buffer("gradient", (size,), self.dtype, "dW and db of a batch, flat")]
        return buffers + [Buffer(name, (size,), self.dtype, "optimizer state") for name in names]

    @abstractmethod
    def _workspace(self, rows: int, workers: int, batch_rows: int, inputs: Inputs) -> Parts:
        """The parts that hold the arrays of chunks of `rows` rows."""

    @abstractmethod
    def _choose(self, batch_rows: int, inputs: Inputs) -> tuple[int, int]:
        """Rows of a chunk, and workers, where memory is no object."""

    @abstractmethod
    def _bind_optimizer(self) -> None:
        """State vectors, zero, for the optimizer's rule as it is now; those of the names in `state`
        are among them.
        """

    @abstractmethod
    def _allocate(self, plan: Plan, inputs: Inputs) -> None:
        """The plan's workspace."""

    def _drop_workspace(self) -> None:
        """Give the workspace back."""
        self.allocated = self.inputs = self._covered = None

    @abstractmethod
    def _first_chunk(self) -> Chunk:
        """The arrays that `evaluate` works on."""

    def _to_host(self, array: Array) -> np.ndarray:
        """Numbers of this step's as NumPy's."""
        return np.asarray(array)

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """What else the result depends on to the bit, as far as JSON can hold it."""

    def _outdated(self) -> bool:
        """Whether what is bound no longer fits the settings, though the state vectors do."""
        return self.by_layer != self.optimizer.layers

    @property
    def segments(self) -> list[Segment]:
        """The parts of the flat vectors that are updated alike."""
        return segments(self.layout, self.by_layer, self.missed)

    @property
    def frozen(self) -> list[Segment]:
        """Those of them that are not updated."""
        return (
            [segment for segment in self.segments if segment.layer.frozen] if self.by_layer else []
        )

    @abstractmethod
    def count_skipped(self, progress: Progress) -> None:
        """Bring `progress.skipped` up to date; waits for the device."""

    def _count(self) -> int:
        """Return how many updates were done, without those that were skipped."""
        return self.done

    @abstractmethod
    def _program(self) -> Program:
        """Return the program that updates each entry, with its scalars folded."""

    @abstractmethod
    def _take(self, facts: Mapping[str, Any]) -> None:
        """Go on with what `_facts` said, or say that this cannot be."""

    @abstractmethod
    def run(self, batch: Batch, plan: Plan, progress: Progress) -> object:
        """One update; J before it."""

    @abstractmethod
    def apply(self, gradient: Array, progress: Progress) -> None:
        """One update by a gradient of the caller's, flat, which is not written to."""

    @abstractmethod
    def loss_and_gradient(self, batch: Batch, plan: Plan, number: int = 1) -> float:
        """J of a batch, penalties included, and its gradient in `self.gradient`; dropout as in the
        step of this number.
        """

    @abstractmethod
    def evaluate(self, batch: Batch, plan: Plan, see: Callable[[Array, int, int], None]) -> float:
        """The mean loss of a batch, without penalties; `see(output, start, stop)` gets each chunk's
        output, S[L] if matched.
        """

    def together(self, batch_rows: int, inputs: Inputs) -> int:
        """Return how many steps on batches of so many rows may be launched as one."""
        return 1

    def parts(self, batch: Batch, plan: Plan, progress: Progress) -> StepParts:
        """Take a step apart into what can be measured."""
        raise DeviceUnavailable(
            "a step has parts where it is captured as a graph: on a CUDA device with cuBLASLt"
        )

    @abstractmethod
    def weight(self, batch: Batch) -> float | None:
        """Σ w over the rows of a batch; None where only the device knows."""

    @abstractmethod
    def count_launched(self) -> None:
        """Count the steps that a device has done where an interrupt came between launch and count."""

    def require_whole(self) -> None:
        """Raise a RuntimeError if an update, or a change of the state vectors, was left half done."""
        self.store.require_whole(self.torn)

    def renew(self) -> None:
        """Give up what another thread was doing here when the process was forked."""
        self.store.torn = self.torn
        self._drop_workspace()

    # -- what a checkpoint holds --

    def snapshot(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """What the next steps depend on beside the parameters: state vectors, on the host, and what
        JSON can hold.
        """
        self.require_whole()
        plans = [
            [rows, list(inputs), plan.rows, plan.workers]
            for (rows, inputs), plan in self._plans.items()
        ]
        vectors = {name: self._to_host(vector) for name, vector in self.state.items()}
        counts = {
            "updates": self._count(),
            "kept": [*self.kept.items()],
            "missed": [*self.missed.items()],
        }
        return vectors, {
            "rule": self.rule,
            "rate": self.rate,
            "plans": plans,
            **counts,
            **self._facts(),
        }

    def restore(self, vectors: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Go on from a snapshot, chunks and algorithms being those of then. Raises ValueError if it
        is not of this step.
        """
        self._settled = {
            (rows, Inputs.read(inputs)): (most, workers)
            for rows, inputs, most, workers in facts["plans"]
        }
        for (rows, _), chunk in self._settled.items():
            if not all(isinstance(n, int) and 1 <= n <= rows for n in chunk):
                raise ValueError(f"chunks of {chunk} rows and workers for {rows} rows")
        self._plans.clear()
        if not facts["rule"]:
            return  # before the first step: the state begins at zero
        row, known = (
            UPDATES[facts["rule"]],
            {name for row in UPDATES.values() for name in row.states},
        )
        vectors = {name.removeprefix("state "): vector for name, vector in vectors.items()}
        if not {*row.states} <= {*vectors} <= known or any(
            v.shape != (self.layout.size,) for v in vectors.values()
        ):
            raise ValueError(
                f"the state vectors {sorted(vectors)} are not those of {facts['rule']}: "
                f"{sorted(row.states)}"
            )
        self.rate = float(facts["rate"])
        self._count_layers(facts["updates"], dict(facts["kept"]), dict(facts["missed"]))
        if facts["rule"] != self.optimizer.row:
            vectors = self._carried_over(vectors)
        self.torn = self.done + 1
        self.state = {f"state {name}": vector for name, vector in vectors.items()}
        self._bind_optimizer()
        for name, vector in vectors.items():
            self.state[f"state {name}"][...] = self.ops.xp.asarray(vector)
        first = [vectors[name] for name in self.optimizer.states[:1] if name in vectors]
        self.reach = max((float(abs(vector).max()) for vector in first), default=0.0)
        self._take(facts)
        self.torn = 0

    def _count_layers(
        self, updates: int, kept: Mapping[int, int], missed: Mapping[int, int]
    ) -> None:
        """Begin or end, after so many updates, the count of those that layers miss, where the
        settings freeze others now.

        Raises:
            ValueError: the counts are of no run.
        """
        counts = [updates, *kept, *missed, *kept.values(), *missed.values()]
        if not all(isinstance(n, int) and n >= 0 for n in counts) or updates < max(
            [0, *kept.values(), *missed.values()]
        ):
            raise ValueError(
                f"after {updates} updates, layers have seen {kept} and missed {missed}"
            )
        frozen = [l for l, layer in self.optimizer.layers.items() if layer.frozen]
        thawed = {
            l: updates - seen for l, seen in kept.items() if l not in frozen and seen < updates
        }
        live = {l: n for l, n in missed.items() if l not in frozen}
        self.done, self.kept = updates, {l: kept.get(l, updates - missed.get(l, 0)) for l in frozen}
        self.missed = live | thawed if "t" in self._program().reads else {}

    def _carried_over(self, vectors: dict[str, Array]) -> dict[str, Array]:
        """Return state vectors of another rule as those of the optimizer's, each segment by its
        learning rate.
        """
        parts = [
            self.optimizer.carry_over(
                {name: vector[part.start : part.stop] for name, vector in vectors.items()},
                self.rate * part.layer.rate,
            )
            for part in segments(self.layout, self.by_layer or self.optimizer.layers)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def first_not_finite(self, batch: Batch, plan: Plan) -> int | None:
        """The first layer whose outputs on this batch are not finite; or the last whose gradient is
        not; None if all are.
        """
        bad: list[int] = []

        def look(_: Array, start: int, stop: int) -> None:
            chunk = self._first_chunk()
            for l in range(1, self.layout.layers + 1):
                names = [name for name in (f"S[{l}]", f"Z[{l}]") if name in chunk.buffers]
                if not all(
                    np.isfinite(self._to_host(chunk.rows(name, stop - start))).all()
                    for name in names
                ):
                    bad.append(l)
                    return

        self.evaluate(batch, plan, look)
        if bad:
            return min(bad)
        self.loss_and_gradient(batch, plan)
        gradient = self._to_host(self.gradient)
        (dW, db), da = self.layout.views(gradient), self.layout.slopes(gradient)
        for l in range(self.layout.layers, 0, -1):
            if not (np.isfinite(dW[l]).all() and (db[l] is None or np.isfinite(db[l]).all())):
                return l
            if da[l] is not None and not np.isfinite(da[l]).all():
                return l
        return None

    # -- the plan --

    def _bound(self, gradient: Array) -> tuple[Activation | None, ...]:
        """The activations, whose learned parameters' gradients go to a flat gradient."""
        return bind(self.activations, self.store.a, self.layout.slopes(gradient))

    def fit_buffers(self, rows: int, best: bool) -> list[Buffer]:
        """What `fit` needs beside the step: the order of so many rows, and the best parameters if
        they are kept.
        """
        order = [Buffer("row order", (rows,), "int64", "shuffled row numbers")] if rows else []
        return order + (
            [Buffer("best", (self.layout.size,), self.dtype, "parameters to go back to")]
            if best
            else []
        )

    def make_plan(self, batch_rows: int, inputs: Inputs, reserved: Sequence[Buffer] = ()) -> Plan:
        """The memory table for batches of up to `batch_rows` rows of such inputs, beside what `fit`
        has reserved.

        Raises:
            MemoryError: `memory_limit` cannot be kept even with chunks of one row; prints the
                largest buffers.
        """
        what = "W[1] … W[L], b[1] … b[L]" + (", a[1] … a[L]" if self.layout.learned else "")
        fixed: Parts = {"parameters": [Buffer("parameters", (self.layout.size,), self.dtype, what)]}
        fixed["state"] = self._state_buffers()
        if reserved:
            fixed["fit"] = list(reserved)

        def table(rows: int, workers: int) -> Plan:
            return Plan(
                rows,
                workers,
                batch_rows,
                {**fixed, **self._workspace(rows, workers, batch_rows, inputs)},
            )

        rows, workers = self._settled.get((batch_rows, inputs)) or self._choose(batch_rows, inputs)
        rows = min(rows, self._most_rows or rows)
        limit = self.settings.memory_limit
        if limit is None or table(rows, workers).total_bytes <= limit:
            return table(rows, workers)
        shared = planning.most_rows(limit, lambda n: table(n, workers), rows) if workers > 1 else 0
        if shared >= min(rows, SHARED_ROWS):
            return table(shared, workers)
        return planning.within(limit, lambda n: table(n, 1), rows)

    def reserve(self, buffers: Sequence[Buffer], there: Sequence[Buffer] = ()) -> dict[str, Array]:
        """Arrays for `fit`, part of every plan until `reserve([])` gives them back, as are those
        that are there already.
        """
        self._reserve((*buffers, *there))
        return planning.allocate(self.ops, buffers)

    def _reserve(self, buffers: Sequence[Buffer]) -> None:
        self.reserved, self._plans = buffers, {}
        if self.settings.memory_limit is not None:
            self._drop_workspace()  # it may be larger than what is left now

    @contextlib.contextmanager
    def lent(self, buffers: Sequence[Buffer]) -> Iterator[dict[str, Array]]:
        """Yield arrays that are part of every plan, beside those of `fit`, until the block ends."""
        before, plans, most_rows = self.reserved, self._plans, self._most_rows
        self._reserve((*before, *buffers))
        try:
            yield planning.allocate(self.ops, buffers)
        finally:
            self._reserve(before)
            if self._most_rows == most_rows:
                self._plans = plans  # a checkpoint tells them

    def settle(self) -> None:
        """Bind what the optimizer and the settings have become; the state goes on.

        Raises:
            ValueError: epsilon is 0, or infinite, in the parameters' dtype.
        """
        self.require_whole()
        self.optimizer.require_epsilon(self.dtype)
        if self.by_layer != self.optimizer.layers:
            self.optimizer.require_layers(self.layout.layers)
        if not self.rule:
            self._count_layers(0, {}, {})
            self._bind_optimizer()
        elif self.rule != self.optimizer.row or self._outdated():
            self.restore(*self.snapshot())

    def prepare(self, batch_rows: int, inputs: Inputs) -> Plan:
        """The plan for batches of this size, and its arrays allocated, unless those that are there
        will do.
        """
        self.settle()
        plan = self._planned(batch_rows, inputs)
        if plan is self._covered:  # as most steps are
            return plan
        while self.allocated is None or self.inputs != inputs or not self.allocated.covers(plan):
            self._drop_workspace()
            try:
                self._allocate(plan, inputs)
            except MemoryError as error:
                plan = self._smaller(plan, inputs, error)
            else:
                self.allocated, self.inputs = plan, inputs
        self._covered = plan
        return plan

    def prepare_anew(self, batch_rows: int, inputs: Inputs) -> None:
        """Prepare for batches of this size; larger arrays, in which evaluation would differ, are
        given back.
        """
        there = self.allocated
        if there is not None and (there.batch_rows, self.inputs) != (batch_rows, inputs):
            self._drop_workspace()
        self.prepare(batch_rows, inputs)

    def _planned(self, batch_rows: int, inputs: Inputs) -> Plan:
        key = batch_rows, inputs
        if key not in self._plans:
            if len(self._plans) > 64:
                self._plans.clear()
            self._plans[key] = self.make_plan(batch_rows, inputs, self.reserved)
        return self._plans[key]

    def _smaller(self, plan: Plan, inputs: Inputs, error: MemoryError) -> Plan:
        """A plan with half the chunk, after what others use has left too little memory for this
        one.
        """
        self._drop_workspace()
        if plan.rows == 1:
            raise MemoryError(
                "not even one row at a time fits the memory that is left; the largest: "
                f"{plan.largest()}"
            ) from error
        self._most_rows = plan.rows // 2
        log.warning(
            "out of memory: chunks of %s rows instead of %s from here on (%s)",
            f"{self._most_rows:,}",
            f"{plan.rows:,}",
            error,
        )
        self._plans.clear()
        self._settled.clear()
        return self._planned(plan.batch_rows, inputs)
