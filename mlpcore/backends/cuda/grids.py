"""How each kernel is launched: grid, block, vector width. Plain arithmetic on shapes, so that it is
tested without a device.

A block is (x, y) threads, 256 in all, over a tile of x·V columns; it goes down the rows with a
stride. V entries fill 16 bytes where the row length and the addresses allow, else V = 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mlpcore.backends.cuda.device import Launch

THREADS = 256
# per multiprocessor: 2,048 threads, all that would fit with 32 registers each; activation_gradient
# takes up to 124
BLOCKS = 8
ROWS = 4  # that a thread has in flight, as in the kernels
SHARED = (
    47 << 10
)  # bytes of dynamic shared memory: of the 48 KiB that a block gets without asking, sums take up to 1 KiB


class Tiled(NamedTuple):
    """A launch over a matrix, and its vector width."""

    launch: Launch
    vector: int

    @property
    def partials(self) -> int:
        """Blocks in the grid: numbers of scratch for a sum over all of it."""
        return self.launch.grid[0] * self.launch.grid[1]


def vector_width(columns: int, itemsize: int, alignment: int = 16) -> int:
    """Entries in a 16-byte access, or 1 where a row or an address does not allow it."""
    wide = max(1, 16 // itemsize)
    return wide if columns % wide == 0 and alignment % 16 == 0 else 1


def tiles(rows: int, columns: int, vector: int, multiprocessors: int) -> Tiled:
    """Blocks over a (rows, columns) matrix; at most as many as run at a time, at least one."""
    packs = -(-columns // vector)
    x = min(32, 1 << (packs - 1).bit_length())
    y = THREADS // x
    across = -(-packs // x)
    down = min(-(-rows // (y * ROWS)), max(1, BLOCKS * multiprocessors // across))
    return Tiled(Launch((across, max(1, down)), (x, y)), vector)


def row_warps(rows: int, multiprocessors: int) -> Launch:
    """A warp for each row, 8 in a block."""
    return Launch((max(1, min(-(-rows // 8), BLOCKS * multiprocessors)), 1), (32, 8))


def cross_entropy(
    rows: int, columns: int, itemsize: int, multiprocessors: int
) -> tuple[Launch, bool]:
    """Softmax with cross-entropy: a warp a row, and whether db fits its shared memory, a row of it
    for each warp.
    """
    fused = columns * itemsize <= SHARED
    warps = 8
    while fused and warps * columns * itemsize > SHARED:
        warps //= 2
    grid = max(1, min(-(-rows // warps), 2 * multiprocessors))
    return Launch((grid, 1), (32, warps), warps * columns * itemsize if fused else 0), fused


def flat(size: int, multiprocessors: int) -> Launch:
    """A pass over a vector by blocks that stride over it."""
    return Launch(
        (max(1, min(-(-size // (THREADS * ROWS)), BLOCKS * multiprocessors)), 1), (THREADS, 1)
    )


def each(size: int, vector: int) -> Launch:
    """A thread for every `vector` entries of a vector."""
    return Launch((max(1, -(-size // (THREADS * vector))), 1), (THREADS, 1))


def partial_sums(
    rows: int, widths: Iterable[int], itemsizes: tuple[int, ...], multiprocessors: int, learned: Iterable[int] = ()
) -> tuple[int, int]:  # fmt: skip
    """Scratch for the sums of any kernel over up to `rows` rows of these widths: numbers, and
    counters.

    Layers of the widths in `learned` have a parameter for each output, whose gradient is a second
    sum over the rows.
    """
    numbers, counters = 2 * BLOCKS * multiprocessors, 1  # gradient_norm
    for n in set(widths):
        numbers = max(numbers, 2 * n + 128)  # biases on which an epilogue is tried
        for vector in {1, *(16 // itemsize for itemsize in itemsizes)}:
            tiled = tiles(rows, n, vector, multiprocessors)
            numbers = max(numbers, tiled.partials + tiled.launch.grid[1] * n)
            counters = max(counters, tiled.launch.grid[0])
            if n in learned:
                numbers = max(numbers, 2 * tiled.launch.grid[1] * n)
                counters = max(counters, 2 * tiled.launch.grid[0])
        for itemsize in itemsizes:
            launch, _ = cross_entropy(rows, n, itemsize, multiprocessors)
            numbers = max(numbers, launch.grid[0] * (1 + n))
    return numbers, counters + 1
