"""The settings, rates and counts that a captured step sends to the device before a launch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpcore.backends.cuda import slot as cuda_slot
from mlpcore.backends.cuda.gemm import Product
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import Progress, Schedule
from mlpcore.engine.capture import Capture
from mlpcore.engine.problem import Problem, Settings
from mlpcore.engine.state import State

log = logging.getLogger("mlpcore")


class Control:
    """The device's copies of settings and counts, and the values they were made from.

    Args:
        problem, state, capture: of the step.

    Attributes:
        fresh: True until the device has received the count of updates.
        varies: True if a custom optimizer may have different scalars at each step.
    """

    def __init__(self, problem: Problem, state: State, capture: Capture) -> None:
        self.problem, self.state, self.capture = problem, state, capture
        self.fresh = True
        self.varies = type(problem.optimizer).scalars is not Optimizer.scalars
        self._values: tuple[dict[str, Any], Settings] | None = None

    def forget(self) -> None:
        """Mark the slot's scalars to be set again before the next launch."""
        self._values = None

    def refresh(self) -> None:
        """Refresh what may have been changed from outside: settings, and the low parameters."""
        problem = self.problem
        known = self._values
        settings = problem.settings
        if known is None or known[1] is not settings or known[0] != vars(problem.optimizer):
            self._set_values(problem.optimizer.constants())

    def _set_values(self, values: Mapping[str, float]) -> None:
        """Set these scalars of the optimizer and the penalties in all slots from now on."""
        settings = self.problem.settings
        self.capture.kernels.set_values({**values, "l1": settings.l1, "l2": settings.l2})
        self._values = dict(vars(self.problem.optimizer)), settings

    def begin(self, progress: Progress, count: int) -> None:
        """Set counts, scalars and rates for the next `count` steps."""
        if self.fresh:
            self._set_counts(progress)
        if self.varies:
            self._set_values(self.problem.optimizer.scalars(progress))
        rates = self.rates(progress, count)
        self.capture.kernels.set_rates(rates)
        self.state.rate = next((rate for rate in reversed(rates) if rate), self.state.rate)

    def rates(self, progress: Progress, count: int) -> list[float]:
        """Return the learning rates of the next steps."""
        optimizer = self.problem.optimizer
        if self.varies:
            return [optimizer.scalars(progress)["rate"]] * count
        rate = optimizer.learning_rate
        if type(optimizer).rate is Optimizer.rate and not isinstance(rate, Schedule):
            return [float(rate)] * count
        ahead, rates = dataclasses.replace(progress), []
        for _ in range(count):
            rates.append(optimizer.rate(ahead))
            ahead.step += 1
        return rates

    # -- counts --

    def updates(self) -> int:
        """Return the number of updates done, without the skipped ones; wait for them."""
        return self.state.done if self.fresh else int(self.read()["updates"])

    def read(self) -> np.ndarray:
        """Return the device's counts and faults; wait for its work."""
        return self.capture.kernels.read_control()

    def _set_counts(self, progress: Progress) -> None:
        """Send the device the counts before its first update, and the bound of the state."""
        control = self.read()
        control["updates"], control["skipped"] = progress.step - progress.skipped, progress.skipped
        control["reach"] = self.state.reach
        self.capture.kernels.write_control(control)
        self.fresh = False

    # -- files --

    def facts(self) -> dict[str, Any]:
        """Return algorithms and counts, for a checkpoint."""
        if not self.state.rule:
            return {}
        device, known = self.capture.device, self.capture.ops.algorithms
        with device.lock:  # another trainer's thread may be choosing algorithms
            chosen = [[*dataclasses.astuple(p), x.hex()] for p, x in known.chosen.items()]
            fused = [[*dataclasses.astuple(p), pays] for p, pays in known.fused.items()]
        facts: dict[str, Any] = {"library": device.library, "algorithms": chosen, "fused": fused}
        if not self.fresh:
            control = self.read()
            names = cuda_slot.CONTROL.names or ()
            facts["control"] = {name: control[name].item() for name in names}
        return facts

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Restore a checkpoint's algorithms and counts."""
        if "control" in facts:  # else the device takes over the update counts at the next step
            control = np.zeros((), cuda_slot.CONTROL)
            for name, value in facts["control"].items():
                control[name] = value
            if facts["rule"] != self.problem.optimizer.row:  # the first vector may be another one
                control["reach"] = self.state.reach
            self.capture.kernels.write_control(control)
            self.fresh = False
        if "library" not in facts:  # saved on a CPU
            return
        device, known = self.capture.device, self.capture.ops.algorithms
        if facts["library"] != device.library:
            log.warning(
                "saved with %s, resumed with %s: results will not be bit-identical",
                facts["library"],
                device.library,
            )
            return
        with device.lock:
            known.chosen |= {
                Product(*fields): bytes.fromhex(text) for *fields, text in facts["algorithms"]
            }
            known.fused |= {Product(*fields): pays for *fields, pays in facts["fused"]}
