"""The choice of the step that fits a device."""

from __future__ import annotations

from mlpcore.backends import devices
from mlpcore.core.activations import Activation
from mlpcore.core.layout import Layout, Parameters
from mlpcore.core.losses import Objective
from mlpcore.core.optimizers import Optimizer
from mlpcore.engine.cpu_step import CpuStep
from mlpcore.engine.problem import Problem, Settings
from mlpcore.engine.step import Step


def make_step(
    device: str,
    layout: Layout,
    store: Parameters,
    activations: tuple[Activation | None, ...],
    objective: Objective,
    optimizer: Optimizer,
    settings: Settings,
    precision: str | None = None,
    deterministic: bool = False,
) -> Step:
    """Return a step for a device: captured on CUDA, operation by operation elsewhere.

    Args:
        device: name of the device.
        layout, store, activations, objective, optimizer, settings: as in `Problem`.
        precision: as in `GraphStep`.
        deterministic: True to choose algorithms without timing them.
    """
    there = devices.find(device)
    new_ops = there.operations(precision == "tf32", deterministic)
    problem = Problem(layout, store, activations, objective, optimizer, settings, new_ops)
    if not there.captures:
        return CpuStep(problem)
    from mlpcore.engine.graph_step import GraphStep

    return GraphStep(problem, devices.open_device(device), precision)
