"""The arrays and recordings of a captured step: a chunk, and the kernels around it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlpcore.backends.cuda.device import CudaDevice
from mlpcore.backends.cuda.loss import SlotRows
from mlpcore.backends.cuda.ops import CudaOps
from mlpcore.backends.cuda.slot import Scalar
from mlpcore.backends.cuda.step_kernels import StepKernels
from mlpcore.core.ops import Array, Buffer, Recording
from mlpcore.core.optimizers import segments
from mlpcore.core.program import Program, program
from mlpcore.data.batches import Batch, Inputs
from mlpcore.engine import plan as planning
from mlpcore.engine.chunks import SHAPES, Chunk
from mlpcore.engine.plan import Plan
from mlpcore.engine.problem import Problem
from mlpcore.engine.staging import Staging, staging_buffers
from mlpcore.engine.state import State
from mlpcore.engine.workspace import Parts

UNROLLED = 64  # maximum number of chunks in one graph
CHUNK_BYTES = 32 << 20  # bytes of a chunk's arrays: most of an H200's L2
NARROW = 128  # width of layers up to which the kernels are so short that their number matters
NARROW_BYTES = 256 << 20  # bytes of a chunk's arrays in that case
NARROWEST, WIDEST = 8192, 1 << 18  # range of the rows of an automatic chunk


class SlotChunk(Chunk):
    """A chunk whose loss reads targets and row weights from the caller's arrays.

    Args: the inputs, then those of `Chunk`.
    """

    def __init__(self, inputs: Inputs, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._targets = SlotRows(np.dtype(inputs.y_dtype).name, inputs.classes)
        self._weights = (
            SlotRows(np.dtype(inputs.w_dtype).name, scale=self.scale) if inputs.w_dtype else None
        )

    def targets(self, rows: int, weighted: bool) -> tuple[Any, Any]:
        """Return Y and the row weights over the batch's weight, in the form for `ops.loss`."""
        return self._targets, self._weights if weighted else self.scale


class Capture:
    """The arrays of a captured step, and the recordings that work on them.

    Args:
        problem, state: as in a step.
        device: the device of the parameters.
        precision: as in `GraphStep`.

    Attributes:
        layers: dtype of Z, S, G and D.
        scaled: True if there is a loss scale.
        low: the parameters in dtype `layers`, or None if that is their own dtype.
        kernels: the kernels around the chunks.
        penalties: which of l1 and l2 the update was compiled with.
        chunk, staging: those of the allocated plan; `inputs` are the inputs it was made for.
        recordings: by operation and the shapes it works on.
    """

    kernels: StepKernels
    chunk: Chunk
    inputs: Inputs

    def __init__(
        self, problem: Problem, state: State, device: CudaDevice, precision: str | None
    ) -> None:
        self.problem, self.state, self.device = problem, state, device
        self.ops: CudaOps = problem.new_ops()
        self.layers = precision if precision in ("float16", "bfloat16") else problem.dtype
        self.scaled = precision == "float16"
        self.low: Array | None = None
        self.staging: Staging | None = None
        self.recordings: OrderedDict[tuple[object, ...], Recording] = OrderedDict()
        self.penalties = self.penalised()

    # -- the plan --

    def penalised(self) -> tuple[bool, bool]:
        """Return which of l1 and l2 are not 0."""
        return self.problem.settings.l1 != 0, self.problem.settings.l2 != 0

    def _program(self) -> Program:
        """Return the statements of unscaling, penalties, clipping and the optimizer, in order."""
        settings, optimizer = self.problem.settings, self.problem.optimizer
        terms = ["unscale * g" if self.scaled else "g", *settings.penalty_terms]
        statements = [f"g = {' + '.join(terms)}"] if len(terms) > 1 or self.scaled else []
        statements += ["g = clip * g"] if settings.clip_norm is not None else []
        scalars = {"clip", "unscale", "l1", "l2", "rate", "t", *optimizer.constants()}
        return program("; ".join([*statements, optimizer.statements]), frozenset(scalars))

    def _new_kernels(self) -> StepKernels:
        optimizer, layout = self.problem.optimizer, self.problem.layout
        layers, missed = optimizer.layers, self.state.missed
        return StepKernels(
            self.ops,
            self._program(),
            optimizer.bounds_of_row,
            ["rate", "l1", "l2", *sorted(optimizer.constants())],
            ("decay", "l1", "l2"),
            self.scaled,
            self.problem.dtype,
            layout.size,
            segments(layout, layers, missed) if layers or missed else (),
        )

    def state_buffers(self) -> list[Buffer]:
        """List the gradient, the optimizer state, low parameters and the kernels' arrays."""
        size, what = self.problem.layout.size, "read by the products"
        low = [Buffer("low-precision parameters", (size,), self.layers, what)]
        return [
            *self.state.buffers(),
            *(low if self.layers != self.problem.dtype else []),
            *self._new_kernels().buffers(),
        ]

    def unrolls(self, rows: int, batch_rows: int) -> bool:
        """Return True if one graph holds all chunks of a batch."""
        return -(-batch_rows // rows) <= UNROLLED

    def parts(self, rows: int, workers: int, batch_rows: int, inputs: Inputs) -> Parts:
        """List the arrays of a chunk of `rows` rows, and those that stage rows from the host."""
        problem = self.problem
        parts: Parts = {
            "workspace": planning.chunk_buffers(
                self.ops,
                problem.layout,
                self.layers,
                problem.activations,
                problem.objective,
                inputs,
                rows,
                rows < batch_rows,
            )
        }
        if inputs.host:
            staged = batch_rows if self.unrolls(rows, batch_rows) else rows
            parts["staging"] = staging_buffers(problem.layout, inputs, staged)
        return parts

    def choose(self, batch_rows: int, inputs: Inputs) -> tuple[int, int]:
        """Return the rows of a chunk, and one worker, if memory is unlimited."""
        rows = self.problem.settings.most_rows
        if rows is None:
            fixed, much = (
                planning.part_bytes(self.parts(n, 1, n, inputs)["workspace"]) for n in (1, 1025)
            )
            narrow = max(self.problem.layout.sizes[1:]) <= NARROW
            most = NARROW_BYTES if narrow else CHUNK_BYTES
            rows = max(NARROWEST, min(WIDEST, most * 1024 // max(1, much - fixed)))
        return min(rows, batch_rows), 1

    # -- arrays --

    def bind(self) -> None:
        """Allocate the state as zeros, and make the kernels for the optimizer's current rule."""
        buffers = self.state_buffers()
        self.state.vectors.clear()
        arrays = planning.allocate(self.ops, buffers)
        self.kernels = self._new_kernels()
        self.kernels.use({x.name: arrays.pop(x.name) for x in self.kernels.buffers()})
        self.low = arrays.pop("low-precision parameters", None)
        self.ops.low = None if self.low is None else (self.problem.parameters, self.low)
        self.state.begin(arrays)
        self.penalties = self.penalised()

    def allocate(self, plan: Plan, inputs: Inputs) -> None:
        """Allocate the plan's arrays, and make their chunk."""
        problem, kernels = self.problem, self.kernels
        buffers = planning.allocate(self.ops, plan.parts["workspace"])
        for i, (name, array) in enumerate(buffers.items()):
            numbers = array.dtype.kind in "fu" and array.dtype.itemsize > 1
            if name[0] in "XSZG" and numbers and array.ndim:
                kernels.randomize(array, i)  # data for choosing an algorithm
        W = problem.store.W if self.low is None else problem.layout.views(self.low)[0]
        gradient = self.state.gradient
        self.chunk = SlotChunk(
            inputs,
            self.ops,
            W,
            problem.store.b,
            problem.activations_on(gradient),
            problem.objective,
            *problem.layout.views(gradient),
            buffers,
            kernels.scalar(Scalar.SCALE),
            kernels.scalar(Scalar.LOSS),
            problem.layout.repeats,
        )
        self.inputs = inputs
        self.ops.control, self.ops.step = kernels.control, kernels.slot
        self.ops.gain = kernels.scalar(Scalar.GAIN) if self.scaled else None
        if inputs.host:
            self.staging = Staging(self.device, planning.allocate(self.ops, plan.parts["staging"]))

    def drop(self) -> None:
        """Free the arrays and the recordings that use them."""
        self.staging = None
        vars(self).pop("chunk", None)  # the next plan makes a new one
        self.recordings.clear()
        self.ops.use({})  # its scratch was part of those arrays

    def to_host(self, array: Array) -> np.ndarray:
        """Return an array of the device as a NumPy array, in a dtype that NumPy can compute in."""
        host = self.device.to_host(array)
        return (host.astype(np.uint32) << 16).view(np.float32) if host.dtype == np.uint16 else host

    def loss(self) -> float:
        """Return the current J on the device; wait for it."""
        return float(self.device.to_host(self.kernels.scalars)[Scalar.LOSS])

    # -- recordings --

    def recorded(self, key: tuple[object, ...], run: Callable[[], None]) -> Recording:
        """Return the recording of this key; if there is none, record the launches of `run`."""
        if key not in self.recordings:
            self.recordings[key] = self.ops.record(run)
            if len(self.recordings) > SHAPES:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key]

    def run_whole(
        self, what: str, chunks: Sequence[tuple[int, int]], weighted: bool, steps: int = 1
    ) -> None:
        """Run this many steps, or "gradient"s, each on all of these chunks."""
        for _ in range(steps):
            self.begin(chunks[-1][1], weighted)
            for i, (start, stop) in enumerate(chunks):
                self.run_chunk(start, stop - start, weighted, i > 0)
            if what == "step":
                self.end()

    def begin(self, size: int, weighted: bool) -> None:
        """Add up the weights of a batch of this size, if they are on the device."""
        if weighted and not self.inputs.host:
            self.kernels.sum_weights(self.inputs.w_dtype, size)

    def run_chunk(self, first: int, rows: int, weighted: bool, accumulate: bool) -> None:
        """Run a chunk forward and backward."""
        self._gather(first, rows)
        self.chunk.run("step", rows, weighted, accumulate)

    def run_forward(self, rows: int, weighted: bool) -> None:
        """Run a chunk forward."""
        self._gather(0, rows)
        self.chunk.run("forward", rows, weighted, False)

    def run_loss(self, rows: int, weighted: bool) -> None:
        """Add up the loss of the chunk whose forward pass ran last."""
        self.chunk.run("loss", rows, weighted, False)

    def _gather(self, first: int, rows: int) -> None:
        """Gather X of a chunk; later kernels read the slot from the same row on."""
        self.ops.first = first
        self.kernels.gather(self.inputs.x_dtype, self.chunk.rows("X", rows), first)

    def end(self) -> None:
        """Update the parameters, their copy and the state."""
        problem, settings = self.problem, self.problem.settings
        arrays = {"w": problem.parameters, "g": self.state.gradient, **self.state.own}
        clip_norm = settings.clip_norm or 0.0
        weights = problem.layout.weights
        self.kernels.update(arrays, self.low, weights, clip_norm, settings.tolerant)

    # -- a launch --

    def set_slot(
        self,
        batch: Batch,
        start: int,
        stop: int,
        number: int,
        answer: int,
        weight: float,
        resume: bool = False,
    ) -> None:
        """Set the slot for rows start … stop of a batch; rows on the host are staged."""
        sources: Sequence[Array | None] = (batch.X, batch.Y, batch.weights)
        rows, first = batch.rows, start
        if self.staging is not None:
            sources, rows, first = self.staging.put(sources, rows, start, stop), None, 0
        further = batch.size if batch.steps > 1 else 0
        self.kernels.set_slot(sources, rows, first, start, further, number, answer, weight, resume)

    def done(self) -> None:
        """Note that all work on the slot's rows has been submitted."""
        if self.staging is not None:
            self.staging.done()
