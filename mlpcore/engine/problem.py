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
        l1, l2: J gains l1 Σ|W| + ½ l2 Σ W².
        clip_norm: the largest norm of a gradient; None: any.
        chunk_rows: most rows of a chunk; "auto": the step chooses.
        memory_limit: bytes of all arrays together; None: no limit.
        workers: threads that run chunks of their own; None: the step chooses.
        on_non_finite: "skip" to leave out a step that is not finite, "raise" to raise.
        dropout: the rate of each hidden layer; None for no dropout.
        seed: of the masks of dropout, and of the row order.
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
        """The most rows of a chunk; None where the step chooses."""
        return None if isinstance(self.chunk_rows, str) else self.chunk_rows

    @property
    def tolerant(self) -> bool:
        """True if a step that is not finite is left out instead of raised."""
        return self.on_non_finite == "skip"

    @property
    def penalty_terms(self) -> list[str]:
        """The penalties' terms of a weight's slope that are not 0."""
        return [term.slope for name, term in PENALTIES.items() if getattr(self, name)]


class Problem:
    """Everything that a step is made from.

    Args:
        layout, store: the network's flat vector and the views of it.
        activations: index 0 None, then one a layer.
        objective: the loss on top of the output activation.
        optimizer: the update rule's settings.
        settings: the trainer's.
        new_ops: makes the operations of one more worker.

    Attributes:
        activations: with dropout, on the learned parameters in `store`.
        parameters: the flat vector.
        dtype: its NumPy name.
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
        """Return the activations, with the learned ones writing their slopes to a flat gradient."""
        return bind(self.activations, self.store.a, self.layout.slopes(gradient))
