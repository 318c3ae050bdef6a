"""The crew of a step: workers, each with its own arrays for a chunk of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlpcore.core.ops import Array, Buffer, EagerOps
from mlpcore.data.batches import Inputs
from mlpcore.engine import plan as planning
from mlpcore.engine import stretch
from mlpcore.engine.lanes import Lanes
from mlpcore.engine.plan import Plan
from mlpcore.engine.problem import Problem
from mlpcore.engine.worker import Worker
from mlpcore.engine.workspace import Parts

WORKER_ROWS = 256  # rows of a worker, for each other worker
WORKER_FLOP = 4e8  # operations of a step from which handing work to another thread pays
# the same of steps in one call: rows if a gradient is in a core's cache, and operations
STRETCH_ROWS, STRETCH_FLOP = 64, 2e7


class Crew:
    """The workers that share a batch.

    Args:
        problem: the problem that they work on.
        lanes: the lanes that add up their gradients.
        ops: operations for arrays that outlast the workers.

    Attributes:
        workers: the workers of the allocated plan.
        scale: 1 / Σ w of the batch, which every worker reads.
        weight: the Σ w that `scale` was set for; None if uncertain.
    """

    def __init__(self, problem: Problem, lanes: Lanes, ops: EagerOps) -> None:
        self.problem, self.lanes, self.ops = problem, lanes, ops
        self.workers: list[Worker] = []
        self.scale = ops.xp.ones((), problem.dtype)
        self.weight: float | None = 1.0

    # -- the plan --

    def state_buffers(self) -> list[Buffer]:
        """List the gradient, the optimizer state and the lanes' registers."""
        return [*self.lanes.state.buffers(), *self.lanes.buffers()]

    def parts(self, rows: int, workers: int, batch_rows: int, inputs: Inputs) -> Parts:
        """List the arrays of each worker, for chunks of `rows` rows."""
        problem = self.problem
        accumulates = rows * workers < batch_rows
        buffers = planning.chunk_buffers(
            self.ops,
            problem.layout,
            problem.dtype,
            problem.activations,
            problem.objective,
            inputs,
            rows,
            accumulates,
        )
        parts: Parts = {"workspace": buffers}
        size = (problem.layout.size,)
        for number in range(2, workers + 1):
            gradient = Buffer("gradient", size, problem.dtype, f"of worker {number}")
            parts[f"workspace {number}"] = [*buffers, gradient]
        return parts

    def choose(self, batch_rows: int, inputs: Inputs) -> tuple[int, int]:
        """Return the rows of a chunk, and the number of workers, if memory is unlimited."""
        settings = self.problem.settings

        def workspace(rows: int) -> int:
            return planning.part_bytes(self.parts(rows, 1, batch_rows, inputs)["workspace"])

        itemsize = np.dtype(self.problem.dtype).itemsize
        rows = settings.most_rows or planning.choose_rows(
            workspace, self.problem.layout, itemsize, batch_rows
        )
        workers = settings.workers or self._choose_workers(batch_rows, inputs, rows)
        workers = min(batch_rows, workers)
        return min(rows, -(-batch_rows // workers)), workers

    def _choose_workers(self, batch_rows: int, inputs: Inputs, chunk_rows: int) -> int:
        """Return the number of threads that BLAS would use, each with its own rows, or 1.

        Adding up two gradients costs about as much as 15 rows of the GEMMs: with 256 rows per
        worker and more for each further one, that is 6% at most, less than several threads save in
        the passes between the GEMMs. Handing work over and waiting for it takes 0.1 ms, so a step
        of less than 0.4 GFLOP uses one thread. In a stretch of steps handing over is a barrier, and
        what pays is that no thread reads rows that another has written.
        """
        threads, layout = self.lanes.threads, self.problem.layout
        if threads == 1:
            return 1
        rows, flop = batch_rows / threads / (threads - 1), 6 * batch_rows * layout.weights
        if rows >= WORKER_ROWS and flop >= WORKER_FLOP:
            return threads
        cached = layout.size * np.dtype(self.problem.dtype).itemsize <= planning.CACHE
        if rows < (STRETCH_ROWS if cached else WORKER_ROWS) or flop < STRETCH_FLOP:
            return 1
        most = threads * chunk_rows
        possible = stretch.possible(self.problem, self.ops, batch_rows, inputs, most)
        return threads if possible else 1

    def allocate(self, plan: Plan, inputs: Inputs) -> None:
        """Allocate the plan's arrays: one worker per part."""
        for i in range(plan.workers):
            self._add_worker(plan.parts[f"workspace {i + 1}" if i else "workspace"])

    def drop(self) -> None:
        """Dismiss the workers, which frees their arrays."""
        self.workers, self.lanes.additions = [], []

    def _add_worker(self, buffers: Sequence[Buffer]) -> None:
        problem, ops = self.problem, self.problem.new_ops()
        arrays = planning.allocate(ops, buffers)
        gradient = arrays.pop("gradient", None)
        if gradient is None:  # the first worker adds to the batch's own gradient
            gradient = self.lanes.state.gradient
        else:
            self.lanes.add(gradient)
        dW, db = problem.layout.views(gradient)
        self.workers.append(
            Worker(
                ops,
                problem.store.W,
                problem.store.b,
                problem.activations_on(gradient),
                problem.objective,
                dW,
                db,
                arrays,
                self.scale,
                problem.layout.repeats,
            )
        )

    def to_host(self, array: Array) -> np.ndarray:
        """Return an array of this step as a NumPy array."""
        host: np.ndarray = array if self.ops.xp is np else self.ops.xp.asnumpy(array)
        return host

    # -- a step --

    def set_scale(self, weight: float) -> None:
        """Set 1 / Σ w for a batch of this weight."""
        largest = float(np.finfo(self.problem.dtype).max)
        if not 1 / largest < weight < largest:
            beyond = (
                f"sums to {weight:g}, out of the range of {self.problem.dtype}: rescale the weights"
            )
            zero = "must not be all zero on the rows of the batch"
            raise ValueError(f"sample_weight {beyond if weight else zero}")
        self.weight = None  # an interrupt may come before the new one is stored
        self.scale[...] = 1 / weight
        self.weight = weight

    def draw(self, number: int) -> None:
        """Draw the dropout masks of this step number from now on."""
        for worker in self.workers:
            worker.ops.step = number
