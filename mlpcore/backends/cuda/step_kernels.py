"""The kernels around the chunks of a captured step: slot, rows, norm and finite test, update.

    set_slot | sum_weights, per chunk: gather … | prepare_update, update

The slot is written by a separate launch before the graph, so that a replay can read other rows,
rates and addresses.
"""

from __future__ import annotations

import array
import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlpcore.backends import formula_text
from mlpcore.backends.cuda import grids, source
from mlpcore.backends.cuda.device import Launch
from mlpcore.backends.cuda.launcher import c_type
from mlpcore.backends.cuda.ops import CudaOps
from mlpcore.backends.cuda.slot import (
    APPLIED,
    CONTROL,
    SEGMENT,
    SETTINGS,
    SLOT,
    WORD,
    Scalar,
    SlotRecord,
)
from mlpcore.core.ops import Array, Buffer
from mlpcore.core.optimizers import Segment
from mlpcore.core.program import Program

SET_SLOT = Launch((1, 1), (128, 1))  # at least one thread per word
FIRST_LOSS_SCALE = 65536.0  # initial loss scale for float16
GROWTH = 2000  # steps until the loss scale for float16 doubles

# offsets of the slot's fields, in words
_SOURCE, _ROW_STRIDE, _COLUMN_STRIDE = WORD["source"], WORD["row_stride"], WORD["column_stride"]
_ROWS, _SOURCE_ROWS, _FIRST = WORD["rows"], WORD["source_rows"], WORD["first"]
_BATCH_ROW, _BATCH_ROWS, _STEP = WORD["batch_row"], WORD["batch_rows"], WORD["step"]
_ANSWER, _RESUME, _WEIGHT = WORD["answer"], WORD["resume"], WORD["weight"]
_SETTINGS, _RATES = WORD["settings"], WORD["rates"]

References = Sequence[Callable[[], Array | None]]


def _nothing() -> None:
    """Stand for a reference to a missing array."""


def _same(references: References, sources: Sequence[Array | None]) -> bool:
    """Return True if these are the referenced arrays; a deleted array does not equal None."""
    x, y, w = references
    weights = sources[2]
    same = w is _nothing if weights is None else w() is weights
    return same and x() is sources[0] and y() is sources[1]


def _table(segments: Sequence[Segment]) -> np.ndarray:
    """Return the segments as the bytes of their structs."""
    decays = [-1.0 if x.decay is None else x.decay for x in segments]
    rows = [
        (x.stop, x.weights, x.layer.frozen, x.layer.rate, decay, x.missed)
        for x, decay in zip(segments, decays, strict=True)
    ]
    return np.array(rows, SEGMENT).view(np.uint8)


class StepKernels:
    """The kernels around a step's chunks, on the arrays listed by `buffers`.

    Args:
        ops: the operations whose stream, device and scratch are used.
        program: the update's statements, with scalars folded.
        bounds: the bounds of its effect, in the form that `formula_text.update` takes.
        settings: names of the scalars that the host sets, in the slot's order: rate, l1, l2, then
            the optimizer's.
        flags: those `settings` that are 0 on biases.
        scaled: True if there is a loss scale.
        wide: dtype of parameters, gradient and sums.
        size: length of the flat vectors.
        segments: parts of the flat vectors, if layers have their own settings; else none.
    """

    def __init__(
        self,
        ops: CudaOps,
        program: Program,
        bounds: tuple[str, str],
        settings: Sequence[str],
        flags: Sequence[str],
        scaled: bool,
        wide: str,
        size: int,
        segments: Sequence[Segment] = (),
    ) -> None:
        assert tuple(settings[:3]) == ("rate", "l1", "l2")
        assert len(settings) <= SETTINGS, settings
        self.ops, self.program, self.bounds = ops, program, bounds
        self.settings, self.flags, self.scaled = settings, flags, scaled
        self.wide, self.type, self.segments = wide, source.TYPES[wide], segments
        self._grid = grids.flat(size, ops.device.multiprocessors)

    def buffers(self) -> list[Buffer]:
        """Return the arrays that these kernels share."""
        numbers = Scalar.FIRST_OF_UPDATE + max(2, len(self.segments)) * len(self.program.folded)
        table, sums = (len(self.segments) * SEGMENT.itemsize,), (2 * self._grid.grid[0],)
        own = [Buffer("segments", table, "uint8", "settings of layers")] if self.segments else []
        return [
            *own,
            Buffer("scalars", (numbers,), self.wide, "1 / Σ w, loss scale, J, penalties, update's"),
            Buffer("slot", (SLOT.itemsize,), "uint8", "addresses, sizes and rates of the step"),
            Buffer("control", (CONTROL.itemsize,), "uint8", "update count, loss scale, faults"),
            Buffer("sums", sums, self.wide, "of squares and penalties, two per block"),
            Buffer("finished", (1,), "uint32", "count of blocks that have finished their sums"),
        ]

    def use(self, arrays: Mapping[str, Array]) -> None:
        """Use these arrays; the control block is reset."""
        self.scalars, self.slot, self.control = arrays["scalars"], arrays["slot"], arrays["control"]
        self._sums, self._finished = arrays["sums"], arrays["finished"]
        self.scalars[...] = 0
        self._finished[...] = 0
        self._segments = arrays.get("segments")
        if self._segments is not None:
            self._segments[...] = self.ops.device.to_device(_table(self.segments))
        self.write_control(np.zeros((), CONTROL))
        self.record = SlotRecord()
        self._pointed: References = [_nothing] * 3  # arrays that the record's sources point into
        words = array.array("q", bytes(8 * _ROWS))
        self._before: tuple[References, array.array[int], int] = self._pointed, words, 0
        kernel = self.ops.device.kernel(source.text("updates.cu"), f"set_slot<{self.type}>")
        arguments = self.record.array, self.slot, self.control, self.scalars
        self._set_slot = self.ops.device.bind(kernel, SET_SLOT, arguments)

    def scalar(self, entry: int) -> Array:
        """Return one of the scalars, 0-d."""
        return self.scalars[entry : entry + 1].reshape(())

    def read_control(self) -> np.ndarray:
        """Return the control block, 0-d; waits for the device."""
        control: np.ndarray = self.ops.device.to_host(self.control).view(CONTROL)[0].copy()
        return control

    def write_control(self, control: np.ndarray) -> None:
        """Set the control block."""
        if not self.scaled or not control["loss_scale"]:
            control["loss_scale"] = FIRST_LOSS_SCALE if self.scaled else 1.0
        self.control[...] = self.ops.device.to_device(np.frombuffer(control.tobytes(), np.uint8))

    # -- before the graph --

    def set_values(self, values: Mapping[str, float]) -> None:
        """Set the scalars of the optimizer's formulas, except the rate, for all later slots."""
        for i, name in enumerate(self.settings[1:], _SETTINGS + 1):
            self.record.numbers[i] = values.get(name, 0.0)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rates of the next slot's steps, in order."""
        numbers = self.record.numbers
        numbers[_SETTINGS] = rates[0]
        for i, rate in enumerate(rates, _RATES):
            numbers[i] = rate

    def set_slot(
        self,
        sources: Sequence[Array | None],
        rows: Array | None,
        first: int,
        batch_row: int,
        batch_rows: int,
        step: int,
        answer: int,
        weight: float,
        resume: bool,
    ) -> None:
        """Tell the next launches which rows to read, and where to write the results.

        Args:
            sources: X, Y, and row weights or None.
            rows: row numbers of X, or None for all in order.
            first: the entry of `rows`, or the row of X, that is row `batch_row` of the batch.
            batch_row: number of that row in the batch.
            batch_rows: offset of the next step in the same launch, 0 if the launch holds only one
                step.
            step: number of the update, from 1.
            answer: address at which the results are stored, or 0.
            weight: Σ w of the batch, 0 if the device computes it.
            resume: True to continue a step that has begun.
        """
        words = self.record.words
        if not _same(self._pointed, sources):
            self._point(sources)
        words[_ROWS] = 0 if rows is None else self.ops.device.address(rows)
        words[_FIRST], words[_BATCH_ROW], words[_BATCH_ROWS] = first, batch_row, batch_rows
        words[_STEP], words[_ANSWER], words[_RESUME] = step, answer, resume
        self.record.numbers[_WEIGHT] = weight
        self._set_slot()

    def set_applied(self, step: int, answer: int) -> None:
        """Tell the next launch to update with the caller's gradient, without rows or penalties.

        The penalties in the slot are 0 until `set_values` sets them again.

        Args:
            step: number of the update, from 1.
            answer: address at which the results are stored.
        """
        words, numbers = self.record.words, self.record.numbers
        # the earlier rows may have been freed
        words[:_SOURCE_ROWS] = memoryview(bytes(8 * _SOURCE_ROWS)).cast("q")
        self._pointed = [_nothing] * 3
        words[_BATCH_ROWS], words[_STEP], words[_ANSWER], words[_RESUME] = 0, step, answer, APPLIED
        numbers[_WEIGHT] = 1.0
        numbers[_SETTINGS + 1] = numbers[_SETTINGS + 2] = 0.0
        self._set_slot()

    def _point(self, sources: Sequence[Array | None]) -> None:
        """Make the slot point to X, Y and row weights.

        The arrays before the current ones are remembered too, since staged rows alternate.
        """
        words = self.record.words
        last = self._pointed, array.array("q", words[:_ROWS]), words[_SOURCE_ROWS]
        before, self._before = self._before, last
        if _same(before[0], sources):
            self._pointed, words[:_ROWS], words[_SOURCE_ROWS] = before
            return
        for i, rows in enumerate(sources):
            if rows is None:
                words[_SOURCE + i] = 0
                continue
            item, strides = rows.dtype.itemsize, rows.strides
            words[_SOURCE + i] = self.ops.device.address(rows)
            words[_ROW_STRIDE + i] = strides[0] // item
            words[_COLUMN_STRIDE + i] = strides[1] // item if len(strides) > 1 else 1
        assert sources[0] is not None
        words[_SOURCE_ROWS] = len(sources[0])
        self._pointed = [_nothing if rows is None else weakref.ref(rows) for rows in sources]

    # -- in the graph --

    def gather(self, dtype: str, out: Array, first: int) -> None:
        """Set out to rows first … first + len(out) of the batch's X, which has the given dtype."""
        (m, n), device = out.shape, self.ops.device
        width = max(np.dtype(dtype).itemsize, out.dtype.itemsize)
        tiled = grids.tiles(m, n, grids.vector_width(n, width), device.multiprocessors)
        name = f"gather<{source.TYPES[np.dtype(dtype).name]}, {c_type(out)}, {tiled.vector}>"
        self.ops.launch(
            source.text("gather.cu"), name, tiled.launch, self.slot, out, self.control, first, m, n
        )

    def sum_weights(self, dtype: str, rows: int) -> None:
        """Set the scale to 1 / Σ w of the batch's rows, whose weights have this dtype."""
        launch = grids.flat(rows, self.ops.device.multiprocessors)
        partials, counters = self.ops.partials(launch.grid[0], 1, self.wide)
        self.ops.launch(
            source.text("gather.cu"),
            f"sum_weights<{source.TYPES[np.dtype(dtype).name]}, {self.type}>",
            launch,
            self.slot,
            self.scalar(Scalar.SCALE),
            partials,
            counters,
            self.control,
            rows,
        )

    def recast(self, parameters: Array, low: Array) -> None:
        """Refresh the low-precision copy of the parameters."""
        launch = grids.flat(parameters.size, self.ops.device.multiprocessors)
        name = f"recast<{self.type}, {c_type(low)}>"
        self._launch(name, launch, parameters, low, parameters.size)

    def update(
        self,
        arrays: Mapping[str, Array],
        low: Array | None,
        weights: int,
        clip_norm: float,
        tolerant: bool,
    ) -> None:
        """Test norm and finiteness of the penalised gradient, and update unless there is a fault.

        Args:
            arrays: parameters, gradient and state vectors, by name.
            low: the low-precision copy of the parameters, or None.
            weights: number of leading entries that are weights.
            clip_norm: the largest allowed norm of the gradient.
            tolerant: True to skip an update that is not finite.
        """
        w, g = arrays["w"], arrays["g"]
        first, second = [*list(arrays.values())[2:], None, None][:2]
        names, flags = tuple(self.settings), tuple(self.flags)
        formula = formula_text.update(self.program, list(arrays), names, flags, "g", self.bounds)
        self.ops.launch(
            source.text("updates.cu", formula),
            f"prepare_update<{self.type}, Formula>",
            self._grid,
            self.slot,
            self.control,
            self.scalars,
            w,
            g,
            first,
            second,
            self._sums,
            self._finished,
            float(clip_norm),
            np.int32(self.scaled),
            GROWTH,
            np.int32(tolerant),
            self._segments,
            np.int32(len(self.segments)),
            weights,
            w.size,
        )
        k = self.scalars[Scalar.FIRST_OF_UPDATE :]
        self.ops.update(
            self.program, arrays, k, low, weights, self.control, names, flags, "g", self._segments
        )

    def randomize(self, array: Array, seed: int) -> None:
        """Fill the array with random numbers in [-1, 1), so that timing runs on real data."""
        launch = grids.flat(array.size, self.ops.device.multiprocessors)
        self._launch(f"randomize<{c_type(array)}>", launch, array, array.size, np.uint32(seed))

    def _launch(self, name: str, launch: Launch, *arguments: object) -> None:
        self.ops.launch(source.text("updates.cu"), name, launch, *arguments)
