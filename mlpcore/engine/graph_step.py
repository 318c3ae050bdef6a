"""A training step on a CUDA device: captured once for each shape, then launched as a whole.

    row order → slot {addresses, sizes, rates} → one launch for one or many steps → J of each, on
    the device

Nothing waits for the device: a fault is recorded there, blocks all later updates, and is raised
when J is read, at the end of an epoch, or by an evaluation. Rows are gathered chunk by chunk
through the slot, which advances from step to step by itself. If a batch has more chunks than a
graph holds, the graph of one chunk is replayed instead.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from mlpcore.backends.cuda import slot as cuda_slot
from mlpcore.backends.cuda.device import CudaDevice
from mlpcore.backends.cuda.slot import Scalar
from mlpcore.backends.cuda.step_kernels import StepKernels
from mlpcore.core.ops import Array
from mlpcore.core.program import program
from mlpcore.core.schedules import Progress
from mlpcore.data.batches import Batch, Inputs
from mlpcore.engine import device_loss, launches
from mlpcore.engine.capture import Capture
from mlpcore.engine.control import Control
from mlpcore.engine.device_loss import DeviceLoss, StepResults
from mlpcore.engine.parts import StepParts
from mlpcore.engine.plan import Plan
from mlpcore.engine.problem import Problem, Settings
from mlpcore.engine.state import State
from mlpcore.engine.step import find_not_finite
from mlpcore.engine.workspace import Workspace

NODES = 2048  # maximum number of nodes in a graph of several steps, estimated from above
WORTHWHILE = 1e11  # operations of a step from which launching it separately costs nothing
P = ParamSpec("P")
R = TypeVar("R")


def _guarded(
    method: Callable[Concatenate[GraphStep, P], R],
) -> Callable[Concatenate[GraphStep, P], R]:
    """Make a method of `GraphStep` hold the lock, with the step's device as the current one."""

    @functools.wraps(method)
    def alone(step: GraphStep, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with step.lock, step.device.active():
            return method(step, *args, **kwargs)

    return alone


class GraphStep:
    """Gradient and update of one network on a CUDA device.

    Args:
        problem: a network, an objective and an optimizer; its `new_ops` makes `CudaOps`.
        device: the device of the parameters.
        precision: precision of products and layers: None (the network's dtype), "tf32", "bfloat16"
            or "float16"; it does not change sums, gradient and parameters.

    Attributes:
        lock: held while a step is launched, and while its results are read.
        J: loss of the last step.
        untouched: True if nobody else has written the parameters since the last step.
    """

    def __init__(self, problem: Problem, device: CudaDevice, precision: str | None) -> None:
        self.problem, self.store, self.device = problem, problem.store, device
        self.lock = threading.RLock()
        self.state = State(problem)
        self.capture = Capture(problem, self.state, device, precision)
        self.control = Control(problem, self.state, self.capture)
        self.workspace = Workspace(problem, self.capture)
        self.ops = self.capture.ops
        self.J: DeviceLoss | None = None
        self.untouched = False
        self._settled: tuple[dict[str, Any], Settings] | None = None  # those of the bound state
        self._results: StepResults | None = None
        self._stream: object = None  # stream of the last step
        self._progress: Progress | None = None  # progress of the last step
        self._uncounted = False  # True while a step may be launched but not counted

    @property
    def gradient(self) -> Array:
        """The gradient of the last batch, flat."""
        return self.state.gradient

    @property
    def kernels(self) -> StepKernels:
        """Kernels around the chunks; they are replaced when the optimizer's rule changes."""
        return self.capture.kernels

    # -- preparation --

    def prepare(self, batch_rows: int, inputs: Inputs) -> Plan:
        """Update the settings; return the plan for such batches, with its arrays allocated."""
        plan = self.workspace.plans.get((batch_rows, inputs))
        if plan is not None and plan is self.workspace.covered and self._is_settled():
            return plan  # the usual case
        with self.lock, self.device.active():
            self.follow()
            self._settle()
            return self.workspace.prepare(batch_rows, inputs)

    def _is_settled(self) -> bool:
        """Return True if nothing that a step depends on has changed."""
        if self._uncounted or self.state.torn or self.store.torn:
            return False
        return self._settled == (vars(self.problem.optimizer), self.problem.settings)

    def _settle(self) -> None:
        """Adapt to changed settings of the optimizer and the trainer; keep the state."""
        state, capture, optimizer = self.state, self.capture, self.problem.optimizer
        self.require_whole()
        state.require_valid()
        if not state.rule:
            state.count(0, {}, {})
            self._bind()
        elif state.outdated or capture.penalties != capture.penalised():
            self.restore(*self.snapshot())
        known = {**vars(optimizer), "layers": dict(optimizer.layers)}
        self._settled = known, self.problem.settings

    def _bind(self) -> None:
        # counts and faults outlast the rule
        before = None if self.control.fresh else self.control.read()
        self.workspace.drop()
        self.capture.bind()
        if before is not None:
            self.kernels.write_control(before)
        self.store.writer = None
        self.control.forget()
        self.workspace.plans.clear()
        self.state.rule = self.problem.optimizer.row  # last, since an interrupt may come before it

    @_guarded
    def require_whole(self) -> None:
        """Raise a RuntimeError if an update was interrupted; otherwise count the launched steps."""
        self.state.require_whole()
        self.count_launched()

    @_guarded
    def count_launched(self) -> None:
        """Count steps that the device has run but an interrupt kept from being counted."""
        if self._uncounted and self._progress is not None:
            control = self.control.read()
            step = int(control["updates"]) + int(control["skipped"])
            if step > self._progress.step and self.J is not None:
                self.J.ask()
            self._progress.step, self._uncounted = step, False

    @_guarded
    def count_skipped(self, progress: Progress) -> None:
        """Update `progress.skipped`; wait for the device."""
        if self.problem.settings.tolerant and not self.control.fresh:
            progress.skipped = int(self.control.read()["skipped"])

    def renew(self) -> None:
        """Drop work that another thread had under way here when the process was forked."""
        self.lock = threading.RLock()
        self.store.torn = self.state.torn
        self.workspace.drop()

    @_guarded
    def snapshot(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return what later steps depend on apart from the parameters: state vectors, and facts.

        The vectors are on the host, and the facts can be stored as JSON. Waits for all steps.
        """
        self.follow()
        self.require_whole()
        vectors = {name: self.capture.to_host(x) for name, x in self.state.vectors.items()}
        facts = {**self.state.facts(self.control.updates()), "plans": self.workspace.facts()}
        return vectors, {**facts, **self.control.facts()}

    @_guarded
    def restore(self, vectors: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Restore a snapshot, with its chunks and algorithms.

        Raises:
            ValueError: it does not belong to this step.
        """
        self.follow()
        self.workspace.restore(facts["plans"])
        if not facts["rule"]:
            return  # before the first step: the state starts at zero
        vectors = self.state.read(vectors, facts)
        with self.state.replaced(vectors):
            self._bind()
            self.state.fill(vectors, self.ops.xp)
            self.control.restore(facts)

    # -- a step --

    def together(self, batch_rows: int, inputs: Inputs, most: int) -> int:
        """Return how many of the next `most` steps one launch holds: a power of two."""
        flop = 6 * batch_rows * self.problem.layout.weights
        if inputs.host or self.control.varies or flop > WORTHWHILE:
            return 1
        rows = self.prepare(batch_rows, inputs).rows
        chunks = -(-batch_rows // rows)
        if not self.capture.unrolls(rows, batch_rows):
            return 1
        # gather, layers forward and backward, loss; sum_weights, the update
        nodes = chunks * 5 * self.problem.layout.layers + 3
        return 1 << (max(1, min(most, cuda_slot.TOGETHER, NODES // nodes)).bit_length() - 1)

    def run(self, batch: Batch, plan: Plan, progress: Progress) -> DeviceLoss:
        """Launch the steps of a batch without waiting; return J before each, to be read later.

        `plan` is the result of `prepare` for the batch; `progress` counts the steps.
        """
        with self.lock, self.device.active():
            self.control.begin(progress, batch.steps)
            self._results = results = device_loss.room(self._results, self.device, batch.steps)
            first = results.asked
            self.J = J = DeviceLoss(self, results, first, batch.steps, progress)
            self._progress, self._uncounted = progress, True
            self._launch("step", batch, plan, progress.step + 1, results.answer)
            results.asked = first + batch.steps
            progress.step, self._uncounted = progress.step + batch.steps, False
            self.store.writer = self
        return J

    @_guarded
    def apply(self, gradient: Array, progress: Progress) -> None:
        """Make one update with the caller's gradient, flat and on the device; wait for it."""
        self.follow()
        self._settle()
        self._refresh()
        if gradient is not self.gradient:
            self.gradient[...] = gradient
        self.control.begin(progress, 1)
        self._results = results = device_loss.room(self._results, self.device, 1)
        first = results.asked
        end = self.capture.recorded(("end",), self.capture.end)
        self.kernels.set_applied(progress.step + 1, results.answer)
        self.control.forget()  # so that the penalties are set again
        self.J, self._progress, self._uncounted = None, progress, True
        end.replay()
        results.asked = first + 1
        progress.step, self._uncounted = progress.step + 1, False
        self.store.writer = self
        self.read_results(results, first, 1, progress)

    @_guarded
    def loss_and_gradient(self, batch: Batch, plan: Plan, number: int = 1) -> float:
        """Return J of a batch, penalties included; its gradient is in `gradient` afterwards.

        Dropout is that of step `number`. Waits for both.
        """
        self._launch("gradient", batch, plan, number, 0)
        settings, n, gradient = self.problem.settings, self.problem.layout.weights, self.gradient
        weights = self.problem.parameters[:n]
        if self.capture.scaled:
            gradient /= self.kernels.scalar(Scalar.GAIN)
        if terms := settings.penalty_terms:  # as in the update, to the bit
            penalty = program(f"g = {' + '.join(['g', *terms])}", frozenset({"l1", "l2"}))
            factors = penalty.fold({"l1": settings.l1, "l2": settings.l2})
            scalars = {key: np.float64(value) for key, value in factors.items()}
            self.ops.map(penalty, {"w": weights, "g": gradient[:n]}, scalars)
        for part in self.state.frozen:
            gradient[part.start : part.stop] = 0
        J = self.capture.loss() + settings.l1 * self.ops.sum_abs(weights)
        return J + 0.5 * settings.l2 * self.ops.sum_squares(weights)

    @_guarded
    def evaluate(self, batch: Batch, plan: Plan, see: Callable[[Array, int, int], None]) -> float:
        """Return the mean loss of a batch, without penalties.

        `see(output, start, stop)` gets each chunk's output on the host: S[L] if output and loss
        match, else Z[L].
        """
        self.follow()
        self._refresh()
        launches.evaluate(self.capture, batch, plan, self.weight(batch) or 0.0, see)
        J, control = self.capture.loss(), self.control.read()
        if control["status"]:
            self.raise_fault(int(control["status"]), int(control["fault_step"]), self._progress)
        return J

    @_guarded
    def first_not_finite(self, batch: Batch, plan: Plan) -> int | None:
        """Return the first layer with outputs, or the last with a gradient, that are not finite."""
        capture = self.capture
        return find_not_finite(self, lambda: capture.chunk, capture.to_host, batch, plan)

    @_guarded
    def parts(self, batch: Batch, plan: Plan, progress: Progress) -> StepParts:
        """Return the graphs of a step, ready to be measured on the rows of this batch."""
        self.follow()
        self._refresh()
        weight, rates = self.weight(batch) or 0.0, self.control.rates(progress, 1)
        return launches.take_apart(self.capture, batch, plan, progress.step + 1, weight, rates)

    def weight(self, batch: Batch) -> float | None:
        """Return Σ w over the rows of a batch; None if the weights are on the device."""
        if batch.weights is None:
            return float(batch.size)
        if self.device.holds(batch.weights):
            return None
        w = batch.weights if batch.rows is None else batch.weights.take(batch.rows)
        return float(w.astype(np.float64).sum())

    # -- launches --

    def follow(self) -> None:
        """Make the current stream wait for the work of the last step, on any stream."""
        self._stream = self.device.follow(self._stream)

    def _refresh(self) -> None:
        """Refresh what may have been changed from outside: settings, and the low parameters."""
        self.control.refresh()
        store, low = self.store, self.capture.low
        exposed = store.exposed and not self.untouched
        if low is not None and (store.writer is not self or exposed):
            self.kernels.recast(self.problem.parameters, low)
            store.writer = self

    def _launch(self, what: str, batch: Batch, plan: Plan, number: int, answer: int) -> None:
        """Launch the steps of a batch, starting at step `number`, or only its "gradient"."""
        self.follow()
        self._refresh()
        weight = self.weight(batch) or 0.0
        launches.launch(self.capture, what, batch, plan, number, answer, weight)

    # -- results --

    def read_results(
        self, results: StepResults, first: int, count: int, progress: Progress
    ) -> list[list[float]]:
        """Return rows of results, or raise the fault that one of them reports."""
        with self.lock, self.device.active():
            if not results.has(first, count):
                self.follow()  # the current stream may differ from the steps'
            rows = results.read(first, count)
            for _, status, step, _ in rows:
                if status:
                    self.raise_fault(int(status), int(step), progress)
            return rows

    @_guarded
    def raise_fault(self, status: int, step: int, progress: Progress | None) -> None:
        """Clear a fault and raise it; parameters and counts are as before its step."""
        control = self.control.read()
        if control["status"] and control["fault_step"] == step:  # else already cleared
            control["status"] = control["fault_step"] = 0
            self.kernels.write_control(control)
            if progress is not None and step:
                progress.step = min(progress.step, step - 1)
        raise device_loss.fault(status, step, self.problem, progress)
