"""Matrix products; the algorithm of each is chosen when it first runs."""

from __future__ import annotations

import math
from collections.abc import Callable

from mlpcore.backends.cuda.device import CudaDevice
from mlpcore.backends.cuda.gemm import Algorithms, Product, UnsupportedAlgorithm, describe
from mlpcore.backends.cuda.launcher import Launcher
from mlpcore.core.ops import Array, row_major


class ProductOps(Launcher):
    """The part of the operations that multiplies matrices.

    Args:
        device: the device.
        tf32: True if float32 products round their factors to 10 bits.
        algorithms: the choice of algorithms, shared with other operations.

    Attributes:
        asked: products requested so far, and the fused ones that were tried.
    """

    def __init__(
        self, device: CudaDevice, tf32: bool = False, algorithms: Algorithms | None = None
    ):
        super().__init__(device)
        self.tf32 = tf32
        self.algorithms = algorithms or Algorithms()
        self.asked: set[Product] = set()

    def gemm(self, A: Array, B: Array, C: Array, accumulate: bool = False) -> None:
        """Set C = A B, or C += A B. All may be transposed views."""
        A, B, C = row_major(A, B, C)
        addresses = self._addresses(A, B, C)
        product = describe(A, B, C, accumulate, addresses, self.tf32)
        self.asked.add(product)
        if not self.algorithms.is_ready(product):
            # candidates under test accumulate, too
            before = C.copy() if accumulate and not self._rehearsing else None
            self._choose(product, lambda one: self._multiply(product, one, addresses))
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
        """Run a product of the matrices at these addresses."""
        A, B, C = addresses
        if "product workspace" not in self._scratch:
            workspace = self.device.empty(self.device.product_workspace)
            self._scratch = {**self._scratch, "product workspace": workspace}
        address = self.device.address(self._scratch["product workspace"])
        self.device.multiply(product, algorithm, B, A, C, bias, aux, address)

    def _choose(self, product: Product, run: Callable[[bytes], None]) -> None:
        """Run a product for the first time, with a checkpoint's algorithm or all candidates."""
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
                    able = [one for one in candidates if seconds[one] < math.inf]
                    chosen = min(able, key=seconds.__getitem__, default=None)
                if chosen is None:
                    raise UnsupportedAlgorithm(
                        f"cuBLASLt refuses each of the {len(candidates)} algorithms that it offers "
                        f"for {product}"
                    )
                known.chosen[product] = chosen
            known.ready[product] = known.chosen[product]

    @staticmethod
    def _runs(run: Callable[[bytes], None], algorithm: bytes) -> bool:
        """Run a product with an algorithm; return True if the library supports it."""
        try:
            run(algorithm)
        except UnsupportedAlgorithm:
            return False
        return True

    def _seconds(self, run: Callable[[bytes], None], algorithm: bytes) -> float:
        """Return the seconds that a product takes with an algorithm; inf if it is unsupported."""
        try:
            return self.device.seconds(lambda: run(algorithm))
        except UnsupportedAlgorithm:
            return math.inf
