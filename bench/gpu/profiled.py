"""Two steps to profile with Nsight Compute: 4096 x 4 in bfloat16, 8,192 rows."""

from __future__ import annotations

import sys
from typing import Any

import mlpcore as mc
from bench.gpu import clock, kit


def main(width: int = 4096, rows: int = 8192) -> int:
    device = kit.opened()
    net = mc.MLP([width] * 5, "relu", "identity", device=device.name, seed=0)
    settings: Any = {"precision": "bfloat16", "deterministic": True}
    trainer = mc.Trainer(net, "squared_error", mc.AdamW(1e-4), **settings)
    rng = device.xp.random.default_rng(0)
    X, Y = (rng.standard_normal((rows, width), dtype=device.xp.float32) for _ in range(2))
    losses = [trainer.step(X, Y) for _ in range(2)]
    clock.wait(device)
    print(f"losses {[float(J) for J in losses]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
