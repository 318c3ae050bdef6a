"""Checks of settings: numbers, words, names and paths that users pass.

Each error names the argument, what was expected and what came. A setting is stored as what its
check returns, Python's own number, bool or text, so that a file gives back what was set, to the
bit.
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

Check = Callable[[object, str], object]  # of a setting and its name: what is stored, or an error
LARGEST = 2**63 - 1  # integer that NumPy, the kernels and files hold
RANGES = {  # the smallest (normal) and the largest positive number of each dtype of parameters
    "float32": (2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "float64": (sys.float_info.min, sys.float_info.max),
}
T = TypeVar("T")
_LONGEST_NAME, _LONGEST_PATH = 200, 4096  # characters, bytes


def plain(value: object) -> object:
    """Return the value of a NumPy scalar, or of an array without axes, as Python's own."""
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
    """Return a real number of any library, a decimal or a fraction as a Python float.

    Args:
        value: the number; of a NumPy float32 the result is its exact value.
        name: of the argument.
        least, above, most, below: bounds; the second and the fourth are excluded.

    Raises:
        TypeError, ValueError: no real number, not finite, out of bounds, or none that float64
            holds.
    """
    given = plain(value)
    if not _is_real(given):
        raise TypeError(f"{name} must be a number; got {shown(given)}")
    try:
        found = float(given)
    except OverflowError:
        raise ValueError(
            f"{name} must be finite; got {shown(given)}, which no float64 holds"
        ) from None
    except (
        ArithmeticError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # whatever the library says
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be a number; got {shown(given)}: {line(error)}") from None
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite; got {shown(given)}")
    if abs(found) < RANGES["float64"][0] and found != given:  # a decimal that becomes 0, say
        raise ValueError(f"{name} must be 0 or a number that float64 holds; got {shown(given)}")
    if not (least <= found <= most and above < found < below):
        limits = {"at least": least, "more than": above, "at most": most, "less than": below}
        wanted = [f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit)]
        raise ValueError(f"{name} must be {' and '.join(wanted)}; got {found}")
    return found


def require_held(value: float, dtype: str, name: str) -> None:
    """Raise a ValueError if the value becomes 0, infinite or subnormal in a network's dtype."""
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
    """Return `value` as the seed of random numbers: an int of 128 bits, as NumPy's entropy is."""
    return positive_integer(value, name, least=0, most=2**128 - 1)


def boolean(value: object, name: str) -> bool:
    """Return `value` as a bool; raise a TypeError that names it otherwise."""
    given = plain(value)
    if not isinstance(given, bool):
        raise TypeError(f"{name} must be True or False; got {shown(given)}")
    return given


def one_of(value: object, name: str, known: Sequence[str]) -> str:
    """Return `value` as one of the known words; raise a TypeError or ValueError otherwise."""
    given = plain(value)
    if not isinstance(given, str):
        raise TypeError(f"{name} must be one of {', '.join(known)}; got {shown(given)}")
    if given not in known:
        raise unknown(name, given, known)
    return str.__str__(given)  # of a subclass, too


def text(value: object, name: str, what: str = "text") -> str:
    """Return `value` as a name that messages and files can show; `what` says what it should be."""
    given = plain(value)
    if not isinstance(given, str):
        raise TypeError(f"{name} must be {what}; got {shown(given)}")
    if not given.isprintable() or len(given) > _LONGEST_NAME:
        printable = f"printable, of at most {_LONGEST_NAME} characters"
        raise ValueError(f"{name} must be {what}, {printable}; got {shown(given)}")
    return str.__str__(given)


def path(value: object, name: str = "path") -> str:
    """Return `value` as the path of a file; raise a TypeError or ValueError otherwise."""
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
    """Return the check of a setting that may also be None."""
    return lambda value, name: None if value is None else check(value, name)


def settle(settings: object, checks: Mapping[str, Check], prefix: str = "") -> None:
    """Replace the fields of a frozen dataclass by what their checks return."""
    for name, check in checks.items():
        if hasattr(settings, name):
            object.__setattr__(settings, name, check(getattr(settings, name), f"{prefix}{name}"))


def typed(kind: type[T], described: Mapping[str, Any]) -> T:
    """Return a dataclass made of what JSON held.

    Raises:
        TypeError, ValueError: a field is not of its type, or an integer is negative.
    """
    hints = get_type_hints(kind)
    return kind(
        **{name: typed_value(value, hints[name], name) for name, value in described.items()}
    )


def typed_value(value: Any, hint: Any, name: str) -> Any:
    """Return the value, if it is what the hint says; integers must not be negative."""
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
