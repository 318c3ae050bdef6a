"""Losses by name, and the pairing of a loss with an output for the backends.

A loss and an output activation that match (softmax + cross_entropy, sigmoid + binary_cross_entropy,
…) are computed from S[L] and yield D[L] = ∂J/∂S[L] directly; any other pair yields G[L] =
∂J/∂Z[L].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core import formulas
from mlpcore.core.activation import Activation
from mlpcore.core.loss import Loss, Matched
from mlpcore.core.sheet import ACTIVATIONS, LOSSES, MATCHED, OF_PROBABILITIES

__all__ = [
    "CROSS_ENTROPY", "Loss", "Objective", "described", "matching", "names", "of_probabilities",
    "pair", "resolve", "restored", "with_options",
]  # fmt: skip

ANY_OUTPUT = Activation("any output", "s", "1")
CROSS_ENTROPY = LOSSES["cross_entropy"]


@dataclass(frozen=True)
class Objective:
    """A loss on top of an output activation, as the backends compute it.

    Attributes:
        matched: True if `value` and `slope` read `x` = S[L] and give D[L]; otherwise x = Z[L] and
            they give G[L].
        value, slope: formulas in `x`, `y`, the scalars and `p`, one entry per column
            (`loss.columns`); empty if the loss is row-wise.
        scalars: the parameters `a` of the activation and `q` of the loss.
        second_derivative: ∂slope/∂x if the sheet defines it, else None.
    """

    loss: Loss
    output: Activation
    matched: bool
    value: str
    slope: str
    scalars: tuple[tuple[str, float], ...]
    second_derivative: str | None = None

    @property
    def curvature(self) -> str:
        """∂²value/∂x², a formula in the slope's variables."""
        if self.second_derivative is not None:
            return self.second_derivative
        return formulas.differentiate(self.slope, {"x": "1"})


def names(rowwise: bool = True) -> list[str]:
    """Return the names of losses, with or without the row-wise ones (cross_entropy)."""
    return [name for name, loss in LOSSES.items() if rowwise or not loss.rowwise]


def matching(output: Activation) -> str:
    """Return the name of the loss that matches an output activation."""
    if output.rowwise:
        return CROSS_ENTROPY.name
    return {"sigmoid": "binary_cross_entropy", "exp": "poisson"}.get(output.name, "squared_error")


def resolve(spec: object, argument: str = "loss") -> Loss:
    """Return the loss that a user's `"cross_entropy"`, `("huber", 1.0)` or `Loss(…)` describes.

    Raises:
        TypeError, ValueError: names `argument`, and the nearest known name or the fault of the
            parameter.
    """
    if callable(spec) and isinstance(own := getattr(spec, "loss", None), Loss):  # mc.loss(…)
        return own
    return Loss.resolve(spec, argument, LOSSES, names())


def described(loss: Loss) -> dict[str, Any]:
    """Return a loss's arguments for a file."""
    return loss.described(LOSSES)


def restored(arguments: Mapping[str, Any]) -> Loss:
    """Return the loss that `described` described. Raises TypeError or ValueError."""
    return Loss.restored(arguments, LOSSES)


def of_probabilities(dtype: str) -> Loss:
    """Return cross-entropy of probabilities, elementwise: -y log z.

    A trainer computes it from S[L] instead, which loses nothing to rounding.

    Args:
        dtype: of the probabilities; values below its smallest normal number are raised to it.
    """
    return replace(OF_PROBABILITIES, parameter=values.RANGES[dtype][0])


def with_options(
    loss: Loss, class_weight: Any = None, label_smoothing: float | None = None,
    pos_weight: Any = None, outputs: int | None = None,
) -> Loss:  # fmt: skip
    """Return the loss with those options that are not None.

    Args:
        loss: the loss.
        class_weight, label_smoothing, pos_weight: as in `Loss`; class weights may be {class:
            weight} if `outputs` is given.
        outputs: the network's number of outputs, which the options must fit; None: unknown.

    Raises:
        TypeError, ValueError: names the option, what was expected and what was passed.
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
    """Return the weights as a list; classes missing from {class: weight} get weight 1."""
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
            "class_weight must be a list of one number per class if there is no network; got a dict"
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
    """Return the loss on top of this output activation; None: its inputs come from anywhere.

    Raises:
        ValueError: the loss is not defined on the range of the activation (cross_entropy needs
            softmax, …).
    """
    output = output or ANY_OUTPUT
    _require_fitting(loss, output)
    if loss.rowwise:
        return Objective(loss, output, True, "", "", ())
    fixed = output.learned is None  # D computed from S[L] leaves out the parameter's gradient
    in_sheet = fixed and output.is_in(ACTIVATIONS) and loss.is_in(LOSSES)
    matched = MATCHED.get((loss.name, output.name)) if in_sheet else None
    if loss.binary and loss.options:
        return _weighed(loss, output, matched)
    most = {} if loss.most is None else {"most": loss.most}
    if fixed and loss.matched and output.name == loss.outputs:
        matched = Matched(*loss.matched)
    row, by_x = matched or loss, {"z": "x"}
    if matched is not None:
        by_x = {"z": formulas.substitute(output.value, {"s": "x"}), "s": "x"}
    value, slope = (formulas.substitute(text, by_x) for text in (row.value, row.slope))
    second = row.second_derivative
    return Objective(
        loss,
        output,
        matched is not None,
        f"minimum({value}, most)" if most else value,
        slope,
        tuple({**output.scalars, **loss.scalars, **most}.items()),
        None if second is None else formulas.substitute(second, by_x),
    )


def _require_fitting(loss: Loss, output: Activation) -> None:
    """Raise a ValueError unless the loss is defined on the range of the activation."""
    if loss.rowwise:
        fits = [name for name, sigma in ACTIVATIONS.items() if sigma.rowwise]
        fitting = output.rowwise
    else:
        pairs = (other for name, other in MATCHED if name == loss.name)
        fits = sorted({*loss.outputs.split(), *pairs})
        own = output.name not in ACTIVATIONS  # the user's activation: the user knows its range
        fitting = output.name in fits or loss.outputs == "any" or own
    if not fitting:
        raise ValueError(
            f"loss {loss.name!r} needs output {' or '.join(map(repr, fits))}; the network has "
            f"{output.name!r}"
        )


def _weighed(loss: Loss, output: Activation, matched: Matched | None) -> Objective:
    """Return binary cross-entropy with smoothed and weighted targets y and 1 - y.

    They replace u and v in the `weighed` formulas.
    """
    kept, spread = 1 - loss.label_smoothing, loss.label_smoothing / 2
    u, v = (f"({kept!r} * {y} + {spread!r})" if spread else y for y in ("y", "(1 - y)"))
    if loss.class_weight is not None:
        negative, positive = (weight / max(loss.class_weight) for weight in loss.class_weight)
        # 0 for a row of weight 0
        weight = f"maximum({positive!r} * y + {negative!r} * (1 - y), 1e-30)"
        u, v = f"{positive!r} * {u} / {weight}", f"{negative!r} * {v} / {weight}"
    if loss.pos_weight is not None:
        u = f"{'p' if loss.columns else repr(loss.pos_weight)} * ({u})"
    row = loss.weighed if matched is None else matched.weighed
    assert row is not None
    by_x = {"u": u, "v": v, "z": "x", "s": "x"}
    value, slope, second = (formulas.substitute(text, by_x) for text in row)
    if loss.most is not None:
        value = f"minimum({value}, {loss.most!r})"
    scalars = tuple(output.scalars.items())
    return Objective(loss, output, matched is not None, value, slope, scalars, second)
