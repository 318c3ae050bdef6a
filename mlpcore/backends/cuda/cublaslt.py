"""Matrix products by cuBLASLt, called through ctypes.

`nvmath.bindings` is not used because it cannot be loaded without a driver, so that nothing here
could be tested without a GPU; it would also be one more package whose CUDA version must match
CuPy's. The library is the one that CuPy itself uses, found by `cuda.pathfinder` (which CuPy
requires). The constants below are those of the C interface, the same in CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
import threading
from typing import NamedTuple

from mlpcore.backends.cuda.gemm import Product, UnsupportedAlgorithm

# cudaDataType_t
TYPES = {"float32": 0, "tf32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
# cublasComputeType_t
COMPUTE = {"float32": 68, "tf32": 77, "float64": 70, "float16": 68, "bfloat16": 68}
# cublasLtEpilogue_t: gelu with bias and aux, the others with bias
EPILOGUES = {"": 1, "bias": 4, "relu": 6, "gelu": 164}
# cublasLtMatmulDescAttributes_t
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_STRIDE = 3, 4, 7, 8, 11, 12
# cublasLtMatmulPreferenceAttributes_t: workspace, alignments of A, B, C, D
MAX_WORKSPACE, LEFT, RIGHT, BEFORE, AFTER = 1, 5, 6, 7, 8
RESULT = 96  # bytes of cublasLtMatmulHeuristicResult_t; the first 64 are the algorithm
STATE = 72  # offset of the status in cublasLtMatmulHeuristicResult_t
CANDIDATES = 8  # number of candidates requested from the heuristic


class Descriptors(NamedTuple):
    """The descriptors of a product: its operation and the layouts of its matrices."""

    operation: ctypes.c_void_p
    left: ctypes.c_void_p
    right: ctypes.c_void_p
    result: ctypes.c_void_p


class CublasLt:
    """The library, and descriptors of the products requested so far.

    Descriptors need no driver; everything else does.

    Args:
        path: the shared library; None finds the one that CuPy uses.

    Raises:
        OSError: the library cannot be found or loaded.
    """

    def __init__(self, path: str | None = None):
        if path is None:
            from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

            try:
                path = load_nvidia_dynamic_lib("cublasLt").abs_path
            except DynamicLibNotFoundError as error:
                raise OSError(str(error)) from None
        self._library = ctypes.CDLL(path)
        self._handle: ctypes.c_void_p | None = None
        # held from setting a descriptor's pointers until the library has read them
        self._lock = threading.Lock()
        self._descriptors: dict[Product, Descriptors] = {}
        self._multiply = self._library.cublasLtMatmul
        self._multiply.argtypes = [ctypes.c_void_p] * 14 + [ctypes.c_size_t, ctypes.c_void_p]
        self._library.cublasLtGetVersion.restype = ctypes.c_size_t

    @property
    def version(self) -> int:
        """Version in NVIDIA's numbering, e.g. 130000."""
        return int(self._library.cublasLtGetVersion())

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with cuBLAS status {status}")

    def _set(
        self, function: str, thing: ctypes.c_void_p, attribute: int, value: ctypes._SimpleCData[int]
    ) -> None:
        self._call(
            function,
            thing,
            ctypes.c_int(attribute),
            ctypes.byref(value),
            ctypes.c_size_t(ctypes.sizeof(value)),
        )

    def _open(self) -> ctypes.c_void_p:
        """Return the library's handle, created once."""
        if self._handle is None:
            handle = ctypes.c_void_p()
            self._call("cublasLtCreate", ctypes.byref(handle))
            self._handle = handle
        return self._handle

    # -- descriptors --

    def describe(self, product: Product) -> Descriptors:
        """Return the descriptors of a product, created once."""
        if product not in self._descriptors:
            operation = ctypes.c_void_p()
            scale = TYPES["float64" if product.dtype == "float64" else "float32"]
            self._call(
                "cublasLtMatmulDescCreate",
                ctypes.byref(operation),
                ctypes.c_int(COMPUTE[product.dtype]),
                ctypes.c_int(scale),
            )
            for attribute, value in (
                (TRANSA, int(product.transpose_left)),
                (TRANSB, int(product.transpose_right)),
                (EPILOGUE, EPILOGUES[product.epilogue]),
            ):
                self._set(
                    "cublasLtMatmulDescSetAttribute", operation, attribute, ctypes.c_int32(value)
                )
            if product.epilogue == "gelu":
                stride = ctypes.c_int64(product.result_stride)
                self._set("cublasLtMatmulDescSetAttribute", operation, AUX_STRIDE, stride)
            p = product
            left = (p.k, p.m) if p.transpose_left else (p.m, p.k)
            right = (p.n, p.k) if p.transpose_right else (p.k, p.n)
            self._descriptors[product] = Descriptors(
                operation,
                self._layout(p.dtype, *left, p.left_stride),
                self._layout(p.dtype, *right, p.right_stride),
                self._layout(p.result_dtype, p.m, p.n, p.result_stride),
            )
        return self._descriptors[product]

    def _layout(self, dtype: str, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self._call(
            "cublasLtMatrixLayoutCreate",
            ctypes.byref(layout),
            ctypes.c_int(TYPES[dtype]),
            ctypes.c_uint64(rows),
            ctypes.c_uint64(columns),
            ctypes.c_int64(stride),
        )
        return layout

    def _point(self, operation: ctypes.c_void_p, bias: int, aux: int) -> None:
        for attribute, address in ((BIAS_POINTER, bias), (AUX_POINTER, aux)):
            if address:
                self._set(
                    "cublasLtMatmulDescSetAttribute", operation, attribute, ctypes.c_uint64(address)
                )

    # -- with a driver --

    def algorithms(self, product: Product, workspace: int) -> list[bytes]:
        """Return the heuristic's candidates, the most likely first; none for unsupported products.

        Must not be called while capturing.
        """
        with self._lock:
            return self._candidates(product, workspace)

    def _candidates(self, product: Product, workspace: int) -> list[bytes]:
        p, descriptors = product, self.describe(product)
        # addresses aligned like the real ones: the heuristic checks only the alignment
        bias = p.bias_alignment if p.epilogue else 0
        aux = p.aux_alignment if p.epilogue == "gelu" else 0
        self._point(descriptors.operation, bias, aux)
        preference = ctypes.c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        try:
            setter = "cublasLtMatmulPreferenceSetAttribute"
            self._set(setter, preference, MAX_WORKSPACE, ctypes.c_size_t(workspace))
            # the default is 256, more than a matrix inside the flat vector may have
            for attribute, alignment in (
                (LEFT, p.left_alignment),
                (RIGHT, p.right_alignment),
                (BEFORE, p.result_alignment),
                (AFTER, p.result_alignment),
            ):
                self._set(setter, preference, attribute, ctypes.c_uint32(alignment))
            found, count = ctypes.create_string_buffer(RESULT * CANDIDATES), ctypes.c_int()
            operation, left, right, result = descriptors
            status = self._library.cublasLtMatmulAlgoGetHeuristic(
                self._open(), operation, left, right, result, result, preference,
                ctypes.c_int(CANDIDATES), found, ctypes.byref(count),
            )  # fmt: skip
        finally:
            self._call("cublasLtMatmulPreferenceDestroy", preference)
        if status not in (0, 15) and not product.epilogue:  # 15: not supported
            raise RuntimeError(
                f"cublasLtMatmulAlgoGetHeuristic failed with cuBLAS status {status} for {product}"
            )
        results = [
            found.raw[RESULT * i : RESULT * (i + 1)]
            for i in range(count.value if status == 0 else 0)
        ]
        return [result[:64] for result in results if not any(result[STATE : STATE + 4])]

    def multiply(
        self,
        product: Product,
        algorithm: bytes,
        left: int,
        right: int,
        result: int,
        bias: int,
        aux: int,
        workspace: int,
        workspace_bytes: int,
        stream: int,
    ) -> None:
        """Run a product on a stream; all operands are device addresses."""
        number = ctypes.c_double if product.dtype == "float64" else ctypes.c_float
        one, beta = number(1), number(1 if product.accumulate else 0)
        with self._lock:
            d = self.describe(product)
            self._point(d.operation, bias, aux)
            status = self._multiply(
                self._open(), d.operation, ctypes.addressof(one), left, d.left, right, d.right,
                ctypes.addressof(beta), result, d.result, result, d.result, algorithm, workspace,
                workspace_bytes, stream,
            )  # fmt: skip
        if status:
            raise UnsupportedAlgorithm(
                f"cublasLtMatmul failed with cuBLAS status {status} for {product}"
            )
