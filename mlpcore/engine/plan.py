"""The plan: every array of a training step, listed before the first is allocated.

    bytes = parameters + gradient + optimizer state                 (fixed by the network)
          + workers × (inputs, S, Z, G, scratch of one chunk)       (∝ chunk rows, not ∝ batch rows)

The plan lists exactly the bytes that the engine allocates. The arrays of each part are cut from
one allocation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlpcore.checks.errors import shown
from mlpcore.checks.values import LARGEST, plain, positive_integer
from mlpcore.core.activations import Activation
from mlpcore.core.layout import Layout
from mlpcore.core.losses import Objective
from mlpcore.core.ops import Array, Buffer, ChunkShape, Ops, accumulator, storage
from mlpcore.data.batches import Inputs

ALIGNMENT = 256  # bytes: preferred by cuBLASLt, and a multiple of a cache line
CACHE = 1 << 20  # bytes of a chunk's arrays: half of a common core's L2
NARROWEST, WIDEST = 256, 1024  # range of the rows of an automatic chunk (docs/performance.md)


@dataclass(frozen=True)
class Plan:
    """The memory table of a training step.

    Attributes:
        rows: rows of the largest chunk.
        workers: number of threads that each run their own chunks.
        batch_rows: rows of the batch that it was made for.
        parts: the tables, by the name of their allocation.
    """

    rows: int
    workers: int
    batch_rows: int
    parts: Mapping[str, Sequence[Buffer]]

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part_bytes(buffers) for buffers in self.parts.values())

    def covers(self, other: Plan) -> bool:
        """Return True if this plan's arrays suffice for another plan with similar inputs."""
        sizes, wanted = self._chunk_sizes(), other._chunk_sizes()
        enough = all(sizes.get(name, -1) >= size for name, size in wanted.items())
        return enough and self.rows >= other.rows and self.workers >= other.workers

    def _chunk_sizes(self) -> dict[str, int]:
        buffers = [*self.parts["workspace"], *self.parts.get("staging", ())]
        return {x.name: math.prod(x.shape) for x in buffers}

    def __str__(self) -> str:
        """Return the table as text, part by part, and the total."""
        lines = [
            f"batch {self.batch_rows:,} rows, in chunks of at most {self.rows:,} rows, "
            f"{self.workers} worker(s)"
        ]
        for part, buffers in self.parts.items():
            lines.append(f"{part}: {human(part_bytes(buffers))}")
            for x in buffers:
                shape = " x ".join(f"{n:,}" for n in x.shape)
                lines.append(
                    f"  {x.name:<16} {shape:>16} {x.dtype:<8} {human(part_bytes([x])):>11}  {x.why}"
                )
        lines.append(f"total: {human(self.total_bytes)} = {self.total_bytes:,} bytes")
        return "\n".join(lines)

    def largest(self, count: int = 5) -> str:
        """Return the largest buffers as text, for the message about a limit that is too small."""
        every = sorted(
            (x for buffers in self.parts.values() for x in buffers), key=nbytes, reverse=True
        )
        return ", ".join(f"{x.name} {human(nbytes(x))}" for x in every[:count])


def nbytes(buffer: Buffer) -> int:
    """Return the bytes that a buffer occupies, rounded up to the alignment."""
    return -(-_used(buffer) // ALIGNMENT) * ALIGNMENT


def _used(buffer: Buffer) -> int:
    return math.prod(buffer.shape) * np.dtype(storage(buffer.dtype)).itemsize


def part_bytes(buffers: Sequence[Buffer]) -> int:
    """Return the bytes of one allocation: its buffers, and the padding that aligns the first.

    A single buffer is not aligned.
    """
    if len(buffers) == 1:
        return _used(buffers[0])
    return sum(map(nbytes, buffers)) + ALIGNMENT if buffers else 0


def human(count: float) -> str:
    """Return a number of bytes as text: `1536` as "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError(count)


def parse_bytes(
    limit: object, argument: str = "memory_limit", free: Callable[[], int] | None = None
) -> int | None:
    """Return a user's limit in bytes; None for None.

    Args:
        limit: `2 << 30`, `"2 GiB"`, `"500 MB"`; 0.5 or `"50%"` of the result of `free()`.
        argument: the argument's name in errors.
        free: returns the free bytes; None if fractions are not allowed.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what was passed.
    """
    wanted = (
        f"{argument}: expected bytes, text such as '2 GiB', or a fraction of free memory such as "
        "0.5 or '50%'"
    )
    if limit is None:
        return None
    limit = plain(limit)
    share: float | None = None
    if isinstance(limit, int) and not isinstance(limit, bool):
        count = positive_integer(limit, argument)
    elif isinstance(limit, float):
        share = float(limit)
    elif isinstance(limit, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(B|bytes|[KMGT]i?B|%)\s*", limit, re.I)
        if not match:
            raise ValueError(f"{wanted}; got {shown(limit)}")
        base, unit = (1024 if "i" in match[2].lower() else 1000), match[2][0].upper()
        share = float(match[1]) / 100 if unit == "%" else None
        bytes_ = float(match[1]) * base ** ("KMGT".index(unit) + 1 if unit in "KMGT" else 0)
        count = int(bytes_) if bytes_ < LARGEST else 0
    else:
        raise TypeError(f"{wanted}; got {type(limit).__name__}")
    if share is not None:
        if not 0 < share <= 1 or free is None:
            raise ValueError(f"{wanted}; got {shown(limit)}")
        count = int(share * free())
    if count <= 0:
        raise ValueError(
            f"{argument} must be at least 1 byte and less than 8 EiB; got {shown(limit)}"
        )
    return count


def within(limit: int | None, table: Callable[[int], Plan], rows: int) -> Plan:
    """Return the plan of the largest chunk of at most `rows` rows that fits into a limit.

    Raises:
        MemoryError: not even a chunk of one row fits; names the largest arrays.
    """
    if limit is None:
        return table(rows)
    most = most_rows(limit, table, rows)
    if most:
        return table(most)
    least = table(1)
    has, needs = human(limit), human(least.total_bytes)
    if has == needs:  # to one digit
        has, needs = f"{limit:,} bytes", f"{least.total_bytes:,} bytes"
    raise MemoryError(
        f"memory_limit {has} is less than the {needs} that is needed; "
        f"the largest: {least.largest()}"
    )


def most_rows(limit: int, table: Callable[[int], Plan], rows: int) -> int:
    """Return the largest number of rows, at most `rows`, whose plan fits into the limit, or 0."""
    if table(rows).total_bytes <= limit:
        return rows
    low, high = 0, rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if table(middle).total_bytes <= limit else (low, middle - 1)
    return low


def allocate(ops: Ops, buffers: Sequence[Buffer]) -> dict[str, Array]:
    """Return the buffers of one part as arrays by name, cut from one allocation.

    The allocation takes `part_bytes(buffers)` bytes.
    """
    if not buffers:
        return {}
    memory = ops.empty(part_bytes(buffers))
    offset = -_address(memory) % ALIGNMENT if len(buffers) > 1 else 0
    arrays = {}
    for x in buffers:
        arrays[x.name] = (
            memory[offset : offset + _used(x)].view(np.dtype(storage(x.dtype))).reshape(x.shape)
        )
        offset += nbytes(x)
    return arrays


def _address(memory: Array) -> int:
    interface = (
        memory.__array_interface__
        if isinstance(memory, np.ndarray)
        else memory.__cuda_array_interface__
    )
    return int(interface["data"][0])


def chunk_buffers(
    ops: Ops,
    layout: Layout,
    dtype: str,
    activations: tuple[Activation | None, ...],
    objective: Objective,
    inputs: Inputs,
    rows: int,
    accumulates: bool,
) -> list[Buffer]:
    """List the arrays of one worker for chunks of up to `rows` rows, with layers in `dtype`.

    `accumulates` is True if a worker runs several chunks of a batch.
    """
    sizes, L = layout.sizes, layout.layers
    buffers = [Buffer("X", (rows, sizes[0]), dtype, "gathered rows of the chunk")]
    if ops.gathers:
        wide = accumulator(dtype)
        y_shape, y_dtype = ((rows,), "int64") if inputs.classes else ((rows, sizes[L]), wide)
        buffers += _as_given(ops, "X", (rows, sizes[0]), inputs.x_dtype, dtype)
        buffers.append(Buffer("Y", y_shape, y_dtype, "their targets"))
        buffers += _as_given(ops, "Y", y_shape, inputs.y_dtype, y_dtype)
        if inputs.w_dtype:
            buffers.append(Buffer("w", (rows,), wide, "their weights over the batch's weight"))
            buffers += _as_given(ops, "w", (rows,), inputs.w_dtype, wide)
    for l in range(1, L + 1):
        activation = activations[l]
        assert activation is not None
        if l == L and objective.matched:
            buffers.append(
                Buffer(f"S[{l}]", (rows, sizes[l]), dtype, f"pre-activation, then D[{l}]")
            )
        else:
            if activation.slope_reads_s:
                buffers.append(
                    Buffer(
                        f"S[{l}]",
                        (rows, sizes[l]),
                        dtype,
                        f"pre-activation: σ' of {activation.name} reads it",
                    )
                )
            buffers.append(
                Buffer(f"Z[{l}]", (rows, sizes[l]), dtype, f"output of layer {l}, then D[{l}]")
            )
    widths = sizes[1:L] if objective.matched else sizes[1:]
    if widths:
        buffers.append(Buffer("G", (rows * max(widths),), dtype, "∂J/∂Z[l] of one layer at a time"))
    accumulates = accumulates or any(layout.repeats)
    shape = ChunkShape(rows, sizes, dtype, activations, objective, accumulates)
    return buffers + ops.scratch(shape)


def _as_given(ops: Ops, name: str, shape: tuple[int, ...], given: str, dtype: str) -> list[Buffer]:
    if not ops.stages or np.dtype(given) == np.dtype(dtype):
        return []
    return [
        Buffer(f"{name} as given", shape, np.dtype(given).str, f"{name} before the cast to {dtype}")
    ]


def choose_rows(
    workspace: Callable[[int], int], layout: Layout, itemsize: int, batch_rows: int
) -> int:
    """Return the rows of a chunk: enough to pay for dW, few enough to keep its arrays in cache.

    Adding a chunk's dW costs about as much as 15 rows of its GEMMs, 1.5% with 1,024 rows; if dW
    itself stays in cache, 256 rows are enough.
    """
    fit = CACHE // max(1, workspace(1024) // 1024)
    least = NARROWEST if layout.weights * itemsize <= CACHE // 4 else WIDEST
    return max(1, min(batch_rows, max(least, min(WIDEST, fit))))
