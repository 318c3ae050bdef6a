"""`mlpcore info --compile`: the CPU's passes compiled before the first training needs them."""

from __future__ import annotations

import contextlib

import numpy as np

import mlpcore as mc
from mlpcore.backends.compiled import compiler
from mlpcore.core import losses
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.sheet import ACTIVATIONS, LOSSES

SGD = [
    mc.SGD(0.1, momentum=0.9, nesterov=nesterov, velocity=velocity)
    for nesterov in (False, True)
    for velocity in ("steps", "gradients")
]
OPTIMIZERS: list[Optimizer] = [  # one for each update of the sheet
    mc.SGD(0.1), *SGD, mc.Adam(), mc.Adam(epsilon_hat=True), mc.AdamW(), mc.RMSprop(), mc.Lion()
]  # fmt: skip


def compile_all(dtype: str) -> str:
    """Compile the passes of all built-in activations, losses and updates, and say how many.

    Tiny networks are trained and used, which need the same passes as large ones.
    """
    require_compiler()
    made, found, seconds = compiler.counts()
    for output in ACTIVATIONS:
        for loss in LOSSES:
            try:
                losses.pair(LOSSES[loss], ACTIVATIONS[output])
            except ValueError:  # a loss of other outputs
                continue
            use(output, loss, dtype)
    for optimizer in OPTIMIZERS:
        use("identity", "squared_error", dtype, optimizer)
    require_compiler()
    now_made, now_found, now = compiler.counts()
    return (
        f"{now_made - made} passes of {dtype} compiled in {now - seconds:.1f} s, "
        f"{now_found - found} found in the cache"
    )


def require_compiler() -> None:
    """Raise a ValueError that says why passes are not compiled."""
    if reason := compiler.why_not():
        raise ValueError(f"--compile: expected a C++ compiler that works; got none: {reason}")


def use(output: str, loss: str, dtype: str, optimizer: Optimizer | None = None) -> None:
    """Train a network with this output, and hidden layers alike, for two steps, and predict."""
    rowwise = ACTIVATIONS[output].rowwise
    X, Y = np.full((2, 4, 2), 0.5)
    for targets in (Y, [0, 1, 0, 1]) if LOSSES[loss].rowwise else (Y,):
        hidden = "relu" if rowwise else output
        net = mc.MLP([2, 3, 2], hidden, output, dtype=dtype, device="cpu")
        with contextlib.suppress(mc.NonFiniteLoss):
            trainer = mc.Trainer(net, loss, optimizer)
            trainer.fit(X, targets, epochs=1, batch_size=2, progress=False)
        net.predict(X)
