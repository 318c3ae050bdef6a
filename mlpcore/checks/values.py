"""Checks of the settings that users pass: numbers, words, names and paths.

Each error names the argument, what was expected and what was passed. A setting is stored as its
check returns it, as a plain Python number, bool or string, so that files restore it to the bit.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from mlpcore.checks.errors import line, shown, unknown

Check = Callable[[object, str], object]  # of a setting and its name; returns the value to store
LARGEST = 2**63 - 1  # the largest integer that NumPy, the kernels and files hold
RANGES = {  # the smallest normal and the largest positive number of each parameter dtype
    "float32": (2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "float64": (sys.float_info.min, sys.float_info.max),
}
T = TypeVar("T")
_LONGEST_NAME, _LONGEST_PATH = 200, 4096  # characters, bytes


def plain(value: object) -> object:
    """Return a NumPy scalar or 0-d array as a Python value; anything else unchanged."""
    if not isinstance(value, np.generic | np.ndarray) or isinstance(value, np.ma.MaskedArray):
        return value
    return value.item() if value.ndim == 0 and value.dtype.kind in "biufU" else value


def _is_real(value: object) -> TypeGuard[Any]:
    if isinstance(value, np.generic):  # long doubles, and the types of ml_dtypes
        return value.dtype.kind in "fV" and np.can_cast(value.dtype, np.longdouble)
    array = isinstance(value, np.ndarray) or getattr(value, "ndim", 0) != 0
    return hasattr(value, "__float__") and not array and not isinstance(value, bool | str)


def number(
    value: object, name: str, *, least: float = -math.inf, above: float = -math.inf,
    most: float = math.inf, below: float = math.inf,
) -> float:  # fmt: skip
    """Return a real number of any library, a Decimal or a Fraction as a Python float.

    Args:
        value: the number; a NumPy float32 keeps its exact value.
        name: the argument's name.
        least, above, most, below: bounds; `above` and `below` are exclusive.

    Raises:
        TypeError, ValueError: `value` is not a real number, is not finite, is out of bounds or
            cannot be held by a float64.
    """
    given = plain(value)
    if not _is_real(given):
        raise TypeError(f"{name} must be a number; got {shown(given)}")
    try:
        found = float(given)
    except OverflowError:
        raise ValueError(
            f"{name} must be finite; got {shown(given)}, which float64 cannot hold"
        ) from None
    except (
        ArithmeticError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # other libraries may raise any of these
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be a number; got {shown(given)}: {line(error)}") from None
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite; got {shown(given)}")
    if abs(found) < RANGES["float64"][0] and found != given:  # e.g. a Decimal that underflows to 0
        raise ValueError(f"{name} must be 0 or a number that float64 holds; got {shown(given)}")
    if not (least <= found <= most and above < found < below):
        limits = {"at least": least, "more than": above, "at most": most, "less than": below}
        wanted = [f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit)]
        raise ValueError(f"{name} must be {' and '.join(wanted)}; got {found}")
    return found


def require_held(value: float, dtype: str, name: str) -> None:
    """Raise a ValueError if a network's dtype would make the value 0, infinite or subnormal."""
    smallest, largest = RANGES[dtype]
    if value and not smallest <= abs(value) <= largest:
        raise ValueError(f"{name} must be a number that {dtype} holds; got {value}")


def positive_integer(value: object, name: str, least: int = 1, most: int = LARGEST) -> int:
    """Return `value` as a Python int within the bounds; else raise a TypeError or ValueError."""
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{name} must be an integer; got {shown(given)}")
    found = operator.index(given)
    if not least <= found <= most:
        limit = f"at least {least}" if found < least else f"at most {most}"
        raise ValueError(f"{name} must be {limit}; got {shown(found)}")
    return found


def seed(value: object, name: str = "seed") -> int:
    """Return `value` as the seed of random numbers: an int of up to 128 bits, as in NumPy."""
    return positive_integer(value, name, least=0, most=2**128 - 1)


def boolean(value: object, name: str) -> bool:
    """Return `value` as a bool; otherwise raise a TypeError that names the argument."""
    given = plain(value)
    if not isinstance(given, bool):
        raise TypeError(f"{name} must be True or False; got {shown(given)}")
    return given


def one_of(value: object, name: str, known: Sequence[str]) -> str:
    """Return `value` as one of the known words; otherwise raise a TypeError or ValueError."""
    given = plain(value)
    if not isinstance(given, str):
        raise TypeError(f"{name} must be one of {', '.join(known)}; got {shown(given)}")
    if given not in known:
        raise unknown(name, given, known)
    return str.__str__(given)  # a plain str, also of a subclass


def text(value: object, name: str, what: str = "text") -> str:
    """Return `value` as a printable name; `what` describes it in the error message."""
    given = plain(value)
    if not isinstance(given, str):
        raise TypeError(f"{name} must be {what}; got {shown(given)}")
    if not given.isprintable() or len(given) > _LONGEST_NAME:
        printable = f"printable, of at most {_LONGEST_NAME} characters"
        raise ValueError(f"{name} must be {what}, {printable}; got {shown(given)}")
    return str.__str__(given)


def path(value: object, name: str = "path") -> str:
    """Return `value` as a file path; otherwise raise a TypeError or ValueError."""
    given = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(given, str):
        raise TypeError(f"{name} must be the path of a file; got {shown(value)}")
    found = str.__str__(given)
    try:
        encoded = os.fsencode(found)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or b"\0" in encoded or len(encoded) > _LONGEST_PATH:
        raise ValueError(f"{name} must be the path of a file; got {shown(found)}")
    return found


def optional(check: Check) -> Check:
    """Return a check that also accepts None."""
    return lambda value, name: None if value is None else check(value, name)


def settle(settings: object, checks: Mapping[str, Check], prefix: str = "") -> None:
    """Replace the fields of a frozen dataclass with the values that their checks return."""
    for name, check in checks.items():
        if hasattr(settings, name):
            object.__setattr__(settings, name, check(getattr(settings, name), f"{prefix}{name}"))


def typed(kind: type[T], described: Mapping[str, Any]) -> T:
    """Return a dataclass made from values read from JSON.

    Raises:
        TypeError, ValueError: a field has the wrong type, or an integer is negative.
    """
    hints = get_type_hints(kind)
    return kind(
        **{name: typed_value(value, hints[name], name) for name, value in described.items()}
    )


def typed_value(value: Any, hint: Any, name: str) -> Any:
    """Return the value if it matches the type hint; integers must not be negative."""
    if not _fits(value, hint):
        raise TypeError(f"{name} must be {getattr(hint, '__name__', hint)}; got {value!r:.100}")
    return value


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(x, get_args(hint)[0]) for x in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(x, get_args(hint)[1]) for x in value.values())
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
    if hint is float:
        return isinstance(value, float) or _fits(value, int)
    return hint is Any or isinstance(value, hint)
