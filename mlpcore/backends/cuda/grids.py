"""Grid, block and vector width of each kernel: arithmetic on shapes, tested without a device.

A block has (x, y) threads, 256 in all, over a tile of x·V columns; it strides down the rows. V
entries fill 16 bytes if the row length and the addresses allow it, else V = 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mlpcore.backends.cuda.device import Launch

THREADS = 256
# blocks per multiprocessor: 2,048 threads, as many as fit with 32 registers each;
# activation_gradient uses up to 124
BLOCKS = 8
ROWS = 4  # rows that a thread has in flight, as in the kernels
# bytes of dynamic shared memory; of the default 48 KiB per block, sums use up to 1
SHARED = 47 << 10


class Tiled(NamedTuple):
    """A launch over a matrix, with its vector width."""

    launch: Launch
    vector: int

    @property
    def partials(self) -> int:
        """Number of blocks, which is the scratch entries needed for a sum over the matrix."""
        return self.launch.grid[0] * self.launch.grid[1]


def vector_width(columns: int, itemsize: int, alignment: int = 16) -> int:
    """Return the entries in a 16-byte access, or 1 if a row or an address rules it out."""
    wide = max(1, 16 // itemsize)
    return wide if columns % wide == 0 and alignment % 16 == 0 else 1


def tiles(rows: int, columns: int, vector: int, multiprocessors: int) -> Tiled:
    """Return blocks over a matrix: at least one, at most as many as can run at the same time."""
    packs = -(-columns // vector)
    x = min(32, 1 << (packs - 1).bit_length())
    y = THREADS // x
    across = -(-packs // x)
    down = min(-(-rows // (y * ROWS)), max(1, BLOCKS * multiprocessors // across))
    return Tiled(Launch((across, max(1, down)), (x, y)), vector)


def row_warps(rows: int, multiprocessors: int) -> Launch:
    """Return a launch of one warp per row, 8 warps in a block."""
    return Launch((max(1, min(-(-rows // 8), BLOCKS * multiprocessors)), 1), (32, 8))


def cross_entropy(
    rows: int, columns: int, itemsize: int, multiprocessors: int
) -> tuple[Launch, bool]:
    """Return a launch of one warp per row, and whether db fits into its shared memory.

    Each warp needs its own row of shared memory for it.
    """
    fused = columns * itemsize <= SHARED
    warps = 8
    while fused and warps * columns * itemsize > SHARED:
        warps //= 2
    grid = max(1, min(-(-rows // warps), 2 * multiprocessors))
    return Launch((grid, 1), (32, warps), warps * columns * itemsize if fused else 0), fused


def flat(size: int, multiprocessors: int) -> Launch:
    """Return a launch of blocks that stride over a vector."""
    return Launch(
        (max(1, min(-(-size // (THREADS * ROWS)), BLOCKS * multiprocessors)), 1), (THREADS, 1)
    )


def each(size: int, vector: int) -> Launch:
    """Return a launch of one thread per `vector` entries of a vector."""
    return Launch((max(1, -(-size // (THREADS * vector))), 1), (THREADS, 1))


def partial_sums(
    rows: int,
    widths: Iterable[int],
    itemsizes: tuple[int, ...],
    multiprocessors: int,
    learned: Iterable[int] = (),
) -> tuple[int, int]:
    """Return the numbers and counters that any kernel's sums over these layers need.

    Layers whose widths are in `learned` have one parameter per output, whose gradient is a second
    sum over the rows.
    """
    numbers, counters = 2 * BLOCKS * multiprocessors, 1  # gradient_norm
    for n in set(widths):
        numbers = max(numbers, 2 * n + 128)  # biases on which an epilogue is tested
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
