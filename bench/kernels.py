"""The elementwise kernels of the CUDA backend against a device copy of equal size: both only move bytes.

    python bench/kernels.py [--gib 1 2] --out DIR

`copy` reads and writes an array; `bias_activation` reads and writes S in place; `activation_gradient` reads G and Z (or S) and
writes D over G. Bandwidth counts each read and each write once. Device events, medians of interleaved repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

from bench import machine
from mlpcore.backends import device as devices
from mlpcore.core import formulas
from mlpcore.core.activations import resolve
from mlpcore.core.errors import DeviceUnavailable
from mlpcore.core.ops import storage

COLUMNS = 4096
ACTIVATIONS = ("relu", "tanh", "gelu")


def measure(device: Any, dtype: str, gib: float, rounds: int) -> list[dict[str, Any]]:
    """Bandwidths of one dtype and size, each over the copy's."""
    xp, ops = device.xp, devices.operations(device.name)()
    kind = xp.dtype(storage(dtype))
    rows = int(gib * 2**30) // (COLUMNS * kind.itemsize)

    def data() -> Any:
        numbers = xp.random.default_rng(0).standard_normal((rows, COLUMNS), dtype=xp.float32)
        return (numbers.view(xp.uint32) >> 16).astype(xp.uint16) if dtype == "bfloat16" else numbers.astype(kind, copy=False)

    S, G, other, b, db = data(), data(), data(), xp.zeros(COLUMNS, xp.float32), xp.zeros(COLUMNS, xp.float32)
    runs: dict[str, tuple[int, Callable[[], None]]] = {"copy": (2, lambda: xp.copyto(other, S))}
    for name in ACTIVATIONS:
        sigma = resolve(name)
        reads = 1 + len(formulas.reads(sigma.slope) & {"s", "z"})
        runs[f"bias_activation {name}"] = (2, lambda sigma=sigma: ops.bias_activation(S, b, sigma, S))
        runs[f"activation_gradient {name}"] = (
            reads + 1,
            lambda sigma=sigma: ops.activation_gradient(G, other, S, sigma, G, db),
        )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (_, launch) in runs.items():
            seconds[name].append(device.seconds(launch))
    rate = {name: moved * S.nbytes / statistics.median(seconds[name]) for name, (moved, _) in runs.items()}
    return [
        {"kernel": name, "dtype": dtype, "GiB": gib, "GB/s": rate[name] / 1e9, "over copy": rate[name] / rate["copy"]}
        for name in runs
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        device = devices.open_device("cuda:0")
    except DeviceUnavailable as reason:
        print(f"kernels: {reason}", file=sys.stderr)
        return 1
    points = [(dtype, gib) for dtype in ("float32", "bfloat16") for gib in options.gib]
    rows = [row for point in points for row in measure(device, *point, options.rounds)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernels.json").write_text(json.dumps({"machine": machine.describe("cuda"), "kernels": rows}, indent=1))
    for row in rows:
        point = f"{row['kernel']:<28} {row['dtype']:<9} {row['GiB']:>5.1f} GiB"
        print(f"{point} {row['GB/s']:>8.0f} GB/s  {row['over copy']:>5.2f} x copy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
