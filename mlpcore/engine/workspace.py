"""The workspace of a step: its plans, and the arrays of the plan that is allocated."""

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
Shape = tuple[int, Inputs]  # rows of a batch, and what its arrays look like
SHARED_ROWS = 64  # of a chunk from which several workers are worth their memory where it is limited
PLANS = 64  # that are kept; one for each size of batch


class Chunks(Protocol):
    """The chunks of a kind of step: which arrays they need, and the making of them."""

    ops: Any

    def state_buffers(self) -> list[Buffer]:
        """List the gradient, the optimizer state and what else lasts from step to step."""

    def parts(self, rows: int, workers: int, batch_rows: int, inputs: Inputs) -> Parts:
        """List the arrays of chunks of `rows` rows, allocation by allocation."""

    def choose(self, batch_rows: int, inputs: Inputs) -> tuple[int, int]:
        """Return the rows of a chunk, and the workers, where memory is no object."""

    def allocate(self, plan: Plan, inputs: Inputs) -> None:
        """Allocate the plan's arrays."""

    def drop(self) -> None:
        """Give the arrays back."""


class Workspace:
    """Plans for batches of each size, and the arrays that serve the larger ones.

    Args:
        problem: which the arrays are for.
        chunks: that are made of them.

    Attributes:
        plans: by rows and inputs of a batch.
        reserved: arrays of `fit` that are part of every plan.
        allocated: the plan whose arrays are there, or None; `inputs` are what it was made for.
        covered: the last plan for which these arrays will do.
    """

    def __init__(self, problem: Problem, chunks: Chunks) -> None:
        self.problem, self.chunks = problem, chunks
        self.plans: dict[Shape, Plan] = {}
        self.reserved: Sequence[Buffer] = ()
        self.allocated: Plan | None = None
        self.inputs: Inputs | None = None
        self.covered: Plan | None = None
        self._settled: dict[Shape, tuple[int, int]] = {}  # rows and workers of a resumed run
        self._most_rows: int | None = None  # of a chunk, since memory ran out

    # -- plans --

    def fit_buffers(self, rows: int, best: bool) -> list[Buffer]:
        """List the order of so many rows and, if they are kept, the best parameters, for `fit`."""
        size, dtype = self.problem.layout.size, self.problem.dtype
        order = [Buffer("row order", (rows,), "int64", "shuffled row numbers")] if rows else []
        kept = [Buffer("best", (size,), dtype, "parameters to go back to")] if best else []
        return order + kept

    def make_plan(self, batch_rows: int, inputs: Inputs, reserved: Sequence[Buffer] = ()) -> Plan:
        """Return the memory table for batches of up to `batch_rows` rows and what `fit` reserved.

        Raises:
            MemoryError: `memory_limit` cannot be kept even with chunks of one row; names the
                largest buffers.
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
        """Choose chunks and workers as a checkpoint's run did.

        Raises:
            TypeError, ValueError: no run has such chunks.
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
        """Allocate arrays for `fit`, part of every plan until `reserve([])` gives them back.

        The arrays of `there` exist already; they become part of every plan, too.
        """
        self._reserve((*buffers, *there))
        return planning.allocate(self.chunks.ops, buffers)

    def _reserve(self, buffers: Sequence[Buffer]) -> None:
        self.reserved, self.plans = buffers, {}
        if self.problem.settings.memory_limit is not None:
            self.drop()  # it may be larger than what is left now

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
                self.plans = plans  # a checkpoint tells them

    # -- what is allocated --

    def prepare(self, batch_rows: int, inputs: Inputs) -> Plan:
        """Return the plan for batches of this size; allocate its arrays unless others will do."""
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
        """Give back arrays of another size, in which an evaluation would differ by rounding."""
        there = self.allocated
        if there is not None and (there.batch_rows, self.inputs) != (batch_rows, inputs):
            self.drop()

    def drop(self) -> None:
        """Give the arrays of the chunks back."""
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
        """Return a plan with half the chunk, since others have left too little memory for this."""
        self.drop()
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
        self.plans.clear()
        self._settled.clear()
        return self._planned(plan.batch_rows, inputs)
