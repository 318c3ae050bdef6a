"""The separate parts of a training step on a CUDA device, for measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mlpcore.backends.cuda.gemm import Product
from mlpcore.core.ops import Recording
from mlpcore.data.batches import Batch


class StepParts(NamedTuple):
    """The graphs of a step on one batch, and the choices made for them.

    `replay()` of each launches it on the current stream and does not wait. They are for timing:
    every replay of `step` updates the parameters and the optimizer state without counting the step,
    J adds up over replays of `gradient`, and `products` leaves meaningless numbers in the gradient.
    They are valid until the trainer's next call with other rows.

    Attributes:
        step: the whole step; None if the batch is cut into more chunks than one graph holds.
        gradient: only forward, loss and backward; None if `step` is.
        products: only the matrix products, on the step's own arrays and with its own algorithms.
        chunks: the rows that go forward and backward together, as (start, stop).
        rows: maximum rows of a chunk.
        fused: number of layers whose activation is fused into the matrix product, and number of
            layers for which that was tried.
        algorithms: the algorithm of each matrix product of the step.
        batch: the arrays that `step` and `gradient` read, kept alive here.
    """

    step: Recording | None
    gradient: Recording | None
    products: Recording
    chunks: list[tuple[int, int]]
    rows: int
    fused: tuple[int, int]
    algorithms: Mapping[Product, bytes]
    batch: Batch
