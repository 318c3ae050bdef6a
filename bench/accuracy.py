"""The worst error of every formula in each dtype, against mpmath: the tables of docs/accuracy.md.

    python -m bench.accuracy

    error = max(0, |computed - f(x)| - moves · |f(x + ulp(x)) - f(x)|) / ulp(f(x)),   x as stored

The second term is the change of the result over one last place of x, since x is not known any
better. Numbers below the smallest normal one count as 0. Needs mpmath, onnxruntime for its table
and g++ for the table of the CUDA kernels.
"""

from __future__ import annotations

import argparse
import functools
import math
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
from mpmath import mpf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

from mlpcore.backends.compiled import compiler
from mlpcore.backends.compiled.ops import CompiledOps
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import activations, formulas, losses
from mlpcore.core.activations import Activation
from mlpcore.core.losses import Objective
from mlpcore.io.atomic import replacing
from mlpcore.mlp import MLP

Array = Any
Number = Any  # mpmath's numbers
DTYPES = ("float32", "float64")
QUANTITIES = ("value", "slope", "curvature")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
# enough for 50 correct digits of log(1 + 1e-38); below this, differences vanish
DIGITS, MORE = 130, 800
BOUND = 8  # ulp that no formula exceeds, on any machine and in any implementation
mpmath.mp.dps = DIGITS


class Taylor:
    """A function at one point: f, f', f''/2, f'''/6, to 130 digits."""

    def __init__(self, *c: Number):
        self.c = [*c, *[mpf(0)] * (4 - len(c))]

    @property
    def derivatives(self) -> list[Number]:
        """f, f', f'', f'''."""
        return [mpf(self.c[0]), mpf(self.c[1]), mpf(2 * self.c[2]), mpf(6 * self.c[3])]

    def __add__(self, other: Any) -> Taylor:
        if not isinstance(other, Taylor):
            return Taylor(self.c[0] + other, *self.c[1:])
        return Taylor(*[a + b for a, b in zip(self.c, other.c, strict=True)])

    def __mul__(self, other: Any) -> Taylor:
        if not isinstance(other, Taylor):
            return Taylor(*[a * other for a in self.c])
        (a, b, c, d), (p, q, r, s) = self.c, other.c
        return Taylor(a * p, a * q + b * p, a * r + b * q + c * p, a * s + b * r + c * q + d * p)

    def __truediv__(self, other: Any) -> Taylor:
        if not isinstance(other, Taylor):
            return Taylor(*[a / other for a in self.c])
        (a, b, c, d), (p, q, r, s) = self.c, other.c
        w = a / p
        x = (b - w * q) / p
        y = (c - w * r - x * q) / p
        return Taylor(w, x, y, (d - w * s - x * r - y * q) / p)

    def __neg__(self) -> Taylor:
        return Taylor(*[-a for a in self.c])

    def __sub__(self, other: Any) -> Taylor:
        return self + -other

    def __rsub__(self, other: Any) -> Taylor:
        return -self + other

    def __rtruediv__(self, other: Any) -> Taylor:
        return Taylor(mpf(other)) / self

    __radd__, __rmul__ = __add__, __mul__


def _integral(first: Number, slope: Taylor) -> Taylor:
    return Taylor(first, *(slope.c[k - 1] / k for k in range(1, 4)))


def _derivative(u: Taylor) -> Taylor:
    return Taylor(*(k * u.c[k] for k in range(1, 4)))


def exp(u: Taylor) -> Taylor:
    """e^u."""
    _, b, c, d = u.c
    return mpmath.exp(u.c[0]) * Taylor(mpf(1), b, c + b * b / 2, d + b * c + b * b * b / 6)


def log(u: Taylor) -> Taylor:
    """The natural logarithm of u."""
    return _integral(mpmath.log(u.c[0]), _derivative(u) / u)


def log1p(u: Taylor) -> Taylor:
    """The natural logarithm of 1 + u."""
    return _integral(mpmath.log1p(u.c[0]), _derivative(u) / (1 + u))


def sigmoid(u: Taylor) -> Taylor:
    """1 / (1 + e^-u)."""
    return 1 / (1 + exp(-u))


def softplus(u: Taylor) -> Taylor:
    """log(1 + e^u)."""
    return u + log1p(exp(-u)) if u.c[0] > 0 else log1p(exp(u))


def tanh(u: Taylor) -> Taylor:
    """The hyperbolic tangent of u."""
    return 1 - 2 / (exp(2 * u) + 1)


# -- the functions again ---------------------------------------------------------------------------

LAMBDA, LAMBDA_ALPHA = (
    mpf("1.0507009873554804934193349852946"),
    mpf("1.7580993408473768599402175208123"),
)


def _gelu(s: Taylor, a: Number) -> Taylor:
    return s * sigmoid(2 * mpmath.sqrt(2 / mpmath.pi) * (s + mpf("0.044715") * s * s * s))


def _mish(s: Taylor, a: Number) -> Taylor:
    e = exp(s)
    n = e * (e + 2)
    return s * (1 - 2 / (n + 2)) if s.c[0] > 0 else s * n / (n + 2)


def _gelu_erf(s: Taylor, a: Number) -> Taylor:
    density = exp(s * s / -2) / mpmath.sqrt(2 * mpmath.pi)
    return s * _integral(mpmath.erfc(-s.c[0] / mpmath.sqrt(2)) / 2, density * _derivative(s))


def _pieces(
    below: Callable[..., Taylor], above: Callable[..., Taylor]
) -> Callable[[Taylor, Number], Taylor]:
    return lambda s, a: above(s, a) if s.c[0] > 0 else below(s, a)


def _expm1(s: Taylor) -> Taylor:
    return _integral(mpmath.expm1(s.c[0]), _derivative(s) * exp(s))


OF_S: dict[str, Callable[[Taylor, Number], Taylor]] = {
    "identity": lambda s, a: s,
    "sigmoid": lambda s, a: sigmoid(a * s),
    "tanh": lambda s, a: tanh(s),
    "relu": _pieces(lambda s, a: 0 * s, lambda s, a: s),
    "relu6": lambda s, a: Taylor(mpf(0)) if s.c[0] < 0 else s if s.c[0] < 6 else Taylor(mpf(6)),
    "leaky_relu": _pieces(lambda s, a: a * s, lambda s, a: s),
    "prelu": _pieces(lambda s, a: a * s, lambda s, a: s),
    "elu": _pieces(lambda s, a: a * _expm1(s), lambda s, a: s),
    "selu": _pieces(lambda s, a: LAMBDA_ALPHA * _expm1(s), lambda s, a: LAMBDA * s),
    "softplus": lambda s, a: softplus(s),
    "gelu": _gelu,
    "gelu_erf": _gelu_erf,
    "silu": lambda s, a: s * sigmoid(s),
    "mish": _mish,
    "hard_tanh": lambda s, a: s if abs(s.c[0]) < 1 else Taylor(mpmath.sign(s.c[0])),
    "exp": lambda s, a: exp(s),
}  # fmt: skip
# slope and curvature at a stored output z, if the sheet writes them in z
OF_Z: dict[str, Callable[[Number, Number], tuple[Number, Number]]] = {
    "identity": lambda z, a: (mpf(1), mpf(0)),
    "sigmoid": lambda z, a: (a * z * (1 - z), a * a * z * (1 - z) * (1 - 2 * z)),
    "tanh": lambda z, a: (1 - z * z, -2 * z * (1 - z * z)),
    "relu": lambda z, a: (mpf(z > 0), mpf(0)),
    "relu6": lambda z, a: (mpf(0 < z < 6), mpf(0)),
    "leaky_relu": lambda z, a: (mpf(1) if z > 0 else a, mpf(0)),
    "softplus": lambda z, a: (-mpmath.expm1(-z), -mpmath.expm1(-z) * mpmath.exp(-z)),
    "hard_tanh": lambda z, a: (mpf(abs(z) < 1), mpf(0)),
    "exp": lambda z, a: (z, z),
}


def _bce(x: Taylor, y: Number) -> Taylor:
    return (1 - y) * softplus(x) + y * softplus(-x)


def _huber(r: Taylor, q: Number) -> Taylor:
    if abs(r.c[0]) <= q:
        return r * r / 2
    return q * ((r if r.c[0] > 0 else -r) - q / 2)


def _log_cosh(r: Taylor) -> Taylor:
    half = mpmath.sinh(r.c[0] / 2)
    return _integral(mpmath.log1p(2 * half * half), tanh(r) * _derivative(r))


def _sign(r: Number) -> int:
    return int(r > 0) - int(r < 0)


OF_OUTPUT: dict[
    str, Callable[[Taylor, Number, Number], Taylor]
] = {  # of x = z, or x = s of a matched pair
    "squared_error": lambda z, y, q: (z - y) * (z - y) / 2,
    "absolute_error": lambda z, y, q: _sign(z.c[0] - y) * (z - y),
    "huber": lambda z, y, q: _huber(z - y, q),
    "log_cosh": lambda z, y, q: _log_cosh(z - y),
    "quantile": lambda z, y, q: ((1 - q) if z.c[0] > y else -q) * (z - y),
    "poisson": lambda z, y, q: z - y * log(z) if y else z,
    "binary_cross_entropy": lambda z, y, q: (
        (-y * log(z) if y else 0) - ((1 - y) * log1p(-z) if y < 1 else Taylor(0))
    ),
    "binary_cross_entropy of sigmoid": lambda s, y, a: _bce(a * s, y),
    "poisson of exp": lambda s, y, a: exp(s) - y * s,
    "poisson of softplus": lambda s, y, a: softplus(s) - y * log(softplus(s)),
    "squared_error of identity": lambda s, y, a: (s - y) * (s - y) / 2,
}


# -- what is compared ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row of the sheets with its parameter and target.

    Attributes:
        name: name of the row, or "loss of output" for a matched pair.
        parameter: the value of a or q, None for the default.
        y: the target of a loss, None of an activation.
    """

    name: str
    parameter: float | None = None
    y: float | None = None

    @property
    def moves(self) -> int:
        """Last places of the input to allow for: more than one for sums that have roots."""
        return {
            "gelu": 4,
            "gelu_erf": 4,
            "mish": 4,
            "poisson of exp": 4,
            "poisson of softplus": 4,
        }.get(self.name, 1)

    @functools.cached_property
    def sigma(self) -> Activation:
        """The activation."""
        return activations.resolve(
            self.name if self.parameter is None else (self.name, self.parameter)
        )

    @functools.cached_property
    def objective(self) -> Objective:
        """The loss for the output in its name."""
        loss, _, output = self.name.partition(" of ")
        if output:
            return losses.pair(
                losses.resolve(loss),
                activations.resolve((output, self.parameter) if self.parameter else output),
            )
        return losses.pair(losses.resolve((loss, self.parameter) if self.parameter else loss), None)

    def reads_z(self, quantity: str) -> bool:
        """Return True if the quantity is a function of the stored output."""
        return self.y is None and quantity != "value" and not self.sigma.slope_reads_s

    def formula(self, quantity: str, dtype: str) -> Activation:
        """Return the quantity as an activation of one variable: s, or z if it is read."""
        row = self.sigma if self.y is None else self.objective
        scalars = dict(row.scalars if self.y is None else self.objective.scalars)
        if self.y is not None:
            scalars["y"] = float(np.dtype(dtype).type(self.y))
        names = {"x": "s", "z": "s", **{name: repr(number) for name, number in scalars.items()}}
        return Activation(
            f"{self.name}'s {quantity}", formulas.substitute(getattr(row, quantity), names), "1"
        )


CASES = [
    *(Case(name) for name in OF_S if name not in ("sigmoid", "leaky_relu", "prelu", "elu")),
    *(Case("sigmoid", a) for a in (1.0, 0.3, 4.0)),
    *(Case("leaky_relu", a) for a in (0.01, 0.3, 50.0)),
    *(Case("prelu", a) for a in (0.25, -0.7, 50.0)),
    *(Case("elu", a) for a in (1.0, 0.3, 50.0)),
    *(Case(name, None, y) for name in ("squared_error", "absolute_error", "log_cosh") for y in (0.0,
            0.7)),
    *(Case("huber", q, y) for q in (1.0, 0.1) for y in (0.0, 0.7)),
    *(Case("quantile", q, y) for q in (0.5, 0.999, 0.001) for y in (0.0, 0.7)),
    *(Case("poisson", None, y) for y in (0.0, 1.0, 7.0)),
    *(Case("binary_cross_entropy", None, y) for y in (0.0, 0.3, 1.0)),
    *(Case("binary_cross_entropy of sigmoid", 1.0, y) for y in (0.0, 0.3, 0.5, 0.999, 1.0)),
    *(Case("binary_cross_entropy of sigmoid", 4.0, y) for y in (0.0, 0.3)),
    *(Case("poisson of exp", None, y) for y in (0.0, 1.0, 7.0)),
    *(Case("poisson of softplus", None, y) for y in (0.0, 1.0, 7.0)),
    *(Case("squared_error of identity", None, y) for y in (0.0, 0.7)),
]  # fmt: skip


@functools.cache
def grid(dtype: str, thin: int) -> Array:
    """Return every `thin`-th number of a grid from ±1e-38 to ±1e38, denser where functions bend."""
    middle = np.linspace(-20, 20, 331)
    tails = np.concatenate(
        [np.linspace(86, 95, 28), np.linspace(100, 760, 45), [708.4, 709.7, 745.2]]
    )
    positive = np.concatenate(
        [10 ** np.linspace(-38, 38, 191), tails, [7, 8, 15, 16.7, 17, 25, 36.8, 40, 45]]
    )
    roots = [-1.2784645, -0.7524614, -1.1924, 0.54132485, 0.7, 1.7, 0.8, 0.6]
    near = np.concatenate([k + np.array([-1e-3, -1e-6, 0, 1e-6, 1e-3]) for k in (-1, 0, 1, *roots)])
    numbers = (
        np.concatenate([middle, positive, -positive, near])[::thin].astype(np.float32).astype(dtype)
    )
    more = np.nextafter(numbers[::9], np.array(np.inf, dtype))
    return np.unique(
        np.concatenate(
            [numbers, more, np.array([0, 1e-38, -1e-38, 1e38, -1e38, 1e8, 40, -20, 20], dtype)]
        )
    )


def points(case: Case, dtype: str, thin: int) -> Array:
    """Return the inputs of a case, in the range in which its function is defined."""
    s, number = grid(dtype, thin), np.dtype(dtype).type
    if case.name == "poisson":
        return s[s > 1e-37]
    if case.name == "binary_cross_entropy":
        near_1 = (1 - 10 ** np.linspace(-7 if dtype == "float32" else -15, -0.5, 60)).astype(dtype)
        return np.unique(np.concatenate([s[(s > 0) & (s < 1)], near_1]))
    if case.name in ("huber", "quantile", "absolute_error"):  # except where two pieces meet
        residual = abs(s - number(case.y))
        return s[(residual != 0) & (residual != case.parameter)]
    return s[s != 0] if case.name in ("relu", "relu6", "leaky_relu", "prelu", "elu", "selu") else s


@functools.cache
def exact(case: Case, x: float, y: float | None) -> list[Number]:
    """f, f', f'', f''' at x."""
    parameter = None if case.parameter is None else mpf(case.parameter)
    at = Taylor(mpf(x), 1)
    if y is None:
        return OF_S[case.name](at, parameter).derivatives
    with mpmath.workdps(MORE if case.name == "poisson of softplus" and x < -100 else DIGITS):
        return OF_OUTPUT[case.name](at, mpf(y), parameter).derivatives


@functools.cache
def references(
    case: Case, quantity: str, dtype: str, thin: int
) -> tuple[Array, list[tuple[Number, Number]]]:
    """Return the stored inputs and, for each, the result and its change per last place."""
    k, found = QUANTITIES.index(quantity), []
    y = None if case.y is None else float(np.dtype(dtype).type(case.y))
    s = points(case, dtype, thin)
    if case.reads_z(quantity):
        z = numpy_door(case, "value", s)
        parameter = None if case.parameter is None else mpf(case.parameter)
        z = np.unique(z[np.isfinite(z)])
        for x in z:
            moved = float(np.spacing(abs(x)))
            below, here, above = (
                OF_Z[case.name](mpf(float(x)) + by, parameter)[k - 1] for by in (-moved, 0, moved)
            )
            # at a jump, the side without the jump
            found.append((here, min(abs(below - here), abs(above - here))))
        return z, found
    for x in s:
        here = exact(case, float(x), y)
        change = abs(here[k + 1]) * mpf(float(np.spacing(abs(x))))
        if y:
            change += abs(exact(case, float(x), y * (1 - float(np.finfo(dtype).eps)))[k] - here[k])
        found.append((here[k], change))
    return s, found


def error(result: Any, f: Number, allowance: Number) -> float:
    """Return the error of one number in units in the last place of f, minus the allowance."""
    info = np.finfo(result.dtype)
    largest, tiny = float(info.max), mpf(float(info.tiny))
    if abs(f) > largest * (1 - 8 * mpf(float(info.eps))):
        return 0.0 if abs(result) > 0.99 * largest else math.inf
    if not np.isfinite(result):
        return math.inf
    off = abs(mpf(float(result)) - f) - allowance
    if abs(f) < tiny * mpf("1.001"):
        off -= tiny
    return float(
        max(mpf(0), off) / mpf(float(np.spacing(max(result.dtype.type(abs(float(f))), info.tiny))))
    )


Door = Callable[[Case, str, Array], Array]


def worst(case: Case, quantity: str, dtype: str, door: Door, thin: int = 1) -> tuple[float, float]:
    """Return the largest error of an implementation, in units in the last place, and its input."""
    x, expected = references(case, quantity, dtype, thin)
    found = door(case, quantity, x)
    assert found.dtype == x.dtype, (found.dtype, x.dtype)
    errors = [
        error(r, f, case.moves * allowance)
        for r, (f, allowance) in zip(found, expected, strict=True)
    ]
    i = int(np.argmax(errors))
    return errors[i], float(x[i])


# -- the implementations ---------------------------------------------------------------------------


def numpy_door(case: Case, quantity: str, x: Array) -> Array:
    """Return the results of the NumPy backend."""
    return _by(NumpyOps(), case, quantity, x)


def compiled_door(case: Case, quantity: str, x: Array) -> Array:
    """Return the results of a compiled pass. Raises RuntimeError if nothing can be compiled."""
    if reason := compiler.why_not():
        raise RuntimeError(f"passes are not compiled: {reason}")
    return _by(CompiledOps(), case, quantity, x)


def _by(ops: NumpyOps, case: Case, quantity: str, x: Array) -> Array:
    out = np.empty((1, len(x)), x.dtype)
    ops.quietly(
        ops.bias_activation, x[None].copy(), None, case.formula(quantity, x.dtype.name), out
    )
    return out[0]


def onnx_door(case: Case, quantity: str, x: Array) -> Array:
    """Return the results of onnxruntime for a one-unit network that `MLP.to_onnx` wrote."""
    import onnxruntime

    sigma = case.sigma if quantity == "value" else case.formula(quantity, x.dtype.name)
    net = MLP([1, 1], [], sigma, dtype=x.dtype.name, init="zeros", device="cpu")
    net.parameters[0] = 1
    with tempfile.TemporaryDirectory() as folder:
        net.to_onnx(f"{folder}/net.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            f"{folder}/net.onnx", options, providers=["CPUExecutionProvider"]
        )
        return session.run(None, {"X": x[:, None]})[0][:, 0]


# -- the page --------------------------------------------------------------------------------------


def scale(ulp: float) -> str:
    """Return the error rounded up to 1, 2, 4, 8, …: last digits depend on the machine's exp."""
    return f"{2 ** max(0, math.ceil(math.log2(ulp)))}" if ulp else "0"


def table(door: Door, names: list[str], quantities: tuple[str, ...], thin: int) -> str:
    """Return a Markdown table of the worst errors in ulp, one line per row of the sheets."""
    heads = [f"{quantity}, {dtype}" for dtype in DTYPES for quantity in quantities]
    lines = ["| row | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        cells = []
        for dtype in DTYPES:
            for quantity in quantities:
                ulp, where = max(
                    worst(case, quantity, dtype, door, thin) for case in CASES if case.name == name
                )
                cells.append(scale(ulp) + (f" at {where:.3g}" if ulp > 1 else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(thin: int = 1) -> dict[str, str]:
    """Return the page's tables by the name of their marker."""
    of_losses = list(dict.fromkeys(case.name for case in CASES if case.y is not None))
    return {
        "activations": table(numpy_door, list(OF_S), QUANTITIES, thin),
        "losses": table(numpy_door, of_losses, QUANTITIES, thin),
        "compiled activations": table(compiled_door, list(OF_S), QUANTITIES, thin),
        "compiled losses": table(compiled_door, of_losses, QUANTITIES, thin),
        "onnx": table(onnx_door, list(OF_S), ("value",), thin),
    }


def machine() -> str:
    """Return the facts about the machine that the last digits depend on."""
    return f"NumPy {np.__version__}, {platform.machine()}, {platform.system()}"


def written(text: str, parts: dict[str, str]) -> str:
    """Return the page with each table between its markers replaced."""
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{part}\n{end}{after}"
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the tables into docs/accuracy.md instead of printing them",
    )
    found = {"machine": machine(), **tables()}
    if parser.parse_args().write:
        text = written(PAGE.read_text(), found)
        with replacing(PAGE) as file:
            file.write(text.encode())
    else:
        print("\n\n".join(found.values()))
