"""The step of each headline case in parts: host, device, graph, products, every node."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlpcore as mc
from bench.cases import BETAS, CASES, DECAY, EPSILON, TIMED_RATE
from bench.gpu import clock, kit
from mlpcore.backends.cuda.device import CudaDevice

ENOUGH = 2e4  # microseconds per timed block
TRACED = 5  # number of steps whose nodes are averaged


class Apart(NamedTuple):
    """A case of bench.cases at a batch size, in a precision and with a chunk."""

    case: str
    batch: int
    precision: str | None
    chunk_rows: int | str = "auto"

    @property
    def name(self) -> str:
        """Name of the case, such as `narrow/262144/float16`, with the requested chunk if any."""
        chunk = "" if self.chunk_rows == "auto" else f"/chunks of {self.chunk_rows}"
        return f"{self.case}/{self.batch}/{self.precision or 'float32'}{chunk}"


HEADLINES = [
    Apart("latency", 128, None),
    Apart("wide", 8192, "bfloat16"),
    Apart("narrow", 2**18, "float16"),
    Apart("784-512-512-10", 1024, "tf32"),
    Apart("784-512-512-10", 1024, None),
    Apart("gelu", 512, None),
    *(Apart("narrow", 2**18, "float16", rows) for rows in (2**14, 2**16, 2**17, 2**18)),
    *(Apart("wide", 2**16, "bfloat16", rows) for rows in (2**13, 2**16)),
]
SMALL = [Apart("784-128-10", 64, None), Apart("64-64-64-64-1", 96, "float16", 7)]


def apart(device: CudaDevice, what: Apart) -> dict[str, Any]:
    """Return all times of a step in microseconds, and the choices made for it."""
    case, xp, rng = CASES[what.case], device.xp, device.xp.random.default_rng(0)
    net = mc.MLP(case.sizes, case.activation, case.output, device=device.name, seed=0)
    optimizer = mc.AdamW(TIMED_RATE, DECAY, *BETAS, EPSILON)
    settings: Any = {"precision": what.precision, "chunk_rows": what.chunk_rows}
    trainer = mc.Trainer(net, case.loss, optimizer, **settings)
    X = rng.standard_normal((what.batch, case.sizes[0]), dtype=xp.float32)
    if case.loss == "cross_entropy":
        Y = rng.integers(0, case.sizes[-1], what.batch)
    else:
        Y = rng.standard_normal((what.batch, case.sizes[-1]), dtype=xp.float32)
    begin = time.perf_counter()
    found: dict[str, Any] = {"J": float(trainer.step(X, Y))}
    found["first step s"] = time.perf_counter() - begin
    data, parts = trainer.prepare(X, Y), trainer.parts(X, Y)
    found |= {"chunks": len(parts.chunks), "rows of a chunk": parts.rows}
    found["plan bytes"] = trainer.plan(what.batch).total_bytes
    once = clock.microseconds(device, lambda: trainer.step(data), 3, repeats=1)
    count = int(max(3, min(200, ENOUGH / once)))
    calls = {"step(X, Y)": lambda: trainer.step(X, Y), "step(data)": lambda: trainer.step(data)}
    for words, run in calls.items():
        host, wall = clock.host_and_wall(device, run, count)
        found |= {f"{words}, host us": host, f"{words}, wall us": wall}
    found["step(data), device us"] = clock.microseconds(device, lambda: trainer.step(data), count)
    products = found["products us"] = clock.microseconds(device, parts.products.replay, count)
    if parts.step is not None and parts.gradient is not None:
        found["graph us"] = clock.microseconds(device, parts.step.replay, count)
        found["forward and backward us"] = clock.microseconds(device, parts.gradient.replay, count)
        found["forward and backward over products"] = found["forward and backward us"] / products
        found["host over graph"] = found["step(data), host us"] / found["graph us"]
    found["layers fused, of"] = list(parts.fused)
    found["algorithms"] = {str(product): one.hex() for product, one in parts.algorithms.items()}
    found["nodes"] = nodes(device, lambda: trainer.step(data)) if what.chunk_rows == "auto" else {}
    return found


def nodes(device: CudaDevice, run: Any) -> dict[str, Any]:
    """Return the kernels of a run, by PyTorch's profiler, which sees the whole process."""
    if not clock.is_gpu(device) or not importlib.util.find_spec("torch"):
        return {"missing": "needs a GPU, and PyTorch for its profiler"}
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.zeros(1, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(TRACED):
            run()
        clock.wait(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        return table(json.loads(trace.read_text())["traceEvents"], TRACED)


def table(events: Iterable[Mapping[str, Any]], runs: int) -> dict[str, Any]:
    """Return for each kernel of a trace: launches per run, mean time, mean gap before it."""
    kinds = "kernel", "gpu_memset", "gpu_memcpy"
    on_device = [event for event in events if event.get("cat") in kinds]
    found: dict[str, list[float]] = {}
    end = None
    for event in sorted(on_device, key=lambda event: event["ts"]):
        row = found.setdefault(event["name"][:120], [0, 0.0, 0.0])
        row[0] += 1
        row[1] += event["dur"]
        row[2] += 0 if end is None else max(0, event["ts"] - end)
        end = max(end or 0, event["ts"] + event["dur"])
    return {
        name: {"a run": n / runs, "us": round(us / n, 2), "gap before us": round(gap / n, 2)}
        for name, (n, us, gap) in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = kit.options(__doc__, arguments)
    device, report = kit.opened(), kit.Report(options.out, "steps")
    cases = SMALL if options.small else HEADLINES
    for what in cases:
        report.add(what.name, lambda what=what: apart(device, what))
        if clock.is_gpu(device):
            device.xp.get_default_memory_pool().free_all_blocks()
    return report.finish(f"{len(cases) - len(report.failed)} of {len(cases)} steps measured")


if __name__ == "__main__":
    sys.exit(main())
