"""A training step on a CUDA device: captured once for each shape, then launched as a whole.

    row order → slot {addresses, sizes, rates} → one launch for one or many steps → J of each, on
    the device

Nothing waits for the device: a fault is noted there, forbids all later updates, and is raised when
J is read, at the end of an epoch, or by an evaluation. Rows are gathered chunk by chunk through the
slot, and the slot moves on from step to step by itself. A batch of more chunks than a graph holds
replays the graph of one chunk instead.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlpcore.backends.cuda import slot as cuda_slot
from mlpcore.backends.cuda.device import Device
from mlpcore.backends.cuda.gemm import Product
from mlpcore.backends.cuda.loss import SlotRows
from mlpcore.backends.cuda.ops import CudaOps
from mlpcore.backends.cuda.slot import Scalar, Status
from mlpcore.backends.cuda.step_kernels import StepKernels
from mlpcore.checks.errors import NonFiniteLoss
from mlpcore.core.activations import Activation
from mlpcore.core.layout import Layout, Parameters
from mlpcore.core.losses import Objective
from mlpcore.core.ops import Array, Buffer, Recording
from mlpcore.core.optimizers import Optimizer, segments
from mlpcore.core.program import Program, program
from mlpcore.core.schedules import Progress, Schedule
from mlpcore.data.batches import Batch, Inputs
from mlpcore.engine import device_loss
from mlpcore.engine import plan as planning
from mlpcore.engine.chunks import SHAPES, Chunk, cut, even
from mlpcore.engine.device_loss import DeviceLoss, StepResults
from mlpcore.engine.parts import StepParts
from mlpcore.engine.plan import Plan
from mlpcore.engine.staging import Staging, staging_buffers
from mlpcore.engine.workspace import Parts, PlannedStep, Settings, log

UNROLLED = 64  # chunks that one graph holds
CHUNK_BYTES = 32 << 20  # of a chunk's arrays: most of an H200's L2
NARROW, NARROW_BYTES = (
    128,
    256 << 20,
)  # layers up to this width: kernels so short that their number counts
NARROWEST, WIDEST = 8192, 1 << 18  # rows of a chunk when chosen by itself
NODES = 2048  # that a graph of several steps holds, counted from above
WORTHWHILE = 1e11  # operations of a step from which launching it by itself costs nothing


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of `GraphStep` run alone, with the step's device as the current one."""

    @functools.wraps(method)
    def alone(step: GraphStep, *arguments: Any, **named: Any) -> Any:
        with step.lock, step.device.active():
            return method(step, *arguments, **named)

    return alone


class SlotChunk(Chunk):
    """A chunk whose targets and row weights the loss reads where the caller has them.

    Args: as `Chunk`, and the inputs.
    """

    def __init__(self, inputs: Inputs, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._targets = SlotRows(np.dtype(inputs.y_dtype).name, inputs.classes)
        self._weights = (
            SlotRows(np.dtype(inputs.w_dtype).name, scale=self.scale) if inputs.w_dtype else None
        )

    def targets(self, rows: int, weighted: bool) -> tuple[Any, Any]:
        """Return Y and the row weights over the batch's weight, as `ops.loss` takes them."""
        return self._targets, self._weights if weighted else self.scale


class GraphStep(PlannedStep):
    """Gradient and update of one network on a CUDA device.

    Args:
        device: where the parameters lie.
        precision: None (the network's dtype), "tf32", "bfloat16" or "float16": of products and
            layers; sums, gradient and parameters stay as they are.
        Others: as `PlannedStep`; `new_ops` gives `CudaOps`.
    """

    ops: CudaOps
    kernels: StepKernels

    def __init__(
        self, layout: Layout, store: Parameters, activations: tuple[Activation | None, ...], objective: Objective,
        optimizer: Optimizer, settings: Settings, new_ops: Callable[[], CudaOps], device: Device, precision: str | None,
    ) -> None:  # fmt: skip
        super().__init__(layout, store, activations, objective, optimizer, settings, new_ops)
        self.device = device
        self.lock = (
            threading.RLock()
        )  # held while a step is launched, and while its results are read
        self.layers = (
            precision if precision in ("float16", "bfloat16") else self.dtype
        )  # dtype of Z, S, G, D
        self.scaled = precision == "float16"
        self.low: Array | None = None
        self.chunk: Chunk | None = None
        self.staging: Staging | None = None
        self.recordings: OrderedDict[tuple[object, ...], Recording] = OrderedDict()
        self._results: StepResults | None = None
        self._values: tuple[dict[str, Any], Settings] | None = (
            None  # that the slot's scalars were set from
        )
        self._penalties = self._penalised()
        self._fresh = True  # whether the device's update count is still to be set
        self._stream: object = None  # of the last step
        self._progress: Progress | None = None  # that the last step counted in
        self._uncounted = False  # whether a step may have been launched and not counted

    # -- the plan --

    def _program(self) -> Program:
        """The optimizer's statements behind unscaling, penalties and clipping."""
        terms = ["unscale * g" if self.scaled else "g", *self.settings.penalty_terms]
        statements = [f"g = {' + '.join(terms)}"] if len(terms) > 1 or self.scaled else []
        statements += ["g = clip * g"] if self.settings.clip_norm is not None else []
        scalars = {"clip", "unscale", "l1", "l2", "rate", "t", *self.optimizer.constants()}
        return program("; ".join([*statements, self.optimizer.statements]), frozenset(scalars))

    def _kernels(self) -> StepKernels:
        names = ["rate", "l1", "l2", *sorted(self.optimizer.constants())]
        layers, missed = self.optimizer.layers, self.missed
        return StepKernels(
            self.ops, self._program(), self.optimizer.bounds_of_row, names, ("decay", "l1", "l2"), self.scaled, self.dtype,
            self.layout.size, segments(self.layout, layers, missed) if layers or missed else (),
        )  # fmt: skip

    def _state_buffers(self) -> list[Buffer]:
        size, buffers = self.layout.size, self._vectors()
        if self.layers != self.dtype:
            buffers.append(
                Buffer("low-precision parameters", (size,), self.layers, "what the products read")
            )
        return buffers + self._kernels().buffers()

    def _unrolled(self, rows: int, batch_rows: int) -> bool:
        return -(-batch_rows // rows) <= UNROLLED

    def _workspace(self, rows: int, workers: int, batch_rows: int, inputs: Inputs) -> Parts:
        parts: Parts = {
            "workspace": planning.chunk_buffers(
                self.ops,
                self.layout,
                self.layers,
                self.activations,
                self.objective,
                inputs,
                rows,
                rows < batch_rows,
            )
        }
        if inputs.host:
            staged = batch_rows if self._unrolled(rows, batch_rows) else rows
            parts["staging"] = staging_buffers(self.layout, inputs, staged)
        return parts

    def _choose(self, batch_rows: int, inputs: Inputs) -> tuple[int, int]:
        rows = self.settings.most_rows
        if rows is None:
            fixed, much = (
                planning.part_bytes(self._workspace(n, 1, n, inputs)["workspace"])
                for n in (1, 1025)
            )
            most = NARROW_BYTES if max(self.layout.sizes[1:]) <= NARROW else CHUNK_BYTES
            rows = max(NARROWEST, min(WIDEST, most * 1024 // max(1, much - fixed)))
        return min(rows, batch_rows), 1

    def _penalised(self) -> tuple[bool, bool]:
        return self.settings.l1 != 0, self.settings.l2 != 0

    def _outdated(self) -> bool:
        """Whether another penalty is zero than when the update was compiled, or layers have other
        settings.
        """
        return super()._outdated() or self._penalties != self._penalised()

    def renew(self) -> None:
        """Give up what another thread was doing here when the process was forked."""
        self.lock = threading.RLock()
        super().renew()

    # -- what a checkpoint holds --

    @_guarded
    def require_whole(self) -> None:
        """Raise a RuntimeError if an update was left half done; else count what was launched."""
        super().require_whole()
        self.count_launched()

    @_guarded
    def count_launched(self) -> None:
        """Count the steps that the device has done where an interrupt came between launch and
        count.
        """
        if self._uncounted and self._progress is not None:
            control = self.kernels.read_control()
            step = int(control["updates"]) + int(control["skipped"])
            if step > self._progress.step and self.J is not None:
                self.J.ask()
            self._progress.step, self._uncounted = step, False

    @_guarded
    def snapshot(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """What the next steps depend on beside the parameters; waits for the steps so far."""
        self.follow()
        return super().snapshot()

    @_guarded
    def restore(self, vectors: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self.follow()
        super().restore(vectors, facts)

    def _facts(self) -> dict[str, Any]:
        if not self.rule:
            return {}
        with self.device.lock:  # another trainer's thread may be choosing
            algorithms = [
                [*dataclasses.astuple(p), a.hex()] for p, a in self.ops.algorithms.chosen.items()
            ]
            fused = [
                [*dataclasses.astuple(p), pays] for p, pays in self.ops.algorithms.fused.items()
            ]
        facts: dict[str, Any] = {
            "library": self.device.library,
            "algorithms": algorithms,
            "fused": fused,
        }
        if not self._fresh:
            control = self.kernels.read_control()
            facts["control"] = {
                name: control[name].item() for name in cuda_slot.CONTROL.names or ()
            }
        return facts

    def _count(self) -> int:
        return self.done if self._fresh else int(self.kernels.read_control()["updates"])

    def _take(self, facts: Mapping[str, Any]) -> None:
        if "control" in facts:  # else the device takes the counts of updates over at the next step
            control = np.zeros((), cuda_slot.CONTROL)
            for name, value in facts["control"].items():
                control[name] = value
            if facts["rule"] != self.optimizer.row:  # whose first state vector may be another one
                control["reach"] = self.reach
            self.kernels.write_control(control)
            self._fresh = False
        if "library" not in facts:  # saved on a CPU
            return
        if facts["library"] != self.device.library:
            log.warning(
                "saved with %s, goes on with %s: not equal to the bit",
                facts["library"],
                self.device.library,
            )
            return
        with self.device.lock:
            self.ops.algorithms.chosen |= {
                Product(*fields): bytes.fromhex(text) for *fields, text in facts["algorithms"]
            }
            self.ops.algorithms.fused |= {
                Product(*fields): pays for *fields, pays in facts["fused"]
            }

    def _first_chunk(self) -> Chunk:
        return self._arrays()

    def _to_host(self, array: Array) -> np.ndarray:
        """Numbers on the host, in a dtype that NumPy computes in."""
        host = self.device.to_host(array)
        return (host.astype(np.uint32) << 16).view(np.float32) if host.dtype == np.uint16 else host

    @_guarded
    def count_skipped(self, progress: Progress) -> None:
        """Bring `progress.skipped` up to date; waits for the device."""
        if self.settings.tolerant and not self._fresh:
            progress.skipped = int(self.kernels.read_control()["skipped"])

    @_guarded
    def first_not_finite(self, batch: Batch, plan: Plan) -> int | None:
        """The first layer whose outputs on this batch are not finite; or the last whose gradient is
        not; None if all are.
        """
        return super().first_not_finite(batch, plan)

    # -- arrays --

    def _bind_optimizer(self) -> None:
        # counts and faults outlast the rule
        before = None if self._fresh else self.kernels.read_control()
        self._drop_workspace()
        buffers = self._state_buffers()
        self.state.clear()
        self.state = planning.allocate(self.ops, buffers)
        self.kernels = self._kernels()
        self.kernels.use(
            {buffer.name: self.state.pop(buffer.name) for buffer in self.kernels.buffers()}
        )
        if before is not None:
            self.kernels.write_control(before)
        self.low = self.state.pop("low-precision parameters", None)
        self.ops.low = None if self.low is None else (self.parameters, self.low)
        for vector in self.state.values():
            vector[...] = 0
        self.store.writer = self._values = None
        self.gradient = self.state.pop("gradient")
        self.rule, self._penalties = self.optimizer.row, self._penalised()
        self.by_layer = dict(self.optimizer.layers)
        self._plans.clear()

    def _allocate(self, plan: Plan, inputs: Inputs) -> None:
        buffers = planning.allocate(self.ops, plan.parts["workspace"])
        for i, (name, array) in enumerate(buffers.items()):
            if (
                name[0] in "XSZG"
                and array.dtype.kind in "fu"
                and array.ndim
                and array.dtype.itemsize > 1
            ):
                self.kernels.randomize(array, i)
        W = self.W if self.low is None else self.layout.views(self.low)[0]
        scale, J = self.kernels.scalar(Scalar.SCALE), self.kernels.scalar(Scalar.LOSS)
        dW, db = self.layout.views(self.gradient)
        self.chunk = SlotChunk(
            inputs, self.ops, W, self.b, self._bound(self.gradient), self.objective, dW, db, buffers, scale, J,
            self.layout.repeats,
        )  # fmt: skip
        self.ops.control, self.ops.step = self.kernels.control, self.kernels.slot
        self.ops.gain = self.kernels.scalar(Scalar.GAIN) if self.scaled else None
        if inputs.host:
            self.staging = Staging(self.device, planning.allocate(self.ops, plan.parts["staging"]))

    def _drop_workspace(self) -> None:
        super()._drop_workspace()
        self.chunk, self.staging = None, None
        self.recordings.clear()
        self.ops.use({})  # whose scratch lay in it

    # -- the step --

    def prepare(self, batch_rows: int, inputs: Inputs) -> Plan:
        """The plan for batches of this size, and its arrays allocated behind the last step's work."""
        plan = self._plans.get((batch_rows, inputs))
        whole = not (self._uncounted or self.torn or self.store.torn)
        bound = whole and self.rule == self.optimizer.row and not self._outdated()
        if plan is not None and plan is self._covered and bound:
            self.optimizer.require_epsilon(self.dtype)
            return plan  # as most steps are
        with self.lock, self.device.active():
            self.follow()
            return super().prepare(batch_rows, inputs)

    def together(self, batch_rows: int, inputs: Inputs) -> int:
        """Return how many steps on batches of so many rows one launch may hold: a power of two."""
        if inputs.host or self._varies() or 6 * batch_rows * self.layout.weights > WORTHWHILE:
            return 1
        rows = self.prepare(batch_rows, inputs).rows
        if not self._unrolled(rows, batch_rows):
            return 1
        chunks = -(-batch_rows // rows)
        # gather, layers forward and back, loss; sum_weights, the update
        nodes = chunks * 5 * self.layout.layers + 3
        return 1 << (max(1, min(cuda_slot.TOGETHER, NODES // nodes)).bit_length() - 1)

    def run(self, batch: Batch, plan: Plan, progress: Progress) -> DeviceLoss:
        """X, Y → forward → loss → backward → update, launched and not waited for. Returns J, to be
        read later.
        """
        with self.lock, self.device.active():
            if self._fresh:
                self._set_counts(progress)
            results, first = self._results_for(batch.steps)
            if self._varies():
                self._set_values(self.optimizer.scalars(progress))
            self._set_rates(progress, batch.steps)
            self.J = J = DeviceLoss(self, results, first, batch.steps, progress)
            self._progress, self._uncounted = progress, True
            self._launch(
                "step",
                batch,
                plan,
                progress.step + 1,
                results.address + device_loss.ROW_BYTES * first,
            )
            J.ask()
            progress.step, self._uncounted = progress.step + batch.steps, False
            self.store.writer = self
        return J

    @_guarded
    def apply(self, gradient: Array, progress: Progress) -> None:
        """One update by a gradient of the caller's, flat and on the device; waits for it, and
        raises what is wrong with it.
        """
        self.follow()
        self.settle()
        self._refresh()
        if self._fresh:
            self._set_counts(progress)
        if gradient is not self.gradient:
            self.gradient[...] = gradient
        results, first = self._results_for(1)
        if self._varies():
            self._set_values(self.optimizer.scalars(progress))
        self._set_rates(progress, 1)
        end = self._recorded(("end",), self._end)
        self.kernels.set_applied(progress.step + 1, results.address + device_loss.ROW_BYTES * first)
        self._values = None  # the penalties are to be set anew
        self.J, self._progress, self._uncounted = None, progress, True
        end.replay()
        results.asked = first + 1
        progress.step, self._uncounted = progress.step + 1, False
        self.store.writer = self
        self.read_results(results, first, 1, progress)

    def _results_for(self, steps: int) -> tuple[StepResults, int]:
        """Return where the results of so many steps go, and the number of the first."""
        results = self._results
        if results is None or results.asked + steps > device_loss.ROWS:
            results = self._results = StepResults(self.device)
        return results, results.asked

    def _set_counts(self, progress: Progress) -> None:
        """Tell the device how many updates were done, and skipped, before its first, and how large
        the state may be.
        """
        control = self.kernels.read_control()
        control["updates"], control["skipped"] = progress.step - progress.skipped, progress.skipped
        control["reach"] = self.reach
        self.kernels.write_control(control)
        self._fresh = False

    def _set_rates(self, progress: Progress, count: int) -> None:
        """Set the learning rates of the next steps."""
        rates = self._rates(progress, count)
        self.kernels.set_rates(rates)
        self.rate = next((rate for rate in reversed(rates) if rate), self.rate)

    def _rates(self, progress: Progress, count: int) -> list[float]:
        """Return the learning rates of the next steps."""
        optimizer = self.optimizer
        if self._varies():
            return [optimizer.scalars(progress)["rate"]] * count
        if type(optimizer).rate is Optimizer.rate and not isinstance(
            optimizer.learning_rate, Schedule
        ):
            return [float(optimizer.learning_rate)] * count
        ahead, rates = dataclasses.replace(progress), []
        for _ in range(count):
            rates.append(optimizer.rate(ahead))
            ahead.step += 1
        return rates

    @_guarded
    def loss_and_gradient(self, batch: Batch, plan: Plan, number: int = 1) -> float:
        """J of a batch, penalties included, and its gradient in `self.gradient`; waits for both."""
        self._launch("gradient", batch, plan, number, 0)
        l1, l2, n = self.settings.l1, self.settings.l2, self.layout.weights
        weights = self.parameters[:n]
        if self.scaled:
            self.gradient /= self.kernels.scalar(Scalar.GAIN)
        if terms := self.settings.penalty_terms:  # as in the update, to the bit
            penalty = program(f"g = {' + '.join(['g', *terms])}", frozenset({"l1", "l2"}))
            scalars = {
                key: np.float64(value) for key, value in penalty.fold({"l1": l1, "l2": l2}).items()
            }
            self.ops.map(penalty, {"w": weights, "g": self.gradient[:n]}, scalars)
        for part in self.frozen:
            self.gradient[part.start : part.stop] = 0
        return (
            self._loss() + l1 * self.ops.sum_abs(weights) + 0.5 * l2 * self.ops.sum_squares(weights)
        )

    @_guarded
    def parts(self, batch: Batch, plan: Plan, progress: Progress) -> StepParts:
        """Record the parts of a step on this batch and point them at its rows."""
        self.follow()
        self._refresh()
        weighted, chunks = batch.weights is not None, cut(batch.size, plan.rows, 1)[0]
        shapes = sorted({(stop - start, i > 0) for i, (start, stop) in enumerate(chunks)})
        step = gradient = None
        if len(chunks) <= UNROLLED:
            step, gradient = (
                self._recorded(
                    (what, batch.size, weighted, 1),
                    functools.partial(self._whole, what, chunks, weighted),
                )
                for what in ("step", "gradient")
            )

        def one_of_each_shape() -> None:
            for n, more in shapes:
                self._chunk(0, n, weighted, more)

        self.ops.record(one_of_each_shape)  # settles what is still open
        self.ops.asked.clear()
        self.ops.record(one_of_each_shape)
        asked = set(self.ops.asked)
        self.ops.only_products = True
        try:
            products = self.ops.record(lambda: self._whole("step", chunks, weighted))
        finally:
            self.ops.only_products = False
        if step is not None:
            self.kernels.set_rates(self._rates(progress, 1))
            self._part(batch, 0, batch.size, progress.step + 1, 0, resume=False)
            self._done()
        known = self.ops.algorithms
        tried = [known.fused[product] for product in asked if product in known.fused]
        algorithms = {p: known.chosen[p] for p in asked if known.fused.get(p, True)}
        return StepParts(
            step,
            gradient,
            products,
            [*chunks],
            plan.rows,
            (sum(tried), len(tried)),
            algorithms,
            batch,
        )

    def _loss(self) -> float:
        """J as it stands on the device."""
        return float(self.device.to_host(self.kernels.scalars)[Scalar.LOSS])

    def weight(self, batch: Batch) -> float | None:
        """Σ w over the rows of a batch, their number without weights; None where the weights lie on
        the device.
        """
        if batch.weights is None:
            return float(batch.size)
        if self.device.holds(batch.weights):
            return None
        w = batch.weights if batch.rows is None else batch.weights.take(batch.rows)
        return float(w.astype(np.float64).sum())

    def _launch(self, what: str, batch: Batch, plan: Plan, number: int, answer: int) -> None:
        """Launch the steps of a batch, the first of this number, or its "gradient" alone."""
        self.follow()
        self._refresh()
        weighted = batch.weights is not None
        key = what, batch.size, weighted, batch.steps
        chunks = cut(batch.size, plan.rows, 1)[0]
        if len(chunks) > UNROLLED:
            self._launch_by_chunks(what, batch, chunks, number, answer)
            return
        whole = self._recorded(
            key, functools.partial(self._whole, what, chunks, weighted, batch.steps)
        )
        self._part(batch, 0, batch.size, number, answer, resume=False)
        whole.replay()
        self._done()

    def _launch_by_chunks(
        self, what: str, batch: Batch, chunks: list[tuple[int, int]], number: int, answer: int
    ) -> None:
        """Launch a step, or the gradient, of a batch of more chunks than one graph holds."""
        assert batch.steps == 1
        weighted = batch.weights is not None
        # all recordings are there before the first is replayed: choosing algorithms overwrites
        # arrays
        begin = self._recorded(
            ("begin", batch.size, weighted), lambda: self._begin(batch.size, weighted)
        )
        steps = {
            (n, more): self._recorded(
                ("chunk", n, weighted, more), functools.partial(self._chunk, 0, n, weighted, more)
            )
            for n, more in {(stop - start, i > 0) for i, (start, stop) in enumerate(chunks)}
        }
        end = self._recorded(("end",), self._end) if what == "step" else None
        for i, (start, stop) in enumerate(chunks):
            self._part(batch, start, stop, number, answer, resume=i > 0)
            if i == 0:
                begin.replay()
            steps[stop - start, i > 0].replay()
            if end is not None and i == len(chunks) - 1:
                end.replay()
            self._done()

    def follow(self) -> None:
        """The current stream's work comes behind that of the last step, on whatever stream that
        was.
        """
        self._stream = self.device.follow(self._stream)

    def _refresh(self) -> None:
        """Bring up to date what somebody may have changed: settings, and the parameters' copy."""
        settings, optimizer = self.settings, self.optimizer
        known = self._values
        if known is None or known[1] is not settings or known[0] != vars(optimizer):
            self._set_values(optimizer.constants())
        store = self.store
        if self.low is not None and (
            store.writer is not self or (store.exposed and not self.untouched)
        ):
            self.kernels.recast(self.parameters, self.low)
            store.writer = self

    def _varies(self) -> bool:
        """Return whether a user's own optimizer may have other scalars at each step."""
        return type(self.optimizer).scalars is not Optimizer.scalars

    def _set_values(self, values: Mapping[str, float]) -> None:
        """Let the slots from here on hold these scalars of the optimizer's and the penalties."""
        settings = self.settings
        self.kernels.set_values({**values, "l1": settings.l1, "l2": settings.l2})
        self._values = dict(vars(self.optimizer)), settings

    def _part(
        self, batch: Batch, start: int, stop: int, number: int, answer: int, resume: bool
    ) -> None:
        """Set the slot for rows start … stop of the batch; those of the host are staged."""
        sources: Sequence[Array | None] = (batch.X, batch.Y, batch.weights)
        rows, first = batch.rows, start
        if self.staging is not None:
            sources, rows, first = self.staging.put(sources, rows, start, stop), None, 0
        weight = 0.0 if resume else self.weight(batch) or 0.0
        further = batch.size if batch.steps > 1 else 0
        self.kernels.set_slot(sources, rows, first, start, further, number, answer, weight, resume)

    def _done(self) -> None:
        if self.staging is not None:
            self.staging.done()

    def _recorded(self, key: tuple[object, ...], run: Callable[[], None]) -> Recording:
        """Return the recording of this key; make it of what `run` launches where there is none."""
        if key not in self.recordings:
            self.recordings[key] = self.ops.record(run)
            if len(self.recordings) > SHAPES:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key]

    # -- what the graphs hold --

    def _whole(
        self, what: str, chunks: list[tuple[int, int]], weighted: bool, steps: int = 1
    ) -> None:
        for _ in range(steps):
            self._begin(chunks[-1][1], weighted)
            for i, (start, stop) in enumerate(chunks):
                self._chunk(start, stop - start, weighted, i > 0)
            if what == "step":
                self._end()

    def _begin(self, size: int, weighted: bool) -> None:
        if weighted and not self._inputs().host:
            self.kernels.sum_weights(self._inputs().w_dtype, size)

    def _inputs(self) -> Inputs:
        assert self.inputs is not None
        return self.inputs

    def _chunk(self, first: int, rows: int, weighted: bool, accumulate: bool) -> None:
        self._gather(first, rows)
        self._arrays().run("step", rows, weighted, accumulate)

    def _gather(self, first: int, rows: int) -> None:
        """X of a chunk; what reads the slot after it begins with the same row."""
        self.ops.first = first
        self.kernels.gather(self._inputs().x_dtype, self._arrays().rows("X", rows), first)

    def _arrays(self) -> Chunk:
        assert self.chunk is not None
        return self.chunk

    def _end(self) -> None:
        arrays = {"w": self.parameters, "g": self.gradient}
        arrays |= {name: self.state[f"state {name}"] for name in self.optimizer.states}
        settings = self.settings
        self.kernels.update(
            arrays, self.low, self.layout.weights, settings.clip_norm or 0.0, settings.tolerant
        )

    # -- evaluation and faults --

    @_guarded
    def evaluate(self, batch: Batch, plan: Plan, see: Callable[[Array, int, int], None]) -> float:
        """The mean loss of a batch, without penalties; `see(output, start, stop)` gets each chunk's
        output, S[L] if matched.
        """
        weighted = batch.weights is not None
        self.follow()
        self._refresh()
        begin = self._recorded(
            ("begin", batch.size, weighted), lambda: self._begin(batch.size, weighted)
        )
        for i, (start, stop) in enumerate(even(0, batch.size, plan.rows)):
            n = stop - start
            forward = self._recorded(
                ("forward", n, weighted), functools.partial(self._forward, n, weighted)
            )
            loss_of = self._recorded(
                ("loss", n, weighted),
                functools.partial(self._arrays().run, "loss", n, weighted, False),
            )
            self._part(batch, start, stop, 1, 0, resume=i > 0)
            if i == 0:
                begin.replay()
            forward.replay()
            see(self._to_host(self._arrays().output(n)).astype(self.dtype, copy=False), start, stop)
            loss_of.replay()
            self._done()
        loss = self._loss()
        status = self.kernels.read_control()
        if status["status"]:
            self.raise_fault(int(status["status"]), int(status["fault_step"]), self._progress)
        return loss

    def _forward(self, rows: int, weighted: bool) -> None:
        self._gather(0, rows)
        self._arrays().run("forward", rows, weighted, False)

    def read_results(
        self, results: StepResults, first: int, count: int, progress: Progress
    ) -> list[list[float]]:
        """Return rows of results, or raise the fault that one of them tells of."""
        with self.lock, self.device.active():
            if not results.has(first, count):
                self.follow()  # the current stream may be another one than the steps'
            rows = results.read(first, count)
            for _, status, step, _ in rows:
                if status:
                    self.raise_fault(int(status), int(step), progress)
            return rows

    @_guarded
    def raise_fault(self, status: int, step: int, progress: Progress | None) -> None:
        """Take back the fault and raise it: the parameters, and the count of steps, are as before
        the step it came in.
        """
        control = self.kernels.read_control()
        if (
            control["status"] and control["fault_step"] == step
        ):  # else it was taken back when it was read before
            control["status"] = control["fault_step"] = 0
            self.kernels.write_control(control)
            if progress is not None and step:
                progress.step = min(progress.step, step - 1)
        if status & Status.BAD_LABEL:
            raise ValueError(
                f"Y must hold classes 0 … {self.layout.sizes[-1] - 1}; a row of step {step} holds "
                "another"
            )
        if status & Status.BAD_WEIGHT:
            raise ValueError(
                f"sample_weight must be finite, not negative and not all zero; step {step} had "
                "others"
            )
        if status & Status.BAD_ROW:
            raise ValueError(f"rows must be row numbers of X; step {step} had others")
        rate = (
            self.optimizer.rate(dataclasses.replace(progress, step=max(0, step - 1)))
            if progress
            else math.nan
        )
        message = f"step {step}: the loss, the gradient or the update is not finite at learning rate {rate:g}"
        message += "; the parameters are as before it"
        raise NonFiniteLoss(message, step, rate)
