"""The class of losses, built-in (see `losses.py`) and user-defined.

J = Σ_i w_i ℓ(z_i, y_i) / Σ_i w_i,   ℓ of a row = the sum of the formula over its outputs
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core import formulas
from mlpcore.core.program import check
from mlpcore.core.rows import CHECKS, Row


class Matched(NamedTuple):
    """A loss with a matching output, computed from S[L] without overflow or loss of digits.

    Attributes:
        value: a formula in `s`, `a` (the output's parameter), `z`, `y` and `q`.
        slope: its derivative by s, which gives D[L].
        second_derivative: the second derivative by s, if differentiating the slope as written loses
            digits; else None.
        weighed: value, slope and second derivative in `s`, `a` and the weights `u` and `v` of y and
            1 - y, for a loss that takes options; else None.
    """

    value: str
    slope: str
    second_derivative: str | None = None
    weighed: tuple[str, str, str] | None = None


@dataclass(frozen=True, repr=False)
class Loss(Row):
    """A loss summed over the outputs of a row, defined by the formulas of its value and slope.

    Args:
        name: its name in messages and files.
        value: a formula in `z` (an output), `y` (its target) and, with a parameter, `q`.
        slope: ∂value/∂z, in the same variables; None: the derivative of the value, which at a kink
            follows the convention of `positive`.
        parameter: the value of `q`; None without one.
        outputs: names, separated by blanks, of the outputs on whose range the loss is defined.
        matched: value and ∂value/∂s for the output named by `outputs`, in its `s` and `a` and in
            `z`, `y` and `q`, used instead of ∂J/∂Z[L]; None: the built-in formulas, if the loss is
            built in.
        weighed: value, slope and second derivative in `z` and the weights `u` and `v` of y and
            1 - y; such a loss takes class_weight, label_smoothing and pos_weight.
        second_derivative: the second derivative by z, a formula in the slope's variables, for a
            slope whose derivative as written loses digits; None: derived.
        condition: a condition on the parameter, e.g. "q > 0"; None: any number is allowed.
        most: the most that an output (cross_entropy: a row) adds to J; None: no limit. The gradient
            ignores the limit.
        class_weight: one number per class, for cross_entropy, or for binary_cross_entropy with one
            output (classes 0 and 1).
        label_smoothing: ε in [0, 1): targets become (1 - ε) y + ε/K over K classes, K = 2 for an
            output of binary_cross_entropy.
        pos_weight: weight of the loss of a positive target in binary_cross_entropy: one number, or
            one per output.

    Raises:
        ValueError: a formula cannot be read, or reads an unknown variable; or the loss does not
            take an option. Says which.

    Example:
        >>> trainer = Trainer(net, loss=Loss("fourth_power", "(z - y) ** 4"))
    """

    outputs: str = "any"
    matched: tuple[str, str] | None = field(default=None, kw_only=True)
    weighed: tuple[str, str, str] | None = field(default=None, kw_only=True, compare=False)
    most: float | None = field(default=None, kw_only=True)
    class_weight: tuple[float, ...] | None = field(default=None, kw_only=True)
    label_smoothing: float = field(default=0.0, kw_only=True)
    pos_weight: float | tuple[float, ...] | None = field(default=None, kw_only=True)

    letter: ClassVar = "q"
    reads: ClassVar = ("z", "y")
    slope_may_read: ClassVar = ("z", "y")
    names_of_rowwise: ClassVar = ("cross_entropy",)
    kept_by_sheet: ClassVar = ("second_derivative", "weighed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rowwise:
            for formula in self.matched or ():
                check("matched", formula, ("s", "z", "y", "a"), self.scalars)
            for formula in self.weighed or ():
                check("weighed", formula, ("z", "u", "v"), self.scalars)
        self._check_options()

    def _check_options(self) -> None:
        for name in self.options:  # before their values, since a dict may be valid for another loss
            if not self.binary and not (self.rowwise and name != "pos_weight"):
                also = "" if name == "pos_weight" else "cross_entropy or "
                raise ValueError(
                    f"{name} is for the loss {also}binary_cross_entropy; got loss {self.name!r}"
                )
        values.settle(self, _WEIGHTS)
        weights = self.class_weight
        if weights is not None and not any(weights):
            raise ValueError("class_weight must not be all zero")
        if weights is not None and self.label_smoothing and not all(weights):
            raise ValueError(
                "class_weight must be positive if label_smoothing gives each class a share; "
                f"class {weights.index(0)} has weight 0"
            )

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set: class weights, label smoothing and the weight of positives."""
        options = {
            "class_weight": self.class_weight,
            "label_smoothing": self.label_smoothing or None,
            "pos_weight": self.pos_weight,
        }
        return {name: value for name, value in options.items() if value is not None}

    @property
    def binary(self) -> bool:
        """True for binary cross-entropy, whose targets y and 1 - y can be weighed."""
        return self.weighed is not None

    @property
    def columns(self) -> tuple[float, ...]:
        """One number per output, which the backends read from an array; empty if there are none."""
        if self.rowwise and self.class_weight is not None:
            largest = max(self.class_weight)
            return tuple(weight / largest for weight in self.class_weight)
        return self.pos_weight if isinstance(self.pos_weight, tuple) else ()

    def mixes(self, classes: bool) -> bool:
        """Return True if options change the target of cross-entropy that a row of Y gives.

        Args:
            classes: True if Y holds class indices, not distributions.
        """
        return self.label_smoothing > 0 or (self.class_weight is not None and not classes)

    def require_held(self, dtype: str) -> None:
        """Raise a ValueError that names a parameter or option that a dtype cannot hold."""
        numbers = {
            f"loss: the parameter of {self.name}": self.parameter,
            "most": self.most,
            **self.options,
        }
        for name, value in numbers.items():
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                values.require_held(number, dtype, name)

    def require_outputs(self, outputs: int) -> None:
        """Raise a ValueError that names an option that does not fit this many outputs."""
        if self.class_weight is not None:
            if self.binary and outputs != 1:
                raise ValueError(
                    "class_weight is for binary_cross_entropy of one output; the network has "
                    f"{outputs}: pass pos_weight with one number per output"
                )
            classes = 2 if self.binary else outputs
            if len(self.class_weight) != classes:
                raise ValueError(
                    f"class_weight must have one number per class, {classes} in all; got "
                    f"{len(self.class_weight)}"
                )
        if isinstance(self.pos_weight, tuple) and len(self.pos_weight) != outputs:
            raise ValueError(
                f"pos_weight must be a number, or {outputs} numbers, one per output; got "
                f"{len(self.pos_weight)} numbers"
            )

    @property
    def takes_classes(self) -> bool:
        """True if Y may hold class indices."""
        return self.rowwise

    @property
    def classifies(self) -> bool:
        """True if accuracy is meaningful for a model trained with it."""
        return self.name in ("cross_entropy", "binary_cross_entropy")

    def __str__(self) -> str:
        """Return the name with its parameter, and the options that are set."""
        shown = [f"{key}={_brief(value)}" for key, value in self.options.items()]
        return ", ".join([repr(self.spec), *shown])

    def __repr__(self) -> str:
        """Return parameter, options and formulas; long lists appear as their length."""
        if self.rowwise:
            return f"Loss({self})"
        parameter = {} if self.parameter is None else {"parameter": self.parameter}
        settings = {**parameter, **self.options, "value": self.value, "slope": self.slope}
        shown = [f"{key}={_brief(value)}" for key, value in settings.items()]
        return f"Loss({self.name!r}, {', '.join(shown)})"


def _brief(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({len(value)} numbers)" if len(value) > 8 else repr(list(value))
    return repr(value)


def _weights(value: Any, name: str) -> float | tuple[float, ...]:
    """Return a number, a list or an array as a weight or a tuple of weights."""
    given = value.tolist() if getattr(value, "ndim", None) == 1 else value
    if not isinstance(given, list | tuple):
        return values.number(given, name, least=0)
    return tuple(values.number(x, f"{name}[{i}]", least=0) for i, x in enumerate(given))


def _class_weights(value: object, name: str) -> tuple[float, ...]:
    """Return the weights of classes as a tuple."""
    weights = _weights(value, name)
    if isinstance(weights, float):
        raise TypeError(f"{name} must be a list of one number per class; got {shown(value)}")
    return weights


def _several(value: object, name: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return a tuple of formulas, one for each of these parts."""
    if not isinstance(value, list | tuple) or len(value) != len(parts):
        raise TypeError(
            f"{name} must be {len(parts)} formulas, ({', '.join(parts)}); got {shown(value)}"
        )
    return tuple(formulas.text(formula, name) for formula in value)


Loss.checks = {
    **CHECKS,
    "outputs": values.text,
    "matched": values.optional(functools.partial(_several, parts=("value", "slope"))),
    "weighed": values.optional(
        functools.partial(_several, parts=("value", "slope", "second_derivative"))
    ),
    "most": values.optional(values.number),
    "label_smoothing": functools.partial(values.number, least=0, below=1),
}
_WEIGHTS: dict[str, values.Check] = {
    "class_weight": values.optional(_class_weights),
    "pos_weight": values.optional(_weights),
}
