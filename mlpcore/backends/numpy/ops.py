"""The reference backend: in-place ufuncs and `matmul` on preallocated arrays.

It is written against an array module `xp`, so that the same code on CuPy arrays is the unfused
check of the fused kernels. Every GEMM goes through NumPy's own BLAS: a second one in the process
(SciPy's) would fight the first for the cores.
"""

from __future__ import annotations

import contextvars
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from mlpcore.core import dropout
from mlpcore.core.activations import Activation
from mlpcore.core.dropout import Dropped
from mlpcore.core.formulas import Program, program
from mlpcore.core.losses import Loss, Objective
from mlpcore.core.ops import Array, Buffer, Call, Input, Transposed, make, row_major

PIECE = 32768  # entries per pass of a formula: what it reads and writes stays in L2
# entries that NumPy buffers in a broadcast: 8,192 by default, which is slower and takes 64 KiB
BUFFER = 2048
SHORT, STRETCH = (
    64,
    1 << 17,
)  # entries of a piece of a sum; of as many pieces as are summed by one call
BLOCK = 2048  # entries that a sum converts to double at a time: 16 KiB for each thread of a step
FEW = (
    2048  # entries of a product that cost less to zero than `matmul` takes to look at its arguments
)
# softmax over at most so many classes works on the transpose, where row sums are sums of contiguous
# rows
NARROW = 64


class Tape:
    """A recorded run: functions, each with its arguments."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def replay(self) -> None:
        """Do the calls again, inside `NumpyOps.quietly`."""
        make(self.calls)


def _quiet_context() -> contextvars.Context:
    """Return a context in which NumPy does not warn of overflow and broadcasts by `BUFFER` entries.

    To call a function in it costs a fraction of an errstate block.
    """
    context = contextvars.copy_context()
    context.run(np.seterr, all="ignore")
    context.run(np.setbufsize, BUFFER)
    return context


class NumpyOps:
    """`core.ops.Ops` on NumPy arrays, or on those of a module with NumPy's interface."""

    stages = gathers = True

    def __init__(self, xp: Any = np):
        self.xp = xp
        self._matmul: Callable[..., object] = xp.matmul
        self._dot: Callable[..., object] = xp.dot
        self.quietly = _quiet_context().run
        self._tape: Tape | None = None
        self._scratch: Mapping[str, Array] = {}
        self.step = self.first = 0
        self._functions = {
            "copy": xp.positive,
            "positive": partial(xp.greater, casting="unsafe"),
            "kept": partial(xp.not_equal, casting="unsafe"),
            **{
                name: getattr(xp, name)
                for name in ("add", "subtract", "multiply", "divide", "negative")
            },
            **{
                name: getattr(xp, name)
                for name in ("maximum", "minimum", "tanh", "exp", "expm1", "log", "log1p")
            },
            **{name: getattr(xp, name) for name in ("abs", "sqrt", "sign", "sin", "cos")},
        }

    # -- memory --

    def empty(self, nbytes: int) -> Array:
        """`nbytes` of uninitialised memory, as a 1-D uint8 array."""
        return self.xp.empty(nbytes, self.xp.uint8)

    def scratch(
        self,
        rows: int,
        sizes: tuple[int, ...],
        dtype: str,
        activations: tuple[Activation | None, ...],
        objective: Objective,
        accumulates: bool,
    ) -> list[Buffer]:
        """The arrays of its own that this backend needs for a chunk of up to `rows` rows, for the
        plan.
        """
        L, wide, classes = len(sizes) - 1, max(sizes[1:]), sizes[-1]
        registers = shares = 0
        for l, activation in enumerate(activations):
            if activation is None or activation.rowwise or (l == L and objective.matched):
                continue
            kept = activation.slope_reads_s
            value = self._value(activation, dtype, in_place=not kept)
            slope = self._slope(activation, dtype, "z")
            count = max(value.registers if value else 0, slope.registers)
            if activation.a is not None:
                count = max(count, 1 + self._by_parameter(activation, dtype).registers)
                piece = _piece_rows(rows, sizes[l]) * sizes[l]
                shares = max(shares, sizes[l])
            else:
                piece = min(PIECE, rows * sizes[l])
            registers = max(registers, count * piece)
        if objective.output.rowwise and not objective.matched:
            registers = max(registers, rows * classes)
        if not objective.loss.rowwise:
            value, slope = self._loss(objective, dtype, in_place=objective.matched)
            registers = max(registers, (1 + max(value.registers, slope.registers)) * rows * classes)
        buffers = [Buffer("ones", (rows,), dtype, "db = 1ᵀ D")]
        if registers:
            buffers.append(
                Buffer("registers", (registers,), dtype, "intermediate results of formulas")
            )
        if objective.loss.rowwise:
            buffers += [
                Buffer("softmax", (rows * classes,), dtype, "exponentials"),
                Buffer("row sums", (4, rows), dtype, "maximum, sums and label's entry of each row"),
                Buffer("row numbers", (rows,), "int64", "0, 1, 2, …"),
                Buffer("label entries", (2, rows), "int64", "where each row's label stands"),
            ]
        if objective.loss.columns:
            buffers.append(
                Buffer(
                    "column weights",
                    (classes,),
                    dtype,
                    "of the loss: by class, or of positive targets",
                )
            )
        dropped = [
            n
            for n, activation in zip(sizes, activations, strict=True)
            if isinstance(activation, Dropped)
        ]
        if dropped:
            piece, bits = (
                max(_piece_rows(rows, n) * n for n in dropped),
                8 * np.dtype(dtype).itemsize,
            )
            buffers += [
                Buffer("mask numbers", (max(rows, *dropped),), "uint32", "0, 1, 2, …"),
                Buffer("mask keys", (2, rows + max(dropped)), "uint32", "of rows and columns"),
                Buffer("draws", (piece,), "uint32", "for entries of Z, a piece at a time"),
                Buffer("mask", (piece,), f"int{bits}", "all bits set where an entry is dropped"),
            ]
        if objective.output.rowwise and not objective.matched:
            buffers.append(Buffer("row sum", (rows,), dtype, "softmax: maximum, sum"))
            if objective.output.logarithmic:
                buffers.append(Buffer("row numbers", (rows,), "int64", "0, 1, 2, …"))
                buffers.append(
                    Buffer(
                        "largest entries", (2, rows), "int64", "which they are and where they stand"
                    )
                )
        if accumulates:
            largest = max(a * b for a, b in itertools.pairwise(sizes))
            buffers.append(Buffer("dW of a chunk", (largest,), dtype, "before it is added to dW"))
        if accumulates or shares:
            buffers.append(Buffer("db of a chunk", (wide,), dtype, "before it is added to db"))
        if shares:
            buffers.append(
                Buffer("da by output", (shares,), dtype, "before it is added up or added to da")
            )
        return buffers

    def map_scratch(self, program: Program, size: int, dtype: str) -> list[Buffer]:
        """Likewise for `map` over vectors of `size` entries."""
        shape = max(1, program.registers) * min(PIECE, size)
        return [
            Buffer("registers", (shape,), dtype, "of the update, a piece of the vectors at a time")
        ]

    def use(self, scratch: Mapping[str, Array]) -> None:
        """Take these arrays, as `scratch` listed them, instead of allocating at each call."""
        self._scratch = scratch
        if "ones" in scratch:
            scratch["ones"][...] = 1
        for name in ("row numbers", "mask numbers"):
            if name in scratch:
                scratch[name][...] = self.xp.arange(len(scratch[name]))

    def _take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """The planned scratch array of this name, cut to `shape`; outside a workspace a fresh one."""
        if name in self._scratch:
            size = int(np.prod(shape))
            return self._scratch[name].reshape(-1)[:size].reshape(shape)
        return self.xp.empty(shape, dtype)

    # -- recording --

    def renew(self) -> None:
        """Give up what another thread was doing here when the process was forked."""
        self.quietly, self._tape = _quiet_context().run, None

    def record(self, run: Callable[[], None]) -> Tape:
        """The operations that `run` calls, recorded instead of executed."""
        assert self._tape is None, "a recording is under way"
        self._tape = tape = Tape()
        try:
            run()
        finally:
            self._tape = None
        return tape

    def _do(self, function: Callable[..., object], *arguments: Any) -> None:
        if self._tape is None:
            function(*arguments)
        else:
            self._tape.calls.append((function, *arguments))

    def _run(self, compiled: Program, arrays: Mapping[str, Array], registers: list[Array]) -> None:
        """Each step of a program on its arrays; scalars are among them under their folded keys."""
        places = _flat({**arrays, **{f"r{i}": register for i, register in enumerate(registers)}})
        for name, operands, out in compiled.steps:
            function, arguments = self._functions[name], [places[x] for x in operands]
            if name == "positive":
                self._do(function, *arguments, 0, places[out])
            elif name == "kept":
                bits = arguments[0].view(f"uint{8 * arguments[0].dtype.itemsize}")
                self._do(
                    function,
                    bits,
                    self._constant(1 << 8 * bits.dtype.itemsize - 1, bits),
                    places[out],
                )
            elif name in ("maximum", "minimum"):  # NumPy 2.4 wants their `out` by name
                self._do(partial(function, out=places[out]), *arguments)
            else:
                self._do(function, *arguments, places[out])

    def _formula(self, compiled: Program, arrays: dict[str, Array], activation: Activation) -> None:
        """A program on arrays of one shape, by pieces that stay in cache where the arrays are
        contiguous.
        """
        first = next(iter(arrays.values()))
        constants, flat = self._given(compiled, activation, first.dtype), _flat(arrays)
        if any(array.ndim for array in constants.values()):
            for pieces, registers in self._pieces(arrays, compiled.registers):
                self._run(compiled, {**pieces, **constants}, registers)
        elif flat is not arrays:
            self.map(compiled, flat, constants)
        else:
            self._run(
                compiled,
                {**arrays, **constants},
                self._registers(compiled.registers, first.shape, first.dtype),
            )

    def _given(self, compiled: Program, activation: Activation, dtype: Any) -> dict[str, Array]:
        """Return what a program reads beside the layer's arrays: constants, and the learned
        parameter, 0-d or (n,).
        """
        constants = self._constants(compiled, activation.scalars, dtype)
        if activation.a is not None:
            constants["a"] = activation.a.reshape(()) if activation.a.size == 1 else activation.a
        return constants

    def _pieces(
        self, arrays: Mapping[str, Array], registers: int
    ) -> Iterator[tuple[dict[str, Array], list[Array]]]:
        """Yield matrices of one shape by rows that stay in cache, with so many registers of that
        size.
        """
        first = next(iter(arrays.values()))
        (m, n), few = first.shape, _piece_rows(*first.shape)
        own = self._registers(registers, (few, n), first.dtype)
        for start in range(0, m, few):
            rows = slice(start, min(m, start + few))
            yield (
                {name: array[rows] for name, array in arrays.items()},
                [register[: rows.stop - start] for register in own],
            )

    def _registers(
        self, count: int, shape: tuple[int, ...], dtype: Any, skip: int = 0
    ) -> list[Array]:
        return list(self._take("registers", (skip + count, *shape), dtype)[skip:])

    def _constants(
        self, compiled: Program, scalars: Mapping[str, float], dtype: Any
    ) -> dict[str, Array]:
        return {key: self.xp.asarray(value, dtype) for key, value in compiled.fold(scalars).items()}

    # -- operations --

    def gather(self, source: Array, rows: slice | Array, out: Array, stage: Array | None) -> None:
        """Out = source[rows], cast to out's dtype by way of `stage` (source's dtype) where the
        dtypes differ.
        """
        if stage is None and not isinstance(rows, slice):
            source.take(rows, 0, out, "clip")
            return
        if not isinstance(rows, slice):
            source.take(rows, 0, stage, "clip")
        self.xp.copyto(out, source[rows] if isinstance(rows, slice) else stage, casting="unsafe")

    def gemm(self, A: Array, B: Array, C: Array, accumulate: bool = False) -> None:
        """C = A B, or C += A B. All may be transposed views, A an `Input`."""
        A, B, C = row_major(A, B, C)
        product = self._take("dW of a chunk", C.shape, C.dtype) if accumulate else C
        self._multiply(A, B, product)
        if accumulate:
            self._do(self.xp.add, C, product, C)

    def _multiply(self, A: Array, B: Array, C: Array) -> None:
        if isinstance(A, Input | Transposed):
            self._do(_multiply_input, self._product_into(C), A, B, C)
        elif (
            A.shape[1] == 1
        ):  # an outer product: matmul would take 6 times as long (docs/performance.md)
            self._do(self.xp.multiply, A, B, C)
        else:
            self._do(self._product_into(C), A, B, C)

    def _product_into(self, C: Array) -> Callable[..., object]:
        """`dot` looks at less before it calls BLAS than `matmul`, but writes zeros into C first."""
        return self._dot if C.size <= FEW else self._matmul

    def layer(
        self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array
    ) -> None:
        """S = A W + b; Z = σ(S)."""
        self.gemm(A, W, S)
        self.bias_activation(S, b, activation, Z)

    def bias_activation(self, S: Array, b: Array | None, activation: Activation, Z: Array) -> None:
        """S += b; Z = σ(S), row by row. Z may be S."""
        if b is not None and len(S) == 1:
            self._do(self.xp.add, S[0], b, S[0])  # no broadcast: half the time
        elif b is not None:
            self._do(self.xp.add, S, b, S)
        if activation.rowwise:
            (self._log_softmax if activation.logarithmic else self._softmax)(S, Z)
            return
        compiled = self._value(activation, S.dtype.name, in_place=Z is S)
        if compiled is None:
            return
        self._formula(compiled, {"s": S, "z": Z}, activation)
        if isinstance(activation, Dropped):
            self._drop(Z, activation.key, activation.threshold)

    def _drop(self, Z: Array, key: int, threshold: int) -> None:
        """Z = -0 where the mask says so, by pieces of rows that stay in cache; see `core.dropout`."""
        xp, do, (m, n), few = self.xp, self._do, Z.shape, _piece_rows(*Z.shape)
        signed, unsigned = (np.dtype(f"{kind}{8 * Z.dtype.itemsize}") for kind in ("int", "uint"))
        numbers = (
            self._scratch["mask numbers"]
            if "mask numbers" in self._scratch
            else xp.arange(max(m, n), dtype=xp.uint32)
        )
        keys, shifted = self._take("mask keys", (2, m + n), xp.uint32)
        draws, mask = (
            self._take("draws", (few * n,), xp.uint32),
            self._take("mask", (few * n,), signed),
        )
        do(self._place, key, numbers, keys[:m], keys[m:])
        self._scramble(keys, shifted)
        do(xp.right_shift, keys, self._constant(dropout.SHIFTS[2], keys), shifted)
        do(xp.bitwise_xor, keys, shifted, keys)
        for start in range(0, m, few):
            rows = slice(start, min(m, start + few))
            words = Z[rows].reshape(-1).view(signed)
            u, dropped = draws[: words.size], mask[: words.size]
            bits, below = dropped.view(unsigned), u.view(xp.int32)
            do(xp.bitwise_xor, keys[rows, None], keys[m:], u.reshape(-1, n))
            self._scramble(u, dropped.view(xp.uint32)[: words.size])
            do(xp.right_shift, u, self._constant(32 - dropout.BITS, u), u)
            do(xp.subtract, u, self._constant(threshold, u), u)
            do(
                xp.right_shift, below, self._constant(31, below), dropped
            )  # all bits where u was below the threshold
            do(xp.bitwise_or, words, dropped, words)
            do(xp.right_shift, bits, self._constant(1, bits), bits)  # all but the sign
            do(xp.bitwise_xor, words, dropped, words)

    def _place(self, key: int, numbers: Array, rows: Array, columns: Array) -> None:
        """Numbers of rows and columns, moved to where this step's masks lie: the step and the row
        change between replays.
        """
        base = dropout.mix(key + self.step)
        self.xp.add(numbers[: len(rows)], (base + self.first) & 0xFFFFFFFF, rows)
        self.xp.add(numbers[: len(columns)], dropout.mix(base + dropout.GOLDEN), columns)

    def _scramble(self, x: Array, shifted: Array) -> None:
        """The steps of `dropout.mix` up to the last multiplication, in place."""
        for shift, factor in zip(dropout.SHIFTS, dropout.FACTORS, strict=False):
            self._do(self.xp.right_shift, x, self._constant(shift, x), shifted)
            self._do(self.xp.bitwise_xor, x, shifted, x)
            self._do(self.xp.multiply, x, self._constant(factor, x), x)

    def _constant(self, value: int, like: Array) -> Array:
        return self.xp.asarray(value, like.dtype)

    def _softmax(self, S: Array, Z: Array) -> None:
        xp, row = self.xp, self._take("row sum", (S.shape[0], 1), S.dtype)
        self._do(xp.maximum.reduce, S, 1, None, row, True)
        self._do(xp.subtract, S, row, Z)
        self._do(xp.exp, Z, Z)
        self._do(xp.add.reduce, Z, 1, None, row, True)
        self._do(xp.divide, Z, row, Z)

    def _log_softmax(self, S: Array, Z: Array) -> None:
        """Z = s - log Σ exp(s), s = S - max: the largest entry's 1 stays out of the sum, and is
        `log1p`'s.
        """
        xp, (rows, classes) = self.xp, S.shape
        row, powers = (
            self._take("row sum", (rows, 1), S.dtype),
            self._take("registers", S.shape, S.dtype),
        )
        largest, at = self._take("largest entries", (2, rows), xp.int64)
        self._do(xp.argmax, S, 1, largest)
        self._do(xp.maximum.reduce, S, 1, None, row, True)
        self._do(xp.subtract, S, row, Z)
        self._do(xp.exp, Z, powers)
        self._do(xp.multiply, self._row_numbers(rows), classes, at)
        self._do(xp.add, at, largest, at)
        self._do(powers.reshape(-1).put, at, 0, "clip")
        self._do(xp.add.reduce, powers, 1, None, row, True)
        self._do(xp.log1p, row, row)
        self._do(xp.subtract, Z, row, Z)

    def _row_numbers(self, rows: int) -> Array:
        return (
            self._scratch["row numbers"][:rows]
            if "row numbers" in self._scratch
            else self.xp.arange(rows)
        )

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
        """D = G ⊙ σ'(S, Z), db = Σ_rows D, da = Σ G ⊙ ∂z/∂a, or db += …, da += …. D may be G or Z;
        S, Z and G are kept.
        """
        if activation.da is not None:
            self._sum_by_parameter(G, S, Z, activation, accumulate)
        if activation.rowwise:
            (self._log_softmax_gradient if activation.logarithmic else self._softmax_gradient)(
                G, Z, D
            )
        else:
            target = "z" if D is Z else "g" if D is G else "d"
            compiled = self._slope(activation, Z.dtype.name, target)
            arrays = {"z": Z, "g": G, "d": D, **({"s": S} if activation.slope_reads_s else {})}
            self._formula(compiled, arrays, activation)
        self._sum_rows(D, db, accumulate)

    def _sum_by_parameter(
        self, G: Array, S: Array, Z: Array, activation: Activation, accumulate: bool
    ) -> None:
        """Write Σ_rows G ⊙ ∂z/∂a, summed over the outputs as well where they share a, to `da`, or
        add it.
        """
        compiled, da, n = self._by_parameter(activation, Z.dtype.name), activation.da, Z.shape[1]
        constants = self._given(compiled, activation, Z.dtype)
        sums, begun = (
            (da, accumulate) if da.size == n else (self._take("da by output", (n,), Z.dtype), False)
        )
        for pieces, (product, *registers) in self._pieces(
            {"g": G, "s": S, "z": Z}, 1 + compiled.registers
        ):
            self._run(compiled, {**pieces, "p": product, **constants}, registers)
            self._sum_rows(product, sums, begun)
            begun = True
        if sums is not da:
            self._do(_add_up, sums, da, accumulate)

    def _softmax_gradient(self, G: Array, Z: Array, D: Array) -> None:
        """D = Z ⊙ (G - Σ_columns G ⊙ Z): the Jacobian of a row of softmax, applied."""
        xp, row = self.xp, self._take("row sum", (Z.shape[0], 1), Z.dtype)
        product = self._take("registers", Z.shape, Z.dtype)
        self._do(xp.multiply, G, Z, product)
        self._do(xp.add.reduce, product, 1, None, row, True)
        self._do(xp.subtract, G, row, product)
        self._do(xp.multiply, product, Z, D)

    def _log_softmax_gradient(self, G: Array, Z: Array, D: Array) -> None:
        """D = G - exp(Z) Σ_columns G: the Jacobian's transpose, applied."""
        xp, row = self.xp, self._take("row sum", (Z.shape[0], 1), Z.dtype)
        powers = self._take("registers", Z.shape, Z.dtype)
        self._do(xp.exp, Z, powers)
        self._do(xp.add.reduce, G, 1, None, row, True)
        self._do(xp.multiply, powers, row, powers)
        self._do(xp.subtract, G, powers, D)

    def curvature(
        self, G: Array, H: Array, T: Array, S: Array, Z: Array, activation: Activation, D: Array, db: Array | None,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        """D = G ⊙ σ' + H ⊙ T ⊙ σ'', the derivative of ⟨H, σ' ⊙ T⟩ beside G's; db as in
        `activation_gradient`.
        """
        if activation.rowwise:
            self._do(
                bend_rowwise,
                G,
                H,
                T,
                self.xp.exp(Z) if activation.logarithmic else Z,
                activation.logarithmic,
            )
            self.activation_gradient(T, S, Z, activation, D, db, accumulate)
            return
        else:
            arrays = {
                "z": Z,
                "g": G,
                "d": D,
                "h": H,
                "t": T,
                **({"s": S} if activation.slope_reads_s else {}),
            }
            formula = f"g * ({activation.slope}) + h * t * ({activation.curvature})"
            compiled = program(
                f"{'z' if D is Z else 'd'} = {formula}", frozenset(activation.scalars), Z.dtype.name
            )
            self._formula(compiled, arrays, activation)
        self._sum_rows(D, db, accumulate)

    def scale_rows(self, A: Array, k: Array) -> None:
        """A = k ⊙ A, with k 0-d or (rows, 1)."""
        self._do(self.xp.multiply, A, k, A)

    def _sum_rows(self, D: Array, db: Array | None, accumulate: bool) -> None:
        if db is None:
            return
        if len(D) == 1:
            self._do(*((self.xp.add, db, D[0], db) if accumulate else (self.xp.positive, D[0], db)))
            return
        ones = (
            self._scratch["ones"][: D.shape[0]]
            if "ones" in self._scratch
            else self.xp.ones(D.shape[0], D.dtype)
        )
        if accumulate:
            part = self._take("db of a chunk", db.shape, db.dtype)
            self._do(self._product_into(db), ones, D, part)
            self._do(self.xp.add, db, part, db)
        else:
            self._do(self._product_into(db), ones, D, db)

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
        """J += Σ k ℓ(x, Y) and D = k ∂ℓ/∂x; with `db` also its sum over rows. x is S[L] if matched,
        else Z[L]; D may be x.
        """
        weights = self._column_weights(objective.loss, x.dtype)
        if objective.loss.rowwise:
            self._softmax_cross_entropy(x, Y, k, D, J, objective.loss, weights)
        else:
            value, slope = self._loss(objective, x.dtype.name, in_place=D is x)
            part, *registers = self._registers(
                1 + max(value.registers, slope.registers), x.shape, x.dtype
            )
            for compiled in (value, slope):
                constants = self._constants(compiled, dict(objective.scalars), x.dtype)
                columns = {} if weights is None else {"p": weights}
                self._run(
                    compiled,
                    {"x": x, "y": Y, "k": k, "v": part, "d": D, **columns, **constants},
                    registers,
                )
            self._add_sum(part, J)
        self._sum_rows(D, db, accumulate)

    def _column_weights(self, loss: Loss, dtype: Any) -> Array | None:
        """The loss's number for each column, in the plan's array where there is one."""
        if not loss.columns:
            return None
        planned = self._scratch.get("column weights")
        return self.xp.asarray(loss.columns, dtype) if planned is None else planned

    def _softmax_cross_entropy(
        self, S: Array, Y: Array, k: Array, D: Array, J: Array, loss: Loss, weights: Array | None
    ) -> None:
        """ℓ = log Σ exp(s - max) - (s_y - max) and D = k (softmax(s) - onehot(y)), from S.

        Neither overflows nor cancels: in the place of one exponential e, the label's or the
        largest, stands e - 1, so that the sum is Σ - 1, whose log1p keeps its digits; and that
        entry of D is -k R / Σ with the sum R of the others.
        """
        xp, do, (rows, classes) = self.xp, self._do, S.shape
        flat = self._take("softmax", (rows * classes,), S.dtype)
        P = flat.reshape(classes, rows).T if classes <= NARROW else flat.reshape(rows, classes)
        top, total, entry, value = self._take("row sums", (4, rows, 1), S.dtype)
        at, largest = self._take("label entries", (2, rows), xp.int64)
        numbers = self._row_numbers(rows)
        one, labels = self._number(1, S), Y.ndim == 1
        do(xp.copyto, P, S)
        if not labels:
            do(S.argmax, 1, largest)
        columns = Y if labels else largest
        if classes <= NARROW:
            do(xp.multiply, columns, rows, at)
            do(xp.add, at, numbers, at)
        else:
            do(xp.multiply, numbers, classes, at)
            do(xp.add, at, columns, at)
        if labels:
            do(xp.maximum.reduce, P, 1, None, top, True)
        else:
            do(flat.take, at, 0, top[:, 0], "clip")
        do(xp.subtract, P, top, P)
        if labels:
            do(flat.take, at, 0, entry[:, 0], "clip")
            if loss.mixes(labels):
                self._mixed_labels(
                    P, flat, at, Y, k, D, J, loss, weights, (top, total, entry, value)
                )
                return
        elif loss.mixes(labels):
            self._mixed_distributions(P, Y, k, D, J, loss, weights, (top, total, entry))
            return
        else:
            do(xp.multiply, Y, P, D)
            do(xp.add.reduce, D, 1, None, entry, True)
        do(xp.exp, P, P)
        apart = top[:, 0]
        do(flat.take, at, 0, apart, "clip")
        do(xp.subtract, apart, one, apart)
        do(flat.put, at, apart, "clip")
        do(xp.add.reduce, P, 1, None, total, True)
        do(xp.log1p, total, value)
        if not labels:
            do(xp.add.reduce, Y, 1, None, top, True)
            do(xp.multiply, value, top, value)
        self._add_row_losses(value, entry, k, J, loss.most)
        if labels:
            do(xp.subtract, top, total, top)  # -R
            do(xp.add, total, one, total)
            do(xp.divide, k, total, total)
            do(xp.multiply, P, total, P)
            do(xp.multiply, top, total, top)
            do(flat.put, at, apart, "clip")
            do(xp.copyto, D, P)
        else:  # the largest is 1, so that R = Σ - 1: its entry is (Σ_c y_c - y - y R) / Σ
            do(xp.add, total, one, entry)
            do(xp.divide, P, entry, P)
            do(xp.multiply, P, top, P)
            do(xp.subtract, P, Y, P)
            do(flat.take, at, 0, value[:, 0], "clip")
            do(xp.multiply, total, value, total)
            do(xp.add, top, value, top)
            do(xp.add, total, top, total)
            do(xp.divide, total, entry, total)
            do(flat.put, at, total[:, 0], "clip")
            do(xp.multiply, P, k, D)

    def _mixed_distributions(
        self,
        P: Array,
        Y: Array,
        k: Array,
        D: Array,
        J: Array,
        loss: Loss,
        weights: Array | None,
        sums: tuple[Array, ...],
    ) -> None:
        """ℓ and D of a distribution over classes as `_mix` changes it, from P = s - max."""
        xp, do, (top, total, entry) = self.xp, self._do, sums
        self._mix(Y, D, total, loss, weights)
        do(xp.vecdot, D, P, entry[:, 0])
        do(xp.add.reduce, D, 1, None, top, True)
        do(xp.exp, P, P)
        do(xp.add.reduce, P, 1, None, total, True)
        do(xp.divide, P, total, P)
        do(xp.log, total, total)
        do(xp.multiply, total, top, total)
        self._add_row_losses(total, entry, k, J, loss.most)
        do(xp.multiply, P, top, P)
        do(xp.subtract, P, D, P)
        do(xp.multiply, P, k, D)

    def _mix(self, Y: Array, t: Array, weight: Array, loss: Loss, weights: Array | None) -> None:
        """Set t = c ((1 - ε) Y + ε/K) / C, the shares of `targets.mixed`; `weight` is overwritten."""
        xp, smoothing = self.xp, loss.label_smoothing
        self._do(xp.multiply, Y, self._number(1 - smoothing, t), t)
        self._do(xp.add, t, self._number(smoothing / t.shape[1], t), t)
        if weights is not None:
            self._do(xp.matmul, Y, weights, weight[:, 0])
            self._do(_ones_for_zeros, weight)
            self._do(xp.multiply, t, weights, t)
            self._do(xp.divide, t, weight, t)

    def _mixed_labels(
        self, P: Array, flat: Array, at: Array, Y: Array, k: Array, D: Array, J: Array, loss: Loss, weights: Array | None,
        sums: tuple[Array, ...],
    ) -> None:  # fmt: skip
        """ℓ = -Σ t log p and D = k (Σ t softmax(s) - t) with t = (1 - ε) onehot(y) + (ε/K) c / c_y,
        from P = s - max.
        """
        xp, (top, total, entry, own) = self.xp, sums
        kept, share = (
            self._number(1 - loss.label_smoothing, P),
            self._number(loss.label_smoothing / P.shape[1], P),
        )

        def spread() -> Array:
            """(ε/K) / c_y of each row."""
            if weights is None:
                return share
            self._do(weights.take, Y, 0, own[:, 0], "clip")
            self._do(_ones_for_zeros, own)
            self._do(xp.divide, share, own, own)
            return own

        self._do(xp.multiply, entry, kept, entry)
        self._do(
            *(
                (xp.matmul, P, weights, top[:, 0])
                if weights is not None
                else (xp.add.reduce, P, 1, None, top, True)
            )
        )
        self._do(xp.multiply, top, spread(), top)
        self._do(xp.add, entry, top, entry)
        self._do(xp.exp, P, P)
        self._do(xp.add.reduce, P, 1, None, total, True)
        self._do(xp.log, total, top)
        self._do(xp.divide, k, total, total)
        if weights is not None:  # Σ t is not 1
            self._do(xp.multiply, own, self._number(sum(loss.columns), P), own)
            self._do(xp.add, own, kept, own)
            self._do(xp.multiply, top, own, top)
            self._do(xp.multiply, total, own, total)
        self._add_row_losses(top, entry, k, J, loss.most)
        self._do(xp.multiply, P, total, P)
        self._do(xp.multiply, k, spread(), top)
        if weights is None:
            self._do(xp.subtract, P, top, P)
        else:
            self._do(xp.multiply, top, weights, D)
            self._do(xp.subtract, P, D, P)
        self._do(flat.take, at, 0, entry[:, 0], "clip")
        self._do(xp.multiply, k, kept, top)
        self._do(xp.subtract, entry, top, entry)
        self._do(flat.put, at, entry[:, 0], "clip")
        self._do(xp.copyto, D, P)

    def _add_row_losses(
        self, value: Array, entry: Array, k: Array, J: Array, most: float | None
    ) -> None:
        """J += Σ k (value - entry), each row's loss at most `most`; value is overwritten."""
        self._do(self.xp.subtract, value, entry, value)
        if most is not None:
            self._do(partial(self.xp.minimum, out=value), value, most)
        self._do(self.xp.multiply, value, k, value)
        self._add_sum(value, J)

    def _number(self, value: float, like: Array) -> Array:
        return self.xp.asarray(value, like.dtype)

    def _add_sum(self, v: Array, J: Array) -> None:
        """J += Σ v."""
        self._do(_accumulate, self.xp.add.reduce, v.reshape(-1), J)

    def map(
        self, program: Program, arrays: Mapping[str, Array], scalars: Mapping[str, Array]
    ) -> None:
        """Elementwise statements over flat vectors in one pass, by pieces that stay in cache."""
        first = next(iter(arrays.values()))
        registers = self._registers(program.registers, (min(PIECE, first.size),), first.dtype)
        for start in range(0, first.size, PIECE):
            pieces = {name: array[start : start + PIECE] for name, array in arrays.items()}
            size = min(PIECE, first.size - start)
            self._run(program, {**pieces, **scalars}, [register[:size] for register in registers])

    @np.errstate(over="ignore")
    def sum_squares(self, v: Array) -> float:
        """Σ v²: pieces so short that the dtype loses no digit in them, added up in double
        precision.
        """
        total = 0.0
        for start in range(0, v.size, STRETCH):
            part = v[start : start + STRETCH]
            rows = part[: part.size // SHORT * SHORT].reshape(-1, SHORT)
            rest = part[rows.size :]
            total += float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(rest.dot(rest))
        if v.size * float(np.finfo(v.dtype).tiny) * 2**27 < total < math.inf:
            return total
        return sum(
            (float(piece.dot(piece)) for piece in _in_double(v)), 0.0
        )  # a square was 0, or infinite

    def sum_abs(self, v: Array) -> float:
        """Σ |v|, summed in double precision."""
        return sum((float(np.add.reduce(np.abs(piece))) for piece in _in_double(v)), 0.0)

    # -- compiled formulas --

    def _value(self, activation: Activation, dtype: str, in_place: bool) -> Program | None:
        """Z = σ(s), written into s where Z is S; None where nothing is left to do."""
        if activation.value == "s" and in_place:
            return None
        return program(
            f"{'s' if in_place else 'z'} = {activation.value}", frozenset(activation.scalars), dtype
        )

    def _slope(self, activation: Activation, dtype: str, target: str) -> Program:
        """D = G σ', written into the array that D shares memory with."""
        formula = "g" if activation.slope == "1" else f"g * ({activation.slope})"
        return program(f"{target} = {formula}", frozenset(activation.scalars), dtype)

    def _by_parameter(self, activation: Activation, dtype: str) -> Program:
        """P = G ∂z/∂a."""
        return program(f"p = g * ({activation.by_parameter})", frozenset(activation.scalars), dtype)

    def _loss(self, objective: Objective, dtype: str, in_place: bool) -> tuple[Program, Program]:
        """V = k ℓ and D = k ∂ℓ/∂x, the latter written into x where D is x."""
        scalars = frozenset(dict(objective.scalars))
        target = "x" if in_place else "d"
        value, slope = f"v = k * ({objective.value})", f"{target} = k * ({objective.slope})"
        return program(value, scalars, dtype), program(slope, scalars, dtype)


def bend_rowwise(G: Array, H: Array, T: Array, P: Array, logarithmic: bool) -> None:
    """Put into T what the output's gradient turns into that of ⟨H, its differential along T⟩ and of
    G; P are probabilities.

    softmax: T = G + H ⊙ (T - Σ P T) - T Σ H P, for ⟨H, P ⊙ (T - Σ P T)⟩.
    log_softmax: T = G - P ⊙ (T - Σ P T) Σ H, for ⟨H, T - Σ P T⟩.
    """
    centred = T - (P * T).sum(axis=1, keepdims=True)
    if logarithmic:
        T[...] = G - P * centred * H.sum(axis=1, keepdims=True)
    else:
        T[...] = G + H * centred - T * (H * P).sum(axis=1, keepdims=True)


def _piece_rows(rows: int, columns: int) -> int:
    return max(1, min(rows, PIECE // columns))


def _flat(places: dict[str, Array]) -> dict[str, Array]:
    """The same arrays in one dimension, where all but the 0-d ones are contiguous and of one shape:
    less to look at a call.
    """
    wide = [array for array in places.values() if array.ndim]
    if any(
        array.ndim == 1 or array.shape != wide[0].shape or not array.flags.c_contiguous
        for array in wide
    ):
        return places
    return {name: array.reshape(-1) if array.ndim else array for name, array in places.items()}


def _in_double(v: Array) -> Iterator[Array]:
    """Yield a flat vector as float64: in pieces of one buffer, each of which holds until the next."""
    if v.dtype == np.float64:
        yield v
        return
    buffer = np.empty(min(BLOCK, v.size))
    for start in range(0, v.size, BLOCK):
        piece = buffer[: v.size - start]
        piece[...] = v[start : start + BLOCK]
        yield piece


def _ones_for_zeros(v: Array) -> None:
    v[v == 0] = 1


def _add_up(v: Array, total: Array, accumulate: bool) -> None:
    total[...] = total + v.sum() if accumulate else v.sum()


def _multiply_input(
    multiply: Callable[..., object], A: Input | Transposed, B: Array, C: Array
) -> None:
    multiply(A.array if isinstance(A, Input) else A.source.array.T, B, C)


def _accumulate(reduce: Callable[[Array], Any], v: Array, total: Array) -> None:
    total += reduce(v)
