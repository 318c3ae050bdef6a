"""A check of the GPU: two steps of a small network on the GPU and on the CPU."""

from __future__ import annotations

import sys

import numpy as np

import mlpcore as mc
from bench.gpu import kit


def losses(device: str) -> list[float]:
    """Return the losses of the first two training steps."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((61, 7), dtype=np.float32), rng.integers(0, 5, 61)
    net = mc.MLP([7, 17, 5], "relu", "softmax", device=device, seed=0)
    trainer = mc.Trainer(net, "cross_entropy", mc.SGD(0.5))
    return [float(trainer.step(X, Y)) for _ in range(2)]


def main() -> int:
    device = kit.opened()
    found, expected = losses(device.name), losses("cpu")
    if not np.allclose(found, expected, rtol=1e-4):
        sys.exit(f"the GPU computes wrong losses: {found} instead of {expected}")
    print(f"{mc.info()['cuda']}; losses {found} as on the CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
