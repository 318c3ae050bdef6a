"""Learning rate schedules, and the progress of a run that they depend on."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from mlpcore.checks import values
from mlpcore.checks.errors import named, shown
from mlpcore.core import formulas

_NOT_NEGATIVE = functools.partial(values.number, least=0)
FOLLOWED: dict[str, values.Check] = {  # settings for following a figure of the history
    "patience": values.positive_integer,
    "monitor": functools.partial(values.text, what="a key of the history"),
    "mode": values.optional(functools.partial(values.one_of, known=("min", "max"))),
}


def _updates(value: object, name: str, least: int = 1) -> float:
    """Return a number of updates, as an int if it is whole; it may be a fraction of another."""
    count = values.number(value, name, least=least, most=2**53)
    return int(count) if count.is_integer() else count


_SCHEDULED: dict[str, values.Check] = {
    "rate": functools.partial(values.number, above=0),
    "every": _updates,
    "factor": functools.partial(values.number, above=0, most=1),
    "steps": values.optional(_updates),
    "warmup": functools.partial(_updates, least=0),
    "final": _NOT_NEGATIVE,
    "power": functools.partial(values.number, least=0, most=16),  # t ** 16 is a number for every t
    "tolerance": _NOT_NEGATIVE,
    "minimum": _NOT_NEGATIVE,
    "formula": formulas.text,
    **FOLLOWED,
}


@dataclass
class Progress:
    """The progress of a run, which a schedule may depend on.

    step: number of updates done so far.
        step: updates done so far.
        total: number of updates of the current `fit`; None outside `fit`.
        reductions: number of times an `Adaptive` schedule has lowered the rate.
        followed: the `Adaptive` schedule that these reductions belong to; any other starts at its
            own rate. None: any.
        begun: number of updates done before the current `fit` began.
        skipped: number of updates left out because loss or gradient was not finite.
        epochs: passes over the data that `fit` has begun: each has its own row order.
    """

    step: int = 0
    total: int | None = None
    reductions: int = 0
    begun: int = 0
    skipped: int = 0
    epochs: int = 0
    followed: Adaptive | None = None


@dataclass(frozen=True)
class Schedule:
    """A learning rate that changes from update to update; each subclass is one rule."""

    rate: float

    def __post_init__(self) -> None:
        values.settle(self, _SCHEDULED, f"{type(self).__name__}: ")

    def at(self, progress: Progress) -> float:
        """Return the rate of the next update, number `progress.step + 1`."""
        raise TypeError(
            "Schedule is the common base; use Constant, StepDecay, Cosine, InverseScaling, "
            "Adaptive or FormulaSchedule"
        )


@dataclass(frozen=True)
class Constant(Schedule):
    """A constant learning rate, equivalent to a plain number."""

    def at(self, progress: Progress) -> float:
        """Return the rate of the next update."""
        return self.rate


@dataclass(frozen=True)
class StepDecay(Schedule):
    """`rate · factor^⌊t / every⌋` after t updates; `every` counts updates, not epochs."""

    every: int
    factor: float = 0.1

    def at(self, progress: Progress) -> float:
        """Return the rate of the next update."""
        return self.rate * math.pow(self.factor, progress.step // self.every)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear rise over `warmup` updates, then decay along half a cosine to `final`.

    Loshchilov and Hutter 2017. It ends at update `steps`; `steps=None` uses the number of updates
    of the current `fit`.
    """

    steps: int | None = None
    warmup: int = 0
    final: float = 0.0

    def at(self, progress: Progress) -> float:
        """Return the rate of the next update; raise a ValueError if the total is unknown."""
        steps, step = self.steps, progress.step
        if steps is None:
            steps, step = progress.total, progress.step - progress.begun
        if steps is None:
            raise ValueError(
                "learning_rate: Cosine needs steps=… outside fit, and in a fit on a stream of "
                "unknown length"
            )
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        share = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.final + (self.rate - self.final) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class InverseScaling(Schedule):
    """`rate / t^power` for update number t; `power` is at most 16.

    scikit-learn's "invscaling" counts rows and lowers the rate only after each epoch: with n rows
    that is `FormulaSchedule(rate, "rate / pow(n * (epoch - 1) + 1, 0.5)")`, with n written as a
    number.
    """

    power: float = 0.5

    def at(self, progress: Progress) -> float:
        """Return the rate of the next update."""
        return self.rate / math.pow(progress.step + 1, self.power)


@dataclass(frozen=True)
class Adaptive(Schedule):
    """`rate · factor^reductions`, lowered when a figure stops improving.

    The rate is lowered when the figure has not improved by `tolerance` for `patience` epochs.
    `monitor` is a key of `fit`'s history: "loss", the mean of J over an epoch's steps, or
    "validation_loss", "validation_accuracy", "validation_r2", of which the last two improve by
    growing. For a custom metric, `mode` is "min" or "max", whichever is better.
    """

    factor: float = 0.2
    patience: int = 2
    tolerance: float = 1e-4
    minimum: float = 1e-6
    monitor: str = "loss"
    mode: str | None = None

    def at(self, progress: Progress) -> float:
        """Return the rate of the next update."""
        reductions = progress.reductions if progress.followed in (None, self) else 0
        return min(self.rate, max(self.minimum, self.rate * math.pow(self.factor, reductions)))


_PROGRESS = ("step", "begun", "total", "epoch")


@dataclass(frozen=True)
class FormulaSchedule(Schedule):
    """A learning rate given by a formula, which is saved with a run as text.

    FormulaSchedule(0.1, "rate * minimum(1, step / 100)")  # linear rise over 100 updates

    Args:
        rate: the value of `rate` in the formula.
        formula: a formula of `rate`; `step`, the number of the update, from 1; `begun`, updates
            done before the current `fit`; `total`, updates of the current `fit`, if known; `epoch`,
            passes over the data begun by `fit`, including this one. Operations: + - * /, maximum,
            minimum, tanh, exp, expm1, log, log1p, abs, sqrt, sign, positive, pow.

    Raises:
        TypeError, ValueError: the formula cannot be read, or reads an unknown variable.
    """

    formula: str

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            unknown = formulas.reads(self.formula) - {"rate", *_PROGRESS}
            if unknown:
                raise ValueError(
                    f"{shown(self.formula)} reads {shown(min(unknown))}; it may read rate, "
                    f"{', '.join(_PROGRESS)}"
                )
            formulas.scalar(self.formula)
        except (TypeError, ValueError) as error:
            raise named("FormulaSchedule: formula", error) from None

    def at(self, progress: Progress) -> float:
        """Return the rate of the next update.

        Raises:
            ValueError: the formula reads `total` outside a `fit` of known length, or its value is
                not a valid rate; says for which numbers.
        """
        if progress.total is None and "total" in _read(self.formula):
            raise ValueError(
                f"learning_rate: {shown(self.formula)} reads total, which is known only inside "
                "fit, and not for a stream of unknown length"
            )
        known = (progress.step + 1, progress.begun, progress.total or 0, progress.epochs)
        values = dict(zip(_PROGRESS, map(float, known), strict=True))
        try:
            rate = float(formulas.scalar(self.formula)({"rate": self.rate, **values}))
        except (ArithmeticError, ValueError) as error:
            raise ValueError(
                f"learning_rate: {shown(self.formula)} has no value for {values}: {error}"
            ) from None
        if not 0 <= rate < math.inf:
            raise ValueError(
                f"learning_rate: {shown(self.formula)} must be finite and not negative; it is "
                f"{rate} for {values}"
            )
        return rate


def rate_or_schedule(value: object, name: str) -> float | Schedule:
    """Return a learning rate or a schedule, checked."""
    if type(value) is Schedule:
        raise TypeError(f"{name} must be a number or one of the schedules, such as mc.Cosine(0.1)")
    return value if isinstance(value, Schedule) else _NOT_NEGATIVE(value, name)


_read = functools.lru_cache(256)(formulas.reads)
