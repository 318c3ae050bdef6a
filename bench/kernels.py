"""The CUDA backend's elementwise kernels against a device copy of equal size: both move bytes.

    python bench/kernels.py [--gib 1 2] --out DIR

`copy` reads and writes an array; `bias_activation` reads and writes S in place;
`activation_gradient` reads G and Z (or S) and writes D over G. Bandwidth counts each read and each
write once. Each kernel is timed in turn with the copy, after a first call that compiles it; medians
of the repeats. DIR/kernels.json is rewritten after each kernel.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

from bench import machine
from mlpcore.backends import devices
from mlpcore.backends.cuda.device import CudaDevice
from mlpcore.checks.errors import DeviceUnavailable
from mlpcore.core import formulas, losses
from mlpcore.core.activations import resolve
from mlpcore.core.ops import ChunkShape, storage
from mlpcore.engine.plan import allocate

COLUMNS = 4096
ACTIVATIONS = ("relu", "tanh", "gelu")


def measure(device: CudaDevice, dtype: str, gib: float, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield each kernel's bandwidth at one dtype and size, and its ratio to the copy's."""
    xp, ops = device.xp, devices.find(device.name).operations()()
    kind = xp.dtype(storage(dtype))
    rows = max(1, int(gib * 2**30) // (COLUMNS * kind.itemsize))
    objective = losses.pair(losses.resolve("squared_error"), None)
    shape = ChunkShape(rows, (COLUMNS, COLUMNS), dtype, (None, None), objective, accumulates=False)
    scratch = ops.scratch(shape)
    ops.use(allocate(ops, scratch))  # as in a step; else `activation_gradient` allocates

    def data() -> Any:
        numbers = xp.random.default_rng(0).standard_normal((rows, COLUMNS), dtype=xp.float32)
        return (
            (numbers.view(xp.uint32) >> 16).astype(xp.uint16)
            if dtype == "bfloat16"
            else numbers.astype(kind, copy=False)
        )

    S, G, other, b, db = (
        data(),
        data(),
        data(),
        xp.zeros(COLUMNS, xp.float32),
        xp.zeros(COLUMNS, xp.float32),
    )

    def copy() -> None:
        xp.copyto(other, S)

    runs: dict[str, tuple[int, Callable[[], None]]] = {"copy": (2, copy)}
    for name in ACTIVATIONS:
        sigma = resolve(name)
        reads = 1 + len(formulas.reads(sigma.slope) & {"s", "z"})
        runs[f"bias_activation {name}"] = (
            2,
            lambda sigma=sigma: ops.bias_activation(S, b, sigma, S),
        )
        runs[f"activation_gradient {name}"] = (
            reads + 1,
            lambda sigma=sigma: ops.activation_gradient(G, other, S, sigma, G, db),
        )
    for name, (moved, launch) in runs.items():
        launch()  # compiles
        pairs = [(device.seconds(launch), device.seconds(copy)) for _ in range(rounds)]
        rate = moved * S.nbytes / statistics.median(kernel for kernel, _ in pairs)
        over = statistics.median(moved / 2 * copied / kernel for kernel, copied in pairs)
        yield {"kernel": name, "dtype": dtype, "GiB": gib, "GB/s": rate / 1e9, "over copy": over}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        device = devices.open_device("cuda:0")
    except DeviceUnavailable as reason:
        print(f"kernels: {reason}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result = {"machine": machine.describe("cuda"), "commit": machine.commit(), "kernels": rows}
    with device.active():
        for dtype in ("float32", "bfloat16"):
            for gib in options.gib:
                for row in measure(device, dtype, gib, options.rounds):
                    rows.append(row)
                    machine.write(result, options.out / "kernels.json")
                    point = f"{row['kernel']:<28} {row['dtype']:<9} {row['GiB']:>5.1f} GiB"
                    print(
                        f"{point} {row['GB/s']:>8.0f} GB/s  {row['over copy']:>5.2f} x copy",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
