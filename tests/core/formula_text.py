"""The text of a formula, taken as Python, on real or complex arrays: shares nothing with the
evaluators that are tested.
"""

import numpy as np
from scipy import special


def _softplus(u):
    return np.maximum(u, 0) + np.log1p(np.exp(-np.abs(u)))


def _log_cosh(u):
    few = np.minimum(np.abs(u), 20)
    g = np.expm1(few)
    return np.log1p(g / (1 + g) * g * 0.5) + (np.abs(u) - few)


NUMPY = {
    "T": lambda x: x,
    "smooth": lambda x: x,
    "positive": lambda x: np.where(x > 0, 1.0, 0.0),
    "sigmoid": lambda u: 1 / (1 + np.exp(-u)),
    "softplus": _softplus,
    "log_cosh": _log_cosh,
    **{name: getattr(np, name) for name in ("maximum", "minimum", "tanh", "exp", "expm1", "log",
            "log1p", "abs")},
    **{name: getattr(np, name) for name in ("sqrt", "sign", "sin", "cos")},
    "erf": special.erf, "erfc": special.erfc, "normcdf": special.ndtr,
    "normpdf": lambda x: np.exp(-x * x / 2) / np.sqrt(2 * np.pi),
}  # fmt: skip
# as they are written above
NOT_ANALYTIC = ("maximum(", "minimum(", "abs(", "sign(", "positive(", "softplus(", "log_cosh(")


def value(text, **variables):
    """Return the value of a formula."""
    with np.errstate(over="ignore"):  # exp stands in denominators
        return eval(text, {"__builtins__": {}, **NUMPY}, variables)
