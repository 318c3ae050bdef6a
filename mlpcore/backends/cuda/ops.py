"""The CUDA backend: `core.ops.Ops` by fused kernels and cuBLASLt, on a `CudaDevice`.

Every operation is a launch on the current stream and returns at once. Inside `record` the same
launches become a graph. Which algorithm computes a product is settled before: by timing once for
each shape, or by cuBLASLt's first guess (`deterministic`). An activation joins its product where
cuBLASLt computes it as well as the kernel does, and faster.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mlpcore.backends.cuda import grids, source
from mlpcore.backends.cuda.device import CudaDevice, Launch
from mlpcore.backends.cuda.gemm import (
    STORAGE,
    Algorithms,
    Product,
    UnsupportedAlgorithm,
    alignment,
    describe,
)
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core.activations import Activation, resolve
from mlpcore.core.differentials import softmax_curvature
from mlpcore.core.dropout import Dropped
from mlpcore.core.formulas import Program, program
from mlpcore.core.losses import Loss, Objective
from mlpcore.core.ops import Array, Buffer, ChunkShape, Recording, accumulator, row_major, storage

EPILOGUES = {
    "identity": "bias",
    "relu": "relu",
    "gelu": "gelu",
}  # activations that cuBLASLt can apply itself
OWN = [
    resolve(name) for name in EPILOGUES
]  # as the sheet has them: a user's activation may bear the same name
IDENTITY = resolve("identity")
SAMPLE = 64  # rows of a layer on which an epilogue is compared with the kernel
EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "tf32": 2.0**-10,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}


class SlotRows(NamedTuple):
    """The batch's own targets or row weights, which a kernel reads through the slot from
    `CudaOps.first` on.

    Attributes:
        dtype: of the caller's array.
        classes: of targets: whether they are class numbers.
        scale: of weights: 0-d, what they are multiplied by.
    """

    dtype: str
    classes: bool = False
    scale: Array = None


class CudaOps:
    """Operations of one stream of work on a CUDA device.

    Args:
        device: the device.
        tf32: let products of float32 round their factors to 10 bits.
        algorithms: where the choice of algorithms is kept.

    Attributes:
        low: a flat vector and its copy in the precision of the layers; biases that are views of the
            first are read from the second by products that add them. None where layers have the
            precision of the parameters.
    """

    stages = False  # gather casts on the way: rows need no second buffer
    gathers = False  # the loss reads targets and weights where they are

    def __init__(
        self, device: CudaDevice, tf32: bool = False, algorithms: Algorithms | None = None
    ):
        self.device, self.tf32 = device, tf32
        self.xp = device.xp
        self.algorithms = algorithms or Algorithms()
        self.gain: Array | None = None  # 0-d: the loss scale, where there is one
        self.control: Array | None = None  # where kernels report faults
        self.step: Array | None = None  # the slot
        self.first = 0
        self.low: tuple[Array, Array] | None = None
        self._scratch: Mapping[str, Array] = {}
        self._rehearsing = False
        self.asked: set[Product] = (
            set()
        )  # products met so far, the fused ones that were tried included
        self.only_products = (
            False  # whether all but matrix products is left out: what a step is measured against
        )

    # -- memory --

    def empty(self, nbytes: int) -> Array:
        """`nbytes` of uninitialised memory, as a 1-D uint8 array."""
        return self.device.empty(nbytes)

    def scratch(self, chunk: ChunkShape) -> list[Buffer]:
        """Return the arrays of its own that this backend needs for a chunk, for the plan."""
        rows, sizes, wide = chunk.rows, chunk.sizes, accumulator(chunk.dtype)
        itemsizes = (np.dtype(storage(chunk.dtype)).itemsize, np.dtype(wide).itemsize)
        learned = {
            n
            for n, σ in zip(sizes, chunk.activations, strict=True)
            if σ is not None and σ.a is not None and σ.a.size > 1
        }
        numbers, counters = grids.partial_sums(
            rows, sizes[1:], itemsizes, self.device.multiprocessors, learned
        )
        buffers = [
            Buffer("partial sums", (numbers,), wide, "of db and J, one for each block"),
            Buffer("counters", (counters,), "uint32", "of blocks that have finished"),
            Buffer("product workspace", (self.device.product_workspace,), "uint8", "of cuBLASLt"),
        ]
        if chunk.objective.loss.columns:
            why = "of the loss: by class, or of positive targets"
            buffers.append(Buffer("column weights", (sizes[-1],), wide, why))
        return buffers

    def use(self, scratch: Mapping[str, Array]) -> None:
        """Take these arrays, as `scratch` listed them, instead of allocating at each call."""
        self._scratch = scratch
        if "counters" in scratch:
            scratch["counters"][...] = 0

    def partials(self, numbers: int, counters: int, dtype: Any) -> tuple[Array, Array]:
        """Scratch for sums over blocks; its counters are 0, and are 0 again when the kernel ends."""
        if "partial sums" in self._scratch:
            partials, counted = self._scratch["partial sums"], self._scratch["counters"]
            assert numbers <= partials.size, "the plan's scratch is too small"
            assert counters <= counted.size, "the plan's scratch is too small"
            return partials, counted
        return self.xp.empty(max(1, numbers), dtype), self.xp.zeros(counters, self.xp.uint32)

    # -- recording --

    def record(self, run: Callable[[], None]) -> Recording:
        """The operations that `run` calls, recorded. It is rehearsed first: then what must be
        compiled or timed is.
        """
        self._rehearsing = True
        try:
            run()
        finally:
            self._rehearsing = False
        return self.device.record(run)

    def launch(self, source: str, name: str, launch: Launch, *arguments: object) -> None:
        """Launch the instance `name` of a kernel source; in a rehearsal it is only compiled."""
        kernel = self.device.kernel(source, name)
        if not self._rehearsing and not self.only_products:
            self.device.launch(kernel, launch, arguments)

    # -- operations --

    def gemm(self, A: Array, B: Array, C: Array, accumulate: bool = False) -> None:
        """C = A B, or C += A B. All may be transposed views."""
        A, B, C = row_major(A, B, C)
        addresses = self._addresses(A, B, C)
        product = describe(A, B, C, accumulate, addresses, self.tf32)
        self.asked.add(product)
        if not self.algorithms.is_ready(product):
            before = (
                C.copy() if accumulate and not self._rehearsing else None
            )  # what is tried accumulates, too
            self._settle(product, lambda one: self._multiply(product, one, addresses))
            if before is not None:
                C[...] = before
        if not self._rehearsing:
            self._multiply(product, self.algorithms.chosen[product], addresses)

    def _addresses(self, A: Array, B: Array, C: Array) -> tuple[int, int, int]:
        return self.device.address(A), self.device.address(B), self.device.address(C)

    def _multiply(
        self,
        product: Product,
        algorithm: bytes,
        addresses: tuple[int, int, int],
        bias: int = 0,
        aux: int = 0,
    ) -> None:
        A, B, C = addresses
        if "product workspace" not in self._scratch:
            self._scratch = {
                **self._scratch,
                "product workspace": self.device.empty(self.device.product_workspace),
            }
        workspace = self.device.address(self._scratch["product workspace"])
        self.device.multiply(product, algorithm, B, A, C, bias, aux, workspace)

    def _settle(self, product: Product, run: Callable[[bytes], None]) -> None:
        """Run a product for the first time: by the algorithm that a checkpoint named, or all
        candidates to choose from.
        """
        known = self.algorithms
        with self.device.lock:
            if product in known.chosen:
                run(known.chosen[product])
            else:
                candidates = self.device.algorithms(product)
                if known.deterministic:
                    chosen = next((one for one in candidates if self._runs(run, one)), None)
                else:
                    seconds = {one: self._seconds(run, one) for one in candidates}
                    chosen = min(
                        (one for one in candidates if seconds[one] < math.inf),
                        key=seconds.__getitem__,
                        default=None,
                    )
                if chosen is None:
                    raise UnsupportedAlgorithm(
                        f"cuBLASLt refuses each of the {len(candidates)} algorithms that it offers "
                        f"for {product}"
                    )
                known.chosen[product] = chosen
            known.ready[product] = known.chosen[product]

    @staticmethod
    def _runs(run: Callable[[bytes], None], algorithm: bytes) -> bool:
        """Run a product by an algorithm; return whether the library does not refuse it."""
        try:
            run(algorithm)
        except UnsupportedAlgorithm:
            return False
        return True

    def _seconds(self, run: Callable[[bytes], None], algorithm: bytes) -> float:
        """Return how long a product takes by an algorithm; infinite where the library refuses it."""
        try:
            return self.device.seconds(lambda: run(algorithm))
        except UnsupportedAlgorithm:
            return math.inf

    def layer(
        self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array
    ) -> None:
        """S = A W + b; Z = σ(S): one product with the activation in its epilogue where that is
        faster, else two grids.
        """
        fused = None if self.only_products else self._epilogue(A, W, b, activation, S, Z)
        if fused is None:
            self.gemm(A, W, S)
            self.bias_activation(S, b, activation, Z)
        elif not self._rehearsing:
            fused()

    def _epilogue(
        self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array
    ) -> Callable[[], None] | None:
        """The layer as one product, if cuBLASLt has it and it was timed to be faster than two
        launches; None otherwise.
        """
        epilogue = EPILOGUES.get(activation.name, "") if activation in OWN else ""
        added = None if b is None else self._as_added(b, Z)
        if added is None or not epilogue or self.algorithms.deterministic:
            return None
        keeps = Z is not S and activation.slope_reads_s
        if epilogue == "gelu" and not keeps:
            return None
        addresses, bias, aux = (
            self._addresses(A, W, Z),
            self.device.address(added),
            self.device.address(S) if keeps else 0,
        )
        product, known = (
            describe(A, W, Z, False, addresses, self.tf32, epilogue, bias, aux),
            self.algorithms,
        )
        self.asked.add(product)
        if not known.is_ready(product):
            run = functools.partial(self._multiply, product, addresses=addresses, aux=aux)
            with self.device.lock:
                if product not in known.fused:
                    known.fused[product] = self._fusing_pays(
                        product, run, bias, (A, W, b, activation, S, Z)
                    )
                elif known.fused[product]:  # says a checkpoint
                    run(known.chosen[product], bias=bias)
                known.ready[product] = known.chosen.get(product)
        if not known.fused[product]:
            return None
        return functools.partial(
            self._multiply, product, known.chosen[product], addresses, bias, aux
        )

    def _as_added(self, b: Array, Z: Array) -> Array | None:
        """Return the bias in the precision of Z, in which a product adds it, or None."""
        if b.dtype == Z.dtype:
            return b
        if self.low is None or self.low[1].dtype != Z.dtype:
            return None
        vector, low = self.low
        first = (self.device.address(b) - self.device.address(vector)) // b.dtype.itemsize
        return low[first : first + b.size] if 0 <= first <= low.size - b.size else None

    def _fusing_pays(
        self, product: Product, run: Callable[..., None], bias: int, layer: tuple[Any, ...]
    ) -> bool:
        """Return whether an activation in its product's epilogue is right and faster; note the
        algorithm.
        """
        A, W, b, activation, S, Z = layer

        def apart() -> None:
            self.gemm(A, W, S)
            self.bias_activation(S, b, activation, Z)

        rehearsing, self._rehearsing = self._rehearsing, False
        try:
            apart()  # settles the product's own algorithm
            right = self._right(product, run, layer)
            apart()  # what goes on reads these arrays: no NaN may stay in them
            seconds = {one: self._seconds(functools.partial(run, bias=bias), one) for one in right}
            chosen = min(right, key=seconds.__getitem__, default=b"")
            if not chosen or not seconds[chosen] < self.device.seconds(apart):
                return False
            self.algorithms.chosen[product] = chosen
            return True
        finally:
            self._rehearsing = rehearsing

    @np.errstate(all="ignore")
    def _right(
        self, product: Product, run: Callable[..., None], layer: tuple[Any, ...]
    ) -> list[bytes]:
        """Return the candidates that keep what is not finite and are as exact as the kernel."""
        A, W, _, activation, S, Z = layer
        keeps = activation.slope_reads_s
        right = list(self.device.algorithms(product))
        for special in (False, True) if right else ():
            wide, narrow = self._trial_biases(product, Z, special)
            self.gemm(A, W, S)
            size = abs(self._sample(S)).max() + 4
            self.bias_activation(S, wide, activation, Z)
            s, z = self._sample(S), self._sample(Z)
            passed = []
            for one in right:
                S[:SAMPLE] = Z[:SAMPLE] = 0
                if not self._runs(functools.partial(run, bias=self.device.address(narrow)), one):
                    continue
                t, y = self._sample(S), self._sample(Z)
                if special:
                    good = np.array_equal(np.isfinite(y), np.isfinite(z))
                    good = good and (not keeps or np.array_equal(np.isfinite(t), np.isfinite(s)))
                else:
                    # sums of another order
                    bound = size * EPSILON[product.dtype] * (16 + 4 * math.sqrt(product.k))
                    good = abs(y - z).max() <= bound and (not keeps or abs(t - s).max() <= bound)
                    good = good and (
                        not keeps or _error(activation, t, y) <= 2 * _error(activation, s, z)
                    )
                if good:
                    passed.append(one)
            right = passed
        return right

    def _trial_biases(self, product: Product, Z: Array, special: bool) -> tuple[Array, Array]:
        """Return a bias as the kernel reads it and as the product does: numbers, or none that is
        finite.
        """
        n = product.m
        memory, _ = self.partials(2 * n + 128, 1, accumulator(product.result_dtype))
        memory = self._aligned(memory)
        wide = memory[:n]
        narrow = wide if wide.dtype == Z.dtype else self._aligned(memory[n:]).view(Z.dtype)[:n]
        numbers = (
            (math.nan, math.inf, -math.inf) if special else (-3.0, -0.5, 0.25, 1.5, 4.0)
        )  # which all precisions hold
        for i, number in enumerate(numbers):
            wide[i :: len(numbers)] = number
            if narrow is not wide:
                bits = int(np.float32(number).view(np.uint32)) >> 16
                narrow[i :: len(numbers)] = bits if product.result_dtype == "bfloat16" else number
        return wide, narrow

    def _aligned(self, array: Array) -> Array:
        """Return the array from its first well-aligned address on."""
        return array[-self.device.address(array) % 256 // array.dtype.itemsize :]

    def _sample(self, array: Array) -> np.ndarray:
        """Return the first rows of an array, in double."""
        host = self.device.to_host(array[:SAMPLE])
        if host.dtype == np.uint16:  # bfloat16
            host = (host.astype(np.uint32) << 16).view(np.float32)
        return host.astype(np.float64)

    def bias_activation(self, S: Array, b: Array | None, activation: Activation, Z: Array) -> None:
        """S += b; Z = σ(S), row by row, less what is dropped. Z may be S; S itself is kept only
        where the slope reads it.
        """
        m, n = S.shape
        if activation.rowwise:
            launch = grids.row_warps(m, self.device.multiprocessors)
            self.launch(
                source.text("softmax.cu"),
                f"{activation.name}<{_type(S)}>",
                launch,
                S,
                b,
                Z,
                m,
                n,
            )
            return
        keep = Z is not S and activation.slope_reads_s
        tiled = self._tiles(S, S, Z)
        code = source.text("bias_activation.cu", source.activation(activation))
        name, more = "bias_activation", []
        if activation.a is not None:
            name, more = f"{name}_learned", [activation.a, np.int32(activation.a.size > 1)]
        if isinstance(activation, Dropped):
            name = f"{name}_dropout"
            more += [
                self.step,
                self.first,
                np.uint32(activation.key),
                np.uint32(activation.threshold),
            ]
        name = f"{name}<{_type(S)}, Formula, {tiled.vector}, {_bool(keep)}>"
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
        """D = G ⊙ σ'(S, Z), db = Σ_rows D, da = Σ G ⊙ ∂z/∂a, or db += …, da += …. D may be G or Z;
        S, Z and G are kept.
        """
        m, n = Z.shape
        if activation.rowwise:
            launch = grids.row_warps(m, self.device.multiprocessors)
            name = f"{activation.name}_gradient<{_type(Z)}>"
            self.launch(source.text("softmax.cu"), name, launch, G, Z, D, m, n)
            if db is not None:
                self._column_sums(D, db, accumulate)
            return
        self._gradient(G, S, Z, activation, D, db, accumulate)

    def curvature(
        self, G: Array, H: Array, T: Array, S: Array, Z: Array, activation: Activation, D: Array, db: Array | None,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        """D = G ⊙ σ' + H ⊙ T ⊙ σ'', the derivative of ⟨H, σ' ⊙ T⟩ beside G's; db as in
        `activation_gradient`.
        """
        if activation.rowwise:
            P = self.xp.exp(Z) if activation.logarithmic else Z
            softmax_curvature(G, H, T, P, activation.logarithmic)
            self.activation_gradient(T, S, Z, activation, D, db, accumulate)
            return
        activation = (
            activation if activation.a is None else activation.bound(activation.a)
        )  # no da is asked for
        bent = (
            _bent(activation) if activation.a is None else activation.sloped(activation.curvature)
        )
        t, h, d = T.reshape(-1), H.reshape(-1), D.reshape(-1)
        self.map(program("t = t * h", frozenset()), {"t": t, "h": h}, {})
        self.activation_gradient(T, S, Z, bent, T, None)
        self.activation_gradient(G, S, Z, activation, D, None)
        self.map(program("d = d + t", frozenset()), {"d": d, "t": t}, {})
        if db is not None:
            self._column_sums(D, db, accumulate)

    def scale_rows(self, A: Array, k: Array) -> None:
        """A = k ⊙ A, with k 0-d or (rows, 1)."""
        self.xp.multiply(A, k, out=A)

    def _column_sums(self, D: Array, db: Array, accumulate: bool) -> None:
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
        m, n = Z.shape
        tiled = self._tiles(Z, *(x for x in (G, S, Z, D) if x is not None))
        code = source.text("activation_gradient.cu", source.activation(activation))
        instance = f"<{_type(Z)}, Formula, {tiled.vector}, {grids.THREADS}>"
        (across, down), a, da = tiled.launch.grid, activation.a, activation.da
        if da is None:
            partials, counters = (
                (None, None) if db is None else self.partials(down * n, across, db.dtype)
            )
        else:
            one, counts = (down * n, across) if da.size > 1 else (tiled.partials, 1)
            partials, counters = self.partials(down * n + one, across + counts, da.dtype)
        given = G, S, Z, D, db, partials, counters, m, n, np.int32(accumulate)
        if a is None:
            self.launch(code, f"activation_gradient{instance}", tiled.launch, *given)
        else:
            learned = a, da, np.int32(a.size > 1)
            self.launch(
                code, f"activation_gradient_learned{instance}", tiled.launch, *given, *learned
            )

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
        """J += Σ k ℓ(x, Y), D = gain k ∂ℓ/∂x; with `db` also its sum over rows. x is S[L] if
        matched, else Z[L]; D may be x.
        """
        (m, n), wide = x.shape, accumulator(STORAGE[x.dtype.name])
        if isinstance(Y, SlotRows):
            slot, targets, stored, labels = self.step, None, Y.dtype, Y.classes
        else:
            slot, targets, stored, labels = None, Y, Y.dtype.name, Y.ndim == 1
        weights, scale, weighed = None, k, wide
        if isinstance(k, SlotRows):
            scale, weighed = k.scale, k.dtype
        elif k.ndim:
            weights, scale = k, None
        given = (
            slot,
            self.control,
            targets,
            weights,
            np.int32(isinstance(k, SlotRows) or k.ndim > 0),
        )
        types = ", ".join([_type(x), source.TYPES[stored], source.TYPES[weighed]])
        loss, columns = objective.loss, self._column_weights(objective.loss, wide)
        if loss.rowwise:
            item = np.dtype(wide).itemsize
            launch, fused = grids.cross_entropy(m, n, item, self.device.multiprocessors)
            sums = db if fused else None
            partials, counters = self.partials(launch.grid[0] * (1 + n), 2, wide)
            launch = launch._replace(shared=0 if sums is None else launch.shared)
            most = np.inf if loss.most is None else loss.most
            limits = map(
                np.dtype(wide).type, (most, 1 - loss.label_smoothing, loss.label_smoothing / n)
            )
            name = f"softmax_cross_entropy<{types}{', true' if loss.mixes(labels) else ''}>"
            self.launch(
                source.text("losses.cu"), name, launch, x, *given, np.int32(labels), scale, self.gain, D, sums, J,
                partials, counters, self.first, m, n, np.int32(accumulate), *limits, columns,
            )  # fmt: skip
            if db is not None and not fused:
                self._column_sums(D, db, accumulate)
            return
        tiled = self._tiles(x, x, D)
        across, down = tiled.launch.grid
        partials, counters = self.partials(tiled.partials + down * n, across + 1, wide)
        name = f"elementwise_loss<{types}, Formula, {tiled.vector}, {grids.THREADS}>"
        self.launch(
            source.text("losses.cu", source.loss(objective)), name, tiled.launch, x, *given, scale, self.gain, D, db,
            J, partials, counters, self.first, m, n, np.int32(accumulate), columns,
        )  # fmt: skip

    def _column_weights(self, loss: Loss, dtype: str) -> Array | None:
        """The loss's number for each column, in the plan's array where there is one."""
        if not loss.columns:
            return None
        planned = self._scratch.get("column weights")
        return self.xp.asarray(loss.columns, dtype) if planned is None else planned

    def _tiles(self, like: Array, *arrays: Array) -> grids.Tiled:
        """The launch over a matrix, its vector width by the addresses of all arrays that are read
        and written along with it.
        """
        m, n = like.shape
        together = alignment(*(self.device.address(array) for array in arrays))
        vector = grids.vector_width(n, like.dtype.itemsize, together)
        return grids.tiles(m, n, vector, self.device.multiprocessors)

    def map(
        self, program: Program, arrays: Mapping[str, Array], scalars: Mapping[str, Array]
    ) -> None:
        """Elementwise statements over up to four flat vectors in one pass; the scalars are read
        now.
        """
        size = next(iter(arrays.values())).size
        values = self.xp.asarray(
            np.array(2 * [float(scalars[key]) for key in program.folded] or [0.0])
        )
        k = values.astype(next(iter(arrays.values())).dtype)
        names = tuple(
            sorted(program.scalars - {"t", "clip", "unscale"})
        )  # which the kernel's own `fold` declares
        self.update(program, arrays, k, None, size, None, names, (), "")

    def update(
        self, program: Program, arrays: Mapping[str, Array], k: Array, low: Array | None, weights: int, control: Array | None,
        settings: tuple[str, ...], flags: tuple[str, ...], kept: str, segments: Array | None = None,
    ) -> None:  # fmt: skip
        """The statements entry by entry, with scalars `k` for the first `weights` entries, then
        those behind for the rest.

        With `segments` each of them has its own, one behind the other.
        """
        vectors = list(arrays.values())
        first = vectors[0]
        vector = (
            max(1, 16 // first.dtype.itemsize)
            if alignment(*map(self.device.address, vectors)) >= 16
            else 1
        )
        code = source.text(
            "updates.cu", source.update(program, list(arrays), settings, flags, kept)
        )
        name = (
            f"update<{_type(first)}, {'half_t' if low is None else _type(low)}, Formula, {vector}>"
        )
        four = [*vectors, *[None] * (4 - len(vectors))]
        self.launch(
            code,
            name,
            grids.each(first.size, vector),
            *four,
            low,
            k,
            control,
            segments,
            weights,
            first.size,
        )

    def sum_squares(self, v: Array) -> float:
        """Σ v², as a float (waits for it)."""
        return float(self.xp.sum(self.xp.square(v, dtype=self.xp.float64)))

    def sum_abs(self, v: Array) -> float:
        """Σ |v|, as a float (waits for it)."""
        return float(self.xp.sum(self.xp.abs(v, dtype=self.xp.float64)))


@functools.cache
def _bent(activation: Activation) -> Activation:
    """Return an activation whose slope is the curvature of this one."""
    return Activation(f"{activation.name} bent", "s", activation.curvature, activation.parameter)


def new_operations(
    device: CudaDevice, tf32: bool = False, deterministic: bool = False
) -> Callable[[], CudaOps]:
    """Return a factory of operations on a device, which share its choice of algorithms."""
    algorithms = device.choices.setdefault(deterministic, Algorithms(deterministic))
    return functools.partial(CudaOps, device, tf32, algorithms)


def _error(activation: Activation, s: np.ndarray, z: np.ndarray) -> float:
    """Return the largest distance of z from σ(s), over |s|."""
    exact = np.empty_like(s)
    NumpyOps().bias_activation(s.copy(), None, activation, exact)
    return float((abs(z - exact) / (abs(s) + 0.01)).max())


def _type(array: Array) -> str:
    """The C++ type of a buffer's entries."""
    return source.TYPES[STORAGE[array.dtype.name]]


def _bool(value: bool) -> str:
    return str(value).lower()
