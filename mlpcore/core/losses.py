"""Losses: rows of `kernels/losses.def`, softmax + cross-entropy, or the same formulas given at run
time.

    J = Σ_i w_i ℓ(z_i, y_i) / Σ_i w_i,   ℓ of a row = the sum of the formula over its outputs

A loss and an output activation that match (softmax + cross_entropy, sigmoid + binary_cross_entropy,
…) are evaluated from S[L] and go straight to D[L] = ∂J/∂S[L]; every other pair goes through G[L] =
∂J/∂Z[L].
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from mlpcore import kernel_files
from mlpcore.checks import values
from mlpcore.checks.errors import shown, unknown
from mlpcore.core import activations, formulas
from mlpcore.core.activations import Activation, row_parameter


@dataclass(frozen=True)
class Loss:
    """A loss that is a sum over the outputs of a row, given by the formulas of its value and slope.

    Args:
        name: how it is called in messages and files.
        value: a formula in `z` (an output), `y` (its target) and, with a parameter, `q`.
        slope: ∂value/∂z, in the same variables; None: the value's derivative, which for a kink says
            what `positive` says there.
        parameter: the value of `q`, None without one.
        matched: value and ∂value/∂s behind the output that `outputs` names, in its `s` and `a`, in
            `z`, `y` and `q`, in place of the way through ∂J/∂Z[L]; None: as `losses.def` has it.
        most: what an output (cross_entropy: a row) adds to J at most, None without a limit. The
            gradient is that without it.
        class_weight: a number for each class: cross_entropy, or binary_cross_entropy of one output
            (classes 0 and 1).
        label_smoothing: ε in [0, 1): targets are (1 - ε) y + ε/K over K classes, K = 2 for an
            output of binary_cross_entropy.
        pos_weight: what the loss of a positive target counts in binary_cross_entropy: a number, or
            one for each output.

    Raises:
        ValueError: a formula is not in the common subset of C++ and Python, or reads another
            variable; or the loss has no such option. Says which.

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
    class_weight: tuple[float, ...] | None = field(default=None, kw_only=True, repr=False)
    label_smoothing: float = field(default=0.0, kw_only=True, repr=False)
    pos_weight: float | tuple[float, ...] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        values.settle(self, _CHECKS)
        if not self.rowwise:
            formulas.check("value", self.value, ("z", "y"), self.scalars)
            if self.slope is None:
                object.__setattr__(self, "slope", formulas.derive(self.value, "z"))
            formulas.check("slope", self.slope, ("z", "y"), self.scalars)
            for formula in self.matched or ():
                formulas.check("matched", formula, ("s", "z", "y", "a"), self.scalars)
        self._check_options()

    def _check_options(self) -> None:
        for name in self.options:  # before their values: a dict may be right elsewhere
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
                "class_weight must be positive where label_smoothing gives each class a share; "
                f"class {weights.index(0)} weighs 0"
            )

    @property
    def options(self) -> dict[str, Any]:
        """Class weights, label smoothing and the weight of positives, as far as they are set."""
        smoothing = self.label_smoothing or None
        values = {
            "class_weight": self.class_weight,
            "label_smoothing": smoothing,
            "pos_weight": self.pos_weight,
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def binary(self) -> bool:
        """True for the sheet's binary cross-entropy."""
        return self.name == "binary_cross_entropy" and self.value == sheet()[self.name][3]

    @property
    def columns(self) -> tuple[float, ...]:
        """A number for each output, which the backends read from an array; empty where there are
        none.
        """
        if self.rowwise and self.class_weight is not None:
            largest = max(self.class_weight)
            return tuple(weight / largest for weight in self.class_weight)
        return self.pos_weight if isinstance(self.pos_weight, tuple) else ()

    def mixes(self, classes: bool) -> bool:
        """Return whether options change the target of cross-entropy that a row of Y (`classes`: a
        class number) gives.
        """
        return self.label_smoothing > 0 or (self.class_weight is not None and not classes)

    def require_held(self, dtype: str) -> None:
        """Raise a ValueError that names the parameter or option that a network's dtype does not
        hold.
        """
        numbers = {
            f"loss: the parameter of {self.name}": self.parameter,
            "most": self.most,
            **self.options,
        }
        for name, value in numbers.items():
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                values.require_held(number, dtype, name)

    def require_outputs(self, outputs: int) -> None:
        """Raise a ValueError that names the option that is not for a network of so many outputs."""
        if self.class_weight is not None:
            if self.binary and outputs != 1:
                raise ValueError(
                    "class_weight is for binary_cross_entropy of one output; the network has "
                    f"{outputs}: give pos_weight, "
                    "a number for each"
                )
            classes = 2 if self.binary else outputs
            if len(self.class_weight) != classes:
                raise ValueError(
                    f"class_weight must have a number for each of {classes} classes; got "
                    f"{len(self.class_weight)}"
                )
        if isinstance(self.pos_weight, tuple) and len(self.pos_weight) != outputs:
            raise ValueError(
                f"pos_weight must be a number, or one for each of {outputs} output(s); got "
                f"{len(self.pos_weight)} of them"
            )

    @property
    def rowwise(self) -> bool:
        """Whether it needs sums over a row (cross-entropy): then no formula, but code of each
        backend.
        """
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

    def __str__(self) -> str:
        """The name with its parameter, and the options that are set, long lists as their length."""
        shown = [f"{key}={_brief(value)}" for key, value in self.options.items()]
        return ", ".join([repr(self.spec), *shown])

    def __repr__(self) -> str:
        """Return what the user would write: the name of a loss of the sheet, the formulas of any
        other.
        """
        if self.rowwise or sheet().get(self.name, [])[3:] == [self.value, self.slope]:
            return f"Loss({self})"
        formulas_ = f"value={self.value!r}, slope={self.slope!r}"
        return f"Loss({self.name!r}, {formulas_}, parameter={self.parameter!r})"


def _brief(value: Any) -> str:
    many = isinstance(value, tuple) and len(value) > 8
    return (
        f"({len(value)} numbers)"
        if many
        else repr(list(value) if isinstance(value, tuple) else value)
    )


def _weights(value: Any, name: str) -> float | tuple[float, ...]:
    """Return the weight, or the tuple of weights, that a number, a list or an array means."""
    given = value.tolist() if getattr(value, "ndim", None) == 1 else value
    if not isinstance(given, list | tuple):
        return values.number(given, name, least=0)
    return tuple(values.number(x, f"{name}[{i}]", least=0) for i, x in enumerate(given))


def _class_weights(value: object, name: str) -> tuple[float, ...]:
    """Return the weights of classes as a tuple."""
    weights = _weights(value, name)
    if isinstance(weights, float):
        raise TypeError(f"{name} must be a list, a number for each class; got {shown(value)}")
    return weights


def _matched(value: object, name: str) -> tuple[str, str]:
    """Return the two formulas of a loss on an output that matches it."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise TypeError(f"{name} must be two formulas, (value, slope); got {shown(value)}")
    return formulas.text(value[0], name), formulas.text(value[1], name)


_CHECKS: dict[str, values.Check] = {
    "name": values.text,
    "value": formulas.text,
    "slope": values.optional(formulas.text),
    "parameter": values.optional(values.number),
    "outputs": values.text,
    "matched": values.optional(_matched),
    "most": values.optional(values.number),
    "label_smoothing": functools.partial(values.number, least=0, below=1),
}
_WEIGHTS: dict[str, values.Check] = {
    "class_weight": values.optional(_class_weights),
    "pos_weight": values.optional(_weights),
}


@dataclass(frozen=True)
class Objective:
    """A loss on top of an output activation, as the backends compute it.

    Attributes:
        matched: whether `value` and `slope` read `x` = S[L] and give D[L]; otherwise x = Z[L] and
            they give G[L].
        value, slope: formulas in `x`, `y` and the scalars; empty where the loss is row-wise.
        scalars: the parameters `a` of the activation and `q` of the loss.
        bent: ∂slope/∂x where the sheet has it, else "".

    Formulas may also read `p`, an entry for each column: `loss.columns`.
    """

    loss: Loss
    output: Activation
    matched: bool
    value: str
    slope: str
    scalars: tuple[tuple[str, float], ...]
    bent: str = ""

    @property
    def curvature(self) -> str:
        """∂²value/∂x², a formula in what the slope reads: the sheet's, or the slope,
        differentiated.
        """
        return self.bent or formulas.differentiate(self.slope, {"x": "1"})


ANY_OUTPUT = Activation("any output", "s", "1")
CROSS_ENTROPY = Loss("cross_entropy", "", "", outputs="softmax")


def matching(output: Activation) -> str:
    """The name of the loss that goes with an output activation: cross_entropy with (log_)softmax,
    squared_error with most.
    """
    if output.rowwise:
        return CROSS_ENTROPY.name
    return {"sigmoid": "binary_cross_entropy", "exp": "poisson"}.get(output.name, "squared_error")


@functools.cache
def sheet() -> dict[str, list[str]]:
    """The rows LOSS of `losses.def` by name: outputs, default parameter, its condition, value,
    slope.
    """
    rows = formulas.read_sheet(kernel_files.read("losses.def"), "LOSS")
    return {name: [*rest[:3], *map(formulas.written_out, rest[3:])] for name, *rest in rows}


@functools.cache
def matched() -> dict[tuple[str, str], tuple[str, str]]:
    """The rows MATCHED of `losses.def`: value and D of (loss, output), in s, z, y, a."""
    rows = formulas.read_sheet(kernel_files.read("losses.def"), "MATCHED")
    return {
        (loss, output): (formulas.written_out(value), formulas.written_out(slope))
        for loss, output, value, slope in rows
    }


@functools.cache
def bent() -> dict[tuple[str, str], str]:
    """The rows BENT of `losses.def`: the second derivative of (loss, output), of a pair that is not
    matched (loss, "any").
    """
    rows = formulas.read_sheet(kernel_files.read("losses.def"), "BENT")
    return {(loss, output): formulas.written_out(curvature) for loss, output, curvature in rows}


@functools.cache
def weighed() -> dict[tuple[str, str], tuple[str, str, str]]:
    """The rows WEIGHED of `losses.def`: value, slope and curvature of (loss, output), in x, u, v
    and the output's a.
    """
    rows = formulas.read_sheet(kernel_files.read("losses.def"), "WEIGHED")
    return {
        (loss, output): (value, slope, curvature) for loss, output, value, slope, curvature in rows
    }


def resolve(spec: object, argument: str = "loss") -> Loss:
    """Return the loss that a user's `"cross_entropy"`, `("huber", 1.0)`, `Loss(…)` or `mc.loss(…)`
    means.

    Raises:
        TypeError, ValueError: names `argument`, the nearest known name, or what is wrong with the
            parameter.
    """
    if isinstance(spec, Loss):
        return spec
    if callable(spec) and isinstance(own := getattr(spec, "loss", None), Loss):
        return own
    name, parameter = spec if isinstance(spec, tuple | list) and len(spec) == 2 else (spec, None)
    if not isinstance(name, str):
        raise TypeError(
            f"{argument} must be a name, (name, parameter) or mc.Loss; got {shown(spec)}"
        )
    if name == CROSS_ENTROPY.name:
        if parameter is not None:
            raise ValueError(
                f"{argument}: cross_entropy takes no parameter; got {shown(parameter)}"
            )
        return CROSS_ENTROPY
    if name not in sheet():
        raise unknown(argument, name, [*sheet(), CROSS_ENTROPY.name])
    outputs, default, condition, value, slope = sheet()[name]
    return Loss(
        name,
        value,
        slope,
        row_parameter(argument, name, parameter, default, condition, "q")[0],
        outputs,
    )


def with_options(
    loss: Loss, class_weight: Any = None, label_smoothing: float | None = None, pos_weight: Any = None,
    outputs: int | None = None,
) -> Loss:  # fmt: skip
    """Return the loss with those options that are not None; `class_weight` may be {class: weight}
    where `outputs` is given.

    Raises:
        TypeError, ValueError: names the option, what was expected and what came.
    """
    given = {
        "class_weight": class_weight,
        "label_smoothing": label_smoothing,
        "pos_weight": pos_weight,
    }
    given = {name: value for name, value in given.items() if value is not None}
    classes = 2 if loss.binary else outputs
    if class_weight is not None and (loss.rowwise or loss.binary):
        given["class_weight"] = _by_class(class_weight, classes)
    loss = replace(loss, **given) if given else loss
    if outputs is not None:
        loss.require_outputs(outputs)
    return loss


def _by_class(weights: Any, classes: int | None) -> Any:
    """The weights as a list; of a {class: weight} the classes that are not in it weigh 1."""
    if isinstance(weights, str):
        raise ValueError(
            f"class_weight must be a list of numbers or {{class: number}}; got {shown(weights)}. "
            "For 'balanced' pass "
            "sklearn.utils.class_weight.compute_class_weight('balanced', classes=np.arange(K), y=Y)"
        )
    if not isinstance(weights, Mapping):
        return weights
    if classes is None:
        raise TypeError(
            "class_weight must be a list, a number for each class, where there is no network; got "
            "a dict"
        )
    found = [1.0] * classes
    for label, weight in weights.items():
        if (
            not isinstance(label, Integral)
            or isinstance(label, bool)
            or not 0 <= int(label) < classes
        ):
            raise ValueError(
                f"class_weight names the class {shown(label)}; the classes are 0 … {classes - 1}"
            )
        found[int(label)] = values.number(weight, f"class_weight[{label}]", least=0)
    return found


def pair(loss: Loss, output: Activation | None) -> Objective:
    """The loss on top of this output activation; with None, of numbers from anywhere.

    Raises:
        ValueError: the loss is not defined on what the activation puts out (cross_entropy needs
            softmax, …).
    """
    output = output or ANY_OUTPUT
    fits = {
        *loss.outputs.split(),
        *(activation for name, activation in matched() if name == loss.name),
    }
    own = output.name not in activations.names(
        output=True
    )  # the user's activation: the user knows its range
    allowed = (
        output.rowwise if loss.rowwise else output.name in fits or loss.outputs == "any" or own
    )
    if not allowed:
        needed = " or ".join(map(repr, activations.ROWWISE if loss.rowwise else sorted(fits)))
        raise ValueError(
            f"loss {loss.name!r} needs output {needed}; the network has {output.name!r}"
        )
    if loss.rowwise:
        return Objective(loss, output, True, "", "", ())
    fixed = (
        output.learned is None
    )  # D from S[L] has no place for the gradient by a learned parameter
    standard = fixed and activations.sheet().get(output.name, [])[3:] == [
        output.value,
        output.slope,
    ]
    if loss.binary and loss.options:
        return _weighed(loss, output, standard)
    most = {} if loss.most is None else {"most": loss.most}
    scalars = tuple({**output.scalars, **loss.scalars, **most}.items())
    own_pair = loss.matched if output.name == loss.outputs and fixed else None
    row, curvature = own_pair, ""
    if sheet().get(loss.name, [])[3:] == [loss.value, loss.slope] and own_pair is None:
        row = matched().get((loss.name, output.name)) if standard else None
        curvature = bent().get((loss.name, output.name if row else "any"), "")
    texts = (loss.value, loss.slope) if row is None else row
    by_x = (
        {"z": "x"}
        if row is None
        else {"z": formulas.substitute(output.value, {"s": "x"}), "s": "x"}
    )
    value, slope, curvature = (
        text and formulas.substitute(text, by_x) for text in (*texts, curvature)
    )
    if most:
        value = f"minimum({value}, most)"
    return Objective(loss, output, row is not None, value, slope, scalars, curvature)


def _weighed(loss: Loss, output: Activation, standard: bool) -> Objective:
    """Binary cross-entropy whose targets y and 1 - y are smoothed and weighed: u and v of the rows
    WEIGHED.
    """
    kept, spread = 1 - loss.label_smoothing, loss.label_smoothing / 2
    u, v = (f"(T({kept!r}) * {y} + T({spread!r}))" if spread else y for y in ("y", "(1 - y)"))
    if loss.class_weight is not None:
        negative, positive = (weight / max(loss.class_weight) for weight in loss.class_weight)
        # 0: of a row that weighs nothing
        weight = f"maximum(T({positive!r}) * y + T({negative!r}) * (1 - y), T(1e-30))"
        u, v = f"T({positive!r}) * {u} / {weight}", f"T({negative!r}) * {v} / {weight}"
    if loss.pos_weight is not None:
        u = f"{'p' if loss.columns else f'T({loss.pos_weight!r})'} * ({u})"
    matched = standard and (loss.name, output.name) in weighed()
    row = weighed()[loss.name, output.name if matched else "any"]
    value, slope, curvature = (formulas.substitute(text, {"u": u, "v": v}) for text in row)
    if loss.most is not None:
        value = f"minimum({value}, T({loss.most!r}))"
    return Objective(loss, output, matched, value, slope, tuple(output.scalars.items()), curvature)
