"""Optimizers: settings of the sheet's updates.

An optimizer object holds settings only; its state vectors belong to the trainer.
Assigning `optimizer.learning_rate = 1e-4` takes effect at the next update.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core import formulas
from mlpcore.core.layout import Layout
from mlpcore.core.ops import Array
from mlpcore.core.rows import Update
from mlpcore.core.schedules import Progress, Schedule, rate_or_schedule
from mlpcore.core.sheet import UPDATES

_NOT_NEGATIVE = functools.partial(values.number, least=0)
_SHARE = functools.partial(values.number, least=0, below=1)


@dataclass(frozen=True)
class Layer:
    """Settings of one layer that differ from the optimizer's.

    Args:
        rate: factor of the learning rate, 0 or more. At 0 the optimizer's state is still updated,
            and the parameters stay.
        weight_decay: overrides the optimizer's, which must have one; None: the optimizer's.
        frozen: parameters and state stay bit-identical; the gradient counts as 0. A layer that is
            thawed resumes from its state: Adam's bias correction counts only the layer's own
            updates, as in PyTorch.
    """

    rate: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        values.settle(self, _LAYER, "Layer: ")


_LAYER: dict[str, values.Check] = {
    "rate": _NOT_NEGATIVE,
    "weight_decay": values.optional(_NOT_NEGATIVE),
    "frozen": values.boolean,
}


class Segment(NamedTuple):
    """A part of the flat vectors with its own settings.

    Attributes:
        start, stop: the range of its entries.
        weights: True if they are weights, which are decayed and penalised.
        layer: its settings.
        missed: number of updates it missed while frozen, subtracted from its `t`.
    """

    start: int
    stop: int
    weights: bool
    layer: Layer
    missed: int = 0

    @property
    def decay(self) -> float | None:
        """Weight decay of the segment; None: the optimizer's."""
        return self.layer.weight_decay if self.weights else 0.0


class _Span(NamedTuple):
    """A stand-in for a part of the flat vector that holds only its range, for `Layout.views`."""

    start: int
    stop: int

    def __getitem__(self, part: Any) -> Any:
        return _Span(self.start + part.start, self.start + part.stop)

    def reshape(self, *_: int) -> _Span:
        return self

    @property
    def T(self) -> _Span:
        return self


def segments(
    layout: Layout, layers: Mapping[int, Layer], missed: Mapping[int, int] | None = None
) -> list[Segment]:
    """Return the parts of the flat vectors that are updated alike, in order.

    Args:
        layout: layout of the vectors.
        layers: settings by layer.
        missed: updates that a layer missed while it was frozen, by layer. Without `layers` and
            `missed`, the parts are the weights and the rest.
    """
    missed = missed or {}
    size, n = layout.size, layout.weights
    parts = [Segment(0, n, True, Layer()), Segment(n, size, False, Layer())]
    if layers or missed:
        (W, b), a = layout.views(_Span(0, size)), layout.slopes(_Span(0, size))
        owned = [(l, W[l], True) for l in layout.owners]
        owned += [(l, views[l], False) for views in (b, a) for l in range(1, layout.layers + 1)]
        parts = [
            Segment(span.start, span.stop, weights, layers.get(l, Layer()), missed.get(l, 0))
            for l, span, weights in owned
            if span is not None
        ]
        if parts[-1].stop < size:
            parts.append(Segment(parts[-1].stop, size, False, Layer()))
    found: list[Segment] = []
    for part in parts:
        if found and found[-1][2:] == part[2:]:
            found[-1] = found[-1]._replace(stop=part.stop)
        elif part.start < part.stop:
            found.append(part)
    return found


@dataclass
class Optimizer:
    """Settings of an update; each subclass is one update or several.

    Settings are checked when they are set, and stored as Python numbers: a NumPy float32, a Decimal
    or a Fraction as the nearest float64.

    Args:
        learning_rate: a number or a schedule.
        layers: settings by layer number, from 1: `{1: mc.Layer(rate=0.1), 2:
            mc.Layer(frozen=True)}`. A tied matrix has the settings of the layer that owns it.
    """

    learning_rate: float | Schedule
    layers: Mapping[int, Layer] = field(default_factory=dict, kw_only=True)

    checks: ClassVar[dict[str, values.Check]] = {
        "learning_rate": rate_or_schedule,
        "momentum": functools.partial(values.number, least=0, most=1),
        "beta1": _SHARE,
        "beta2": _SHARE,
        "alpha": _SHARE,
        "epsilon": functools.partial(values.number, above=0),
        "weight_decay": _NOT_NEGATIVE,
        "nesterov": values.boolean,
        "epsilon_hat": values.boolean,
        "velocity": functools.partial(values.one_of, known=("steps", "gradients")),
    }

    def __setattr__(self, name: str, value: object) -> None:
        settings = sorted((setting.name for setting in fields(self)), key="layers".__eq__)  # last
        if name not in settings:
            raise AttributeError(
                f"{type(self).__name__} has no setting {name!r}; it has {', '.join(settings)}"
            )
        if name == "layers":
            value = self._checked_layers(value)
        elif name in self.checks:
            value = self.checks[name](value, f"{type(self).__name__}: {name}")
        object.__setattr__(self, name, value)

    def _checked_layers(self, value: object) -> dict[int, Layer]:
        what = f"{type(self).__name__}: layers"
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{what} must be a dict such as {{1: mc.Layer(rate=0.1)}}; got {shown(value)}"
            )
        for l, layer in value.items():
            if isinstance(l, bool) or not isinstance(l, Integral) or not isinstance(layer, Layer):
                raise TypeError(
                    f"{what} must be a dict such as {{1: mc.Layer(rate=0.1)}}; got "
                    f"{shown({l: layer})}"
                )
            if layer.weight_decay is not None and not hasattr(type(self), "weight_decay"):
                raise ValueError(
                    f"{what}: weight_decay is for AdamW and Lion; got {shown({l: layer})}"
                )
        return {int(l): layer for l, layer in value.items()}

    @property
    def row(self) -> str:
        """Name of the sheet's update."""
        return type(self).__name__.lower()

    @property
    def update(self) -> Update:
        """The sheet's update."""
        return UPDATES[self.row]

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the state vectors, each as long as the parameters."""
        return self.update.states

    @property
    def statements(self) -> str:
        """Statements of the update's formula."""
        return self.update.statements

    @property
    def bounds_of_row(self) -> tuple[str, str]:
        """Formulas of the update's bounds."""
        return self.update.bounds

    def bounds(
        self, scalars: Mapping[str, float], largest: float, reach: float
    ) -> tuple[float, float]:
        """Return the bounds of the first state vector after an update, and of a parameter's change.

        Args:
            scalars: scalars of the update, as returned by `scalars`.
            largest: bound of |g|.
            reach: bound of the first state vector before the update.
        """
        names = {**scalars, "G": largest, "reach": reach}
        after, change = self.bounds_of_row
        return formulas.scalar(after)(names), formulas.scalar(change)(names)

    def require_layers(self, count: int) -> None:
        """Raise a TypeError or ValueError unless `layers` fits a network of this many layers."""
        for l in self._checked_layers(self.layers):  # the user may have modified the dict
            if not 1 <= l <= count:
                raise ValueError(
                    f"{type(self).__name__}: layers: the network has layers 1 … {count}; got "
                    f"{shown(l)}"
                )

    def require_epsilon(self, dtype: str) -> None:
        """Raise a ValueError if a dtype cannot hold epsilon: a zero gradient would give 0 / 0."""
        epsilon = getattr(self, "epsilon", 1.0)
        least = epsilon * math.sqrt(1 - getattr(self, "beta2", 0.0))  # at the first update
        smallest, largest = values.RANGES[dtype]
        if not (smallest <= least and epsilon <= largest):
            raise ValueError(
                f"{type(self).__name__}: epsilon, and with a beta2 epsilon * sqrt(1 - beta2), "
                f"must be a number that {dtype} holds, from {smallest:.3g} "
                f"to {largest:.3g}; got {epsilon}"
            )

    def carry_over(self, vectors: Mapping[str, Array], rate: float) -> dict[str, Array]:
        """Return the state vectors of another update converted to this one's, by name.

        Args:
            vectors: state vectors of the other update.
            rate: learning rate of the last update.
        """
        return dict(vectors)

    def rate(self, progress: Progress) -> float:
        """Return the learning rate of the next update."""
        schedule = self.learning_rate
        return schedule.at(progress) if isinstance(schedule, Schedule) else schedule

    def constants(self) -> dict[str, float]:
        """Return the values of the scalars that are the same for every update: the settings."""
        settings = {name: x for name, x in vars(self).items() if isinstance(x, float)}
        for other in ("learning_rate", "weight_decay"):
            settings.pop(other, None)
        return {**settings, "decay": getattr(self, "weight_decay", 0.0)}

    def scalars(self, progress: Progress) -> dict[str, float]:
        """Return the values of the scalars for the next update: `constants`, `rate`, `t`."""
        return {
            **self.constants(),
            "rate": self.rate(progress),
            "t": progress.step - progress.skipped + 1.0,
        }


@dataclass
class SGD(Optimizer):
    """Gradient descent, with momentum if `momentum` > 0.

    Args:
        learning_rate: a number or a schedule.
        momentum: fraction of the last velocity that is kept, in [0, 1].
        nesterov: True to look ahead along the velocity.
        velocity: "steps": v = momentum v - rate g, w += v, which keeps the steps already made
            (Sutskever et al. 2013, scikit-learn); "gradients": v = momentum v + g, w -= rate v,
            which a new rate scales as a whole (PyTorch). The two differ when the rate changes.
    """

    momentum: float = 0.0
    nesterov: bool = False
    velocity: str = "steps"

    @property
    def row(self) -> str:
        """Name of the sheet's update."""
        if not self.momentum:
            return "sgd"
        return ("gradient_" if self.velocity == "gradients" else "") + (
            "nesterov" if self.nesterov else "momentum"
        )

    def carry_over(self, vectors: Mapping[str, Array], rate: float) -> dict[str, Array]:
        """Return the velocity in the units of this update: v = -rate u is the same step."""
        found = dict(vectors)
        if "u" in self.states and "v" in found:
            v = found.pop("v")
            found["u"] = (v.astype("float64") / -rate).astype(v.dtype) if rate else 0 * v
        elif "v" in self.states and "u" in found:
            u = found.pop("u")
            found["v"] = (u.astype("float64") * -rate).astype(u.dtype)
        return found


@dataclass
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015): steps about the size of the learning rate, along m / √v.

    Args:
        learning_rate: a number or a schedule.
        beta1, beta2: fractions of the last m and v that are kept, in [0, 1).
        epsilon: keeps the quotient finite.
        epsilon_hat: True to add epsilon to √v before its bias is corrected, as in scikit-learn.
    """

    learning_rate: float | Schedule = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    epsilon_hat: bool = False

    @property
    def row(self) -> str:
        """Name of the sheet's update."""
        return "adam_hat" if self.epsilon_hat else "adam"


@dataclass
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), on weights, not on biases."""

    learning_rate: float | Schedule = 1e-3
    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass
class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton 2012): the gradient over its running root mean square."""

    learning_rate: float | Schedule = 1e-3
    alpha: float = 0.99
    epsilon: float = 1e-8


@dataclass
class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of an interpolated momentum, with decoupled decay."""

    learning_rate: float | Schedule = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
