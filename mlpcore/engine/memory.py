"""Memory of a call on rows outside a training step: its chunks, its plan, its limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mlpcore.backends import devices
from mlpcore.backends.numpy.programs import PIECE
from mlpcore.core import losses as loss_sheet
from mlpcore.core.activations import Activation
from mlpcore.core.network import Network
from mlpcore.core.ops import Buffer
from mlpcore.core.program import program
from mlpcore.engine import plan as planning
from mlpcore.engine.plan import Plan

VECTORS = 10  # 8-byte numbers per row: weights, sums, labels


class Size(NamedTuple):
    """The caller's limits on memory.

    Attributes:
        chunk_rows: maximum rows of a chunk; None: automatic.
        memory_limit: in the form that `plan.parse_bytes` takes.
    """

    chunk_rows: int | None = None
    memory_limit: float | str | None = None

    def plan(
        self,
        net: Network,
        rows: int,
        chosen: int,
        fixed: Sequence[Buffer],
        chunk: Callable[[int], list[Buffer]],
    ) -> Plan:
        """Return the plan of a pass over this many rows of X, in chunks of at most `chosen` rows.

        Args:
            net: the network, whose parameters count.
            rows: number of rows of X.
            chosen: maximum rows of a chunk.
            fixed: the call's arrays outside the chunks.
            chunk: lists the arrays of a chunk with this many rows.

        Raises:
            MemoryError: even one row at a time exceeds the limit; names the largest arrays.
        """
        limit = planning.parse_bytes(
            self.memory_limit, free=lambda: devices.find(net.device).free_bytes()
        )
        parameters = Buffer("parameters", (net.layout.size,), net.dtype.name, "of the network")

        def table(n: int) -> Plan:
            parts = {"parameters": [parameters], "call": list(fixed), "workspace": chunk(n)}
            return Plan(n, 1, rows, parts)

        return planning.within(limit, table, min(chosen, rows))


def temporaries(
    net: Network,
    activations: Sequence[Activation | None],
    rows: int,
    count: int = 1,
    curved: bool = False,
    objective: loss_sheet.Objective | None = None,
) -> Buffer:
    """Return, for a plan, a bound of the bytes that the backend itself allocates for a chunk.

    Args:
        net: the network.
        activations: activations of its layers.
        rows: number of rows of a chunk.
        count: number of arrays of a chunk's output, or of a learned layer, that exist at a time.
        curved: True if second derivatives are taken.
        objective: the loss on top, if there is one.
    """
    dtype, registers = net.dtype.name, 0
    for σ in activations:
        if σ is not None and not σ.rowwise:
            slope = f"g * ({σ.slope})" + (f" + h * t * ({σ.curvature})" if curved else "")
            found = (_registers(text, σ.scalars, dtype) for text in (σ.value, slope))
            registers = max(registers, *found)
    if objective is not None and not objective.loss.rowwise:
        scalars = dict(objective.scalars)
        for text in (objective.value, objective.slope):
            count = max(count, 2 + _registers(f"k * ({text})", scalars, dtype))
        registers = max(registers, _registers(f"g * ({objective.curvature})", scalars, dtype))
    learned = [n for n, σ in zip(net.sizes, activations, strict=True) if σ and σ.learned]
    numbers = count * rows * max(net.sizes[-1], *learned, 0)
    numbers += registers * min(PIECE, rows * max(net.sizes))
    bound = numbers * net.dtype.itemsize + 8 * VECTORS * rows
    return Buffer("temporaries", (bound,), "uint8", "of the backend, at most")


def _registers(text: str, scalars: Mapping[str, float], dtype: str) -> int:
    """Return the maximum number of intermediate results that a formula has at a time."""
    return program(f"d = {text}", frozenset(scalars), dtype).registers
