"""Every formula on a real GPU against mpmath: its exp, tanh and division, and the products that its
compiler fuses.
"""

import numpy as np
import pytest

from bench import accuracy
from bench.accuracy import BOUND, CASES, DTYPES, QUANTITIES
from mlpcore.backends.cuda.ops import CudaOps
from mlpcore.core import activations, losses


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.parameter}-{case.y}")
def test_every_formula_is_right_to_a_few_units_in_the_last_place(case, gpu):
    def door(case, quantity, x):
        with gpu.active():
            S = gpu.xp.array(x)[:, None]
            Z = gpu.xp.empty_like(S)
            CudaOps(gpu).bias_activation(S, None, case.formula(quantity, x.dtype.name), Z)
            return gpu.to_host(Z)[:, 0]

    found = {
        (quantity, dtype): accuracy.worst(case, quantity, dtype, door, thin=5)
        for quantity in QUANTITIES
        for dtype in DTYPES
    }
    assert all(ulp <= BOUND for ulp, _ in found.values()), found


@pytest.mark.parametrize("sure", [5.0, 20.0, 60.0])
def test_cross_entropy_keeps_its_digits_where_the_label_is_sure(sure, device):
    objective = losses.pair(losses.CROSS_ENTROPY, activations.SOFTMAX)
    with device.active():
        xp, dtype = device.xp, np.float32
        S, Y = xp.array([[sure, 0.0, -1.0]], dtype), xp.array([0])
        D, J, one = xp.empty_like(S), xp.zeros((), dtype), xp.array(1.0, dtype)
        CudaOps(device).loss(S, Y, one, objective, D, None, J, False)
        D, J = device.to_host(D), float(device.to_host(J))
    rest = np.exp(-sure) + np.exp(-1 - sure)
    np.testing.assert_allclose(
        D[0], np.array([-rest, np.exp(-sure), np.exp(-1 - sure)]) / (1 + rest), rtol=1e-6
    )
    np.testing.assert_allclose(J, np.log1p(rest), rtol=1e-6)
