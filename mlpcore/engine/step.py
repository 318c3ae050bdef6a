"""The training step as trainers, gradient checks and estimators use it, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from mlpcore.core.ops import Array
from mlpcore.core.schedules import Progress
from mlpcore.data.batches import Batch, Inputs
from mlpcore.engine.chunks import Chunk
from mlpcore.engine.parts import StepParts
from mlpcore.engine.plan import Plan
from mlpcore.engine.problem import Problem
from mlpcore.engine.state import State
from mlpcore.engine.workspace import Workspace


class Step(Protocol):
    """Gradient and update of one network, on arrays planned beforehand.

    Attributes:
        problem: the problem it works on; `problem.settings` may be replaced between steps.
        state: gradient, optimizer state and their counts.
        workspace: plans and arrays.
        ops: the operations of the device.
        J: loss of the last step that was begun.
        untouched: True if nobody else has written the parameters since the last step.
    """

    problem: Problem
    state: State
    workspace: Workspace
    ops: Any
    J: Any
    untouched: bool

    @property
    def gradient(self) -> Array:
        """The gradient of the last batch, flat."""

    def prepare(self, batch_rows: int, inputs: Inputs) -> Plan:
        """Update the settings; return the plan for such batches, with its arrays allocated."""

    def run(self, batch: Batch, plan: Plan, progress: Progress) -> Any:
        """Run a step on a batch; return the J before its update."""

    def together(self, batch_rows: int, inputs: Inputs, most: int) -> int:
        """Return how many of the next `most` steps on batches of this size go in one launch."""

    def apply(self, gradient: Array, progress: Progress) -> None:
        """Make one update with the caller's flat gradient, which is not modified."""

    def loss_and_gradient(self, batch: Batch, plan: Plan, number: int = 1) -> float:
        """Return J of a batch, penalties included; its gradient is in `gradient` afterwards."""

    def evaluate(self, batch: Batch, plan: Plan, see: Callable[[Array, int, int], None]) -> float:
        """Return the mean loss of a batch, without penalties; `see` gets each chunk's output."""

    def weight(self, batch: Batch) -> float | None:
        """Return Σ w over the rows of a batch; None if only the device knows it."""

    def first_not_finite(self, batch: Batch, plan: Plan) -> int | None:
        """Return the first layer with outputs, or the last with a gradient, that are not finite."""

    def parts(self, batch: Batch, plan: Plan, progress: Progress) -> StepParts:
        """Return the graphs of a step, for measurements."""

    def count_skipped(self, progress: Progress) -> None:
        """Update `progress.skipped`; wait for the device."""

    def count_launched(self) -> None:
        """Count steps that the device has run but an interrupt kept from being counted."""

    def require_whole(self) -> None:
        """Raise a RuntimeError if an update, or a change of the state, was interrupted."""

    def renew(self) -> None:
        """Drop work that another thread had under way here when the process was forked."""

    def snapshot(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return what later steps depend on apart from the parameters: state vectors, and facts."""

    def restore(self, vectors: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Restore a snapshot, with its chunks."""


def find_not_finite(
    step: Step,
    chunk: Callable[[], Chunk],
    to_host: Callable[[Array], np.ndarray],
    batch: Batch,
    plan: Plan,
) -> int | None:
    """Return the layer in which a step went wrong, or None.

    That is the first layer whose outputs on this batch are not finite or, if all outputs are
    finite, the last layer whose gradient is not.

    Args:
        step: the step, which is evaluated again.
        chunk: returns the arrays that `step.evaluate` works on.
        to_host: converts such an array to a NumPy array.
        batch, plan: the rows, and the plan for them.
    """
    layout, bad = step.problem.layout, list[int]()

    def look(_: Array, start: int, stop: int) -> None:
        there = chunk()
        for l in range(1, layout.layers + 1):
            names = [name for name in (f"S[{l}]", f"Z[{l}]") if name in there.buffers]
            arrays = (to_host(there.rows(name, stop - start)) for name in names)
            if not all(np.isfinite(array).all() for array in arrays):
                bad.append(l)
                return

    step.evaluate(batch, plan, look)
    if bad:
        return min(bad)
    step.loss_and_gradient(batch, plan)
    gradient = to_host(step.gradient)
    (dW, db), da = layout.views(gradient), layout.slopes(gradient)
    for l in range(layout.layers, 0, -1):
        arrays = (array for array in (dW[l], db[l], da[l]) if array is not None)
        if not all(np.isfinite(array).all() for array in arrays):
            return l
    return None
