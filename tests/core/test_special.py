"""erf, erfc, normcdf and normpdf as NumPy and ONNX compute them, against 40 digits; their
coefficients, fitted anew.
"""

import warnings

import mpmath
import numpy as np
import pytest
from mpmath import mp

from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import activations, special
from mlpcore.core.program import Program

EXACT = {"erf": mpmath.erf, "erfc": mpmath.erfc, "normcdf": mpmath.ncdf, "normpdf": mpmath.npdf}
ENDS = {"float32": 15, "float64": 39}


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(40):
        yield


def computed(name, x):
    compiled = Program(f"out = {name}(x)", frozenset(), x.dtype.name)
    arrays = {"x": x, "out": np.empty_like(x)}
    with np.errstate(all="ignore"):
        NumpyOps().map(
            compiled,
            arrays,
            {key: np.asarray(number, x.dtype) for key, number in compiled.fold({}).items()},
        )
    return arrays["out"]


def off(found, x, function):
    """The largest error in units in the last place, below the smallest normal number in its."""
    info = np.finfo(x.dtype)
    errors = []
    for one, at in zip(found.tolist(), x.tolist(), strict=True):
        exact = function(mp.mpf(at))
        last = max(abs(exact), mp.mpf(float(info.tiny)))
        errors.append(abs(one - exact) / mp.ldexp(1, int(mp.floor(mp.log(last, 2))) + info.machep))
    return float(max(errors))


@pytest.mark.parametrize("dtype", ENDS)
@pytest.mark.parametrize("name", EXACT)
def test_each_is_right_to_a_few_units_from_the_smallest_numbers_to_the_largest(name, dtype):
    end, far = ENDS[dtype], np.logspace(-38, 38, 77)
    x = np.concatenate(
        [np.linspace(-end, end, 601), np.linspace(-1.3, 1.1, 200), -far, [0.0], far]
    ).astype(dtype)
    assert off(computed(name, x), x, EXACT[name]) <= {"erf": 3, "normpdf": 4}.get(name, 8)


@pytest.mark.parametrize("dtype", ENDS)
def test_the_tails_are_not_0_before_they_must_be_and_the_ends_are_exact(dtype):
    tiny = float(np.finfo(dtype).tiny)
    for name, x in (
        ("erfc", mpmath.findroot(lambda x: mpmath.log(mpmath.erfc(x) / tiny), ENDS[dtype] / 1.5)),
        ("normcdf", mpmath.findroot(lambda x: mpmath.log(mpmath.ncdf(x) / tiny), -ENDS[dtype])),
    ):
        found = computed(name, np.array([float(x)], dtype))
        assert found == pytest.approx(tiny, rel=1e-3)
    ends = np.array([-np.inf, -1e30, 1e30, np.inf, np.nan, 0], dtype)
    for name, values in (("erf", [-1, -1, 1, 1, np.nan, 0]), ("erfc", [2, 2, 0, 0, np.nan, 1]),
                         ("normcdf", [0, 0, 1, 1, np.nan, 0.5])):  # fmt: skip
        np.testing.assert_allclose(computed(name, ends), values, rtol=np.finfo(dtype).eps)
    assert np.isnan(computed("normpdf", ends)[4])


# -- gelu_erf --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ENDS)
def test_value_slope_and_curvature_of_the_exact_gelu_are_right_in_the_tails_and_at_0(dtype):
    sigma, end = activations.resolve("gelu_erf"), ENDS[dtype]
    far = np.logspace(-38, 38, 77)
    s = np.concatenate([np.linspace(-end, end, 501), -far, [0.0], far]).astype(dtype)
    ops, S, Z, one = NumpyOps(), s.copy(), np.empty_like(s), np.ones_like(s)
    with np.errstate(all="ignore"):
        ops.bias_activation(S[:, None], None, sigma, Z[:, None])
        D, E = np.empty_like(s), np.empty_like(s)
        ops.activation_gradient(one[:, None], S[:, None], Z[:, None], sigma, D[:, None], None)
        ops.curvature(
            0 * one[:, None],
            one[:, None],
            one[:, None],
            S[:, None],
            Z[:, None],
            sigma,
            E[:, None],
            None,
        )
    cdf, pdf = mpmath.ncdf, mpmath.npdf
    # that many where Z is below the smallest normal number
    assert off(Z, s, lambda x: x * cdf(x)) <= 24
    normal = abs(Z) > np.finfo(dtype).tiny
    assert off(Z[normal], s[normal], lambda x: x * cdf(x)) <= 8
    near = abs(s) < 2  # where slope and curvature cross 0: as good as 1 is
    for found, exact in ((D, lambda x: cdf(x) + x * pdf(x)), (E, lambda x: pdf(x) * (2 - x * x))):
        assert (
            max(abs(float(found[i] - exact(mp.mpf(float(s[i]))))) for i in near.nonzero()[0])
            <= 4 * np.finfo(dtype).eps
        )
        large = ~near & (abs(s) < 0.85 * end)  # where φ has all its digits
        assert off(found[large], s[large], exact) <= 12
        assert (found[s < -end - 1] == 0).all()
    assert (D[s > end] == 1).all()
    assert D[s == 0] == pytest.approx(0.5)
    assert E[s == 0] == pytest.approx(2 / np.sqrt(2 * np.pi), rel=1e-6)


# -- the coefficients ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ENDS)
def test_the_tails_polynomial_is_the_chebyshev_fit_and_as_good_as_its_dtype(dtype):
    fit, k = special.FITS[dtype], mp.mpf(special.K)

    def scaled(t):
        u = k * (1 + t) / (1 - t)
        return (u + k) * mpmath.exp(u * u / 2) * mpmath.ncdf(-u)

    end = (mp.mpf(fit.end) - k) / (mp.mpf(fit.end) + k)
    with warnings.catch_warnings():
        # 1.4 would rather be asked for the other order, which 1.3 lacks
        warnings.simplefilter("ignore", DeprecationWarning)
        coefficients, error = mpmath.chebyfit(scaled, [-1, end], len(fit.tail), error=True)
    np.testing.assert_allclose(fit.tail, [float(c) for c in reversed(coefficients)], rtol=1e-11)
    assert error / scaled(end) < np.finfo(dtype).eps / 4


@pytest.mark.parametrize("dtype", ENDS)
def test_the_polynomial_of_erf_is_a_least_squares_fit_of_what_its_error_costs(dtype):
    fit = special.FITS[dtype]
    count, end = len(fit.middle), mp.mpf(fit.one)
    nodes = [
        end / 2 * (1 - mpmath.cospi(mp.mpf(2 * i + 1) / (8 * count))) for i in range(4 * count)
    ]
    exponents = [-mpmath.log(mpmath.erfc(u)) for u in nodes]
    costs = [u / mpmath.expm1(w) for u, w in zip(nodes, exponents, strict=True)]
    A = mpmath.matrix(
        [[cost * u**j for j in range(count)] for u, cost in zip(nodes, costs, strict=True)]
    )
    b = mpmath.matrix([cost * w / u for u, w, cost in zip(nodes, exponents, costs, strict=True)])
    coefficients, _ = mpmath.qr_solve(A, b)
    np.testing.assert_allclose(fit.middle, [float(c) for c in coefficients], rtol=1e-9)
    residuals = A * mpmath.matrix(fit.middle) - b
    assert max(map(abs, residuals)) < np.finfo(dtype).eps / 4
