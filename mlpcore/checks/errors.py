"""The package's exceptions, and helpers that word error messages."""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Iterable

_LONGEST = 80  # characters of a value in a message


class DeviceUnavailable(RuntimeError):
    """The requested device cannot be used; the message says why, and what to install."""


class NonFiniteLoss(ArithmeticError):
    """A step produced a NaN or infinite loss, gradient or update; the parameters are unchanged.

    Attributes:
        step: number of the update that failed, counted from 1.
        learning_rate: learning rate of that update.
        layer: the first layer whose outputs are not finite, else the last whose gradient is not
            finite; None if unknown.
    """

    def __init__(self, message: str, step: int, learning_rate: float, layer: int | None = None):
        super().__init__(message)
        self.step = step
        self.learning_rate = learning_rate
        self.layer = layer

    def __reduce__(
        self,
    ) -> tuple[object, ...]:  # by default, only the message of an exception is pickled
        return type(self), (str(self), self.step, self.learning_rate, self.layer)


_ELSEWHERE = {  # names that other libraries use
    "mse": "squared_error", "l2": "squared_error", "mae": "absolute_error",
    "l1": "absolute_error", "pinball": "quantile", "bce": "binary_cross_entropy",
    "ce": "cross_entropy", "linear": "identity", "none": "identity", "swish": "silu",
    "logistic": "sigmoid", "hardtanh": "hard_tanh", "leakyrelu": "leaky_relu",
}  # fmt: skip


def cut(text: object, most: int = 60) -> str:
    """Return the text for a message, cut after `most` characters."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}…"


def line(error: object, most: int = 300) -> str:
    """Return another library's error message as one line, cut after `most` characters."""
    return cut(" ".join(str(error).split()) or type(error).__name__, most)


def listed(names: Iterable[str], most: int = 10) -> str:
    """Return the first `most` names as a list for a message, each cut after 60 characters."""
    first = list(itertools.islice(names, most + 1))
    return ", ".join([*map(cut, first[:most]), *["…"] * (len(first) > most)])


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to this one by its first 60 characters, or None."""
    begins = {other[:60]: other for other in known}
    near = difflib.get_close_matches(name[:60], begins, n=1)
    return begins[near[0]] if near else None


def unknown(argument: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for an unknown name; the message suggests the closest known one."""
    known = list(known)
    other = _ELSEWHERE.get(name[:_LONGEST].lower())
    near = other if other in known else nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else "."
    return ValueError(f"{argument}: unknown name {shown(name)}{hint} Known: {', '.join(known)}")


def named(argument: str, error: Exception) -> TypeError | ValueError:
    """Return the error with the argument's name in front; a UnicodeError becomes a ValueError."""
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return kind(f"{argument}: {error}")


class _Brief(reprlib.Repr):
    """A `repr` that is short enough for a message and never fails."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _LONGEST, _LONGEST

    def repr1(self, x: object, level: int) -> str:
        """Write a container by its first entries, anything else by its own repr."""
        if isinstance(x, bytes | bytearray):
            x = bytes(x[:_LONGEST])
        own = type(x) in (list, tuple, set, frozenset, dict, str, int)
        return super().repr1(x, level) if own else self.repr_instance(x, level)

    def repr_int(self, x: int, level: int) -> str:
        """Write an integer, or its size in bits if long: Python prints at most 4,300 digits."""
        return repr(x) if x.bit_length() <= 200 else f"an integer of {x.bit_length():,} bits"


_brief = _Brief()


def shown(value: object) -> str:
    """Return the value's repr for a message: on one line, cut if it is long."""
    text = " ".join(_brief.repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
