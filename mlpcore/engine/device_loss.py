"""Results of steps on a CUDA device, fetched on request: losses and faults."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

from mlpcore.backends.cuda.device import CudaDevice
from mlpcore.backends.cuda.slot import Status
from mlpcore.checks.errors import NonFiniteLoss
from mlpcore.core.ops import Array
from mlpcore.core.schedules import Progress
from mlpcore.engine.problem import Problem

ROWS = 2048  # results per allocation: 64 KiB
ROW_BYTES = 32


class StepResults:
    """The results of recent steps in device memory.

    Each step has one row: J, status, step of the first fault, Σ w.

    Attributes:
        asked: number of rows whose steps have been launched.
        address: the address of the first row.
    """

    def __init__(self, device: CudaDevice):
        self.device = device
        self.array = device.empty(ROW_BYTES * ROWS).view(np.float64).reshape(ROWS, 4)
        self.address = device.address(self.array)
        self.asked = 0
        self._fetched: list[list[float]] = []

    @property
    def answer(self) -> int:
        """Address of the next row that no step has been assigned."""
        return self.address + ROW_BYTES * self.asked

    def has(self, first: int, count: int) -> bool:
        """Return True if these rows have been fetched."""
        return first + count <= len(self._fetched)

    def read(self, first: int, count: int) -> list[list[float]]:
        """Return rows of launched steps; wait for them, and also fetch all other such rows."""
        if not self.has(first, count):
            self._fetched += self.device.to_host(
                self.array[len(self._fetched) : self.asked]
            ).tolist()
        return self._fetched[first : first + count]


def room(results: StepResults | None, device: CudaDevice, steps: int) -> StepResults:
    """Return results with rows left for this many steps: the given ones, or new ones."""
    if results is None or results.asked + steps > ROWS:
        return StepResults(device)
    return results


class Reader(Protocol):
    """A step that `DeviceLoss` asks for its results."""

    device: CudaDevice

    def read_results(
        self, results: StepResults, first: int, count: int, progress: Progress
    ) -> list[list[float]]:
        """Return rows of results, or raise the fault that one of them reports."""


class DeviceLoss:
    """J of a step, still on the device.

    `float(J)` waits for it, and raises any fault up to that step.
    """

    __slots__ = ("_count", "_first", "_progress", "_results", "_step")

    def __init__(
        self, step: Reader, results: StepResults, first: int, count: int, progress: Progress
    ):
        self._step, self._results, self._first = step, results, first
        self._count, self._progress = count, progress

    @property
    def array(self) -> Array:
        """J as a 0-d float64 array on the device; only `float(J)` checks for faults."""
        return self._results.array[self._first, :1].reshape(())

    def ask(self) -> None:
        """Allow the results to be read, since their steps have been launched."""
        self._results.asked = self._first + self._count

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """Return J and Σ w of each step of this step's launch; wait for them."""
        rows = self._step.read_results(self._results, self._first, self._count, self._progress)
        J, _, _, weights = np.array(rows, np.float64).reshape(-1, 4).T
        return J, weights

    def __float__(self) -> float:
        return float(self.values()[0][0])

    def __repr__(self) -> str:
        return f"DeviceLoss(on {self._step.device.name}; float(J) waits for it)"

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)


def fault(status: int, step: int, problem: Problem, progress: Progress | None) -> Exception:
    """Return the error that describes the fault of a step.

    Args:
        status: bits of `Status`.
        step: number of the step, from 1.
        problem: the problem that the step worked on.
        progress: the step's progress, for the learning rate; None: unknown.
    """
    if status & Status.BAD_LABEL:
        classes = problem.layout.sizes[-1] - 1
        return ValueError(f"Y must hold classes 0 … {classes}; a row of step {step} does not")
    if status & Status.BAD_WEIGHT:
        return ValueError(
            f"sample_weight must be finite, not negative and not all zero; step {step} failed"
        )
    if status & Status.BAD_ROW:
        return ValueError(f"rows must be row numbers of X; step {step} failed")
    rate = math.nan
    if progress is not None:
        rate = problem.optimizer.rate(dataclasses.replace(progress, step=max(0, step - 1)))
    message = (
        f"step {step}: the loss, the gradient or the update is not finite at learning rate "
        f"{rate:g}; the parameters are unchanged"
    )
    return NonFiniteLoss(message, step, rate)
