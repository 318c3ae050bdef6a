"""Checkpoints of a training: what stands in the file, and when `fit` writes one.

Trainer.save → header["trainer"]: settings, optimizer with its schedule, progress, chunks and
algorithms, the run that goes on
               tensors: parameters, the optimizer's state, the best parameters so far, and what
                   would make the header long: histories, weights of classes
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from itertools import chain, islice
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core import optimizers as rules
from mlpcore.core import schedules
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import Adaptive, Progress, Schedule
from mlpcore.io import atomic, kinds
from mlpcore.training.signals import Signals

log = logging.getLogger("mlpcore")
OPTIMIZERS = {
    rule.__name__: rule for rule in (rules.SGD, rules.Adam, rules.AdamW, rules.RMSprop, rules.Lion)
}
SCHEDULES = {
    schedule.__name__: schedule
    for schedule in (
        schedules.Constant, schedules.StepDecay, schedules.Cosine, schedules.InverseScaling, schedules.Adaptive, schedules.FormulaSchedule,
    )
}  # fmt: skip
T = TypeVar("T")
_SECONDS = {"s": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}


# -- settings as JSON
# --------------------------------------------------------------------------------------------------


def describe(settings: Optimizer | Schedule) -> dict[str, Any]:
    """An optimizer, or a schedule, as what JSON holds. Raises TypeError for one that is not
    mlpcore's own.
    """
    name = type(settings).__name__
    if {**OPTIMIZERS, **SCHEDULES}.get(name) is not type(settings):
        kind = "learning_rate" if isinstance(settings, Schedule) else "optimizer"
        hint = "; a schedule by mc.FormulaSchedule can" if kind == "learning_rate" else ""
        raise TypeError(f"{kind}: {name} is not one of mlpcore's own and cannot be saved{hint}")
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if "layers" in values:
        values["layers"] = [
            [l, *dataclasses.astuple(layer)] for l, layer in values["layers"].items()
        ]
    return {"name": name} | {
        key: describe(x) if isinstance(x, Schedule) else x for key, x in values.items()
    }


def optimizer(described: Mapping[str, Any]) -> Optimizer:
    """The optimizer that `describe` described."""
    values = dict(described)
    rule = OPTIMIZERS[values.pop("name")]
    values["layers"] = {l: rules.Layer(*settings) for l, *settings in values["layers"]}
    if isinstance(values["learning_rate"], Mapping):
        values["learning_rate"] = _schedule(values["learning_rate"])
    return rule(**values)


def _schedule(described: Mapping[str, Any]) -> Schedule:
    settings = dict(described)
    return SCHEDULES[settings.pop("name")](**settings)


def describe_progress(progress: Progress) -> dict[str, Any]:
    """Return how far a run is as what JSON holds, without the reductions of a schedule of the
    user's own.
    """
    followed = progress.followed
    if type(followed) not in (type(None), Adaptive):
        progress = dataclasses.replace(progress, reductions=0)
        followed = None
    values = {field.name: getattr(progress, field.name) for field in dataclasses.fields(progress)}
    return values | {"followed": None if followed is None else describe(followed)}


def progress(described: Mapping[str, Any]) -> Progress:
    """Return the progress that `describe_progress` described. Raises TypeError or ValueError as
    `typed` does.
    """
    followed = described["followed"]
    return typed(
        Progress, {**described, "followed": None if followed is None else _schedule(followed)}
    )


def arguments(described: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments with which a trainer that was saved is made again: whatever they are,
    its door checks them.
    """
    settings = dict(described["settings"])
    tolerant = values.boolean(settings.pop("tolerant"), "tolerant")
    settings["chunk_rows"] = "auto" if settings["chunk_rows"] is None else settings["chunk_rows"]
    settings["dropout"] = settings["dropout"] or None
    return settings | {
        "on_non_finite": "skip" if tolerant else "raise", "precision": described["precision"],
        "deterministic": described["deterministic"],
    }  # fmt: skip


def pack(part: dict[str, Any], names: Collection[str]) -> NDArray[np.float64]:
    """Return the named lists of numbers as one; `part`, for the header, keeps their lengths."""
    lists = {name: part[name] for name in names if isinstance(part[name], list | tuple)}
    part |= {name: len(values) for name, values in lists.items()}
    return np.fromiter(chain.from_iterable(lists.values()), np.float64)


def unpack(part: dict[str, Any], names: Collection[str], packed: NDArray[Any]) -> None:
    """Put back what `pack` took out; lists that a file of version 3 has in its header stay as they
    are.

    Raises:
        ValueError: `packed` is not float64, or does not hold as many numbers as the lengths say.
    """
    lengths = {name: part[name] for name in names if type(part[name]) is int}
    known = (
        packed.dtype == np.float64 and packed.ndim == 1 and min(lengths.values(), default=0) >= 0
    )
    if not known or sum(lengths.values()) != len(packed):
        raise ValueError(f"lists of {lengths} numbers; got {packed.dtype} {packed.shape}")
    numbers = iter(packed.tolist())
    part |= {name: list(islice(numbers, length)) for name, length in lengths.items()}


def typed(kind: type[T], described: Mapping[str, Any]) -> T:
    """A dataclass made of what JSON held. Raises TypeError or ValueError where a field is not of
    its type, or is below 0.
    """
    hints = get_type_hints(kind)
    return kind(
        **{name: typed_value(value, hints[name], name) for name, value in described.items()}
    )


def typed_value(value: Any, hint: Any, name: str) -> Any:
    """`value`, if it is what the hint says; integers count something and are not negative."""
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


# -- when to save
# ------------------------------------------------------------------------------------------------------


def interval(every: object) -> tuple[float, str]:
    """What `"1000 steps"`, `"5 min"`, `"2 epochs"` mean: a number of "steps", "seconds" or
    "epochs".

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(every, str):
        raise TypeError(
            f"every must be text such as '1000 steps', '5 min' or '1 epoch'; got {shown(every)}"
        )
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+?)s?\s*", every)
    unit = match[2] if match else ""
    count = float(match[1]) if match else 0.0
    if every.strip().endswith("s") and unit == "":
        unit = "s"
    if unit in _SECONDS and count > 0:
        return count * _SECONDS[unit], "seconds"
    if unit in ("step", "epoch") and count > 0 and count.is_integer():
        return count, f"{unit}s"
    raise ValueError(
        f"every must be text such as '1000 steps', '5 min' or '1 epoch'; got {shown(every)}"
    )


class Checkpoints:
    """The place where `fit` saves, and the moments when it does, a signal's included.

    Args:
        path: of the file.
        every: e.g. "1000 steps", "5 min", "1 epoch".
        keep: versions to keep.

    Raises:
        TypeError, ValueError, OSError: names the argument; a folder that is missing is noticed
            here, not after an hour.
    """

    def __init__(self, path: object, every: object = "1 epoch", keep: object = 1):
        self.path = self._given = values.path(path, "checkpoint")
        folder = os.path.dirname(self.path) or "."
        if os.path.isdir(self.path):
            raise IsADirectoryError(f"checkpoint {self.path!r} is a folder; name a file in it")
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"checkpoint {self.path!r}: the folder {folder!r} does not exist"
            )
        self.count, self.unit = interval(every)
        self.keep = values.positive_integer(keep, "keep")
        for place in atomic.versions(self.path, self.keep):
            where = f"checkpoint {self.path!r}, keep={self.keep}: {str(place)!r}"
            if place.is_dir():
                raise IsADirectoryError(f"{where} is a folder; move it away, or name another file")
            rights = os.access(
                place.parent,
                os.W_OK | os.X_OK,
                effective_ids=os.access in os.supports_effective_ids,
            )
            if not rights and (
                place.is_file() or not place.exists()
            ):  # a device or a pipe needs none
                raise PermissionError(
                    f"{where} is in a folder that cannot be written; name another one"
                )
        self.signals = Signals()
        self.saved(0)

    @contextlib.contextmanager
    def claimed(self, owner: object, trainer: str) -> Iterator[None]:
        """Claim the file for one training; what is saved goes there, wherever links then lead.

        Args:
            owner: the trainer, which alone may write the file.
            trainer: its identifier.

        Raises:
            OSError: another training writes the file, or it holds what this one must not replace:
                no checkpoint, or another trainer's unfinished run.
        """
        with atomic.claimed(self.path, self.keep, owner) as place:
            self.path = str(place)
            kinds.require_replaceable(self._given, kinds.CHECKPOINTS, self.keep, trainer)
            yield

    def saved(self, steps: int) -> None:
        """A checkpoint has been written after so many steps."""
        self._steps, self._epochs, self._time = steps, 0, time.monotonic()

    def steps_left(self, steps: int) -> int:
        """Return how many steps after so many may be done before one is due, at least 1."""
        return (
            max(1, int(self.count) - (steps - self._steps)) if self.unit == "steps" else sys.maxsize
        )

    def due(self, steps: int, epoch_ended: bool) -> bool:
        """Whether one is due after so many steps; to be asked once a step, and once at the end of
        each epoch.
        """
        self._epochs += epoch_ended
        passed = {
            "steps": steps - self._steps,
            "epochs": self._epochs,
            "seconds": time.monotonic() - self._time,
        }
        return self.signals.asked is not None or passed[self.unit] >= self.count

    def leave(self, where: str) -> None:
        """Obey the signal that has come, now that all is saved."""
        self.signals.leave(
            f"stopped {where}; saved in {self._given}, Trainer.load goes on from there"
        )
