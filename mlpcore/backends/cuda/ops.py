"""The CUDA backend: `core.ops.Ops` by fused kernels and cuBLASLt, on a `CudaDevice`.

Every operation is a launch on the current stream and returns at once. Inside `record` the same
launches become a graph. The algorithm of a product is chosen beforehand: by timing once per shape,
or as cuBLASLt's first candidate (`deterministic`). An activation is fused into its product if
cuBLASLt computes it as accurately as the kernel does, and faster.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mlpcore.backends.cuda.device import CudaDevice
from mlpcore.backends.cuda.eager import CupyReference
from mlpcore.backends.cuda.gemm import Algorithms, Product, describe
from mlpcore.backends.cuda.loss import LossOps
from mlpcore.backends.cuda.products import ProductOps
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core.activation import Activation
from mlpcore.core.activations import resolve
from mlpcore.core.ops import Array, Ops, accumulator

# activations that cuBLASLt can apply itself
EPILOGUES = {"identity": "bias", "relu": "relu", "gelu": "gelu"}
# the sheet's own: a user's activation may have the same name
OWN = [resolve(name) for name in EPILOGUES]
SAMPLE = 64  # rows of a layer on which an epilogue is compared with the kernel
EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "tf32": 2.0**-10,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}


class CudaOps(ProductOps, LossOps):
    """Operations of one stream of work on a CUDA device.

    Args: see `ProductOps`.

    Attributes:
        low: a flat vector and its copy in the precision of the layers; products that add biases
            read views of the first from the second. None if layers have the parameters' precision.
    """

    low: tuple[Array, Array] | None = None

    def layer(
        self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array
    ) -> None:
        """Set S = A W + b and Z = σ(S): in one product if that is faster, else in two launches."""
        fused = None if self.only_products else self._epilogue(A, W, b, activation, S, Z)
        if fused is None:
            self.gemm(A, W, S)
            self.bias_activation(S, b, activation, Z)
        elif not self._rehearsing:
            fused()

    def _epilogue(
        self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array
    ) -> Callable[[], None] | None:
        """Return the layer as one product, or None if that is missing, inexact or slower."""
        epilogue = EPILOGUES.get(activation.name, "") if activation in OWN else ""
        added = None if b is None else self._as_added(b, Z)
        if added is None or not epilogue or self.algorithms.deterministic:
            return None
        keeps = Z is not S and activation.slope_reads_s
        if epilogue == "gelu" and not keeps:
            return None
        addresses, known = self._addresses(A, W, Z), self.algorithms
        bias, aux = self.device.address(added), self.device.address(S) if keeps else 0
        product = describe(A, W, Z, False, addresses, self.tf32, epilogue, bias, aux)
        self.asked.add(product)
        if not known.is_ready(product):
            run = functools.partial(self._multiply, product, addresses=addresses, aux=aux)
            with self.device.lock:
                if product not in known.fused:
                    layer = A, W, b, activation, S, Z
                    known.fused[product] = self._fusing_pays(product, run, bias, layer)
                elif known.fused[product]:  # set by a checkpoint
                    run(known.chosen[product], bias=bias)
                known.ready[product] = known.chosen.get(product)
        if not known.fused[product]:
            return None
        algorithm = known.chosen[product]
        return functools.partial(self._multiply, product, algorithm, addresses, bias, aux)

    def _as_added(self, b: Array, Z: Array) -> Array | None:
        """Return the bias in the precision of Z, as a product adds it, or None."""
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
        """Return True if an epilogue is accurate and faster; if so, note its algorithm."""
        A, W, b, activation, S, Z = layer

        def apart() -> None:
            self.gemm(A, W, S)
            self.bias_activation(S, b, activation, Z)

        rehearsing, self._rehearsing = self._rehearsing, False
        try:
            apart()  # chooses the algorithm of the plain product
            right = self._right(product, run, layer)
            apart()  # later operations read these arrays, which must not contain NaN
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
        """Return the candidates that keep non-finite values and are as accurate as the kernel."""
        A, W, _, activation, S, Z = layer
        right = list(self.device.algorithms(product))
        for special in (False, True) if right else ():
            wide, narrow = self._trial_biases(product, Z, special)
            self.gemm(A, W, S)
            size = float(abs(self._sample(S)).max()) + 4
            self.bias_activation(S, wide, activation, Z)
            kernels, passed = (self._sample(S), self._sample(Z)), []
            for one in right:
                S[:SAMPLE] = Z[:SAMPLE] = 0
                if not self._runs(functools.partial(run, bias=self.device.address(narrow)), one):
                    continue
                products = self._sample(S), self._sample(Z)
                if special:
                    good = _as_finite(activation, products, kernels)
                else:
                    good = _as_exact(activation, product, products, kernels, size)
                if good:
                    passed.append(one)
            right = passed
        return right

    def _trial_biases(self, product: Product, Z: Array, special: bool) -> tuple[Array, Array]:
        """Return a bias for the kernel and one for the product, all finite or all non-finite."""
        n = product.m
        memory, _ = self.partials(2 * n + 128, 1, accumulator(product.result_dtype))
        memory = self._aligned(memory)
        wide = memory[:n]
        narrow = wide if wide.dtype == Z.dtype else self._aligned(memory[n:]).view(Z.dtype)[:n]
        # exact in every precision
        numbers = (math.nan, math.inf, -math.inf) if special else (-3.0, -0.5, 0.25, 1.5, 4.0)
        for i, number in enumerate(numbers):
            wide[i :: len(numbers)] = number
            if narrow is not wide:
                bits = int(np.float32(number).view(np.uint32)) >> 16
                narrow[i :: len(numbers)] = bits if product.result_dtype == "bfloat16" else number
        return wide, narrow

    def _aligned(self, array: Array) -> Array:
        """Return the array from its first aligned address on."""
        return array[-self.device.address(array) % 256 // array.dtype.itemsize :]

    def _sample(self, array: Array) -> np.ndarray:
        """Return the first rows of an array, in double."""
        host = self.device.to_host(array[:SAMPLE])
        if host.dtype == np.uint16:  # bfloat16
            host = (host.astype(np.uint32) << 16).view(np.float32)
        return host.astype(np.float64)


def new_operations(
    device: CudaDevice, tf32: bool = False, deterministic: bool = False
) -> Callable[[], Ops]:
    """Return `Device.operations` of a CUDA device: CuPy's own where cuBLASLt is missing."""
    if not device.captures:
        return functools.partial(CupyReference, device.xp)
    algorithms = device.choices.setdefault(deterministic, Algorithms(deterministic))
    return functools.partial(CudaOps, device, tf32, algorithms)


Sample = tuple[np.ndarray, np.ndarray]  # rows of S and Z, in double


def _as_finite(activation: Activation, found: Sample, kernels: Sample) -> bool:
    """Return True if the same entries are finite as in the kernel's result."""
    (t, y), (s, z) = found, kernels
    if not np.array_equal(np.isfinite(y), np.isfinite(z)):
        return False
    return not activation.slope_reads_s or np.array_equal(np.isfinite(t), np.isfinite(s))


def _as_exact(
    activation: Activation, product: Product, found: Sample, kernels: Sample, size: float
) -> bool:
    """Return True if a result equals the kernel's up to rounding from another order of summation.

    Args:
        activation: activation of the layer.
        product: product of the layer, with its epilogue.
        found: the product's result.
        kernels: the kernel's result.
        size: the largest |s|.
    """
    (t, y), (s, z) = found, kernels
    bound = size * EPSILON[product.dtype] * (16 + 4 * math.sqrt(product.k))
    if not abs(y - z).max() <= bound:
        return False
    if not activation.slope_reads_s:
        return True
    exact = _error(activation, t, y) <= 2 * _error(activation, s, z)
    return bool(abs(t - s).max() <= bound) and exact


def _error(activation: Activation, s: np.ndarray, z: np.ndarray) -> float:
    """Return the largest distance of z from σ(s), relative to |s|."""
    exact = np.empty_like(s)
    NumpyOps().bias_activation(s.copy(), None, activation, exact)
    return float((abs(z - exact) / (abs(s) + 0.01)).max())
