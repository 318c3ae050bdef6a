"""Steps of every kind, or kernels at awkward shapes, for compute-sanitizer to watch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import mlpcore as mc
from bench.gpu import kit
from mlpcore.backends import devices
from mlpcore.core import activations, losses

DTYPES = "float16", "float32", "float64"
SHAPES = (1, 1), (3001, 24), (500, 7), (67, 700)


def steps() -> float:
    """Take steps in each precision, in chunks, clipped, penalised; return the last loss."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((61, 7), dtype=np.float32), rng.integers(0, 5, 61)
    w = rng.random(61, dtype=np.float32)
    for precision, chunk_rows in ((None, "auto"), ("float16", 7), ("bfloat16", 20)):
        net = mc.MLP([7, 17, 12, 5], ["relu", "gelu"], "softmax", device="cuda", seed=0)
        settings: Any = {"precision": precision, "chunk_rows": chunk_rows, "clip_norm": 1.0}
        trainer = mc.Trainer(net, deterministic=True, **settings)
        print([float(trainer.step(X, Y, w)) for _ in range(3)], trainer.evaluate(X, Y))
    net = mc.MLP([7, 17, 5], "tanh", "sigmoid", dtype="float64", device="cuda", seed=0)
    return float(mc.Trainer(net, "binary_cross_entropy", l1=0.1).step(X, rng.random((61, 5))))


def kernels(dtypes: Sequence[str] = DTYPES, shapes: Sequence[tuple[int, int]] = SHAPES) -> float:
    """Run activations, slopes and losses over matrices of these shapes; return the last loss."""
    device: Any = kit.opened()
    xp, J = device.xp, None
    for dtype in dtypes:
        ops: Any = devices.find(device.name).operations()()
        wide = "float32" if dtype == "float16" else dtype
        for m, n in shapes:
            S, G = xp.ones((m, n), dtype), xp.ones((m, n), dtype)
            db, J, k, Y = (xp.zeros(shape, wide) for shape in (n, (), (m, 1), (m, n)))
            k += 1
            for name in ("tanh", "softmax"):
                sigma = activations.resolve(name, output=True)
                ops.bias_activation(S, db, sigma, S)
                ops.activation_gradient(G, S, S, sigma, G, db, True)
            for loss, output in (("cross_entropy", "softmax"), ("squared_error", "identity")):
                pair = losses.pair(losses.resolve(loss), activations.resolve(output, output=True))
                targets = Y[:, 0].astype(xp.int64) if loss == "cross_entropy" else Y
                ops.loss(S, targets, k, pair, S, db, J, False)
    return float(J)


WATCHED: dict[str, Callable[[], float]] = {"steps": steps, "kernels": kernels}


def main(arguments: Sequence[str] | None = None) -> int:
    (what,) = sys.argv[1:] if arguments is None else arguments
    kit.opened()
    J = WATCHED[what]()
    print(f"{what}: the last loss is {J}")
    return int(not math.isfinite(J))


if __name__ == "__main__":
    sys.exit(main())
