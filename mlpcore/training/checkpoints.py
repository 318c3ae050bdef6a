"""The saving of `fit`: the file, the interval, and the signals that end a run."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator

from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.io import atomic, kinds
from mlpcore.training.signals import Signals

_SECONDS = {"s": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}


def interval(every: object) -> tuple[float, str]:
    """Return the number of "steps", "seconds" or "epochs" that text such as "5 min" means.

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
        path: path of the file.
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
        self.note_saved(0)

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

    def note_saved(self, steps: int) -> None:
        """Note that a checkpoint has been written after so many steps."""
        self._steps, self._epochs, self._time = steps, 0, time.monotonic()

    def steps_left(self, steps: int) -> int:
        """Return how many steps after so many may be done before one is due, at least 1."""
        return (
            max(1, int(self.count) - (steps - self._steps)) if self.unit == "steps" else sys.maxsize
        )

    def due(self, steps: int, epoch_ended: bool) -> bool:
        """Return True if a checkpoint is due after so many steps.

        It must be asked once a step, and once at the end of each epoch.
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
