"""What a captured step does around its chunks: the slot, gathering rows, norm and finite test, the update.

    set_slot | recast, sum_weights, per chunk: gather … | gradient_norm, update_scalars, update

The slot is written by a launch of its own before the graph, so that a replay reads other rows, rates and addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlpcore.backends import cuda_source, launches
from mlpcore.backends.cuda_device import Launch
from mlpcore.backends.cuda_ops import CudaOps
from mlpcore.core.formulas import Program
from mlpcore.core.ops import Array, Buffer

ONE = Launch((1, 1), (1, 1))  # thread
SLOT = 224  # bytes of struct Slot in kernels/step.cuh
CONTROL = np.dtype(
    [
        ("updates", "i8"),
        ("fault_step", "i8"),
        ("good_steps", "i8"),
        ("loss_scale", "f8"),
        ("skipped", "i8"),
        ("status", "u4"),
        ("skip", "u4"),
    ]
)  # struct Control; fmt: skip
SETTINGS = 12  # scalars that the optimizer's formulas may read
NOT_FINITE, BAD_LABEL, BAD_WEIGHT, BAD_ROW = 1, 2, 4, 8  # bits of Control.status
SCALE, GAIN, LOSS, SQUARES, FIRST = 0, 1, 2, 3, 6  # entries of the scalars; 4 and 5 are l1 and l2
X, Y, WEIGHTS = 0, 1, 2  # fields of the slot
FIRST_LOSS_SCALE, GROWTH = 65536.0, 2000  # of float16: where the loss scale begins, steps until it doubles


class StepKernels:
    """The kernels around a step's chunks, on the arrays that `buffers` lists.

    Args:
        ops: the operations whose stream, device and scratch are used.
        program: the update's statements, scalars folded.
        settings: names of the scalars that the host sets, in the slot's order: l1, l2, then the optimizer's.
        flags: those that are 0 on biases.
        scaled: whether there is a loss scale.
    """

    def __init__(
        self, ops: CudaOps, program: Program, settings: Sequence[str], flags: Sequence[str], scaled: bool, wide: str
    ) -> None:
        assert tuple(settings[:2]) == ("l1", "l2")
        assert len(settings) <= SETTINGS, settings
        self.ops, self.program, self.settings, self.flags, self.scaled = ops, program, settings, flags, scaled
        self.type = cuda_source.TYPES[wide]
        self.wide = wide

    def buffers(self) -> list[Buffer]:
        """The arrays that these kernels share."""
        return [
            Buffer("scalars", (FIRST + 2 * len(self.program.folded),), self.wide, "1 / Σ w, loss scale, J, norm, update's"),
            Buffer("slot", (SLOT,), "uint8", "addresses, sizes and rates of the step"),
            Buffer("control", (CONTROL.itemsize,), "uint8", "update count, loss scale, faults"),
        ]

    def use(self, arrays: Mapping[str, Array]) -> None:
        """Take these arrays; the control block starts anew."""
        self.scalars, self.slot, self.control = arrays["scalars"], arrays["slot"], arrays["control"]
        self.scalars[...] = 0
        self.write_control(np.zeros((), CONTROL))

    def scalar(self, entry: int) -> Array:
        """One of the scalars, 0-d."""
        return self.scalars[entry : entry + 1].reshape(())

    def read_control(self) -> np.ndarray:
        """The control block, 0-d; waits for the device."""
        control: np.ndarray = self.ops.device.to_host(self.control).view(CONTROL)[0].copy()
        return control

    def write_control(self, control: np.ndarray) -> None:
        """Set the control block."""
        if not self.scaled or not control["loss_scale"]:
            control["loss_scale"] = FIRST_LOSS_SCALE if self.scaled else 1.0
        self.control[...] = self.ops.device.to_device(np.frombuffer(control.tobytes(), np.uint8))

    # -- before the graph --

    def set_slot(
        self, sources: Sequence[Array | None], rows: Array | None, first: int, batch_row: int, step: int, recast: bool,
        answer: Array | None, weight: float, resume: bool, values: Mapping[str, float],
    ) -> None:  # fmt: skip
        """Tell the next launches what to read.

        Sources: X, Y, row weights or None, whose row `first` is `batch_row` of the batch; `weight` is Σ w, 0 if the device
        is to find it.
        """
        strides: list[int] = []
        x, y, w = sources
        assert x is not None
        assert y is not None
        for source in (x, y):
            item = source.dtype.itemsize
            strides += [source.strides[0] // item, source.strides[1] // item if source.ndim > 1 else 1]
        strides.append(1 if w is None else w.strides[0] // w.dtype.itemsize)
        settings = [float(values.get(name, 0.0)) for name in self.settings] + [0.0] * (SETTINGS - len(self.settings))
        self._launch(
            f"set_slot<{self.type}>", ONE, self.slot, self.control, self.scalars, *sources, *strides, rows, first, batch_row,
            len(x), step, int(recast), answer, float(weight), np.int32(resume), *settings,
        )  # fmt: skip

    # -- in the graph --

    def gather(self, field: int, source: str, out: Array, first: int) -> None:
        """Out = rows first … first + len(out) of the batch, from a source of this dtype; row weights times 1 / Σ w."""
        m, n = len(out), out.size // max(1, len(out))
        layer = {"uint16": "bfloat16"}.get(out.dtype.name, out.dtype.name)
        width = max(np.dtype(source).itemsize, out.dtype.itemsize)
        tiled = launches.tiles(m, n, launches.vector_width(n, width), self.ops.device.multiprocessors)
        name = f"gather<{cuda_source.TYPES[np.dtype(source).name]}, {cuda_source.TYPES[layer]}, {tiled.vector}>"
        scale = self.scalar(SCALE) if field == WEIGHTS else None
        self.ops.launch(
            cuda_source.text("gather.cu"), name, tiled.launch, self.slot, np.int32(field), out, scale, self.control, first, m, n
        )

    def sum_weights(self, source: str, rows: int) -> None:
        """1 / Σ w of the batch's rows, into the scalars."""
        launch = launches.flat(rows, self.ops.device.multiprocessors)
        partials, counters = self.ops.partials(launch.grid[0], 1, self.wide)
        name = f"sum_weights<{cuda_source.TYPES[np.dtype(source).name]}, {self.type}>"
        self.ops.launch(
            cuda_source.text("gather.cu"), name, launch, self.slot, self.scalar(SCALE), partials, counters, self.control, rows
        )

    def recast(self, parameters: Array, low: Array, asked: bool = True) -> None:
        """The low-precision copy of the parameters made anew, if the slot asks for it, or without asking."""
        launch = launches.flat(parameters.size, self.ops.device.multiprocessors)
        self._launch(
            f"recast<{self.type}, {self._low(low)}>", launch, self.slot if asked else None, parameters, low, parameters.size
        )

    def update(
        self, arrays: Mapping[str, Array], low: Array | None, weights: int, clip_norm: float, tolerant: bool
    ) -> None:  # fmt: skip
        """Norm and finite test of the penalised gradient, then the optimizer's pass, unless a fault forbids it."""
        w, g = arrays["w"], arrays["g"]
        launch = launches.flat(w.size, self.ops.device.multiprocessors)
        partials, counters = self.ops.partials(2 * launch.grid[0], 2, self.wide)
        self._launch(f"gradient_norm<{self.type}>", launch, w, g, self.scalars, partials, counters, weights, w.size)
        formula = cuda_source.update(self.program, list(arrays), self.settings, self.flags, "g")
        self.ops.launch(
            cuda_source.text("updates.cu", formula), f"update_scalars<{self.type}, Formula>", ONE,
            self.slot, self.control, self.scalars, float(clip_norm), np.int32(self.scaled), GROWTH, np.int32(tolerant),
        )  # fmt: skip
        k = self.scalars[FIRST:]
        self.ops.update(self.program, arrays, k, low, weights, self.control, tuple(self.settings), tuple(self.flags), "g")

    def randomize(self, array: Array, seed: int) -> None:
        """Numbers in [-1, 1), so that what is timed runs on data."""
        launch = launches.flat(array.size, self.ops.device.multiprocessors)
        self._launch(f"randomize<{self._low(array)}>", launch, array, array.size, np.uint32(seed))

    def _launch(self, name: str, launch: Launch, *arguments: object) -> None:
        self.ops.launch(cuda_source.text("updates.cu"), name, launch, *arguments)

    @staticmethod
    def _low(array: Array) -> str:
        return cuda_source.TYPES[{"uint16": "bfloat16"}.get(array.dtype.name, array.dtype.name)]
