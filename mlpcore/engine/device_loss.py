"""Losses of steps on a CUDA device, fetched when somebody asks for them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mlpcore.backends.cuda.device import Device
from mlpcore.core.ops import Array
from mlpcore.core.schedules import Progress

ROWS = 2048  # results in one allocation: 64 KiB
ROW_BYTES = 32


class StepResults:
    """The results of recent steps in device memory.

    A step has a row: J, status, step of the first fault, Σ w.

    Attributes:
        asked: rows whose steps have been launched.
        address: where the first row lies.
    """

    def __init__(self, device: Device):
        self.device = device
        self.array = device.empty(ROW_BYTES * ROWS).view(np.float64).reshape(ROWS, 4)
        self.address = device.address(self.array)
        self.asked = 0
        self._fetched: list[list[float]] = []

    def has(self, first: int, count: int) -> bool:
        """Return whether these rows have been fetched."""
        return first + count <= len(self._fetched)

    def read(self, first: int, count: int) -> list[list[float]]:
        """Return rows of steps that have been launched; wait for them, and fetch all others too."""
        if not self.has(first, count):
            self._fetched += self.device.to_host(
                self.array[len(self._fetched) : self.asked]
            ).tolist()
        return self._fetched[first : first + count]


class Reader(Protocol):
    """The step that `DeviceLoss` asks for its results."""

    device: Device

    def read_results(
        self, results: StepResults, first: int, count: int, progress: Progress
    ) -> list[list[float]]:
        """Return rows of results, or raise the fault that one of them tells of."""


class DeviceLoss:
    """J of a step, still on the device.

    `float(J)` waits for it, and raises what went wrong up to that step.
    """

    __slots__ = ("_count", "_first", "_progress", "_results", "_step")

    def __init__(
        self, step: Reader, results: StepResults, first: int, count: int, progress: Progress
    ):
        self._step, self._results, self._first = step, results, first
        self._count, self._progress = count, progress

    @property
    def array(self) -> Array:
        """J as a 0-d float64 array on the device; `float(J)` looks for faults, too."""
        return self._results.array[self._first, :1].reshape(())

    def ask(self) -> None:
        """Let the results be read: their steps have been launched."""
        self._results.asked = self._first + self._count

    def values(self) -> list[tuple[float, float]]:
        """Return J and Σ w of each step of the launch that this one belongs to; wait for them."""
        rows = self._step.read_results(self._results, self._first, self._count, self._progress)
        return [(J, weight) for J, _, _, weight in rows]

    def __float__(self) -> float:
        return self.values()[0][0]

    def __repr__(self) -> str:
        return f"DeviceLoss(on {self._step.device.name}; float(J) waits for it)"

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)
