"""A whole training step across batch sizes, by pytest-benchmark: `pytest bench/ --benchmark-only`.

`extra_info` holds the peak of Python's own allocations during a step, without X and Y, and the
planned bytes.
"""

from __future__ import annotations

import tracemalloc

import pytest

import mlpcore as mc
from bench.cases import CASES
from bench.work import rows

STEPS = [("784-128-10", m) for m in (32, 128, 512)] + [("784-512-512-10", 1024)]
STEPS += [("64-64-64-64-1", m) for m in (1, 32, 1024, 65536)] + [("gelu", 512)]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(("name", "batch"), STEPS)
def test_step(benchmark, tmp_path, name, batch, optimizer):
    case = CASES[name]
    X, Y = rows(case, batch, tmp_path)

    def make():
        net = mc.MLP(case.sizes, case.activation, case.output, device="cpu")
        return mc.Trainer(net, case.loss, getattr(mc, optimizer)(1e-8))

    make().step(X[:1], Y[:1])  # exclude one-time imports and compilation
    tracemalloc.start()
    trainer = make()
    tracemalloc.reset_peak()  # drawing the weights used temporary arrays
    trainer.step(X, Y)
    benchmark.extra_info["peak_bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    benchmark.extra_info["planned_bytes"] = trainer.plan(batch).total_bytes
    benchmark.extra_info["rows"] = batch
    benchmark(trainer.step, X, Y)
