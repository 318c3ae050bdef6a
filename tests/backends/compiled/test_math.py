"""exp, expm1, log, log1p and tanh of kernels/cpu_math.h: their errors, limits and coefficients."""

import ctypes
import platform
import shutil
import subprocess

import mpmath
import numpy as np
import pytest
from mpmath import mp

from mlpcore.backends import kernel_files
from mlpcore.backends.compiled.compiler import FLAGS

HEADER = kernel_files.folder() / "cpu_math.h"
CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++")
# The largest errors in units in the last place that the documentation promises. Measured over all
# floats: 0.971, 1.391, 0.930, 0.930, 1.745; over 2e7 doubles: 0.861, 1.220, 0.965, 1.008, 1.859.
BOUNDS = {"exp": 1.0, "expm1": 1.5, "log": 1.0, "log1p": 1.1, "tanh": 2.0}
DTYPES = {"float": np.float32, "double": np.float64}
SOURCE = """
#include "cpu_math.h"
namespace mlp {
#define LOOP(f, F)                                                     \\
  extern "C" void f##_##F(const F* __restrict__ x, F* __restrict__ z, long n) { \\
    _Pragma("omp simd") for (long i = 0; i < n; ++i) z[i] = f(x[i]);   \\
  }
#define TABLE(f, F) extern "C" const F* const f##_table_##F = cpu_math::Of<F>::f;
#define BOTH(M, f) M(f, float) M(f, double)
BOTH(LOOP, exp) BOTH(LOOP, expm1) BOTH(LOOP, log) BOTH(LOOP, log1p) BOTH(LOOP, tanh)
BOTH(LOOP, sqrt)
BOTH(TABLE, exp) BOTH(TABLE, log) BOTH(TABLE, tanh) BOTH(TABLE, ln2)
}
"""
both_types = pytest.mark.parametrize("type", DTYPES)
each_function = pytest.mark.parametrize("name", BOUNDS)


def compiled(folder, *flags):
    source = folder / "functions.cpp"
    source.write_text(SOURCE)
    command = [CXX, *FLAGS, f"-I{HEADER.parent}", *flags, str(source)]
    return subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu_math")
    compiled(folder, "-march=native", "-o", str(folder / "functions.so"))
    return ctypes.CDLL(str(folder / "functions.so"))


@pytest.fixture
def call(library):
    def call(name, x):
        type = "float" if x.dtype == np.float32 else "double"
        x, z = np.ascontiguousarray(x), np.empty_like(x)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (x, z))
        getattr(library, f"{name}_{type}")(*pointers, ctypes.c_long(x.size))
        return z

    return call


# -- errors ----------------------------------------------------------------------------------------


def error(found, exact):
    """The largest error in units in the last place; infinities, zeros and NaN must be the same."""
    info = np.finfo(found.dtype)
    rounded = exact.astype(found.dtype)
    number = np.isfinite(rounded)
    np.testing.assert_array_equal(found[~number], rounded[~number])
    finite = np.isfinite(found)
    assert (finite == number).all()
    if not number.any():
        return 0.0
    found, exact = found[number], exact[number]
    assert (np.signbit(found) == np.signbit(exact)).all()
    exponent = np.maximum(np.frexp(exact)[1] - 1, info.minexp)
    return float(np.ldexp(abs(found.astype(exact.dtype) - exact), info.nmant - exponent).max())


def near(dtype, *centres):
    """200 neighbours on either side of each number and of its negative."""
    unsigned = np.uint32 if dtype is np.float32 else np.uint64
    bits = np.abs(np.array(centres, dtype)).view(unsigned)[:, None]
    offsets = np.arange(-200, 201)
    x = (bits.astype(np.int64) + offsets).ravel()
    x = np.abs(x).astype(unsigned).view(dtype)
    return np.concatenate([x, -x])[np.isfinite([*x, *x])]


def hard(dtype):
    """Where functions change their course, over- and underflow; where their reductions do."""
    info = np.finfo(dtype)
    ends = [0, info.tiny, info.eps, info.eps / 2, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, info.max]
    ends += [2.0**k for k in (-125, -24, -12, 24, 64, 100, 127)] + [
        0.75 * 2.0**k for k in (10, 127)
    ]
    ends += list(np.log([info.max, info.tiny, info.smallest_subnormal, 1.5, 4 / 3, 2, 3]))
    ends += [9.01, 9.1, 19.06, 19.1, 104, 746]
    steps = np.log(2) * (np.arange(40) + 0.5)
    ends += [*(steps + 0.0849625 * np.log(2)), *(steps / 2 + 0.125 * np.log(2))]
    return near(dtype, *ends)


@each_function
def test_errors_of_float_over_all_bit_patterns(name, call):
    patterns = np.arange(0, 2**32, 1009, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        worst = 0.0
        for x in [*np.array_split(patterns, 64), hard(np.float32)]:  # parts that fit into a cache
            exact = getattr(np, name)(x.astype(np.float64))
            worst = max(worst, error(call(name, x), exact))
    assert worst <= BOUNDS[name]


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs 80-bit numbers")
@each_function
def test_errors_of_double_over_all_exponents(name, call, random):
    bits = random.integers(0, 2**64, 60_000, dtype=np.uint64, endpoint=False)
    sign = random.choice([-1.0, 1.0], 60_000)
    x = np.concatenate([
        bits.view(np.float64),
        sign * np.exp2(random.uniform(-60, 10, 60_000)),
        sign * random.uniform(0, 4, 60_000),
        1 + sign * np.exp2(random.uniform(-53, -1, 60_000)),
        random.uniform(-750, 711, 30_000),
        hard(np.float64),
    ])  # fmt: skip
    with np.errstate(all="ignore"):
        worst = error(call(name, x), getattr(np, name)(x.astype(np.longdouble)))
    assert worst <= BOUNDS[name]


@pytest.fixture
def random():
    return np.random.default_rng(5)


def test_the_references_themselves_are_right_to_a_hundredth_of_a_unit(random):
    x = np.exp2(random.uniform(-30, 3, 50))
    for name in BOUNDS:
        with mp.workdps(40):
            exact = [getattr(mpmath, name)(mp.mpf(at)) for at in x]
            for dtype, eps in ((np.float64, 2.0**-31), (np.longdouble, 2.0**-60)):
                found = getattr(np, name)(x.astype(dtype))
                if np.finfo(dtype).nmant >= 52 + 11 * (dtype is np.longdouble):
                    for one, right in zip(found, exact, strict=True):
                        high = float(one)
                        sum = mp.mpf(high) + mp.mpf(float(one - dtype(high)))
                        assert abs(sum - right) <= eps * abs(right)


@both_types
def test_the_root_is_rounded_correctly(type, call, random):
    x = np.exp2(random.uniform(-120, 120, 1000)).astype(DTYPES[type])
    np.testing.assert_array_equal(call("sqrt", x), np.sqrt(x))


# -- limits, signs and order -----------------------------------------------------------------------

INF, NAN = np.inf, np.nan
LIMITS = {
    "exp": {-INF: 0, -1e30: 0, -0.0: 1, 1e30: INF, INF: INF, NAN: NAN},
    "expm1": {-INF: -1, -1e30: -1, -0.0: -0.0, 1e30: INF, INF: INF, NAN: NAN},
    "log": {-INF: NAN, -1: NAN, -1e-38: NAN, -0.0: -INF, 1: 0, INF: INF, NAN: NAN},
    "log1p": {-INF: NAN, -2: NAN, -1: -INF, -0.0: -0.0, INF: INF, NAN: NAN},
    "tanh": {-INF: -1, -1e30: -1, -0.0: -0.0, 20: 1, 1e30: 1, INF: 1, NAN: NAN},
}


@both_types
@each_function
def test_limits_and_signs_of_zeros(name, type, call):
    x, right = np.array([*LIMITS[name].items(), (-NAN, NAN)], DTYPES[type]).T
    found = call(name, x)
    np.testing.assert_array_equal(found, right)
    known = ~np.isnan(right)
    np.testing.assert_array_equal(np.signbit(found)[known], np.signbit(right)[known])
    if name != "exp":  # 0.0 is the key that -0.0 is
        zero = call(name, np.zeros(3, x.dtype))
        assert (zero == (-INF if name == "log" else 0)).all()
        assert (np.signbit(zero) == (name == "log")).all()


@both_types
def test_near_zero_expm1_log1p_and_tanh_return_their_argument(type, call):
    info = np.finfo(DTYPES[type])
    x = near(DTYPES[type], 0, info.tiny, info.tiny * 2.0**20)
    for name in ("expm1", "log1p", "tanh"):
        np.testing.assert_array_equal(call(name, x), x)


@both_types
def test_tanh_is_odd_and_never_beyond_1(type, call, random):
    x = np.concatenate([random.uniform(0, 25, 100_000).astype(DTYPES[type]), hard(DTYPES[type])])
    z = call("tanh", x)
    assert (abs(z) <= 1).all()
    np.testing.assert_array_equal(call("tanh", -x), -z)
    assert (z[x > 19.1] == 1).all()


# -- vectors ---------------------------------------------------------------------------------------


@both_types
@each_function
def test_an_entry_has_the_same_bits_wherever_it_is_in_an_array(name, type, call, random):
    x = np.concatenate([random.uniform(-3, 3, 30), 10.0 ** random.uniform(-40, 3, 30)])
    x = np.array([*x, 0, -0.0, 1, -1, INF, -INF, NAN, 1e-320], DTYPES[type])
    alone = np.concatenate([call(name, x[i : i + 1]) for i in range(x.size)])
    alone[np.isnan(alone)] = NAN  # which may have either sign
    for length in range(1, 41):
        for start in range(x.size - length + 1):
            part = call(name, x[start : start + length])
            part[np.isnan(part)] = NAN
            assert part.tobytes() == alone[start : start + length].tobytes()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86")
@pytest.mark.parametrize("machine", ["haswell", "skylake-avx512"])
def test_all_loops_become_vectors_and_call_nothing(machine, tmp_path):
    assembly = tmp_path / "functions.s"
    flags = (f"-march={machine}", "-fopt-info-vec-optimized", "-S", "-o", str(assembly))
    report = compiled(tmp_path, *flags).stderr
    assert report.count("using 32 byte vectors") == 2 * (len(BOUNDS) + 1)
    assert "\tcall" not in assembly.read_text()


# -- the coefficients ------------------------------------------------------------------------------

# what a polynomial approximates, and the ends of its argument
FITS = {
    "exp": (lambda r: (mp.expm1(r) - r) / r**2, lambda: (mp.log(0.75), mp.log(1.5))),
    "log": (lambda f: (mp.log1p(f) - f) / f**2, lambda: (-0.25, 0.5)),
    "tanh": (
        lambda s: (mp.tanh(mp.sqrt(s)) / mp.sqrt(s) - 1) / s,
        lambda: (0, (0.375 * mp.ln2) ** 2),
    ),
}
COUNTS = {"float": {"exp": 5, "log": 10, "tanh": 3}, "double": {"exp": 11, "log": 20, "tanh": 7}}


def fit(name, count):
    """The polynomial that is right at the other zeros of a Chebyshev polynomial that is 0 at 0:
    its error times its argument, which is the function's relative error, is nearly minimax.
    """
    function, ends = FITS[name]
    low, high = ends()
    zeros = [mp.cos(mp.pi * (2 * j + 1) / (2 * count + 2)) for j in range(count + 1)]
    width, zero = min((max(high / (1 - z), -low / (1 + z)), z) for z in zeros)
    nodes = [width * (z - zero) for z in zeros if z != zero]
    powers = mp.matrix([[x**i for i in range(count)] for x in nodes])
    return list(mp.lu_solve(powers, mp.matrix([function(x) for x in nodes])))


@both_types
@pytest.mark.parametrize("name", FITS)
def test_coefficients_fitted_anew(name, type, library):
    number = ctypes.c_float if type == "float" else ctypes.c_double
    table = ctypes.POINTER(number).in_dll(library, f"{name}_table_{type}")
    with mp.workdps(60):
        fitted = [float(c) for c in fit(name, COUNTS[type][name])]
    eps = float(np.finfo(DTYPES[type]).eps)
    np.testing.assert_allclose(table[: len(fitted)], fitted, rtol=eps)
    assert name != "log" or fitted[-1] > 0  # so that infinity stays infinity


@both_types
def test_the_parts_of_log_2(type, library):
    number, bits = (ctypes.c_float, 16) if type == "float" else (ctypes.c_double, 42)
    high, low = ctypes.POINTER(number).in_dll(library, f"ln2_table_{type}")[:2]
    with mp.workdps(60):
        assert high == mp.floor(mp.ldexp(mp.ln2, bits)) / mp.mpf(2) ** bits
        assert low == DTYPES[type](float(mp.ln2 - high))


if __name__ == "__main__":  # prints what belongs into the header
    mp.dps = 60
    for type, counts in COUNTS.items():
        for name, count in counts.items():
            print(type, name, [mp.nstr(c, 9 if type == "float" else 17) for c in fit(name, count)])
