"""Every formula as compiled for the CPU, against mpmath: the sweep of tests/core, thinned."""

import pytest

from bench import accuracy
from bench.accuracy import BOUND, CASES, DTYPES, QUANTITIES
from mlpcore.backends.compiled import compiler

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not() or "-")
SOME = [
    next(case for case in CASES if case.name == name)
    for name in dict.fromkeys(case.name for case in CASES)
]
SOME += [
    accuracy.Case("binary_cross_entropy of sigmoid", 1.0, 0.3),
    accuracy.Case("poisson of softplus", None, 1.0),
]


def label(case):
    return "-".join(str(x) for x in (case.name, case.parameter, case.y) if x is not None)


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME, ids=label)
def test_every_formula_is_right_to_a_few_units_in_the_last_place(case):
    found = {
        (quantity, dtype): accuracy.worst(case, quantity, dtype, accuracy.compiled_door, thin=11)
        for quantity in QUANTITIES
        for dtype in DTYPES
    }
    assert all(ulp <= BOUND for ulp, _ in found.values()), found
