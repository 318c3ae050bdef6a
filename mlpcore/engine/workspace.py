"""The workspace of a step: its plans, and the arrays of the allocated plan."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mlpcore.core.ops import Array, Buffer
from mlpcore.data.batches import Inputs
from mlpcore.engine import plan as planning
from mlpcore.engine.plan import Plan
from mlpcore.engine.problem import Problem

log = logging.getLogger("mlpcore")
Parts = dict[str, Sequence[Buffer]]
Shape = tuple[int, Inputs]  # rows of a batch, and a description of its arrays
SHARED_ROWS = 64  # rows of a chunk from which several workers are worth limited memory
PLANS = 64  # number of plans kept; one per batch size


class Chunks(Protocol):
    """The chunks of a kind of step: the arrays they need, and how to create them."""

    ops: Any

    def state_buffers(self) -> list[Buffer]:
        """List the gradient, the optimizer state and other arrays that last from step to step."""

    def parts(self, rows: int, workers: int, batch_rows: int, inputs: Inputs) -> Parts:
        """List the arrays of chunks of `rows` rows, by allocation."""

    def choose(self, batch_rows: int, inputs: Inputs) -> tuple[int, int]:
        """Return the rows of a chunk, and the number of workers, if memory is unlimited."""

    def allocate(self, plan: Plan, inputs: Inputs) -> None:
        """Allocate the plan's arrays."""

    def drop(self) -> None:
        """Free the arrays."""


class Workspace:
    """Plans for batches of each size, and the arrays that serve the larger ones.

    Args:
        problem: the problem that the arrays are for.
        chunks: the chunks made from them.

    Attributes:
        plans: plans by rows and inputs of a batch.
        reserved: arrays of `fit` that are part of every plan.
        allocated: the plan whose arrays exist, or None; `inputs` are the inputs it was made for.
        covered: the last plan for which these arrays suffice.
    """

    def __init__(self, problem: Problem, chunks: Chunks) -> None:
        self.problem, self.chunks = problem, chunks
        self.plans: dict[Shape, Plan] = {}
        self.reserved: Sequence[Buffer] = ()
        self.allocated: Plan | None = None
        self.inputs: Inputs | None = None
        self.covered: Plan | None = None
        self._settled: dict[Shape, tuple[int, int]] = {}  # rows and workers of a resumed run
        self._most_rows: int | None = None  # maximum rows of a chunk, set when memory runs out

    # -- plans --

    def fit_buffers(self, rows: int, best: bool) -> list[Buffer]:
        """List, for `fit`, an order of this many rows and, if kept, the best parameters."""
        size, dtype = self.problem.layout.size, self.problem.dtype
        order = [Buffer("row order", (rows,), "int64", "shuffled row numbers")] if rows else []
        kept = [Buffer("best", (size,), dtype, "parameters to restore")] if best else []
        return order + kept

    def make_plan(self, batch_rows: int, inputs: Inputs, reserved: Sequence[Buffer] = ()) -> Plan:
        """Return the memory table for batches of up to `batch_rows` rows and the arrays of `fit`.

        Raises:
            MemoryError: `memory_limit` is too small even with chunks of one row; names the largest
                buffers.
        """
        problem = self.problem
        what = "W[1] … W[L], b[1] … b[L]" + (", a[1] … a[L]" if problem.layout.learned else "")
        parameters = Buffer("parameters", (problem.layout.size,), problem.dtype, what)
        fixed: Parts = {"parameters": [parameters], "state": self.chunks.state_buffers()}
        if reserved:
            fixed["fit"] = list(reserved)

        def table(rows: int, workers: int) -> Plan:
            parts = self.chunks.parts(rows, workers, batch_rows, inputs)
            return Plan(rows, workers, batch_rows, {**fixed, **parts})

        settled = self._settled.get((batch_rows, inputs))
        rows, workers = settled or self.chunks.choose(batch_rows, inputs)
        rows = min(rows, self._most_rows or rows)
        limit = problem.settings.memory_limit
        if limit is None or table(rows, workers).total_bytes <= limit:
            return table(rows, workers)
        shared = planning.most_rows(limit, lambda n: table(n, workers), rows) if workers > 1 else 0
        if shared >= min(rows, SHARED_ROWS):
            return table(shared, workers)
        return planning.within(limit, lambda n: table(n, 1), rows)

    def facts(self) -> list[list[Any]]:
        """Return chunk rows and workers of each plan, for a checkpoint."""
        return [
            [rows, list(inputs), plan.rows, plan.workers]
            for (rows, inputs), plan in self.plans.items()
        ]

    def restore(self, facts: Sequence[Sequence[Any]]) -> None:
        """Choose chunks and workers as in a checkpoint's run.

        Raises:
            TypeError, ValueError: no run can have such chunks.
        """
        settled = {
            (rows, Inputs.read(inputs)): (most, workers) for rows, inputs, most, workers in facts
        }
        for (rows, _), chunk in settled.items():
            if not all(isinstance(n, int) and 1 <= n <= rows for n in chunk):
                raise ValueError(
                    f"a chunk of {rows} rows has 1 … {rows} rows and as many workers; got {chunk}"
                )
        self._settled = settled
        self.plans.clear()

    # -- what is reserved --

    def reserve(self, buffers: Sequence[Buffer], there: Sequence[Buffer] = ()) -> dict[str, Array]:
        """Allocate arrays for `fit`, part of every plan until `reserve([])` frees them.

        The arrays listed in `there` exist already; they become part of every plan, too.
        """
        self._reserve((*buffers, *there))
        return planning.allocate(self.chunks.ops, buffers)

    def _reserve(self, buffers: Sequence[Buffer]) -> None:
        self.reserved, self.plans = buffers, {}
        if self.problem.settings.memory_limit is not None:
            self.drop()  # it may be larger than the memory that is now left

    @contextlib.contextmanager
    def lent(self, buffers: Sequence[Buffer]) -> Iterator[dict[str, Array]]:
        """Yield arrays that are part of every plan, like those of `fit`, until the block ends."""
        before, plans, most_rows = self.reserved, self.plans, self._most_rows
        self._reserve((*before, *buffers))
        try:
            yield planning.allocate(self.chunks.ops, buffers)
        finally:
            self._reserve(before)
            if self._most_rows == most_rows:
                self.plans = plans  # checkpoints store them

    # -- what is allocated --

    def prepare(self, batch_rows: int, inputs: Inputs) -> Plan:
        """Return the plan for batches of this size; allocate arrays if others do not suffice."""
        plan = self._planned(batch_rows, inputs)
        if plan is self.covered:
            return plan
        while self.allocated is None or self.inputs != inputs or not self.allocated.covers(plan):
            self.drop()
            try:
                self.chunks.allocate(plan, inputs)
            except MemoryError as error:
                plan = self._smaller(plan, inputs, error)
            else:
                self.allocated, self.inputs = plan, inputs
        self.covered = plan
        return plan

    def keep_only(self, batch_rows: int, inputs: Inputs) -> None:
        """Free arrays of another size, with which an evaluation would differ by rounding."""
        there = self.allocated
        if there is not None and (there.batch_rows, self.inputs) != (batch_rows, inputs):
            self.drop()

    def drop(self) -> None:
        """Free the arrays of the chunks."""
        self.allocated = self.inputs = self.covered = None
        self.chunks.drop()

    def _planned(self, batch_rows: int, inputs: Inputs) -> Plan:
        key = batch_rows, inputs
        if key not in self.plans:
            if len(self.plans) > PLANS:
                self.plans.clear()
            self.plans[key] = self.make_plan(batch_rows, inputs, self.reserved)
        return self.plans[key]

    def _smaller(self, plan: Plan, inputs: Inputs, error: MemoryError) -> Plan:
        """Return a plan with half the chunk, since there is too little memory for this one."""
        self.drop()
        if plan.rows == 1:
            raise MemoryError(
                "not even one row at a time fits into the remaining memory; the largest: "
                f"{plan.largest()}"
            ) from error
        self._most_rows = plan.rows // 2
        log.warning(
            "out of memory: chunks of %s rows instead of %s from here on (%s)",
            f"{self._most_rows:,}",
            f"{plan.rows:,}",
            error,
        )
        self.plans.clear()
        self._settled.clear()
        return self._planned(plan.batch_rows, inputs)
