"""The project's own exceptions, and the words in which all errors name an argument."""

from __future__ import annotations

import difflib
import itertools
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


def cut(text: object, most: int = 60) -> str:
    """Return the text as a message shows it: cut after so many characters."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}…"


def short(value: object, most: int = 60) -> str:
    """Return the value's repr as a message shows it: cut after so many characters."""
    return f"{value[:most]!r}…" if isinstance(value, str) and len(value) > most else cut(repr(value), most + 2)


def line(error: object, most: int = 300) -> str:
    """Return what another library says as one line, cut after so many characters."""
    return cut(" ".join(str(error).split()) or type(error).__name__, most)


def listed(names: Iterable[str], most: int = 10) -> str:
    """Return the first names, each cut after 60 characters, as a message lists them."""
    first = list(itertools.islice(names, most + 1))
    return ", ".join([*map(cut, first[:most]), *["…"] * (len(first) > most)])


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like this one, judged by the first 60 characters, or None."""
    begins = {other[:60]: other for other in known}
    near = difflib.get_close_matches(name[:60], begins, n=1)
    return begins[near[0]] if near else None


def unknown(argument: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is none of the known ones, with the nearest match."""
    known = list(known)
    other = _ELSEWHERE.get(str(name).lower())
    near = other if other in known else nearest(str(name), known)
    hint = f"; did you mean {near!r}?" if near else "."
    return ValueError(f"{argument}: unknown name {short(name)}{hint} Known: {', '.join(known)}")
