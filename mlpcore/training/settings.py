"""Validation of a trainer's settings; errors name the argument, the expected and the given."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mlpcore.backends import devices
from mlpcore.checks import values
from mlpcore.checks.errors import shown
from mlpcore.core import losses as loss_sheet
from mlpcore.core.dropout import rates
from mlpcore.core.losses import Loss
from mlpcore.core.optimizers import AdamW, Optimizer
from mlpcore.engine.plan import parse_bytes
from mlpcore.engine.problem import Settings
from mlpcore.training.learner import Learner, Network

log = logging.getLogger("mlpcore")
PRECISIONS = ("tf32", "bfloat16", "float16")
MOST_WORKERS = 1024


def make_learner(
    net: Network,
    loss: Any,
    optimizer: Any,
    class_weight: Any,
    label_smoothing: Any,
    pos_weight: Any,
    l1: Any,
    l2: Any,
    clip_norm: Any,
    dropout: Any,
    precision: Any,
    memory_limit: Any,
    chunk_rows: Any,
    deterministic: Any,
    workers: Any,
    on_non_finite: Any,
    seed: Any,
) -> Learner:
    """Return the learner for a trainer with these arguments of `mc.Trainer`.

    Raises:
        TypeError, ValueError: invalid argument; the message says what was expected.
    """
    rule, precision = _check_optimizer(optimizer, net), _check_precision(precision, net)
    if isinstance(chunk_rows, str) and chunk_rows != "auto":
        raise ValueError(f"chunk_rows must be 'auto' or a number of rows; got {shown(chunk_rows)}")
    integer, norm, device = values.positive_integer, clip_norm, net.device
    settings = Settings(
        l1=check_penalty(l1, "l1", net),
        l2=check_penalty(l2, "l2", net),
        clip_norm=None if norm is None else values.number(norm, "clip_norm", above=0),
        chunk_rows="auto" if isinstance(chunk_rows, str) else integer(chunk_rows, "chunk_rows"),
        memory_limit=parse_bytes(memory_limit, free=lambda: devices.find(device).free_bytes()),
        workers=None if workers is None else integer(workers, "workers", most=MOST_WORKERS),
        on_non_finite=values.one_of(on_non_finite, "on_non_finite", ("raise", "skip")),
        dropout=rates(dropout, net.layout.layers - 1) or None,
        seed=values.seed(seed),
    )
    deterministic = values.boolean(deterministic, "deterministic")
    objective = _choose_loss(loss, net, class_weight, label_smoothing, pos_weight)
    return Learner(net, objective, rule, settings, precision, deterministic)


def check_penalty(value: object, name: str, net: Network) -> float:
    """Return the factor of a penalty as a float; raise an error if the dtype cannot hold it."""
    factor = values.number(value, name, least=0)
    values.require_held(factor, net.dtype.name, name)
    return factor


def _check_optimizer(optimizer: object, net: Network) -> Optimizer:
    """Return the optimizer, AdamW for None, if it can train this network."""
    optimizer = AdamW() if optimizer is None else optimizer
    if not isinstance(optimizer, Optimizer) or type(optimizer) is Optimizer:
        raise TypeError(
            f"optimizer must be e.g. mc.SGD(0.1) or mc.AdamW(1e-3); got {shown(optimizer)}"
        )
    optimizer.require_epsilon(net.dtype.name)
    optimizer.require_layers(net.layout.layers)
    return optimizer


def _check_precision(precision: object, net: Network) -> str | None:
    """Return the precision; warn if the device is a CPU, which ignores it."""
    if precision is None:
        return None
    precision, dtype = values.one_of(precision, "precision", PRECISIONS), net.dtype.name
    if net.device == "cpu":
        log.warning(
            "precision=%r is for GPUs: on the CPU the network computes in %s", precision, dtype
        )
    elif net.dtype != np.float32:
        raise ValueError(f"precision={precision!r} is for a float32 network; this one is {dtype}")
    return precision


def _choose_loss(
    loss: object,
    net: Network,
    class_weight: object,
    label_smoothing: float | None,
    pos_weight: object,
) -> Loss:
    """Return the loss with its options; None picks the one that matches the output activation."""
    output = net.activations[-1]
    assert output is not None
    found = loss_sheet.resolve(loss_sheet.matching(output) if loss is None else loss)
    found = loss_sheet.with_options(
        found, class_weight, label_smoothing, pos_weight, net.layout.sizes[-1]
    )
    found.require_held(net.dtype.name)
    return found
