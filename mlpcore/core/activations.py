"""Activations: rows of `kernels/activations.def`, or the same formulas given at run time.

z = σ(s),   σ' as a formula in z where it can be, so that Z alone is cached
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from mlpcore import kernel_files
from mlpcore.core import formulas
from mlpcore.core.errors import unknown

INITIAL = ("he", "glorot", "lecun")


@dataclass(frozen=True)
class Activation:
    """An elementwise activation, given by the formulas of its value and slope.

    Args:
        name: how it is called in messages and files.
        value: z = σ(s), a formula in `s` and, with a parameter, `a`.
        slope: σ', a formula in `z`, `s`, `a`; None: the value's derivative, which for a kink says what `positive` says there.
            One that does without `s` saves the cache of S.
        parameter: the value of `a`, None without one.
        init: the variance of initial weights: "he" 2 / n_in, "glorot" 2 / (n_in + n_out) / σ'(0)², "lecun" 1 / n_in.

    Raises:
        ValueError: a formula is not in the common subset of C++ and Python, or reads another variable; says which.

    Example:
        >>> net = MLP([4, 8, 1], activations=Activation("cubic", "s ** 3"))
    """

    name: str
    value: str
    slope: str = None  # type: ignore[assignment]  # a formula from __post_init__ on
    parameter: float | None = None
    init: str = "glorot"
    default: float | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be text; got {self.name!r}")
        if self.parameter is not None:
            object.__setattr__(self, "parameter", finite(self.parameter, f"the parameter of {self.name}"))
        if not self.rowwise:
            formulas.check("value", self.value, ("s",), self.scalars)
            if self.slope is None:
                object.__setattr__(self, "slope", formulas.derive(self.value, "s"))
            formulas.check("slope", self.slope, ("s", "z"), self.scalars)
        if not isinstance(self.init, str) or self.init not in INITIAL:
            raise unknown("init", self.init, INITIAL)

    @property
    def rowwise(self) -> bool:
        """Whether it mixes the outputs of a row (softmax, log_softmax): then no formula, but code of each backend."""
        return self.name in ("softmax", "log_softmax") and not self.value

    @property
    def logarithmic(self) -> bool:
        """Whether it is log_softmax, whose outputs are logarithms and whose Jacobian is not symmetric."""
        return self.rowwise and self.name == "log_softmax"

    @functools.cached_property
    def slope_reads_s(self) -> bool:
        """Whether S must be cached beside Z."""
        return not self.rowwise and "s" in formulas.reads(self.slope)

    @functools.cached_property
    def curvature(self) -> str:
        """σ'', a formula in what the slope reads: the sheet's, or the slope, differentiated; "0" of straight lines."""
        if self.rowwise:
            return "0"
        if self.name in curvatures() and sheet()[self.name][3:] == [self.value, self.slope]:
            return curvatures()[self.name]
        return formulas.differentiate(self.slope, {"s": "1", "z": self.slope})

    @property
    def scalars(self) -> dict[str, float]:
        """The formula's scalar variables."""
        return {} if self.parameter is None else {"a": self.parameter}

    @property
    def spec(self) -> tuple[str, float] | str:
        """How a user writes it: the name, or the name with its parameter."""
        return self.name if self.parameter is None else (self.name, self.parameter)

    def slope_at_zero(self) -> float:
        """|σ'(0)|, which scales glorot weights so that the signal keeps its size at the start; 1 where that says nothing."""
        try:
            z = formulas.evaluate_scalar(self.value, s=0.0, **self.scalars)
            slope = abs(formulas.evaluate_scalar(self.slope, s=0.0, z=z, **self.scalars))
        except (ArithmeticError, ValueError):  # 1 / s, log(s)
            return 1.0
        return slope if slope and math.isfinite(slope) else 1.0

    def standard_deviation(self, n_in: int, n_out: int, output: bool) -> float:
        """The standard deviation of initial weights (He et al. 2015, Glorot and Bengio 2010, LeCun et al. 1998).

        Glorot weights are divided by σ'(0), so that sigmoid(a) starts where sigmoid(1) does: substituting a s for s shows
        that the two nets are the same up to the scale of W. The output layer only follows the parameter (1/a), because
        what matters there is the size of the prediction, not of a signal passed on.
        """
        if self.rowwise:
            return math.sqrt(2 / (n_in + n_out))
        if self.init == "lecun":
            return math.sqrt(1 / n_in)
        if self.init == "he":
            return math.sqrt(2 / n_in)
        slope = self.slope_at_zero()
        if output:
            standard = Activation(self.name, self.value, self.slope, self.default) if self.default else self
            slope /= standard.slope_at_zero()
        return math.sqrt(2 / (n_in + n_out)) / slope


def finite(value: object, what: str) -> float:
    """`value` as a float; a TypeError or ValueError that names `what` if it is no finite number."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{what} must be a number; got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{what} must be finite; got a number of {value.__sizeof__()} bytes") from None
    except (TypeError, ValueError) as error:  # an array, say
        raise type(error)(f"{what} must be a number; got {type(value).__name__}: {error}") from None
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite; got {number}")
    return number


SOFTMAX = Activation("softmax", "", "")
ROWWISE = {"softmax": SOFTMAX, "log_softmax": Activation("log_softmax", "", "")}


@functools.cache
def sheet() -> dict[str, list[str]]:
    """The rows of `activations.def` by name: initial weights, default parameter, its condition, value, slope."""
    rows = formulas.read_sheet(kernel_files.read("activations.def"), "ACTIVATION")
    return {name: [*rest[:3], *map(formulas.written_out, rest[3:])] for name, *rest in rows}


@functools.cache
def curvatures() -> dict[str, str]:
    """The rows CURVATURE of `activations.def`: σ'' by name, where it is not the slope as it is written, differentiated."""
    rows = formulas.read_sheet(kernel_files.read("activations.def"), "CURVATURE")
    return {name: formulas.written_out(curvature) for name, curvature in rows}


def names(output: bool = False) -> list[str]:
    """The names that may be given for a hidden layer, or for the output layer."""
    return [*sheet(), *(ROWWISE if output else [])]


def resolve(spec: object, argument: str = "activations", output: bool = False) -> Activation:
    """The activation that a user's `"relu"`, `("sigmoid", 2.0)` or `Activation(…)` means.

    Raises:
        TypeError, ValueError: names `argument`, the nearest known name, or what is wrong with the parameter.
    """
    own = spec if isinstance(spec, Activation) else None
    name, parameter = spec if isinstance(spec, tuple | list) and len(spec) == 2 else (own.name if own else spec, None)
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a name, (name, parameter) or mc.Activation; got {spec!r}")
    if name in ROWWISE and not output and (own is None or own.rowwise):
        raise ValueError(f"{argument}: {name} is for the output layer only (output={name!r})")
    if own is not None:
        return own
    if name in ROWWISE:
        if parameter is not None:
            raise ValueError(f"{argument}: {name} takes no parameter; got {parameter!r}")
        return ROWWISE[name]
    if name not in sheet():
        raise unknown(argument, name, names(output))
    init, default, condition, value, slope = sheet()[name]
    number, default_number = row_parameter(argument, name, parameter, default, condition, "a")
    return Activation(name, value, slope, number, init, default_number)


def row_parameter(
    argument: str, name: str, given: object, default: str, condition: str, letter: str
) -> tuple[float | None, float | None]:
    """The parameter of a sheet's row: the given one, checked against the row's condition, or the default; and the default."""
    if default == "none":
        if given is not None:
            raise ValueError(f"{argument}: {name} takes no parameter; got {given!r}")
        return None, None
    standard = formulas.evaluate_scalar(default)
    number = standard if given is None else finite(given, f"{argument}: the parameter of {name}")
    if not formulas.holds(condition, **{letter: number}):
        raise ValueError(f"{argument}: the parameter of {name} must satisfy {condition}; got {letter} = {number}")
    return number, standard
