"""The class of activations, built-in (see `activations.py`) and user-defined.

z = σ(s),   σ' as a formula in z if possible, so that only Z is cached

A parameter a is a constant of the formulas, or is learned with the weights (prelu). A learned a is
an array alongside s and z: one number per layer or one per output. ∂J/∂a = Σ G ⊙ ∂z/∂a over all
entries that share it.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core import formulas
from mlpcore.core.rows import CHECKS, Row

INITIAL = ("he", "glorot", "lecun")
LEARNED = ("per layer", "per output")  # granularities of a learned parameter


@dataclass(frozen=True)
class Activation(Row):
    """An elementwise activation, given by the formulas of its value and slope.

    Args:
        name: its name in messages and files.
        value: z = σ(s), a formula in `s` and, with a parameter, `a`.
        slope: σ', a formula in `z`, `s`, `a`; None: the derivative of the value, which at a kink
            follows the convention of `positive`. A slope without `s` saves the cache of S.
        parameter: the value of `a`, or its initial value if it is learned; None without one.
        init: the variance of initial weights: "he" is 2 / n_in, "glorot" is
            2 / (n_in + n_out) / σ'(0)², "lecun" is 1 / n_in.
        default: the default parameter of the built-in activation, if `parameter` differs from it.
        learned: None, or `a` is trained: "per layer" is one number, "per output" one per output.
            Training may move `a` anywhere: value and slope must be right for every number.
        second_derivative: σ'', a formula in the slope's variables, for a slope whose derivative as
            written loses digits; None: derived.
        condition: a condition on the parameter, e.g. "a > 0"; None: any number is allowed.

    Attributes:
        a, da: arrays of a learned parameter and of its gradient, (1,) or (n_l,), if the activation
            is `bound` to them; else None, and `parameter` is a constant of the formulas.

    Raises:
        ValueError: a formula cannot be read, or reads an unknown variable; names it.

    Example:
        >>> net = MLP([4, 8, 1], activations=Activation("cubic", "s ** 3"))
    """

    init: str = "glorot"
    default: float | None = field(default=None, compare=False, repr=False)
    learned: str | None = None
    a: Any = field(default=None, init=False, compare=False, repr=False)
    da: Any = field(default=None, init=False, compare=False, repr=False)

    letter: ClassVar = "a"
    reads: ClassVar = ("s",)
    slope_may_read: ClassVar = ("s", "z")
    names_of_rowwise: ClassVar = ("softmax", "log_softmax")
    checks: ClassVar = {
        **CHECKS,
        "init": functools.partial(values.one_of, known=INITIAL),
        "default": values.optional(values.number),
        "learned": values.optional(functools.partial(values.one_of, known=LEARNED)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learned and (self.parameter is None or "a" not in formulas.reads(self.value)):
            raise ValueError(
                f"learned={self.learned!r} needs a value that reads a, and an initial parameter; "
                f"got value {shown(self.value)}, parameter {self.parameter}"
            )

    @property
    def logarithmic(self) -> bool:
        """True for log_softmax: its outputs are logarithms, its Jacobian is not symmetric."""
        return self.rowwise and self.name == "log_softmax"

    @functools.cached_property
    def slope_reads_s(self) -> bool:
        """True if S must be cached along with Z: for the slope, or for ∂z/∂a of a learned a."""
        return not self.rowwise and (self.learned is not None or "s" in formulas.reads(self.slope))

    @functools.cached_property
    def by_parameter(self) -> str:
        """∂z/∂a, a formula in s and a."""
        return formulas.differentiate(self.value, {"a": "1"})

    @functools.cached_property
    def curvature(self) -> str:
        """σ'', a formula in the slope's variables; "0" for straight lines."""
        if self.rowwise:
            return "0"
        if self.second_derivative is not None:
            return self.second_derivative
        return formulas.differentiate(self.slope, {"s": "1", "z": self.slope})

    def sloped(self, slope: str) -> Self:
        """Return this activation with another slope and the same learned parameter."""
        return replace(self, slope=slope, second_derivative=None).bound(self.a)

    @property
    def scalars(self) -> dict[str, float]:
        """Scalar variables of the formulas; empty for a bound activation, whose `a` is an array."""
        return {} if self.a is not None else super().scalars

    @property
    def spec(self) -> tuple[str, float] | tuple[str, float, str] | str:
        """The name, `(name, parameter)`, or `(name, parameter, "per output")`."""
        if self.parameter is not None and self.learned == LEARNED[1]:
            return self.name, self.parameter, self.learned
        return self.name if self.parameter is None else (self.name, self.parameter)

    def with_parameter(self, given: object, argument: str, **changes: Any) -> Self:
        """Return the activation with another parameter; its own parameter becomes the default."""
        return super().with_parameter(given, argument, default=self.parameter, **changes)

    def learned_numbers(self, n: int) -> int:
        """Return the count of numbers a layer of n outputs learns besides weights and biases."""
        return {None: 0, LEARNED[0]: 1, LEARNED[1]: n}[self.learned]

    def bound(self, a: Any, da: Any = None) -> Self:
        """Return this activation bound to the array of its learned parameter.

        With `da`, a backward pass writes ∂J/∂a there.
        """
        twin = copy.copy(self)
        object.__setattr__(twin, "a", a)
        object.__setattr__(twin, "da", da)
        return twin

    def slope_at_zero(self) -> float:
        """Return |σ'(0)|, the divisor of glorot weights; 1 if it is 0, infinite or undefined."""
        try:
            z = formulas.evaluate_scalar(self.value, s=0.0, **self.scalars)
            slope = abs(formulas.evaluate_scalar(self.slope, s=0.0, z=z, **self.scalars))
        except (ArithmeticError, ValueError):  # 1 / s, log(s)
            return 1.0
        return slope if slope and math.isfinite(slope) else 1.0

    def standard_deviation(self, n_in: int, n_out: int, output: bool) -> float:
        """Return the standard deviation of initial weights.

        He et al. 2015, Glorot and Bengio 2010, LeCun et al. 1998. Glorot weights are divided by
        σ'(0), so that sigmoid(a) starts like sigmoid(1): substituting a s for s shows that the two
        nets are the same up to the scale of W. The output layer only follows the parameter (1/a),
        because its scale sets the size of the prediction, not of a signal passed on.
        """
        if self.rowwise:
            return math.sqrt(2 / (n_in + n_out))
        if self.init == "lecun":
            return math.sqrt(1 / n_in)
        if self.init == "he":
            return math.sqrt(2 / n_in)
        slope = self.slope_at_zero()
        if output:
            standard = replace(self, parameter=self.default) if self.default else self
            slope /= standard.slope_at_zero()
        return math.sqrt(2 / (n_in + n_out)) / slope
