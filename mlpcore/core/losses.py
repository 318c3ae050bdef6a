"""Losses: rows of `kernels/losses.def`, softmax + cross-entropy, or the same formulas given at run time.

    J = Σ_i w_i ℓ(z_i, y_i) / Σ_i w_i,   ℓ of a row = the sum of the formula over its outputs

A loss and an output activation that match (softmax + cross_entropy, sigmoid + binary_cross_entropy, …) are evaluated from S[L]
and go straight to D[L] = ∂J/∂S[L]; every other pair goes through G[L] = ∂J/∂Z[L].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from mlpcore import kernel_files
from mlpcore.core import activations, formulas
from mlpcore.core.activations import Activation, finite, row_parameter
from mlpcore.core.errors import unknown


@dataclass(frozen=True)
class Loss:
    """A loss that is a sum over the outputs of a row, given by the formulas of its value and slope.

    Args:
        name: how it is called in messages and files.
        value: a formula in `z` (an output), `y` (its target) and, with a parameter, `q`.
        slope: ∂value/∂z, in the same variables; None: the value's derivative, which for a kink says what `positive` says there.
        parameter: the value of `q`, None without one.
        matched: value and ∂value/∂s behind the output that `outputs` names, in its `s` and `a`, in `z`, `y` and `q`, in place
            of the way through ∂J/∂Z[L]; None: as `losses.def` has it.
        most: what an output (cross_entropy: a row) adds to J at most, None without a limit. The gradient is that without it.

    Raises:
        ValueError: a formula is not in the common subset of C++ and Python, or reads another variable; says which.

    Example:
        >>> trainer = Trainer(net, loss=Loss("fourth_power", "(z - y) ** 4"))
    """

    name: str
    value: str
    slope: str = None  # type: ignore[assignment]  # a formula from __post_init__ on
    parameter: float | None = None
    outputs: str = field(default="any", repr=False)
    matched: tuple[str, str] | None = field(default=None, kw_only=True, repr=False)
    most: float | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be text; got {self.name!r}")
        if self.parameter is not None:
            object.__setattr__(self, "parameter", finite(self.parameter, f"the parameter of {self.name}"))
        if not self.rowwise:
            formulas.check("value", self.value, ("z", "y"), self.scalars)
            if self.slope is None:
                object.__setattr__(self, "slope", formulas.derive(self.value, "z"))
            formulas.check("slope", self.slope, ("z", "y"), self.scalars)

    @property
    def rowwise(self) -> bool:
        """Whether it needs sums over a row (cross-entropy): then no formula, but code of each backend."""
        return self.name == "cross_entropy" and not self.value

    @property
    def scalars(self) -> dict[str, float]:
        """The formula's scalar variables."""
        return {} if self.parameter is None else {"q": self.parameter}

    @property
    def takes_classes(self) -> bool:
        """Whether Y may hold class indices."""
        return self.rowwise

    @property
    def classifies(self) -> bool:
        """Whether accuracy says something about a model trained with it."""
        return self.name in ("cross_entropy", "binary_cross_entropy")

    @property
    def spec(self) -> tuple[str, float] | str:
        """How a user writes it: the name, or the name with its parameter."""
        return self.name if self.parameter is None else (self.name, self.parameter)


@dataclass(frozen=True)
class Objective:
    """A loss on top of an output activation, as the backends compute it.

    Attributes:
        matched: whether `value` and `slope` read `x` = S[L] and give D[L]; otherwise x = Z[L] and they give G[L].
        value, slope: formulas in `x`, `y` and the scalars; empty where the loss is row-wise.
        scalars: the parameters `a` of the activation and `q` of the loss.
    """

    loss: Loss
    output: Activation
    matched: bool
    value: str
    slope: str
    scalars: tuple[tuple[str, float], ...]


ANY_OUTPUT = Activation("any output", "s", "1")
CROSS_ENTROPY = Loss("cross_entropy", "", "", outputs="softmax")


def matching(output: Activation) -> str:
    """The name of the loss that goes with an output activation: cross_entropy with (log_)softmax, squared_error with most."""
    if output.rowwise:
        return CROSS_ENTROPY.name
    return {"sigmoid": "binary_cross_entropy", "exp": "poisson"}.get(output.name, "squared_error")


@functools.cache
def sheet() -> dict[str, list[str]]:
    """The rows LOSS of `losses.def` by name: outputs, default parameter, its condition, value, slope."""
    return {name: rest for name, *rest in formulas.read_sheet(kernel_files.read("losses.def"), "LOSS")}


@functools.cache
def matched() -> dict[tuple[str, str], tuple[str, str]]:
    """The rows MATCHED of `losses.def`: value and D of (loss, output), in s, z, y, a."""
    rows = formulas.read_sheet(kernel_files.read("losses.def"), "MATCHED")
    return {(loss, output): (value, slope) for loss, output, value, slope in rows}


def resolve(spec: object, argument: str = "loss") -> Loss:
    """The loss that a user's `"cross_entropy"`, `("huber", 1.0)` or `Loss(…)` means.

    Raises:
        TypeError, ValueError: names `argument`, the nearest known name, or what is wrong with the parameter.
    """
    if isinstance(spec, Loss):
        return spec
    name, parameter = spec if isinstance(spec, tuple | list) and len(spec) == 2 else (spec, None)
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a name, (name, parameter) or mc.Loss; got {spec!r}")
    if name == CROSS_ENTROPY.name:
        if parameter is not None:
            raise ValueError(f"{argument}: cross_entropy takes no parameter; got {parameter!r}")
        return CROSS_ENTROPY
    if name not in sheet():
        raise unknown(argument, name, [*sheet(), CROSS_ENTROPY.name])
    outputs, default, condition, value, slope = sheet()[name]
    return Loss(name, value, slope, row_parameter(argument, name, parameter, default, condition, "q")[0], outputs)


def pair(loss: Loss, output: Activation | None) -> Objective:
    """The loss on top of this output activation; with None, of numbers from anywhere.

    Raises:
        ValueError: the loss is not defined on what the activation puts out (cross_entropy needs softmax, …).
    """
    output = output or ANY_OUTPUT
    fits = {*loss.outputs.split(), *(activation for name, activation in matched() if name == loss.name)}
    own = output.name not in activations.names(output=True)  # the user's activation: the user knows its range
    allowed = output.rowwise if loss.rowwise else output.name in fits or loss.outputs == "any" or own
    if not allowed:
        needed = " or ".join(map(repr, activations.ROWWISE if loss.rowwise else sorted(fits)))
        raise ValueError(f"loss {loss.name!r} needs output {needed}; the network has {output.name!r}")
    if loss.rowwise:
        return Objective(loss, output, True, "", "", ())
    most = {} if loss.most is None else {"most": loss.most}
    scalars = tuple({**output.scalars, **loss.scalars, **most}.items())
    row = loss.matched if output.name == loss.outputs else None
    activation, own_sheet = activations.sheet().get(output.name, [])[3:], sheet().get(loss.name, [])[3:]
    if activation == [output.value, output.slope] and own_sheet == [loss.value, loss.slope]:
        row = row or matched().get((loss.name, output.name))
    if row is None:
        value, slope = (formulas.substitute(text, {"z": "x"}) for text in (loss.value, loss.slope))
    else:
        value, slope = (formulas.substitute(formulas.substitute(text, {"z": output.value}), {"s": "x"}) for text in row)
    if most:
        value = f"minimum({value}, most)"
    return Objective(loss, output, row is not None, value, slope, scalars)
