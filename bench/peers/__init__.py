"""The implementations: mlpcore and its peers, each driven the same way.

A peer's module has `build(work, way)`, which returns a `Runner`. It raises `ImportError` if its
package is not installed and `Unsupported` if it cannot run the point: both are reported as missing,
with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from bench.work import Work

PEERS = {  # name: (module, way)
    "mlpcore": ("mlpcore_peer", ""),
    "mlpcore-fit": ("mlpcore_peer", "fit"),  # steps on batches of a larger X, in `trainer.fit`
    "torch": ("torch_peer", "eager"),
    "torch-compile": ("torch_peer", "compile"),
    "torch-graph": ("torch_peer", "graph"),  # the whole step in one CUDA graph
    "torch-compile-graph": ("torch_peer", "compile graph"),
    "torch-chunks": ("torch_peer", "chunks"),  # accumulates over chunks of mlpcore's size
    "jax": ("jax_peer", "jit"),  # one call per step, parameters and state donated
    "jax-scan": ("jax_peer", "scan"),  # all steps of a block in one call
    "jax-chunks": ("jax_peer", "scan chunks"),
    "sklearn": ("sklearn_peer", ""),
    "warp-nn": ("warp_peer", ""),
}


class Unsupported(Exception):
    """A point that an implementation cannot run; the message says why."""


class Runner(Protocol):
    """One implementation at one point.

    Attributes:
        note: remark for the reader, or "".
        gemms: runs the step's GEMMs alone `count` times, as `run` runs steps; None if unavailable.
    """

    note: str
    gemms: Callable[[int], float | None] | None

    def losses(self, count: int) -> list[float]:
        """Return J of the first steps, each before its update."""
        ...

    def set_rate(self, rate: float) -> None:
        """Set the learning rate from the next step on."""
        ...

    def run(self, count: int) -> float | None:
        """Run `count` steps to completion; return their seconds by device events, or None."""
        ...

    def peak(self) -> int | None:
        """Return the peak bytes of the device's allocator, or None on a CPU."""
        ...


def build(name: str, work: Work) -> Runner:
    """Return the runner of a peer by its name."""
    module, way = PEERS[name]
    made: Any = importlib.import_module(f"bench.peers.{module}").build(work, way)
    return made
