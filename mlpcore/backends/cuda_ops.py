"""The CUDA backend: `core.ops.Ops` by fused kernels and cuBLASLt, on a `Device`.

Every operation is a launch on the current stream and returns at once. Inside `record` the same launches become a graph. Which
algorithm computes a product is settled before: by timing once for each shape, or by cuBLASLt's first guess (`deterministic`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mlpcore.backends import cuda_source, launches
from mlpcore.backends.cuda_device import Device, Launch
from mlpcore.backends.numpy_ops import bend_softmax
from mlpcore.backends.products import STORAGE, Product, Refused, alignment, describe
from mlpcore.core.activations import Activation, resolve
from mlpcore.core.dropout import Dropped
from mlpcore.core.formulas import Program, program
from mlpcore.core.losses import Objective
from mlpcore.core.ops import Array, Buffer, Recording, accumulator, row_major, storage

EPILOGUES = {"identity": "bias", "relu": "relu", "gelu": "gelu"}  # activations that cuBLASLt can apply itself
OWN = [resolve(name) for name in EPILOGUES]  # as the sheet has them: a user's activation may bear the same name


class SlotRows(NamedTuple):
    """The batch's own targets or row weights, which a kernel reads through the slot from `CudaOps.first` on.

    Attributes:
        dtype: of the caller's array.
        classes: of targets: whether they are class numbers.
        scale: of weights: 0-d, what they are multiplied by.
    """

    dtype: str
    classes: bool = False
    scale: Array = None


class Algorithms:
    """The algorithm of each product, settled once; shared by all operations on a device.

    Attributes:
        chosen: by product; what a checkpoint stores.
    """

    def __init__(self, deterministic: bool = False):
        self.deterministic = deterministic
        self.chosen: dict[Product, bytes] = {}
        self.fused: dict[Product, bool] = {}


class CudaOps:
    """Operations of one stream of work on a CUDA device.

    Args:
        device: the device.
        tf32: let products of float32 round their factors to 10 bits.
        algorithms: where the choice of algorithms is kept.
    """

    stages = False  # gather casts on the way: rows need no second buffer
    gathers = False  # the loss reads targets and weights where they are

    def __init__(self, device: Device, tf32: bool = False, algorithms: Algorithms | None = None):
        self.device, self.tf32 = device, tf32
        self.xp = device.xp
        self.algorithms = algorithms or Algorithms()
        self.gain: Array | None = None  # 0-d: the loss scale, where there is one
        self.control: Array | None = None  # where kernels report faults
        self.step: Array | None = None  # the slot
        self.first = 0
        self._scratch: Mapping[str, Array] = {}
        self._rehearsing = False
        self.asked: set[Product] = set()  # products met so far, the fused ones that were tried included
        self.only_products = False  # whether all but matrix products is left out: what a step is measured against

    # -- memory --

    def empty(self, nbytes: int) -> Array:
        """`nbytes` of uninitialised memory, as a 1-D uint8 array."""
        return self.device.empty(nbytes)

    def scratch(
        self,
        rows: int,
        sizes: tuple[int, ...],
        dtype: str,
        activations: tuple[Activation | None, ...],
        objective: Objective,
        accumulates: bool,
    ) -> list[Buffer]:
        """The arrays of its own that this backend needs for a chunk of up to `rows` rows, for the plan."""
        wide = accumulator(dtype)
        itemsizes = (np.dtype(storage(dtype)).itemsize, np.dtype(wide).itemsize)
        numbers, counters = launches.partial_sums(rows, sizes[1:], itemsizes, self.device.multiprocessors)
        return [
            Buffer("partial sums", (numbers,), wide, "of db and J, one for each block"),
            Buffer("counters", (counters,), "uint32", "of blocks that have finished"),
            Buffer("product workspace", (self.device.product_workspace,), "uint8", "of cuBLASLt"),
        ]

    def map_scratch(self, program: Program, size: int, dtype: str) -> list[Buffer]:
        """Nothing: intermediate results stay in registers."""
        return []

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

    def quietly(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns: kernels are silent."""
        return function(*arguments)

    def record(self, run: Callable[[], None]) -> Recording:
        """The operations that `run` calls, recorded. It is rehearsed first: then what must be compiled or timed is."""
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

    def gather(self, source: Array, rows: slice | Array, out: Array, stage: Array | None) -> None:
        """Out = source[rows], cast to out's dtype. Steps gather by `StepKernels.gather`; this is for calls outside them."""
        assert stage is None
        out[...] = source[rows]

    def gemm(self, A: Array, B: Array, C: Array, accumulate: bool = False) -> None:
        """C = A B, or C += A B. All may be transposed views."""
        A, B, C = row_major(A, B, C)
        addresses = tuple(self.device.address(x) for x in (A, B, C))
        product = describe(A, B, C, accumulate, addresses, self.tf32)
        settling = accumulate and not self._rehearsing and product not in self.algorithms.chosen
        before = C.copy() if settling else None  # what is timed accumulates, too
        algorithm = self._algorithm(product, lambda one: self._multiply(product, one, addresses))
        if before is not None:
            C[...] = before
        if not self._rehearsing:
            self._multiply(product, algorithm, addresses)

    def _multiply(self, product: Product, algorithm: bytes, addresses: tuple[int, ...], bias: int = 0, aux: int = 0) -> None:
        A, B, C = addresses
        if "product workspace" not in self._scratch:
            self._scratch = {**self._scratch, "product workspace": self.device.empty(self.device.product_workspace)}
        workspace = self.device.address(self._scratch["product workspace"])
        self.device.multiply(product, algorithm, B, A, C, bias, aux, workspace)

    def _algorithm(self, product: Product, run: Callable[[bytes], None]) -> bytes:
        """The algorithm of a product: the one settled before, or else the fastest of the candidates."""
        known = self.algorithms.chosen
        self.asked.add(product)
        if product not in known:
            candidates = self.device.algorithms(product)
            if self.algorithms.deterministic or len(candidates) == 1:
                run(candidates[0])  # loads what the first call loads, before any capture
                known[product] = candidates[0]
            else:
                known[product] = min(candidates, key=lambda one: self._seconds(lambda: run(one)))
        return known[product]

    def _seconds(self, run: Callable[[], None]) -> float:
        """How long a product takes; for ever, where the library refuses it."""
        try:
            return self.device.seconds(run)
        except Refused:
            return math.inf

    def layer(self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array) -> None:
        """S = A W + b; Z = σ(S): one product with the activation in its epilogue where that is faster, else two launches."""
        fused = None if self.only_products else self._epilogue(A, W, b, activation, S, Z)
        if fused is None:
            self.gemm(A, W, S)
            self.bias_activation(S, b, activation, Z)
        elif not self._rehearsing:
            fused()

    def _epilogue(
        self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array
    ) -> Callable[[], None] | None:
        """The layer as one product, if cuBLASLt has it and it was timed to be faster than two launches; None otherwise."""
        epilogue = EPILOGUES.get(activation.name, "") if activation in OWN else ""
        if b is None or not epilogue or b.dtype != Z.dtype or self.algorithms.deterministic:
            return None
        keep = S if Z is not S and activation.slope_reads_s else None
        addresses = tuple(self.device.address(x) for x in (A, W, Z))
        bias, aux = self.device.address(b), 0 if keep is None else self.device.address(keep)
        product = describe(A, W, Z, False, (*addresses, bias, *([aux] if aux else [])), self.tf32, epilogue)
        self.asked.add(product)
        if product not in self.algorithms.fused:
            self.algorithms.fused[product] = self._fusing_pays(product, addresses, bias, aux, (A, W, b, activation, S, Z))
        if not self.algorithms.fused[product]:
            return None
        return functools.partial(self._multiply, product, self.algorithms.chosen[product], addresses, bias, aux)

    def _fusing_pays(self, product: Product, addresses: tuple[int, ...], bias: int, aux: int, layer: tuple[Any, ...]) -> bool:
        A, W, b, activation, S, Z = layer
        candidates = self.device.algorithms(product)
        if not candidates:
            return False

        def apart() -> None:
            self.gemm(A, W, S)
            self.bias_activation(S, b, activation, Z)

        def fused(one: bytes) -> float:
            return self._seconds(lambda: self._multiply(product, one, addresses, bias, aux))

        rehearsing, self._rehearsing = self._rehearsing, False
        try:
            apart()  # settles the product's own algorithm
            times = [fused(one) for one in candidates]
            self.algorithms.chosen[product] = candidates[times.index(min(times))]
            return min(times) < self.device.seconds(apart)
        finally:
            self._rehearsing = rehearsing

    def bias_activation(self, S: Array, b: Array | None, activation: Activation, Z: Array) -> None:
        """S += b; Z = σ(S), row by row, less what is dropped. Z may be S; S itself is kept only where the slope reads it."""
        m, n = S.shape
        if activation.rowwise:
            launch = launches.row_warps(m, self.device.multiprocessors)
            self.launch(cuda_source.text("softmax.cu"), f"softmax<{_type(S)}>", launch, S, b, Z, m, n)
            return
        keep = Z is not S and activation.slope_reads_s
        tiled = self._tiles(S, S, Z)
        source = cuda_source.text("bias_activation.cu", cuda_source.activation(activation))
        instance = f"<{_type(S)}, Formula, {tiled.vector}, {_bool(keep)}>"
        if isinstance(activation, Dropped):
            masks = self.step, self.first, np.uint32(activation.key), np.uint32(activation.threshold)
            self.launch(source, f"bias_activation_dropout{instance}", tiled.launch, S, b, Z, m, n, *masks)
        else:
            self.launch(source, f"bias_activation{instance}", tiled.launch, S, b, Z, m, n)

    def activation_gradient(
        self, G: Array, S: Array, Z: Array, activation: Activation, D: Array, db: Array | None, accumulate: bool = False
    ) -> None:
        """D = G ⊙ σ'(S, Z); db = Σ_rows D, or db += Σ_rows D. D may be G or Z; S, Z and G are otherwise kept."""
        m, n = Z.shape
        if activation.rowwise:
            launch = launches.row_warps(m, self.device.multiprocessors)
            self.launch(cuda_source.text("softmax.cu"), f"softmax_gradient<{_type(Z)}>", launch, G, Z, D, m, n)
            if db is not None:
                self._column_sums(D, db, accumulate)
            return
        self._gradient(G, S, Z, activation, D, db, accumulate)

    def curvature(
        self, G: Array, H: Array, T: Array, S: Array, Z: Array, activation: Activation, D: Array, db: Array | None,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        """D = G ⊙ σ' + H ⊙ T ⊙ σ'', the derivative of ⟨H, σ' ⊙ T⟩ beside G's; db as in `activation_gradient`."""
        if activation.rowwise:
            bend_softmax(G, H, T, Z)
            self.activation_gradient(T, S, Z, activation, D, db, accumulate)
            return
        bent = Activation(f"{activation.name} bent", "s", activation.curvature, activation.parameter)
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
        self._gradient(D, D, D, Activation("identity", "s", "1"), None, db, accumulate)

    def _gradient(
        self, G: Array, S: Array, Z: Array, activation: Activation, D: Array | None, db: Array | None, accumulate: bool
    ) -> None:
        m, n = Z.shape
        tiled = self._tiles(Z, *(x for x in (G, S, Z, D) if x is not None))
        source = cuda_source.text("activation_gradient.cu", cuda_source.activation(activation))
        name = f"activation_gradient<{_type(Z)}, Formula, {tiled.vector}, {launches.THREADS}>"
        across, down = tiled.launch.grid
        partials, counters = (None, None) if db is None else self.partials(down * n, across, db.dtype)
        self.launch(source, name, tiled.launch, G, S, Z, D, db, partials, counters, m, n, np.int32(accumulate))

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
        """J += Σ k ℓ(x, Y), D = gain k ∂ℓ/∂x; with `db` also its sum over rows. x is S[L] if matched, else Z[L]; D may be x."""
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
        given = slot, self.control, targets, weights, np.int32(isinstance(k, SlotRows) or k.ndim > 0)
        types = ", ".join([_type(x), cuda_source.TYPES[stored], cuda_source.TYPES[weighed]])
        if objective.loss.rowwise:
            item = np.dtype(wide).itemsize
            launch, fused = launches.cross_entropy(m, n, item, self.device.multiprocessors)
            sums = db if fused else None
            partials, counters = self.partials(launch.grid[0] * (1 + n), 2, wide)
            launch = launch._replace(shared=0 if sums is None else launch.shared)
            most = np.inf if objective.loss.most is None else objective.loss.most
            self.launch(
                cuda_source.text("losses.cu"), f"softmax_cross_entropy<{types}>", launch, x, *given, np.int32(labels), scale,
                self.gain, D, sums, J, partials, counters, self.first, m, n, np.int32(accumulate), np.dtype(wide).type(most),
            )  # fmt: skip
            if db is not None and not fused:
                self._column_sums(D, db, accumulate)
            return
        tiled = self._tiles(x, x, D)
        across, down = tiled.launch.grid
        partials, counters = self.partials(tiled.partials + down * n, across + 1, wide)
        name = f"elementwise_loss<{types}, Formula, {tiled.vector}, {launches.THREADS}>"
        self.launch(
            cuda_source.text("losses.cu", cuda_source.loss(objective)), name, tiled.launch, x, *given, scale, self.gain, D, db,
            J, partials, counters, self.first, m, n, np.int32(accumulate),
        )  # fmt: skip

    def _tiles(self, like: Array, *arrays: Array) -> launches.Tiled:
        """The launch over a matrix, its vector width by the addresses of all arrays that are read and written along with it."""
        m, n = like.shape
        together = alignment(*(self.device.address(array) for array in arrays))
        vector = launches.vector_width(n, like.dtype.itemsize, together)
        return launches.tiles(m, n, vector, self.device.multiprocessors)

    def map(self, program: Program, arrays: Mapping[str, Array], scalars: Mapping[str, Array]) -> None:
        """Elementwise statements over up to four flat vectors in one pass; the scalars are read now."""
        size = next(iter(arrays.values())).size
        values = self.xp.asarray(np.array(2 * [float(scalars[key]) for key in program.folded] or [0.0]))
        k = values.astype(next(iter(arrays.values())).dtype)
        names = tuple(sorted(program.scalars - {"t", "clip", "unscale"}))  # which the kernel's own `fold` declares
        self.update(program, arrays, k, None, size, None, names, (), "")

    def update(
        self, program: Program, arrays: Mapping[str, Array], k: Array, low: Array | None, weights: int, control: Array | None,
        settings: tuple[str, ...], flags: tuple[str, ...], kept: str,
    ) -> None:  # fmt: skip
        """The statements entry by entry, with scalars `k` for the first `weights` entries, then those behind for the rest."""
        vectors = list(arrays.values())
        first = vectors[0]
        vector = max(1, 16 // first.dtype.itemsize) if alignment(*map(self.device.address, vectors)) >= 16 else 1
        source = cuda_source.text("updates.cu", cuda_source.update(program, list(arrays), settings, flags, kept))
        name = f"update<{_type(first)}, {'half_t' if low is None else _type(low)}, Formula, {vector}>"
        four = [*vectors, *[None] * (4 - len(vectors))]
        self.launch(source, name, launches.each(first.size, vector), *four, low, k, control, weights, first.size)

    def sum_squares(self, v: Array) -> float:
        """Σ v², as a float (waits for it)."""
        return float(self.xp.sum(self.xp.square(v, dtype=self.xp.float64)))

    def sum_abs(self, v: Array) -> float:
        """Σ |v|, as a float (waits for it)."""
        return float(self.xp.sum(self.xp.abs(v), dtype=self.xp.float64))

    def copy(self, source: Array, destination: Array) -> None:
        """Destination = source, cast if need be."""
        destination[...] = source

    def synchronize(self) -> None:
        """Wait until everything asked for so far is done."""
        self.device.synchronize()


def _type(array: Array) -> str:
    """The C++ type of a buffer's entries."""
    return cuda_source.TYPES[STORAGE[array.dtype.name]]


def _bool(value: bool) -> str:
    return str(value).lower()
