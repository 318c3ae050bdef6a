"""Matrix products in cuBLASLt's terms: column-major, so that C = A B is passed as Cᵀ = Bᵀ Aᵀ.

A row-major (m, n) array, read as column-major, is its (n, m) transpose: nothing is copied or
transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlpcore.core.ops import Array

# a layer's precision, by the dtype of its arrays
STORAGE = {
    "float32": "float32", "float64": "float64", "float16": "float16", "uint16": "bfloat16",
}  # fmt: skip


class UnsupportedAlgorithm(RuntimeError):
    """The library does not compute a product by an algorithm that it has itself proposed."""


@dataclass(frozen=True)
class Product:
    """D = op(L) op(R) + β D in column-major terms, with D (m, n), op(L) (m, k), op(R) (k, n).

    Attributes:
        m, n, k: dimensions as above.
        transpose_left, transpose_right: True if op transposes.
        left_stride, right_stride, result_stride: leading dimensions, entries from column to column.
        dtype: dtype of L and R: "float64", "float32", "tf32" (float32 rounded on input),
            "bfloat16", "float16".
        result_dtype: dtype of D.
        accumulate: True if β = 1, else β = 0.
        epilogue: the operation applied to D before it is stored: "", "bias" (a bias is added to
            each of its rows), "relu" (with bias), "gelu" (with bias; its input is stored in aux,
            with D's leading dimension).
        left_alignment, right_alignment, result_alignment: powers of two that divide the operands'
            addresses, at most 256.
        bias_alignment, aux_alignment: the same for bias and aux; 256 if absent.
    """

    m: int
    n: int
    k: int
    transpose_left: bool
    transpose_right: bool
    left_stride: int
    right_stride: int
    result_stride: int
    dtype: str
    result_dtype: str
    accumulate: bool
    epilogue: str = ""
    left_alignment: int = 256
    right_alignment: int = 256
    result_alignment: int = 256
    bias_alignment: int = 256
    aux_alignment: int = 256


class Algorithms:
    """The algorithm of each product, chosen once; shared by all operations on a device.

    Args:
        deterministic: True to take cuBLASLt's first candidate without timing.

    Attributes:
        chosen: the algorithms by product; a checkpoint stores them.
        fused: True if an activation is fused into its product, by product; a checkpoint stores it.
        ready: the algorithm with which a product has already run in this process, or None if it
            never will: the first run loads kernels, which is not allowed during a capture.
    """

    def __init__(self, deterministic: bool = False):
        self.deterministic = deterministic
        self.chosen: dict[Product, bytes] = {}
        self.fused: dict[Product, bool] = {}
        self.ready: dict[Product, bytes | None] = {}

    def is_ready(self, product: Product) -> bool:
        """Return True if a product has run with its algorithm, which a checkpoint may change."""
        return product in self.ready and self.ready[product] == self.chosen.get(product)


def operand(array: Array) -> tuple[bool, int]:
    """Return whether an array is a transposed row-major one, and the latter's row stride."""
    item = array.dtype.itemsize
    rows, columns = array.shape
    down, along = array.strides[0] // item, array.strides[1] // item
    if (along == 1 or columns == 1) and (down >= columns or rows == 1):
        return False, max(down, columns) if rows > 1 else columns
    assert down == 1 or rows == 1, (
        f"neither row-major nor the transpose of a row-major array: strides {array.strides}"
    )
    return True, max(along, rows) if columns > 1 else rows


def alignment(*addresses: int) -> int:
    """Return the largest power of two, up to 256, that divides every address."""
    together = 256
    for address in addresses:
        together |= address
    return together & -together


def describe(
    A: Array,
    B: Array,
    C: Array,
    accumulate: bool,
    addresses: tuple[int, int, int],
    tf32: bool = False,
    epilogue: str = "",
    bias: int = 0,
    aux: int = 0,
) -> Product:
    """Return the product C = A B, or C += A B, of row-major arrays or their transposed views.

    C is row-major. `addresses` are those of A, B and C; `bias` and `aux` are also addresses, or 0
    if absent. Left is B and right is A: Cᵀ = Bᵀ Aᵀ, where cuBLASLt reads Bᵀ in B's memory.
    """
    (rows, inner), columns = A.shape, B.shape[1]
    assert (B.shape[0], *C.shape) == (inner, rows, columns), (A.shape, B.shape, C.shape)
    a_transposed, a_stride = operand(A)
    b_transposed, b_stride = operand(B)
    c_transposed, c_stride = operand(C)
    assert not c_transposed
    dtype = STORAGE[A.dtype.name]
    return Product(
        m=columns,
        n=rows,
        k=inner,
        transpose_left=b_transposed,
        transpose_right=a_transposed,
        left_stride=b_stride,
        right_stride=a_stride,
        result_stride=c_stride,
        dtype="tf32" if tf32 and dtype == "float32" else dtype,
        result_dtype=STORAGE[C.dtype.name],
        accumulate=accumulate,
        epilogue=epilogue,
        left_alignment=alignment(addresses[1]),
        right_alignment=alignment(addresses[0]),
        result_alignment=alignment(addresses[2]),
        bias_alignment=alignment(bias),
        aux_alignment=alignment(aux),
    )
