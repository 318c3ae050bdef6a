"""Functions that NumPy and ONNX lack, in terms of those they have; CUDA has its own.

    normcdf(-u) = exp(-u²/2) P(t) / (u + k),  t = (u - k) / (u + k),  u ≥ 0
    erf(u) = -expm1(-u Q(u)),                 Q(u) = -log(erfc(u)) / u

The first follows Shepherd and Laframboise 1981 for erfc. P and Q are polynomials. u² enters `exp`
in two parts, h² + (u - h)(u + h), with h so short that h² is exact: rounding u² would cost u² units
in the last place. `tests/core/test_special.py` refits the coefficients and measures the errors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

NAMES = ("erf", "erfc", "normcdf", "normpdf")
# Smooth functions that no backend provides, for all x. log cosh x = log1p(g² / (2 (1 + g))) with
# g = expm1(|x|), which would overflow; from 20 on it is |x| - log 2
SMOOTH = {
    "sigmoid": "out = 1 / (1 + exp(-x))",
    "softplus": "out = maximum(x, 0) + log1p(exp(-abs(x)))",
    "log_cosh": (
        "u = abs(x); m = minimum(u, 20); g = expm1(m); out = log1p(g / (1 + g) * g * 0.5) + (u - m)"
    ),
}


class Fit(NamedTuple):
    """Constants that depend on the precision.

    Attributes:
        tail: coefficients of P, the constant first.
        middle: coefficients of Q.
        end: the u from which Φ(-u) is 0.
        one: the u from which erf is 1.
        short: a number that leaves h when added to u and subtracted again.
    """

    tail: Sequence[float]
    middle: Sequence[float]
    end: float
    one: float
    short: float


K = 4.25  # k, which is exact in every precision
FITS = {
    "float32": Fit(
        [
            0.7595542066529226, -0.625129789984233, 0.41822764240829313, -0.22051531321940585,
            0.08527106248611231, -0.019367126116153096, -0.0007474888548178836,
            0.0021865672524350394, -0.0003676144160629927, -0.00023653277005186637,
        ],
        [
            1.1283791707544948, 0.6366194420977017, 0.1027771532386843, -0.019150231273223087,
            -0.00016606352689453523, 0.0016730283245923688, -0.0006362699509273604,
            0.00011863972028340501, -9.371547258858671e-06,
        ],
        end=15.5, one=4.0, short=1.5 * 2**16,
    ),
    "float64": Fit(
        [
            0.7595542082672071, -0.6251297770834486, 0.4182275258225325, -0.22051601745278418,
            0.08527207614551903, -0.01935832407783801, -0.0007453379413968367, 0.002149382688681661,
            -0.0004044562440535422, -0.00019212299488817323, 7.800541235407239e-05,
            2.0649039418365726e-05, -1.2619639038470887e-05, -3.1968143531724097e-06,
            2.0036196168605797e-06, 6.776712417021343e-07, -2.9660701000782236e-07,
            -1.6032427998884432e-07, 3.12066350667e-08, 3.405824508535526e-08,
            1.2571322301058026e-09, -4.516131186091612e-09, -1.1056345055770961e-09,
        ],
        [
            1.1283791670955126, 0.6366197723675837, 0.10277260330178228, -0.019128447004886848,
            -0.00020919469750476453, 0.0016962064088085942, -0.0005901256837619686,
            2.5879121305443782e-05, 6.449037661986568e-05, -2.972085302645756e-05,
            3.401998617777377e-06, 2.8419140386595386e-06, -1.7484242470664146e-06,
            3.419223356512873e-07, 1.3358786648599665e-07, -1.3989808038327425e-07,
            6.495933645272067e-08, -2.0706309709237107e-08, 4.930634803938772e-09,
            -8.945576210181249e-10, 1.2272169338051268e-10, -1.2369657500571988e-11,
            8.655552710557009e-13, -3.7582121496776067e-14, 7.625904048420253e-16,
        ],
        end=39.5, one=6.0, short=1.5 * 2**32,
    ),
}  # fmt: skip


@functools.cache
def body(name: str, dtype: str) -> str:
    """Return statements `…; out = …` that compute a function of `x` in a dtype.

    They are accurate to a few units in the last place. erfc, normcdf and normpdf keep their digits
    down to the smallest normal number, erf for all x; NaN propagates.
    """
    fit = FITS["float32" if dtype == "float32" else "float64"]
    if name == "erf":
        middle = _horner("u", [-c for c in fit.middle])
        return f"u = minimum(abs(x), {fit.one!r}); out = -(sign(x) * expm1(u * ({middle})))"
    square, rest, root = (
        ("-(h * h)", "", 1.0) if name == "erfc" else ("-0.5 * (h * h)", "0.5 * ", math.sqrt(2))
    )
    end, k = fit.end / math.sqrt(2) * root, K / math.sqrt(2) * root
    u = f"u = minimum(abs(x), {end!r}); h = (u + {fit.short!r}) - {fit.short!r}"
    e = f"e = exp({square}) * exp({rest}((h - u) * (h + u)))"
    if name == "normpdf":
        return f"{u}; {e}; out = {1 / math.sqrt(2 * math.pi)!r} * e"
    tail = _horner("t", [c * math.sqrt(2) / root for c in fit.tail])
    r = f"v = u + {k!r}; t = (u - {k!r}) / v; r = e * (({tail}) / v); s = sign(x)"
    whole = "s * r + (1 - s)" if name == "erfc" else "(0.5 + 0.5 * s) - s * r"
    return f"{u}; {e}; {r}; out = {whole}"


def _horner(variable: str, coefficients: Sequence[float]) -> str:
    text = repr(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        text = f"({text}) * {variable} + {c!r}"
    return text
