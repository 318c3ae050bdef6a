"""The classes of the sheet's rows: the base of activations and losses, penalties, updates."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

from mlpcore.checks import values
from mlpcore.checks.errors import named, shown, unknown
from mlpcore.core import formulas
from mlpcore.core.program import check

CHECKS: dict[str, values.Check] = {
    "name": values.text,
    "value": formulas.text,
    "slope": values.optional(formulas.text),
    "parameter": values.optional(values.number),
    "second_derivative": values.optional(formulas.text),
    "condition": values.optional(formulas.text),
}


@dataclass(frozen=True)
class Row:
    """A function of one variable, given by formulas: the base of Activation and Loss.

    Args:
        name: its name in messages and files.
        value: a formula in `reads` (the function's variable comes first) and the parameter.
        slope: its derivative by that variable; None: derived.
        parameter: the value of the parameter `letter`; None without one.
        second_derivative: a formula in the slope's variables, for a slope whose derivative as
            written loses digits; None: derived.
        condition: a condition on the parameter, e.g. "a > 0"; None: any number is allowed.
    """

    name: str
    value: str
    slope: str = None  # type: ignore[assignment]  # a formula from __post_init__ on
    parameter: float | None = None
    second_derivative: str | None = field(default=None, kw_only=True, compare=False, repr=False)
    condition: str | None = field(default=None, kw_only=True, compare=False, repr=False)

    letter: ClassVar[str]
    reads: ClassVar[Sequence[str]]
    slope_may_read: ClassVar[Sequence[str]]
    names_of_rowwise: ClassVar[Sequence[str]]
    checks: ClassVar[Mapping[str, values.Check]]
    kept_by_sheet: ClassVar[Sequence[str]] = ("second_derivative",)  # not stored in files

    def __post_init__(self) -> None:
        values.settle(self, self.checks)
        if self.condition is not None:
            self._require_condition(self.condition)
        if not self.rowwise:
            check("value", self.value, self.reads, self.scalars)
            if self.slope is None:
                object.__setattr__(self, "slope", formulas.derive(self.value, self.reads[0]))
            check("slope", self.slope, self.slope_may_read, self.scalars)
            if self.second_derivative is not None:
                may_read = self.slope_may_read
                check("second_derivative", self.second_derivative, may_read, self.scalars)

    def _require_condition(self, condition: str) -> None:
        known = {} if self.parameter is None else {self.letter: self.parameter}
        if not formulas.holds(condition, **known):
            raise ValueError(
                f"the parameter of {self.name} must satisfy {condition}; got {self.letter} = "
                f"{self.parameter}"
            )

    @property
    def rowwise(self) -> bool:
        """True if it needs sums over a row, so that each backend implements it by hand."""
        return self.name in self.names_of_rowwise and not self.value

    @property
    def scalars(self) -> dict[str, float]:
        """Scalar variables of the formulas, with their values."""
        return {} if self.parameter is None else {self.letter: self.parameter}

    @property
    def spec(self) -> Any:
        """The name, or `(name, parameter)`, as a user writes it."""
        return self.name if self.parameter is None else (self.name, self.parameter)

    def is_in(self, table: Mapping[str, Row]) -> bool:
        """Return True if a table has this function under its name, with any parameter."""
        row = table.get(self.name)
        return row is not None and (row.value, row.slope) == (self.value, self.slope)

    def with_parameter(self, given: object, argument: str, **changes: Any) -> Self:
        """Return the function with another parameter.

        Raises:
            TypeError, ValueError: it takes no parameter, or not this one; names the argument.
        """
        if self.parameter is None:
            raise ValueError(f"{argument}: {self.name} takes no parameter; got {shown(given)}")
        number = values.number(given, f"{argument}: the parameter of {self.name}")
        try:
            return replace(self, parameter=number, **changes)
        except ValueError as error:
            raise named(argument, error) from None

    def described(self, table: Mapping[str, Row]) -> dict[str, Any]:
        """Return the arguments for a file, except those that equal the table's row of this name."""
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        del arguments["condition"]  # the stored parameter already satisfies it
        for name in self.kept_by_sheet:
            if arguments[name] is None or self.is_in(table):
                del arguments[name]
        return arguments

    @classmethod
    def restored(cls, described: Mapping[str, Any], table: Mapping[str, Row]) -> Self:
        """Return the object that `described` described; raise TypeError or ValueError otherwise."""
        arguments = dict(described)
        row = table.get(arguments["name"]) if isinstance(arguments.get("name"), str) else None
        formulas_ = arguments.get("value"), arguments.get("slope")
        if row is not None and (row.value, row.slope) == formulas_:
            arguments = {name: getattr(row, name) for name in cls.kept_by_sheet} | arguments
        return cls(**arguments)

    @classmethod
    def resolve(
        cls, spec: object, argument: str, table: Mapping[str, Self], known: Sequence[str]
    ) -> Self:
        """Return the row that a name, `(name, parameter)` or an instance describes.

        Args:
            spec: the user's argument.
            argument: its name in errors.
            table: the rows by name.
            known: the names that an error lists.

        Raises:
            TypeError, ValueError: there is no such row or parameter; says what was expected.
        """
        if isinstance(spec, cls):
            return spec
        pair = isinstance(spec, tuple | list) and len(spec) == 2
        name, parameter = spec if isinstance(spec, tuple | list) and pair else (spec, None)
        if not isinstance(name, str):
            raise TypeError(
                f"{argument} must be a name, (name, parameter) or mc.{cls.__name__}; got "
                f"{shown(spec)}"
            )
        if name not in table:
            raise unknown(argument, name, known)
        row = table[name]
        return row if parameter is None else row.with_parameter(parameter, argument)


class Penalty(NamedTuple):
    """A term of J for each weight w.

    Attributes:
        name: name of its factor, a setting of `Trainer`.
        value: a formula in `w` and the factor.
        slope: its derivative by w.
    """

    name: str
    value: str
    slope: str


@dataclass(frozen=True)
class Update:
    """An optimizer's update of each entry of the parameters, in one pass over the flat vectors.

    If no |g| exceeds G and no entry of the first state vector exceeds `reach`, then after the
    update no entry of it exceeds `reach_after`, and no parameter has moved by more than `change`,
    apart from its decay. `change` also bounds the intermediate results. While both are small,
    nothing can overflow, so that no entry has to be checked.

    Args:
        name: name of the row.
        states: names of the state vectors, zero at first.
        statements: `target = formula; …`, in the parameters `w`, the gradient `g` (penalised,
            clipped, unscaled), the states, and scalars: `rate`, the learning rate; `t`, the number
            of this update, from 1; `decay`, 0 on biases; the optimizer's own settings. Parts that
            read only scalars are computed once per update.
        reach_after, change: the bounds, formulas in `G`, `reach` and the scalars.
    """

    name: str
    states: tuple[str, ...]
    statements: str
    reach_after: str
    change: str

    @functools.cached_property
    def bounds(self) -> tuple[str, str]:
        """Formulas of `reach_after`, and of a bound on any parameter's move.

        The latter is at least the rate, and huge if decay would enlarge weights.
        """
        change = f"maximum(maximum({self.change}, rate), (rate * decay - 2) * 1e300)"
        return self.reach_after, change
