"""The implementations: mlpcore and its peers, each driven the same way.

A peer's module offers `build(work, way)` and returns a `Runner`. It raises `ImportError` where its
package is not installed and `Unsupported` where the point is beyond it: both are reported as
missing, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from bench.work import Work

PEERS = {  # name: (module, way)
    "mlpcore": ("mlpcore_peer", ""),
    "torch": ("torch_peer", "eager"),
    "torch-compile": ("torch_peer", "compile"),
    "torch-graph": ("torch_peer", "graph"),  # the whole step in one CUDA graph
    "torch-compile-graph": ("torch_peer", "compile graph"),
    "torch-chunks": ("torch_peer", "chunks"),  # accumulates over chunks of mlpcore's size
    "jax": ("jax_peer", "jit"),  # a call a step, parameters and state donated
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
        note: what a reader must know about it, or "".
        gemms: runs so many times the step's GEMMs alone, as `run` runs steps; None where they
            cannot be had.
    """

    note: str
    gemms: Callable[[int], float | None] | None

    def losses(self, count: int) -> list[float]:
        """J of the first steps, each before its update."""
        ...

    def set_rate(self, rate: float) -> None:
        """The learning rate from the next step on."""
        ...

    def run(self, count: int) -> float | None:
        """So many steps, waited for; returns their seconds by device events, or None where there
        are none.
        """
        ...

    def peak(self) -> int | None:
        """The most bytes that the device's allocator has handed out, or None on a CPU."""
        ...


def build(name: str, work: Work) -> Runner:
    """The runner of a peer by its name."""
    module, way = PEERS[name]
    made: Any = importlib.import_module(f"bench.peers.{module}").build(work, way)
    return made
