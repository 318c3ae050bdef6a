"""One training step: X, Y → forward → loss → backward → reduce → update.

J = Σ_rows w ℓ / Σ_rows w + l1 Σ|W| + ½ l2 Σ W²
g = ∂J/∂parameters, flat
parameters ← update(parameters, g, state)
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from mlpcore.backends.compiled.ops import CompiledOps
from mlpcore.backends.numpy import blas
from mlpcore.checks.errors import DeviceUnavailable
from mlpcore.core.ops import Array, EagerOps
from mlpcore.core.schedules import Progress
from mlpcore.data.batches import Batch, Inputs, weight_of
from mlpcore.engine import plan as planning
from mlpcore.engine.chunks import cut, even
from mlpcore.engine.crew import Crew
from mlpcore.engine.lanes import Lanes
from mlpcore.engine.parts import StepParts
from mlpcore.engine.plan import Plan
from mlpcore.engine.problem import Problem
from mlpcore.engine.state import State
from mlpcore.engine.step import find_not_finite
from mlpcore.engine.stretch import Losses, Stretch, Stretches
from mlpcore.engine.stretch import run as run_stretch
from mlpcore.engine.threads import Spread, Threads
from mlpcore.engine.workspace import Workspace

log = logging.getLogger("mlpcore")
BLAS_ROWS = 64  # rows per BLAS thread, if a core's cache holds the parameters
BLAS_ALONE = 1 << 18  # multiplications of a GEMM up to which BLAS by default uses one thread
P = ParamSpec("P")
R = TypeVar("R")


def _quiet(
    method: Callable[Concatenate[CpuStep, P], R],
) -> Callable[Concatenate[CpuStep, P], R]:
    """Make a method run without NumPy's overflow warnings, since the step checks for overflow."""

    @functools.wraps(method)
    def quiet(step: CpuStep, /, *args: P.args, **kwargs: P.kwargs) -> R:
        found: R = step.ops.quietly(method, step, *args, **kwargs)
        return found

    return quiet


class CpuStep:
    """A step whose operations run as they are called, on several threads if the batch is large.

    Args:
        problem: a network, an objective and an optimizer.

    Attributes:
        J: loss of the last step.
        untouched: True if nobody else has written the parameters since the last step.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.store = problem, problem.store
        self.ops: EagerOps = problem.new_ops()
        self.state = State(problem)
        self.lanes = Lanes(problem, self.state, self.ops.xp)
        self.crew = Crew(problem, self.lanes, self.ops)
        self.workspace = Workspace(problem, self.crew)
        self.J: Any = None
        self.untouched = False
        layout = problem.layout
        self._most_threads = blas.most() if self.ops.xp is np else 1  # of BLAS by default
        self._largest = max(a * b for a, b in itertools.pairwise(layout.sizes))
        self._in_cache = layout.size * np.dtype(problem.dtype).itemsize <= planning.CACHE
        self._threads: tuple[int, Threads] | None = None  # with the owning process
        # the last batch's chunks for each worker, by its size and plan
        self._shares: tuple[int, Plan | None, list[list[tuple[int, int]]]] = 0, None, []
        self._weighed: tuple[Batch, float] | None = None  # the last batch with row weights, Σ w
        self._passes = "compiled" if isinstance(self.ops, CompiledOps) else "NumPy's"
        self.stretches = Stretches(problem, self.state, self.lanes)

    @property
    def gradient(self) -> Array:
        """The gradient of the last batch, flat."""
        return self.state.gradient

    # -- what it stands on --

    def prepare(self, batch_rows: int, inputs: Inputs) -> Plan:
        """Update the settings; return the plan for such batches, with its arrays allocated."""
        plan = self.workspace.plans.get((batch_rows, inputs))
        settled = vars(self.problem.optimizer) == self.lanes.settings
        whole = settled and not (self.state.torn or self.store.torn)
        if whole and plan is not None and plan is self.workspace.covered:
            return plan  # the usual case
        self._settle()
        return self.workspace.prepare(batch_rows, inputs)

    def _settle(self) -> None:
        """Adapt to changed settings of the optimizer and the trainer; keep the state.

        Raises:
            RuntimeError: an update was interrupted.
            ValueError: epsilon is 0, or infinite, in the parameters' dtype.
        """
        self.state.require_valid()
        if not self.state.rule:
            self.state.count(0, {}, {})
            self._bind()
        elif self.state.outdated:
            self.restore(*self.snapshot())
        self.lanes.settle()

    def _bind(self) -> None:
        self.workspace.drop()
        self.lanes.bind()
        self.workspace.plans.clear()
        self.state.rule = self.problem.optimizer.row  # last, since an interrupt may come before it

    def require_whole(self) -> None:
        """Raise a RuntimeError if an update, or a change of the state, was interrupted."""
        self.state.require_whole()

    def renew(self) -> None:
        """Drop work that another thread had under way here when the process was forked."""
        self.store.torn = self.state.torn
        self.workspace.drop()
        for ops in (self.ops, *self.lanes.ops):
            ops.renew()

    def snapshot(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return what later steps depend on apart from the parameters: state vectors, and facts.

        The vectors are on the host, and the facts can be stored as JSON.
        """
        self.require_whole()
        vectors = {name: self.crew.to_host(x) for name, x in self.state.vectors.items()}
        facts = self.state.facts(self.state.done)
        facts |= {"plans": self.workspace.facts(), "threads": self.lanes.threads}
        return vectors, {**facts, "passes": self._passes}

    def restore(self, vectors: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Restore a snapshot, with its chunks.

        Raises:
            ValueError: it does not belong to this step.
        """
        self.workspace.restore(facts["plans"])
        if not facts["rule"]:
            return  # before the first step: the state starts at zero
        vectors = self.state.read(vectors, facts)
        with self.state.replaced(vectors):
            self._bind()
            self.state.fill(vectors, self.ops.xp)
            now = {"BLAS threads": self.lanes.threads, "passes": self._passes}
            before = {
                "BLAS threads": facts.get("threads"),
                "passes": facts.get("passes", "NumPy's"),
            }
            for what in now:
                if before[what] != now[what]:
                    log.warning(
                        "the run was saved with %s %s and is resumed with %s: its results "
                        "will not be bit-identical",
                        before[what],
                        what,
                        now[what],
                    )

    # -- a step --

    @_quiet
    def run(self, batch: Batch, plan: Plan, progress: Progress) -> float | Losses:
        """Run the steps of a batch; return the J before its update, or those of several.

        Args:
            batch: the rows.
            plan: the plan that `prepare` returned for them.
            progress: counts the steps.

        Raises:
            NonFiniteLoss: J, the gradient or the update of a step is not finite, and has changed
                nothing.
        """
        # One BLAS thread per worker for the *whole* step: a BLAS thread that was still spinning
        # would be one too many. If a core's cache holds the parameters, few rows cost more than
        # they gain, because half of dW is then in another core's cache.
        threads, stretch = self.lanes.threads, self._stretch(batch.size, plan)
        if plan.workers > 1 or (stretch is not None and stretch.threads > 1):
            threads = 1
        elif self._in_cache and batch.size * self._largest > BLAS_ALONE:
            threads = max(1, min(threads, batch.size // BLAS_ROWS))
        with blas.limited(threads) if threads < self._most_threads else blas.NOTHING:
            if stretch is not None:
                return self._run_stretch(stretch, batch, plan, progress)
            return self._run_one(batch, plan, progress)

    def _run_one(self, batch: Batch, plan: Plan, progress: Progress) -> float:
        spread = self._spread() if plan.workers > 1 else None
        if self.problem.settings.dropout:
            self.crew.draw(progress.step + 1)
        J, squares = self._loss_and_squares(batch, plan, spread)
        self.J = J
        self.lanes.update(J, squares, progress, spread)
        return J

    def _stretch(self, rows: int, plan: Plan) -> Stretch | None:
        """Return the stretch of steps on batches of this size, or None if they run one by one.

        Each step has the same bits in a stretch of any length.
        """
        inputs, workers = self.workspace.inputs, self.crew.workers[: plan.workers]
        return None if inputs is None else self.stretches.find(workers, rows, plan.rows, inputs)

    def _run_stretch(
        self, stretch: Stretch, batch: Batch, plan: Plan, progress: Progress
    ) -> float | Losses:
        if self.crew.weight != batch.size:
            self.crew.set_scale(batch.size)
        self._weighed, self.J = None, (losses := Losses(float(batch.size)))

        def run_alone(one: Batch) -> float:
            try:
                return self._run_one(one, plan, progress)
            finally:
                self.J = losses

        run_stretch(stretch, batch, progress, losses, run_alone)
        if batch.steps > 1:
            return losses
        self.J = J = float(losses.values()[0][0])
        return J

    @_quiet
    def loss_and_gradient(self, batch: Batch, plan: Plan, number: int = 1) -> float:
        """Return J of a batch, penalties included; its gradient is in `gradient` afterwards.

        Dropout is that of step `number`.
        """
        self.crew.draw(number)
        return self._loss_and_squares(batch, plan, None)[0]

    def _loss_and_squares(
        self, batch: Batch, plan: Plan, spread: Spread | None
    ) -> tuple[float, float]:
        """Return J, and the squared norm of its gradient."""
        crew, lanes, settings = self.crew, self.lanes, self.problem.settings
        weight = float(batch.size) if batch.weights is None else self.weight(batch)
        self._weighed = None
        if weight != crew.weight:
            crew.set_scale(weight)
        if settings.l1 or settings.l2 or lanes.penalty is not None:
            lanes.set_penalty()
        if batch.size != self._shares[0] or plan is not self._shares[1]:
            self._shares = batch.size, plan, cut(batch.size, plan.rows, plan.workers)
        shares = self._shares[2]
        workers = crew.workers[: len(shares)]
        if spread is None:
            for worker, share in zip(workers, shares, strict=True):
                worker.gradient(batch, share)
        else:
            spread(
                [
                    functools.partial(worker.ops.quietly, worker.gradient, batch, share)
                    for worker, share in zip(workers, shares, strict=True)
                ]
            )
        J = sum([float(worker.J) for worker in workers])
        passes = lanes.additions[: len(shares) - 1]
        if lanes.penalty is not None:
            passes, J = [*passes, lanes.penalty.lanes], J + lanes.penalty_value()
        if spread is None:
            return J, sum([lanes.squares(passes, lane) for lane in range(lanes.count)])
        return J, sum(spread(lanes.jobs(functools.partial(lanes.squares, passes))))

    @_quiet
    def evaluate(self, batch: Batch, plan: Plan, see: Callable[[Array, int, int], None]) -> float:
        """Return the mean loss of a batch, without penalties.

        `see(output, start, stop)` gets each chunk's output on the host: S[L] if output and loss
        match, else Z[L].
        """
        worker = self.crew.workers[0]
        weight = weight_of(batch)
        if weight != self.crew.weight:
            self.crew.set_scale(weight)
        worker.J[...] = 0
        for start, stop in even(0, batch.size, plan.rows):
            output = worker.forward(batch, start, stop)
            see(self.crew.to_host(output), start, stop)
            worker.loss(batch, start, stop)
        return float(worker.J)

    def apply(self, gradient: Array, progress: Progress) -> None:
        """Make one update with the caller's flat gradient, which is not modified."""
        self._settle()
        self._apply(gradient, progress)

    @_quiet
    def _apply(self, gradient: Array, progress: Progress) -> None:
        if gradient is not self.gradient:
            self.gradient[...] = gradient
        squares = sum([self.lanes.squares([], lane) for lane in range(self.lanes.count)])
        self.J = 0.0
        self.lanes.update(0.0, squares, progress)

    def weight(self, batch: Batch) -> float:
        """Return Σ w over the rows of a batch; remember it until the step."""
        if batch.weights is None:
            return float(batch.size)
        if self._weighed is None or self._weighed[0] is not batch:
            self._weighed = batch, weight_of(batch)
        return self._weighed[1]

    def first_not_finite(self, batch: Batch, plan: Plan) -> int | None:
        """Return the first layer with outputs, or the last with a gradient, that are not finite."""
        return find_not_finite(self, lambda: self.crew.workers[0], self.crew.to_host, batch, plan)

    def _spread(self) -> Spread:
        """Return a function that runs jobs on this step's threads; a forked process has its own."""
        if self._threads is None or self._threads[0] != os.getpid():
            count = max(1, self.lanes.threads - 1, len(self.crew.workers) - 1)
            self._threads = os.getpid(), Threads(count)
        return functools.partial(self._threads[1].run, give_up=self.workspace.drop)

    # -- needed only on a device --

    def together(self, batch_rows: int, inputs: Inputs, most: int) -> int:
        """Return how many of the next `most` steps on batches of this size one call makes."""
        stretch = self._stretch(batch_rows, self.prepare(batch_rows, inputs))
        return 1 if stretch is None else min(most, stretch.length)

    def count_skipped(self, progress: Progress) -> None:
        """Do nothing: each step has already been counted."""

    def count_launched(self) -> None:
        """Do nothing: each step has already been counted."""

    def parts(self, batch: Batch, plan: Plan, progress: Progress) -> StepParts:
        """Raise a DeviceUnavailable: there are no graphs to measure."""
        raise DeviceUnavailable(
            "a step has parts only if it is captured as a graph: on a CUDA device with cuBLASLt"
        )
