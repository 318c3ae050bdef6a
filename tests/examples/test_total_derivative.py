"""examples/total_derivative.py: which of the three answers is right, and by what factor the others
are wrong.
"""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

example = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "examples" / "total_derivative.py"))
)


@pytest.mark.parametrize(("x", "y"), [(1.5, 0.7), (0.3, 2.0), (4.0, -1.0)])
def test_only_substitution_before_the_derivative_is_right_and_the_others_miss_a_factor_of_two(x, y):
    rates, measured = example.three_answers(x, y)
    assert rates["substituted before"] == pytest.approx(measured, rel=1e-8)
    for name in ("partial derivative by x", "substituted afterwards"):
        assert 2 * rates[name] == pytest.approx(measured, rel=1e-8)


@pytest.mark.parametrize("w", [1.5, -0.4])
def test_the_engines_tied_gradient_is_the_sum_of_the_two_partial_ones(w):
    first, second = example.two_uses(False, w)
    total, same = example.two_uses(True, w)
    assert total == same == pytest.approx(first + second)
    assert first == pytest.approx(second) == pytest.approx(4 * math.pi / 3 * 0.7 * w)
    assert total == pytest.approx(8 * math.pi / 3 * 0.7 * w)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_use_of_an_autoencoders_matrix_is_not_the_derivative(seed):
    one_use, total, numeric = example.autoencoder(seed)
    assert total == pytest.approx(numeric, rel=1e-7)
    assert abs(one_use - numeric) > 0.01 * abs(numeric)
