"""cuBLASLt reads the descriptors as they are meant."""

import ctypes

import pytest

from mlpcore.backends.cuda import cublaslt
from mlpcore.backends.cuda import gemm as products

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def library():
    """cuBLASLt; its descriptors need no driver, but its wheel takes half a gigabyte, so that CI
    does without.
    """
    pytest.importorskip("cuda.pathfinder", reason="cuda-pathfinder is not installed")
    try:
        return cublaslt.CublasLt()
    except OSError:
        pytest.skip("cuBLASLt is not installed")


@pytest.mark.parametrize("dtype", ["float64", "float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("epilogue", ["", "bias", "relu", "gelu"])
def test_cublaslt_understands_the_descriptors(library, dtype, epilogue):
    result = "float32" if dtype == "tf32" else dtype
    product = products.Product(12, 7, 5, True, False, 6, 8, 16, dtype, result, False, epilogue)
    d = library.describe(product)

    def read(function, thing, attribute, kind):
        value, written = kind(), ctypes.c_size_t()
        status = getattr(library._library, function)(
            thing,
            ctypes.c_int(attribute),
            ctypes.byref(value),
            ctypes.c_size_t(ctypes.sizeof(kind)),
            ctypes.byref(written),
        )
        assert (status, written.value) == (0, ctypes.sizeof(kind))
        return value.value

    layout = [
        ("cublasLtMatrixLayoutGetAttribute", at, kind)
        for at, kind in (
            (0, ctypes.c_uint32),
            (2, ctypes.c_uint64),
            (3, ctypes.c_uint64),
            (4, ctypes.c_int64),
        )
    ]
    number = cublaslt.TYPES[dtype]
    for thing, expected in (
        (d.left, (number, 5, 12, 6)),
        (d.right, (number, 5, 7, 8)),
        (d.result, (number, 12, 7, 16)),
    ):
        assert tuple(read(function, thing, at, kind) for function, at, kind in layout) == expected
    operation = {
        at: read("cublasLtMatmulDescGetAttribute", d.operation, at, ctypes.c_int32)
        for at in (0, 1, cublaslt.TRANSA, cublaslt.TRANSB, cublaslt.EPILOGUE)
    }
    scale = 1 if dtype == "float64" else 0
    assert list(operation.values()) == [
        cublaslt.COMPUTE[dtype],
        scale,
        1,
        0,
        cublaslt.EPILOGUES[epilogue],
    ]
