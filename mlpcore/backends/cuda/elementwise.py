"""Kernels that pass once over a matrix or over flat vectors: activations, sums, updates."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpcore.backends import formula_text
from mlpcore.backends.cuda import grids, source
from mlpcore.backends.cuda.gemm import alignment
from mlpcore.backends.cuda.launcher import Launcher, c_type
from mlpcore.core.activation import Activation
from mlpcore.core.activations import resolve
from mlpcore.core.differentials import softmax_curvature
from mlpcore.core.dropout import Dropped
from mlpcore.core.ops import Array
from mlpcore.core.program import Program, program

IDENTITY = resolve("identity")
OF_THE_KERNEL = {"t", "clip", "unscale"}  # scalars that `fold` declares itself


class ElementwiseOps(Launcher):
    """The part of the operations that computes formulas entry by entry."""

    def bias_activation(self, S: Array, b: Array | None, activation: Activation, Z: Array) -> None:
        """Set S += b and Z = σ(S), row by row, with dropout.

        Z may be S; S is kept only if the slope reads it.
        """
        m, n = S.shape
        if activation.rowwise:
            launch = grids.row_warps(m, self.device.multiprocessors)
            name = f"{activation.name}<{c_type(S)}>"
            self.launch(source.text("softmax.cu"), name, launch, S, b, Z, m, n)
            return
        keep = Z is not S and activation.slope_reads_s
        tiled = self._tiles(S, S, Z)
        code = source.text("bias_activation.cu", formula_text.activation(activation))
        name, more = "bias_activation", []
        if activation.a is not None:
            name, more = f"{name}_learned", [activation.a, np.int32(activation.a.size > 1)]
        if isinstance(activation, Dropped):
            name, key = f"{name}_dropout", np.uint32(activation.key)
            more += [self.step, self.first, key, np.uint32(activation.threshold)]
        name = f"{name}<{c_type(S)}, Formula, {tiled.vector}, {str(keep).lower()}>"
        self.launch(code, name, tiled.launch, S, b, Z, m, n, *more)

    def activation_gradient(
        self,
        G: Array,
        S: Array,
        Z: Array,
        activation: Activation,
        D: Array,
        db: Array | None,
        accumulate: bool = False,
    ) -> None:
        """Set D = G ⊙ σ'(S, Z), db = Σ_rows D, da = Σ G ⊙ ∂z/∂a, or db += …, da += ….

        D may be G or Z; otherwise S, Z and G are kept.
        """
        m, n = Z.shape
        if not activation.rowwise:
            self._gradient(G, S, Z, activation, D, db, accumulate)
            return
        launch = grids.row_warps(m, self.device.multiprocessors)
        name = f"{activation.name}_gradient<{c_type(Z)}>"
        self.launch(source.text("softmax.cu"), name, launch, G, Z, D, m, n)
        if db is not None:
            self._column_sums(D, db, accumulate)

    def curvature(
        self,
        G: Array,
        H: Array,
        T: Array,
        S: Array,
        Z: Array,
        activation: Activation,
        D: Array,
        db: Array | None,
        accumulate: bool = False,
    ) -> None:
        """Set D = G ⊙ σ' + H ⊙ T ⊙ σ'', the gradient of ⟨H, σ' ⊙ T⟩ + ⟨G, Z⟩; db = Σ_rows D."""
        if activation.rowwise:
            P = self.xp.exp(Z) if activation.logarithmic else Z
            softmax_curvature(G, H, T, P, activation.logarithmic)
            self.activation_gradient(T, S, Z, activation, D, db, accumulate)
            return
        if activation.a is None:
            second = _curvature_as_slope(activation)
        else:
            activation = activation.bound(activation.a)  # no da is requested
            second = activation.sloped(activation.curvature)
        t, h, d = T.reshape(-1), H.reshape(-1), D.reshape(-1)
        self.map(program("t = t * h", frozenset()), {"t": t, "h": h}, {})
        self.activation_gradient(T, S, Z, second, T, None)
        self.activation_gradient(G, S, Z, activation, D, None)
        self.map(program("d = d + t", frozenset()), {"d": d, "t": t}, {})
        if db is not None:
            self._column_sums(D, db, accumulate)

    def scale_rows(self, A: Array, k: Array) -> None:
        """Set A = k ⊙ A, with k 0-d or (rows, 1)."""
        self.xp.multiply(A, k, out=A)

    def _column_sums(self, D: Array, db: Array, accumulate: bool) -> None:
        """Set db = Σ_rows D, or add to it."""
        self._gradient(D, D, D, IDENTITY, None, db, accumulate)

    def _gradient(
        self,
        G: Array,
        S: Array,
        Z: Array,
        activation: Activation,
        D: Array | None,
        db: Array | None,
        accumulate: bool,
    ) -> None:
        """Launch `activation_gradient`; without D only the sums are computed."""
        m, n = Z.shape
        tiled = self._tiles(Z, *(x for x in (G, S, Z, D) if x is not None))
        code = source.text("activation_gradient.cu", formula_text.activation(activation))
        instance = f"<{c_type(Z)}, Formula, {tiled.vector}, {grids.THREADS}>"
        (across, down), a, da = tiled.launch.grid, activation.a, activation.da
        partials = counters = None
        if da is not None:
            one, counts = (down * n, across) if da.size > 1 else (tiled.partials, 1)
            partials, counters = self.partials(down * n + one, across + counts, da.dtype)
        elif db is not None:
            partials, counters = self.partials(down * n, across, db.dtype)
        given = G, S, Z, D, db, partials, counters, m, n, np.int32(accumulate)
        if a is None:
            self.launch(code, f"activation_gradient{instance}", tiled.launch, *given)
        else:
            name, shared = f"activation_gradient_learned{instance}", np.int32(a.size > 1)
            self.launch(code, name, tiled.launch, *given, a, da, shared)

    # -- flat vectors --

    def map(
        self, program: Program, arrays: Mapping[str, Array], scalars: Mapping[str, Array]
    ) -> None:
        """Run elementwise statements over up to four flat vectors in one pass.

        The scalars are read when the kernel is launched or recorded.
        """
        first = next(iter(arrays.values()))
        numbers = [float(scalars[key]) for key in program.folded] or [0.0]
        k = self.xp.asarray(np.array(2 * numbers)).astype(first.dtype)
        names = tuple(sorted(program.scalars - OF_THE_KERNEL))
        self.update(program, arrays, k, None, first.size, None, names, (), "")

    def update(
        self,
        program: Program,
        arrays: Mapping[str, Array],
        k: Array,
        low: Array | None,
        weights: int,
        control: Array | None,
        settings: tuple[str, ...],
        flags: tuple[str, ...],
        kept: str,
        segments: Array | None = None,
    ) -> None:
        """Run statements entry by entry, in the form that `formula_text.update` takes.

        Args:
            program: the statements.
            arrays: up to four flat vectors by name.
            k: scalars of the first `weights` entries, then those of the rest; with `segments` those
                of each segment, one after another.
            low: the copy of the first vector in the layers' precision, or None.
            weights: number of leading entries that are weights.
            control: the control block, or None.
            settings: scalars that `fold` reads from the slot.
            flags: those `settings` that are 0 on biases.
            kept: a vector whose entries change only temporarily, or "".
            segments: the parts of the vectors with their own settings, or None.
        """
        vectors: list[Any] = list(arrays.values())
        first = vectors[0]
        aligned = alignment(*map(self.device.address, vectors)) >= 16
        vector = max(1, 16 // first.dtype.itemsize) if aligned else 1
        formula = formula_text.update(program, list(arrays), settings, flags, kept)
        half = "half_t" if low is None else c_type(low)
        name = f"update<{c_type(first)}, {half}, Formula, {vector}>"
        four = [*vectors, *[None] * (4 - len(vectors))]
        self.launch(
            source.text("updates.cu", formula), name, grids.each(first.size, vector), *four, low, k,
            control, segments, weights, first.size,
        )  # fmt: skip

    def sum_squares(self, v: Array) -> float:
        """Return Σ v², summed in double precision (waits for it)."""
        return float(self.xp.sum(self.xp.square(v, dtype=self.xp.float64)))

    def sum_abs(self, v: Array) -> float:
        """Return Σ |v|, summed in double precision (waits for it)."""
        return float(self.xp.sum(self.xp.abs(v, dtype=self.xp.float64)))


@functools.cache
def _curvature_as_slope(activation: Activation) -> Activation:
    """Return an activation whose slope is the curvature of this one."""
    return Activation(f"{activation.name} bent", "s", activation.curvature, activation.parameter)
