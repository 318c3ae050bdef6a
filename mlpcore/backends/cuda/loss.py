"""The loss of a chunk's rows and its gradient, in one kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mlpcore.backends import formula_text
from mlpcore.backends.cuda import grids, source
from mlpcore.backends.cuda.elementwise import ElementwiseOps
from mlpcore.backends.cuda.gemm import STORAGE
from mlpcore.backends.cuda.launcher import c_type
from mlpcore.core.losses import Loss, Objective
from mlpcore.core.ops import Array, accumulator


class SlotRows(NamedTuple):
    """The batch's own targets or row weights, read through the slot from `CudaOps.first` on.

    Attributes:
        dtype: dtype of the caller's array.
        classes: for targets: True if they are class indices.
        scale: for weights: 0-d, the factor of each.
    """

    dtype: str
    classes: bool = False
    scale: Array = None


class _Inputs(NamedTuple):
    """The arguments that tell a kernel where to find targets and weights.

    Attributes:
        given: slot, control block, targets, weights, and 1 if rows have weights.
        types: C++ types of targets and weights.
        labels: True if targets are class indices.
        scale: the factor of all rows, or of their weights.
    """

    given: tuple[Any, ...]
    types: str
    labels: bool
    scale: Array | None


class LossOps(ElementwiseOps):
    """The part of the operations that computes losses."""

    def loss(
        self,
        x: Array,
        Y: Array | SlotRows,
        k: Array | SlotRows,
        objective: Objective,
        D: Array,
        db: Array | None,
        J: Array,
        accumulate: bool,
    ) -> None:
        """Set J += Σ k ℓ(x, Y) and D = gain k ∂ℓ/∂x; with `db` also its sum over rows.

        x is S[L] if matched, else Z[L]; D may be x.
        """
        wide = accumulator(STORAGE[x.dtype.name])
        inputs = self._inputs(Y, k, wide)
        columns = self._column_weights(objective.loss, wide)
        if objective.loss.rowwise:
            self._cross_entropy(x, inputs, objective.loss, D, db, J, accumulate, columns)
            return
        (m, n), tiled = x.shape, self._tiles(x, x, D)
        across, down = tiled.launch.grid
        partials, counters = self.partials(tiled.partials + down * n, across + 1, wide)
        code = source.text("losses.cu", formula_text.loss(objective))
        types = f"{c_type(x)}, {inputs.types}, Formula, {tiled.vector}, {grids.THREADS}"
        self.launch(
            code, f"elementwise_loss<{types}>", tiled.launch, x, *inputs.given, inputs.scale,
            self.gain, D, db, J, partials, counters, self.first, m, n, np.int32(accumulate),
            columns,
        )  # fmt: skip

    def _cross_entropy(
        self,
        x: Array,
        inputs: _Inputs,
        loss: Loss,
        D: Array,
        db: Array | None,
        J: Array,
        accumulate: bool,
        columns: Array | None,
    ) -> None:
        """Launch softmax with cross-entropy; sum D separately if the sums do not fit in."""
        (m, n), wide = x.shape, np.dtype(accumulator(STORAGE[x.dtype.name]))
        launch, fused = grids.cross_entropy(m, n, wide.itemsize, self.device.multiprocessors)
        sums = db if fused else None
        partials, counters = self.partials(launch.grid[0] * (1 + n), 2, wide)
        launch = launch._replace(shared=0 if sums is None else launch.shared)
        most, smoothing = np.inf if loss.most is None else loss.most, loss.label_smoothing
        limits = map(wide.type, (most, 1 - smoothing, smoothing / n))
        mixes = ", true" if loss.mixes(inputs.labels) else ""
        name = f"softmax_cross_entropy<{c_type(x)}, {inputs.types}{mixes}>"
        self.launch(
            source.text("losses.cu"), name, launch, x, *inputs.given, np.int32(inputs.labels),
            inputs.scale, self.gain, D, sums, J, partials, counters, self.first, m, n,
            np.int32(accumulate), *limits, columns,
        )  # fmt: skip
        if db is not None and not fused:
            self._column_sums(D, db, accumulate)

    def _inputs(self, Y: Array | SlotRows, k: Array | SlotRows, wide: str) -> _Inputs:
        """Return the arguments for targets and weights, given as arrays or by the slot."""
        if isinstance(Y, SlotRows):
            slot, targets, stored, labels = self.step, None, Y.dtype, Y.classes
        else:
            slot, targets, stored, labels = None, Y, Y.dtype.name, Y.ndim == 1
        weights, scale, weighed, each = None, k, wide, False
        if isinstance(k, SlotRows):
            scale, weighed, each = k.scale, k.dtype, True
        elif k.ndim:
            weights, scale, each = k, None, True
        given = slot, self.control, targets, weights, np.int32(each)
        return _Inputs(given, f"{source.TYPES[stored]}, {source.TYPES[weighed]}", labels, scale)

    def _column_weights(self, loss: Loss, dtype: str) -> Array | None:
        """Return the loss's number for each column, in the plan's array if there is one."""
        if not loss.columns:
            return None
        planned = self._scratch.get("column weights")
        return self.xp.asarray(loss.columns, dtype) if planned is None else planned
