"""The text of the CUDA kernels' formulas, compiled for a CPU, against mpmath: the sweep of
tests/core, thinned.
"""

import os
import shutil

import pytest

from bench import accuracy
from bench.accuracy import BOUND, CASES, DTYPES, QUANTITIES
from mlpcore.backends import formula_text
from mlpcore.backends.cuda import grids as launches
from mlpcore.backends.cuda import source as cuda_source
from tests.backends.cuda.emulator import compiler
from tests.backends.cuda.emulator.device import CpuDevice

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and "CI" not in os.environ, reason="needs g++"
)
SOME = [
    next(case for case in CASES if case.name == name)
    for name in dict.fromkeys(case.name for case in CASES)
]
SOME += [
    accuracy.Case("binary_cross_entropy of sigmoid", 1.0, 0.3),
    accuracy.Case("poisson of softplus", None, 1.0),
]
TYPES = {"float32": "float", "float64": "double"}


def kernel(case, quantity, dtype):
    """The source and the name of the kernel that computes a formula."""
    source = cuda_source.text(
        "bias_activation.cu", formula_text.activation(case.formula(quantity, dtype))
    )
    return source, f"bias_activation<{TYPES[dtype]}, Formula, 1, false>"


for case_ in SOME:  # one run of g++ for all of them, when the first is launched
    for dtype_ in DTYPES:
        for quantity_ in QUANTITIES:
            compiler.kernel(*kernel(case_, quantity_, dtype_))


def cuda_door(case, quantity, x):
    device = CpuDevice()
    s, z = (device.empty(x.nbytes).view(x.dtype).reshape(len(x), 1) for _ in range(2))
    s[:, 0] = x
    arguments = [s, None, z, len(x), 1]
    device.launch(
        device.kernel(*kernel(case, quantity, x.dtype.name)),
        launches.tiles(len(x), 1, 1, 2).launch,
        arguments,
    )
    return z[:, 0].copy()


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_every_formula_is_right_to_a_few_units_in_the_last_place(case):
    found = {
        (quantity, dtype): accuracy.worst(case, quantity, dtype, cuda_door, thin=11)
        for quantity in QUANTITIES
        for dtype in DTYPES
    }
    assert all(ulp <= BOUND for ulp, _ in found.values()), found
