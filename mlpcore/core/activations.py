"""Activations: rows of `kernels/activations.def`, or the same formulas given at run time.

z = σ(s),   σ' as a formula in z where it can be, so that Z alone is cached

A parameter a is a constant of the formulas, or learned with the weights (prelu): then it is an
array beside s and z, one number for a layer or one for each of its outputs, and ∂J/∂a = Σ G ⊙ ∂z/∂a
over what shares it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlpcore import kernel_files
from mlpcore.checks import values
from mlpcore.checks.errors import shown, unknown
from mlpcore.core import formulas

INITIAL = ("he", "glorot", "lecun")
LEARNED = ("per layer", "per output")  # how many numbers a learned parameter is
Kind = TypeVar("Kind", bound="Activation")
_CHECKS: dict[str, values.Check] = {
    "name": values.text,
    "value": formulas.text,
    "slope": values.optional(formulas.text),
    "parameter": values.optional(values.number),
    "init": functools.partial(values.one_of, known=INITIAL),
    "default": values.optional(values.number),
    "learned": values.optional(functools.partial(values.one_of, known=LEARNED)),
}


@dataclass(frozen=True)
class Activation:
    """An elementwise activation, given by the formulas of its value and slope.

    Args:
        name: how it is called in messages and files.
        value: z = σ(s), a formula in `s` and, with a parameter, `a`.
        slope: σ', a formula in `z`, `s`, `a`; None: the value's derivative, which for a kink says
            what `positive` says there. One that does without `s` saves the cache of S.
        parameter: the value of `a`, None without one; of a learned one the initial value.
        init: the variance of initial weights: "he" 2 / n_in, "glorot" 2 / (n_in + n_out) / σ'(0)²,
            "lecun" 1 / n_in.
        learned: None, or that `a` is trained: "per layer" one number, "per output" one for each
            output. A trained `a` may come to be any number: value and slope must be right for all
            of them.

    Attributes:
        a, da: the arrays of a learned parameter and of its gradient, (1,) or (n_l,), where the
            activation is `bound` to such; else None, and `parameter` is a constant of the formulas.

    Raises:
        ValueError: a formula is not in the common subset of C++ and Python, or reads another
            variable; says which.

    Example:
        >>> net = MLP([4, 8, 1], activations=Activation("cubic", "s ** 3"))
    """

    name: str
    value: str
    slope: str = None  # type: ignore[assignment]  # a formula from __post_init__ on
    parameter: float | None = None
    init: str = "glorot"
    default: float | None = field(default=None, compare=False, repr=False)
    learned: str | None = None
    a: Any = field(default=None, init=False, compare=False, repr=False)
    da: Any = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        values.settle(self, _CHECKS)
        if not self.rowwise:
            formulas.check("value", self.value, ("s",), self.scalars)
            if self.slope is None:
                object.__setattr__(self, "slope", formulas.derive(self.value, "s"))
            formulas.check("slope", self.slope, ("s", "z"), self.scalars)
        if self.learned and (self.parameter is None or "a" not in formulas.reads(self.value)):
            raise ValueError(
                f"learned={self.learned!r} needs a value that reads a, and a parameter to begin "
                "with; got value "
                f"{shown(self.value)}, parameter {self.parameter}"
            )

    @property
    def rowwise(self) -> bool:
        """Whether it mixes the outputs of a row (softmax, log_softmax): then no formula, but code
        of each backend.
        """
        return self.name in ("softmax", "log_softmax") and not self.value

    @property
    def logarithmic(self) -> bool:
        """True for log_softmax, whose outputs are logarithms and whose Jacobian is not symmetric."""
        return self.rowwise and self.name == "log_softmax"

    @functools.cached_property
    def slope_reads_s(self) -> bool:
        """Whether S must be cached beside Z: for the slope, or for ∂z/∂a where the parameter is
        learned.
        """
        return not self.rowwise and (self.learned is not None or "s" in formulas.reads(self.slope))

    @functools.cached_property
    def by_parameter(self) -> str:
        """∂z/∂a, a formula in s and a."""
        return formulas.differentiate(self.value, {"a": "1"})

    @functools.cached_property
    def curvature(self) -> str:
        """σ'', a formula in what the slope reads: the sheet's, or the slope, differentiated; "0" of
        straight lines.
        """
        if self.rowwise:
            return "0"
        if self.name in curvatures() and sheet()[self.name][3:] == [self.value, self.slope]:
            return curvatures()[self.name]
        return formulas.differentiate(self.slope, {"s": "1", "z": self.slope})

    def sloped(self: Kind, slope: str) -> Kind:
        """Return this activation, on the same learned parameter, with another formula for its
        slope.
        """
        return dataclasses.replace(self, slope=slope).bound(self.a)

    @property
    def scalars(self) -> dict[str, float]:
        """The formula's scalar variables; without those of a bound activation, which reads an array
        in their place.
        """
        return {} if self.parameter is None or self.a is not None else {"a": self.parameter}

    @property
    def spec(self) -> tuple[str, float] | tuple[str, float, str] | str:
        """The name, `(name, parameter)`, or `(name, parameter, "per output")`: what a user writes."""
        if self.parameter is None:
            return self.name
        return (
            (self.name, self.parameter, self.learned)
            if self.learned == LEARNED[1]
            else (self.name, self.parameter)
        )

    def learned_numbers(self, n: int) -> int:
        """Return how many numbers of a layer of n outputs are learned beside its weights and
        biases.
        """
        return {None: 0, LEARNED[0]: 1, LEARNED[1]: n}[self.learned]

    def bound(self: Kind, a: Any, da: Any = None) -> Kind:
        """Return this activation on the array of its learned parameter; with `da`, a backward pass
        writes ∂J/∂a there.
        """
        twin = copy.copy(self)
        object.__setattr__(twin, "a", a)
        object.__setattr__(twin, "da", da)
        return twin

    def slope_at_zero(self) -> float:
        """|σ'(0)|, which scales glorot weights so that the signal keeps its size at the start; 1
        where that says nothing.
        """
        try:
            z = formulas.evaluate_scalar(self.value, s=0.0, **self.scalars)
            slope = abs(formulas.evaluate_scalar(self.slope, s=0.0, z=z, **self.scalars))
        except (ArithmeticError, ValueError):  # 1 / s, log(s)
            return 1.0
        return slope if slope and math.isfinite(slope) else 1.0

    def standard_deviation(self, n_in: int, n_out: int, output: bool) -> float:
        """The standard deviation of initial weights (He et al. 2015, Glorot and Bengio 2010, LeCun
        et al. 1998).

        Glorot weights are divided by σ'(0), so that sigmoid(a) starts where sigmoid(1) does:
        substituting a s for s shows that the two nets are the same up to the scale of W. The output
        layer only follows the parameter (1/a), because what matters there is the size of the
        prediction, not of a signal passed on.
        """
        if self.rowwise:
            return math.sqrt(2 / (n_in + n_out))
        if self.init == "lecun":
            return math.sqrt(1 / n_in)
        if self.init == "he":
            return math.sqrt(2 / n_in)
        slope = self.slope_at_zero()
        if output:
            standard = (
                Activation(self.name, self.value, self.slope, self.default)
                if self.default
                else self
            )
            slope /= standard.slope_at_zero()
        return math.sqrt(2 / (n_in + n_out)) / slope


SOFTMAX = Activation("softmax", "", "")
ROWWISE = {"softmax": SOFTMAX, "log_softmax": Activation("log_softmax", "", "")}


@functools.cache
def sheet() -> dict[str, list[str]]:
    """The rows of `activations.def` by name: initial weights, default parameter, its condition,
    value, slope.
    """
    rows = formulas.read_sheet(kernel_files.read("activations.def"), "ACTIVATION")
    return {name: [*rest[:3], *map(formulas.written_out, rest[3:])] for name, *rest in rows}


@functools.cache
def curvatures() -> dict[str, str]:
    """The rows CURVATURE of `activations.def`: σ'' by name, where it is not the slope as it is
    written, differentiated.
    """
    rows = formulas.read_sheet(kernel_files.read("activations.def"), "CURVATURE")
    return {name: formulas.written_out(curvature) for name, curvature in rows}


def names(output: bool = False) -> list[str]:
    """The names that may be given for a hidden layer, or for the output layer."""
    return [*sheet(), *(ROWWISE if output else [])]


def resolve(spec: object, argument: str = "activations", output: bool = False) -> Activation:
    """The activation that a user's `"relu"`, `("sigmoid", 2.0)`, `("prelu", 0.25, "per output")` or
    `Activation(…)` means.

    Raises:
        TypeError, ValueError: names `argument`, the nearest known name, or what is wrong with the
            parameter.
    """
    own = spec if isinstance(spec, Activation) else None
    several = isinstance(spec, tuple | list) and 2 <= len(spec) <= 3
    name, parameter, *shared = (
        spec if isinstance(spec, tuple | list) and several else (own.name if own else spec, None)
    )
    if not isinstance(name, str):
        raise TypeError(
            f"{argument} must be a name, (name, parameter) or mc.Activation; got {shown(spec)}"
        )
    if name in ROWWISE and not output and (own is None or own.rowwise):
        raise ValueError(f"{argument}: {name} is for the output layer only (output={name!r})")
    if own is not None:
        return own
    if name in ROWWISE:
        if parameter is not None or shared:
            raise ValueError(f"{argument}: {name} takes no parameter; got {shown(spec)}")
        return ROWWISE[name]
    if name not in sheet():
        raise unknown(argument, name, names(output))
    init, default, condition, value, slope = sheet()[name]
    learned = LEARNED[0] if condition == "learned" else None
    if shared and learned is None:
        raise ValueError(
            f"{argument}: {name} has no learned parameter, so it is not {shown(shared[0])}; got "
            f"{shown(spec)}"
        )
    if shared and shared[0] not in LEARNED:
        raise ValueError(
            f"{argument}: {name} is learned {' or '.join(map(repr, LEARNED))}; got "
            f"{shown(shared[0])}"
        )
    number, default_number = row_parameter(argument, name, parameter, default, condition, "a")
    return Activation(
        name, value, slope, number, init, default_number, shared[0] if shared else learned
    )


def bind(
    activations: Sequence[Activation | None], a: Sequence[Any], da: Sequence[Any] | None = None
) -> tuple[Activation | None, ...]:  # fmt: skip
    """Return the activations of layers 0 … L, those with a learned parameter on a[l], and on da[l]
    where it is given.
    """
    bound = list(activations)
    for l, sigma in enumerate(activations):
        if sigma is not None and sigma.learned:
            bound[l] = sigma.bound(a[l], None if da is None else da[l])
    return tuple(bound)


def row_parameter(
    argument: str, name: str, given: object, default: str, condition: str, letter: str
) -> tuple[float | None, float | None]:
    """The parameter of a sheet's row: the given one, checked against the row's condition, or the
    default; and the default.
    """
    if default == "none":
        if given is not None:
            raise ValueError(f"{argument}: {name} takes no parameter; got {shown(given)}")
        return None, None
    standard = formulas.evaluate_scalar(default)
    number = (
        standard if given is None else values.number(given, f"{argument}: the parameter of {name}")
    )
    if condition != "learned" and not formulas.holds(condition, **{letter: number}):
        raise ValueError(
            f"{argument}: the parameter of {name} must satisfy {condition}; got {letter} = {number}"
        )
    return number, standard
