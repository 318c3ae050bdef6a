"""The step that fits a device: captured on CUDA, operation by operation elsewhere."""

from __future__ import annotations

from typing import Any

from mlpcore.backends import devices
from mlpcore.core.activations import Activation
from mlpcore.core.layout import Layout, Parameters
from mlpcore.core.losses import Objective
from mlpcore.core.optimizers import Optimizer
from mlpcore.engine.cpu_step import Step
from mlpcore.engine.workspace import PlannedStep, Settings


def make_step(
    device: str, layout: Layout, store: Parameters, activations: tuple[Activation | None, ...], objective: Objective,
    optimizer: Optimizer, settings: Settings, precision: str | None = None, deterministic: bool = False,
) -> PlannedStep:  # fmt: skip
    """A step on a device; arguments as `PlannedStep` and `GraphStep` take them."""
    new_ops: Any = devices.operations(device, precision == "tf32", deterministic)
    if device == "cpu" or not devices.open_device(device).captures:
        return Step(layout, store, activations, objective, optimizer, settings, new_ops)
    from mlpcore.engine.graph_step import GraphStep

    return GraphStep(
        layout,
        store,
        activations,
        objective,
        optimizer,
        settings,
        new_ops,
        devices.open_device(device),
        precision,
    )
