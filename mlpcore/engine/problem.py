"""The problem that a step works on: a network's parameters, an objective and an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlpcore.core import dropout
from mlpcore.core.activations import Activation, bind
from mlpcore.core.layout import Layout, Parameters
from mlpcore.core.losses import Objective
from mlpcore.core.ops import Array
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.sheet import PENALTIES


@dataclass(frozen=True)
class Settings:
    """A trainer's settings that a step depends on.

    Attributes:
        l1, l2: coefficients of the penalty l1 Σ|W| + ½ l2 Σ W² in J.
        clip_norm: maximum norm of a gradient; None: unlimited.
        chunk_rows: maximum rows of a chunk; "auto": the step chooses.
        memory_limit: bytes of all arrays together; None: unlimited.
        workers: number of threads that run their own chunks; None: the step chooses.
        on_non_finite: "skip" to leave out a step that is not finite, "raise" to raise an error.
        dropout: rate of each hidden layer; None for no dropout.
        seed: seed of the dropout masks and the row order.
    """

    l1: float = 0.0
    l2: float = 0.0
    clip_norm: float | None = None
    chunk_rows: int | str = "auto"
    memory_limit: int | None = None
    workers: int | None = None
    on_non_finite: str = "raise"
    dropout: tuple[float, ...] | None = None
    seed: int = 0

    @property
    def most_rows(self) -> int | None:
        """Maximum rows of a chunk; None if the step chooses."""
        return None if isinstance(self.chunk_rows, str) else self.chunk_rows

    @property
    def tolerant(self) -> bool:
        """True if a step that is not finite is left out instead of raising an error."""
        return self.on_non_finite == "skip"

    @property
    def penalty_terms(self) -> list[str]:
        """Terms of the nonzero penalties in a weight's slope."""
        return [term.slope for name, term in PENALTIES.items() if getattr(self, name)]


class Problem:
    """Everything that a step is made from.

    Args:
        layout, store: the network's flat vector and its views.
        activations: index 0 is None, then one per layer.
        objective: the loss on top of the output activation.
        optimizer: the settings of the update rule.
        settings: the trainer's settings.
        new_ops: makes the operations of one more worker.

    Attributes:
        activations: with dropout, bound to the learned parameters in `store`.
        parameters: the flat vector.
        dtype: NumPy name of its dtype.
    """

    def __init__(
        self,
        layout: Layout,
        store: Parameters,
        activations: tuple[Activation | None, ...],
        objective: Objective,
        optimizer: Optimizer,
        settings: Settings,
        new_ops: Callable[[], Any],
    ) -> None:
        self.layout, self.store, self.parameters = layout, store, store.flat
        dropped = dropout.with_dropout(activations, settings.dropout or (), settings.seed)
        self.activations = bind(dropped, store.a)
        self.objective, self.optimizer, self.settings = objective, optimizer, settings
        self.new_ops = new_ops
        self.dtype = str(store.flat.dtype)

    def activations_on(self, gradient: Array) -> tuple[Activation | None, ...]:
        """Return the activations, bound to a flat gradient that receives their learned slopes."""
        return bind(self.activations, self.store.a, self.layout.slopes(gradient))
