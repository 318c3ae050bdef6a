"""The reference backend: in-place ufuncs and `matmul` on preallocated arrays.

It is written against an array module `xp`, so that the same code on CuPy arrays is the unfused
check of the fused kernels. Every GEMM goes through NumPy's own BLAS: a second one in the process
(SciPy's) would compete with it for the cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mlpcore.backends.numpy import programs, scratch, softmax
from mlpcore.backends.numpy.masks import MaskOps
from mlpcore.core.activation import Activation
from mlpcore.core.differentials import softmax_curvature
from mlpcore.core.dropout import Dropped
from mlpcore.core.losses import Loss, Objective
from mlpcore.core.ops import Array, Buffer, ChunkShape, Input, Transposed, row_major
from mlpcore.core.program import Program

SHORT = 64  # entries in a piece of a sum
STRETCH = 1 << 17  # entries of all pieces that one call sums
BLOCK = 2048  # entries that a sum converts to double at a time: 16 KiB for each thread of a step
FEW = 2048  # zeroing this many entries costs less than `matmul` takes to check its arguments


class NumpyOps(MaskOps):
    """`core.ops.Ops` on NumPy arrays, or on those of a module with NumPy's interface."""

    stages = gathers = True

    def __init__(self, xp: Any = np):
        super().__init__(xp)
        self._matmul: Callable[..., object] = xp.matmul
        self._dot: Callable[..., object] = xp.dot

    def scratch(self, chunk: ChunkShape) -> list[Buffer]:
        """Return the arrays that this backend needs for a chunk in addition, for the plan."""
        return scratch.of_chunk(chunk)

    def map_scratch(self, program: Program, size: int, dtype: str) -> list[Buffer]:
        """Return the arrays that `map` over vectors of `size` entries needs, for the plan."""
        return scratch.of_map(program, size, dtype)

    # -- products and layers --

    def gather(self, source: Array, rows: slice | Array, out: Array, stage: Array | None) -> None:
        """Set out = source[rows], cast through `stage` (of source's dtype) if the dtypes differ."""
        if stage is None and not isinstance(rows, slice):
            source.take(rows, 0, out, "clip")
            return
        if not isinstance(rows, slice):
            source.take(rows, 0, stage, "clip")
        self.xp.copyto(out, source[rows] if isinstance(rows, slice) else stage, casting="unsafe")

    def gemm(self, A: Array, B: Array, C: Array, accumulate: bool = False) -> None:
        """Set C = A B, or C += A B. All may be transposed views, A an `Input`."""
        A, B, C = row_major(A, B, C)
        product = self._take("dW of a chunk", C.shape, C.dtype) if accumulate else C
        if isinstance(A, Input | Transposed):
            self._do(_multiply_input, self._product_into(C), A, B, product)
        elif A.shape[1] == 1:
            # an outer product, for which matmul would take 6 times as long (docs/performance.md)
            self._do(self.xp.multiply, A, B, product)
        else:
            self._do(self._product_into(C), A, B, product)
        if accumulate:
            self._do(self.xp.add, C, product, C)

    def _product_into(self, C: Array) -> Callable[..., object]:
        """Return `dot` for a small C: it checks less than `matmul`, but sets C to 0 first."""
        return self._dot if C.size <= FEW else self._matmul

    def layer(
        self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array
    ) -> None:
        """Set S = A W + b and Z = σ(S)."""
        self.gemm(A, W, S)
        self.bias_activation(S, b, activation, Z)

    def bias_activation(self, S: Array, b: Array | None, activation: Activation, Z: Array) -> None:
        """Set S += b and Z = σ(S), row by row. Z may be S."""
        if b is not None and len(S) == 1:
            self._do(self.xp.add, S[0], b, S[0])  # without broadcasting: half the time
        elif b is not None:
            self._do(self.xp.add, S, b, S)
        if activation.rowwise:
            (self._log_softmax if activation.logarithmic else self._softmax)(S, Z)
            return
        compiled = programs.value(activation, S.dtype.name, in_place=Z is S)
        if compiled is None:
            return
        self._formula(compiled, {"s": S, "z": Z}, activation)
        if isinstance(activation, Dropped):
            self._drop(Z, activation.key, activation.threshold)

    # -- derivatives --

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
        if activation.da is not None:
            self._sum_by_parameter(G, S, Z, activation, accumulate)
        if activation.rowwise:
            gradient = (
                self._log_softmax_gradient if activation.logarithmic else self._softmax_gradient
            )
            gradient(G, Z, D)
        else:
            target = "z" if D is Z else "g" if D is G else "d"
            compiled = programs.slope(activation, Z.dtype.name, target)
            arrays = {"z": Z, "g": G, "d": D, **({"s": S} if activation.slope_reads_s else {})}
            self._formula(compiled, arrays, activation)
        self._sum_rows(D, db, accumulate)

    def _sum_by_parameter(
        self, G: Array, S: Array, Z: Array, activation: Activation, accumulate: bool
    ) -> None:
        """Set da, or add to it: Σ_rows G ⊙ ∂z/∂a, also summed over outputs if they share a."""
        compiled, da = programs.by_parameter(activation, Z.dtype.name), activation.da
        assert da is not None
        constants, n = self._given(compiled, activation, Z.dtype), Z.shape[1]
        sums, begun = da, accumulate
        if da.size != n:
            sums, begun = self._take("da by output", (n,), Z.dtype), False
        pieces = self._pieces({"g": G, "s": S, "z": Z}, 1 + compiled.registers)
        for arrays, (product, *registers) in pieces:
            self._run(compiled, {**arrays, "p": product, **constants}, registers)
            self._sum_rows(product, sums, begun)
            begun = True
        if sums is not da:
            self._do(_add_up, sums, da, accumulate)

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
            self._do(softmax_curvature, G, H, T, P, activation.logarithmic)
            self.activation_gradient(T, S, Z, activation, D, db, accumulate)
            return
        arrays = {"z": Z, "g": G, "d": D, "h": H, "t": T}
        if activation.slope_reads_s:
            arrays["s"] = S
        compiled = programs.curvature(activation, Z.dtype.name, "z" if D is Z else "d")
        self._formula(compiled, arrays, activation)
        self._sum_rows(D, db, accumulate)

    def scale_rows(self, A: Array, k: Array) -> None:
        """Set A = k ⊙ A, with k 0-d or (rows, 1)."""
        self._do(self.xp.multiply, A, k, A)

    def _sum_rows(self, D: Array, db: Array | None, accumulate: bool) -> None:
        """Set db = Σ_rows D, or add to it."""
        if db is None:
            return
        if len(D) == 1:
            self._do(*((self.xp.add, db, D[0], db) if accumulate else (self.xp.positive, D[0], db)))
            return
        if "ones" in self._scratch:
            ones = self._scratch["ones"][: len(D)]
        else:
            ones = self.xp.ones(len(D), D.dtype)
        part = self._take("db of a chunk", db.shape, db.dtype) if accumulate else db
        self._do(self._product_into(db), ones, D, part)
        if accumulate:
            self._do(self.xp.add, db, part, db)

    # -- softmax --

    def _row(self, A: Array) -> Array:
        """Return scratch for one number per row."""
        return self._take("row sum", (len(A), 1), A.dtype)

    def _softmax(self, S: Array, Z: Array) -> None:
        self._do(softmax.softmax, S, Z, self._row(S))

    def _log_softmax(self, S: Array, Z: Array) -> None:
        powers = self._take("registers", S.shape, S.dtype)
        largest, at = self._take("largest entries", (2, len(S)), self.xp.int64)
        numbers = self._numbers("row numbers", len(S), self.xp.int64)
        self._do(softmax.log_softmax, S, Z, self._row(S), powers, largest, at, numbers)

    def _softmax_gradient(self, G: Array, Z: Array, D: Array) -> None:
        product = self._take("registers", Z.shape, Z.dtype)
        self._do(softmax.softmax_gradient, G, Z, D, self._row(Z), product)

    def _log_softmax_gradient(self, G: Array, Z: Array, D: Array) -> None:
        powers = self._take("registers", Z.shape, Z.dtype)
        self._do(softmax.log_softmax_gradient, G, Z, D, self._row(Z), powers)

    def _cross_entropy(
        self, S: Array, Y: Array, k: Array, D: Array, J: Array, loss: Loss, weights: Array | None
    ) -> None:
        m, dtype, places = len(S), S.dtype, self.xp.int64
        entropy = softmax.CrossEntropy(
            S,
            Y,
            k,
            D,
            J,
            loss,
            weights,
            flat=self._take("softmax", (S.size,), dtype),
            sums=self._take("row sums", (4, m, 1), dtype),
            places=self._take("label entries", (2, m), places),
            numbers=self._numbers("row numbers", m, places),
        )
        self._do(entropy.run)

    # -- loss --

    def loss(
        self,
        x: Array,
        Y: Array,
        k: Array,
        objective: Objective,
        D: Array,
        db: Array | None,
        J: Array,
        accumulate: bool,
    ) -> None:
        """Set J += Σ k ℓ(x, Y) and D = k ∂ℓ/∂x; with `db` also its sum over rows.

        x is S[L] if matched, else Z[L]; D may be x.
        """
        weights = self._column_weights(objective.loss, x.dtype)
        if objective.loss.rowwise:
            self._cross_entropy(x, Y, k, D, J, objective.loss, weights)
        else:
            value, slope = programs.loss(objective, x.dtype.name, in_place=D is x)
            count = 1 + max(value.registers, slope.registers)
            part, *registers = self._registers(count, x.shape, x.dtype)
            arrays = {"x": x, "y": Y, "k": k, "v": part, "d": D}
            if weights is not None:
                arrays["p"] = weights
            for compiled in (value, slope):
                constants = self._constants(compiled, dict(objective.scalars), x.dtype)
                self._run(compiled, {**arrays, **constants}, registers)
            self._add_sum(part, J)
        self._sum_rows(D, db, accumulate)

    def _column_weights(self, loss: Loss, dtype: Any) -> Array | None:
        """Return the loss's number for each column, in the plan's array if there is one."""
        if not loss.columns:
            return None
        planned = self._scratch.get("column weights")
        return self.xp.asarray(loss.columns, dtype) if planned is None else planned

    def _add_sum(self, v: Array, J: Array) -> None:
        """Set J += Σ v."""
        self._do(_accumulate, self.xp.add.reduce, v.reshape(-1), J)

    @np.errstate(over="ignore")
    def sum_squares(self, v: Array) -> float:
        """Return Σ v²: summed in short pieces that lose no digits, added up in double."""
        total = 0.0
        for start in range(0, v.size, STRETCH):
            part = v[start : start + STRETCH]
            rows = part[: part.size // SHORT * SHORT].reshape(-1, SHORT)
            rest = part[rows.size :]
            total += float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(rest.dot(rest))
        if v.size * float(np.finfo(v.dtype).tiny) * 2**27 < total < math.inf:
            return total
        # a square was 0 or infinite
        return sum((float(piece.dot(piece)) for piece in _in_double(v)), 0.0)

    def sum_abs(self, v: Array) -> float:
        """Return Σ |v|, summed in double precision."""
        return sum((float(np.add.reduce(np.abs(piece))) for piece in _in_double(v)), 0.0)


def _in_double(v: Array) -> Iterator[Array]:
    """Yield a flat vector as float64, in pieces of one buffer: each is valid until the next."""
    if v.dtype == np.float64:
        yield v
        return
    buffer = np.empty(min(BLOCK, v.size))
    for start in range(0, v.size, BLOCK):
        piece = buffer[: v.size - start]
        piece[...] = v[start : start + BLOCK]
        yield piece


def _add_up(v: Array, total: Array, accumulate: bool) -> None:
    total[...] = total + v.sum() if accumulate else v.sum()


def _multiply_input(
    multiply: Callable[..., object], A: Input | Transposed, B: Array, C: Array
) -> None:
    multiply(A.array if isinstance(A, Input) else A.source.array.T, B, C)


def _accumulate(reduce: Callable[[Array], Any], v: Array, total: Array) -> None:
    total += reduce(v)
