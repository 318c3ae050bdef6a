"""Checkpoints of `fit`: the file, the interval, and the signals that end a run."""

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
    """Return the number and unit ("steps", "seconds" or "epochs") of text such as "5 min".

    Raises:
        TypeError, ValueError: it is not such text.
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
    """The file where `fit` saves, and the times when it does, including after a signal.

    Args:
        path: path of the file.
        every: interval, e.g. "1000 steps", "5 min", "1 epoch".
        keep: versions to keep.

    Raises:
        TypeError, ValueError, OSError: invalid argument, or a missing folder, so that it is noticed
            before training and not at the first save.
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
            # a device or a pipe needs no rights in its folder
            if not rights and (place.is_file() or not place.exists()):
                raise PermissionError(
                    f"{where} is in a folder that cannot be written; name another one"
                )
        self.signals = Signals()
        self.note_saved(0)

    @contextlib.contextmanager
    def claimed(self, owner: object, trainer: str) -> Iterator[None]:
        """Claim the file for one training; saves go there even if links change later.

        Args:
            owner: the only object that may write the file.
            trainer: identifier of its trainer.

        Raises:
            OSError: another training is writing the file, it is not a checkpoint, or it holds
                another trainer's unfinished run.
        """
        with atomic.claimed(self.path, self.keep, owner) as place:
            self.path = str(place)
            kinds.require_replaceable(self._given, kinds.CHECKPOINTS, self.keep, trainer)
            yield

    def note_saved(self, steps: int) -> None:
        """Note that a checkpoint has been written after this number of steps."""
        self._steps, self._epochs, self._time = steps, 0, time.monotonic()

    def steps_left(self, steps: int) -> int:
        """Return how many steps may follow the first `steps` before a save is due, at least 1."""
        return (
            max(1, int(self.count) - (steps - self._steps)) if self.unit == "steps" else sys.maxsize
        )

    def due(self, steps: int, epoch_ended: bool) -> bool:
        """Return True if a checkpoint is due after this number of steps.

        Call it once after each step, and once at the end of each epoch.
        """
        self._epochs += epoch_ended
        passed = {
            "steps": steps - self._steps,
            "epochs": self._epochs,
            "seconds": time.monotonic() - self._time,
        }
        return self.signals.asked is not None or passed[self.unit] >= self.count

    def leave(self, where: str) -> None:
        """Obey the signal that was received, now that everything is saved."""
        self.signals.leave(
            f"stopped {where}; saved in {self._given}, Trainer.load resumes from there"
        )
