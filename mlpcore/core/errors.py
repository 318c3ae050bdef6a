"""The project's own exceptions, and the words in which all errors name an argument."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeviceUnavailable(RuntimeError):
    """The device asked for cannot be used; the message says why, and what to install."""


class NonFiniteLoss(ArithmeticError):
    """The loss, its gradient or the update became NaN or infinite. The parameters are those before the step.

    Attributes:
        step: the number of the update that failed, counted from 1.
        learning_rate: its learning rate.
        layer: the first whose outputs, or else the last whose gradient, is not finite; None where that is not known.
    """

    def __init__(self, message: str, step: int, learning_rate: float, layer: int | None = None):
        super().__init__(message)
        self.step = step
        self.learning_rate = learning_rate
        self.layer = layer

    def __reduce__(self) -> tuple[object, ...]:  # an exception is pickled by its message alone, otherwise
        return type(self), (str(self), self.step, self.learning_rate, self.layer)


_ELSEWHERE = {  # what others call it
    "mse": "squared_error", "l2": "squared_error", "mae": "absolute_error", "l1": "absolute_error", "pinball": "quantile",
    "bce": "binary_cross_entropy", "ce": "cross_entropy", "linear": "identity", "none": "identity", "swish": "silu",
    "logistic": "sigmoid", "hardtanh": "hard_tanh", "leakyrelu": "leaky_relu",
}  # fmt: skip


def unknown(argument: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is none of the known ones, with the nearest match."""
    known = list(known)
    other = _ELSEWHERE.get(str(name).lower())
    near = [other] if other in known else difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"{argument}: unknown name {name!r}{hint} Known: {', '.join(known)}")
