"""Headline points of `bench/run.py --suite gpu` beside PyTorch and JAX, all into one result."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from bench.gpu import kit
from bench.machine import ROOT

POINTS = {"latency": 128, "narrow": 2**18, "wide": 8192}  # cases and their batch size
PEERS = "torch-graph,torch-compile-graph,jax-scan"


def command(case: str, out: str) -> list[str]:
    """The command line of one case."""
    words = ["--suite", "gpu", "--no-footprint", "--out", out, "--peers", PEERS]
    words += ["--cases", case, "--batches", str(POINTS[case])]
    return [sys.executable, str(ROOT / "bench" / "run.py"), *words]


def main(arguments: Sequence[str] | None = None) -> int:
    options = kit.options(__doc__, arguments)
    cases = list(POINTS)[: 1 if options.small else None]
    commands = {case: command(case, str(options.out / "peers")) for case in cases}
    failed = [case for case in cases if subprocess.run(commands[case], check=False).returncode]
    words = f"{len(cases) - len(failed)} of {len(cases)} cases beside {PEERS}"
    print(f"{words}; FAILED: {', '.join(failed)}" if failed else words)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
