"""The operations of a backend: every array operation that the engine uses.

The recurrences of `backprop.py` are written once against this Protocol. A call either runs at once
(eager) or, inside `record`, is recorded and runs at each `replay()`: on NumPy as a list of in-place
calls, on CUDA as a graph. Arrays belong to the backend and are row-major unless stated otherwise;
the plan decides on sizes and aliasing.
"""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mlpcore.core.activation import Activation
from mlpcore.core.losses import Objective
from mlpcore.core.program import Program

Array = Any


class Buffer(NamedTuple):
    """One line of the plan: an array that the engine will allocate.

    Attributes:
        name: its letter in the derivation, if it has one.
        shape: the array's shape.
        dtype: its NumPy name, e.g. "float32".
        why: its purpose.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    why: str


class ChunkShape(NamedTuple):
    """The shape of a chunk: how many rows go through which layers.

    Attributes:
        rows: the maximum number of rows.
        sizes: n_0 … n_L.
        dtype: dtype of the layers.
        activations: activations of layers 0 … L; None for layer 0.
        objective: the loss and the output's activation.
        accumulates: True if gradients are added to those of other chunks.
    """

    rows: int
    sizes: tuple[int, ...]
    dtype: str
    activations: tuple[Activation | None, ...]
    objective: Objective
    accumulates: bool


def storage(dtype: str) -> str:
    """Return the NumPy dtype that stores a type; bfloat16, which NumPy lacks, is stored as bits."""
    return "uint16" if dtype == "bfloat16" else dtype


def accumulator(dtype: str) -> str:
    """Return the dtype of sums, gradients, targets and row weights: float32 for half types."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def row_major(A: Array, B: Array, C: Array) -> tuple[Array, Array, Array]:
    """Return the product with a row-major result: Cᵀ = Bᵀ Aᵀ if C is transposed."""
    return (B.T, A.T, C.T) if C.strides[0] < C.strides[1] else (A, B, C)


Call = tuple[Any, ...]  # a function and its arguments


class Recording(Protocol):
    """A recorded run of operations."""

    def replay(self) -> None:
        """Run the operations again, on the same arrays."""


class EagerRecording(Recording, Protocol):
    """A recorded run whose calls can be inspected."""

    @property
    def calls(self) -> Sequence[Call]:
        """The functions, each followed by its arguments."""


def make(calls: Iterable[Call]) -> None:
    """Make calls from C, one after another.

    Python handles signals, and exceptions sent by other threads, only while it interprets. So no
    interrupt can occur between two functions that are written in C, as NumPy's are.
    """
    collections.deque(itertools.starmap(operator.call, calls), 0)


class Ops(Protocol):
    """The operations of one stream of work: arrays in, arrays overwritten, nothing returned.

    Attributes:
        xp: the array module: NumPy or CuPy.
        stages: True if rows of another dtype are gathered into a buffer of that dtype before they
            are cast.
        gathers: True if the targets and weights of a chunk's rows are gathered, like X.
        step: number of the step, which determines the dropout masks; on CUDA the slot that holds
            it.
        first: row of the batch at which a chunk begins; on CUDA counted from the slot's first
            row.
    """

    xp: Any
    stages: bool
    gathers: bool
    step: Any
    first: int

    def empty(self, nbytes: int) -> Array:
        """Return `nbytes` of uninitialised memory, as a 1-D uint8 array."""

    def scratch(self, chunk: ChunkShape) -> list[Buffer]:
        """Return the arrays that the backend needs for a chunk in addition, for the plan."""

    def use(self, scratch: Mapping[str, Array]) -> None:
        """Use these arrays, as listed by `scratch`, instead of allocating at each call."""

    def record(self, run: Callable[[], None]) -> Recording:
        """Record the operations that `run` calls, without executing them.

        A backend may call `run` twice to prepare itself.
        """

    def gemm(self, A: Array, B: Array, C: Array, accumulate: bool = False) -> None:
        """Set C = A B, or C += A B.

        All may be transposed views; A may be an `Input`, which changes between replays.
        """

    def bias_activation(self, S: Array, b: Array | None, activation: Activation, Z: Array) -> None:
        """Set S += b and Z = σ(S), row by row; dropped entries are -0. Z may be S."""

    def layer(
        self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array
    ) -> None:
        """Set S = A W + b and Z = σ(S): `gemm` and `bias_activation`, or both in one."""

    def activation_gradient(
        self,
        G: Array,
        S: Array,
        Z: Array,
        activation: Activation,
        D: Array,
        db: Array | None,
        accumulate: bool = False,
    ) -> None:
        """Set D = G ⊙ σ'(S, Z) and db = Σ_rows D, or db += Σ_rows D.

        D may be G or Z; otherwise S, Z and G are kept. If the activation is bound to a `da`, set or
        add to da = Σ G ⊙ ∂z/∂a, summed over the rows, and over the outputs if they share a.
        """

    def curvature(
        self,
        G: Array,
        H: Array,
        T: Array,
        S: Array,
        Z: Array,
        activation: Activation,
        D: Array,
        db: Array | None,
        accumulate: bool = False,
    ) -> None:
        """Set D = G ⊙ σ' + H ⊙ T ⊙ σ'', the gradient of ⟨H, σ' ⊙ T⟩ + ⟨G, Z⟩; db = Σ_rows D.

        For a softmax, whose slope mixes the entries of a row, it is the same gradient. D may be Z.
        T is overwritten. `da` is not written.
        """

    def scale_rows(self, A: Array, k: Array) -> None:
        """Set A = k ⊙ A, with k 0-d or (rows, 1)."""

    def loss(
        self,
        x: Array,
        Y: Array,
        k: Array,
        objective: Objective,
        D: Array,
        db: Array | None,
        J: Array,
        accumulate: bool,
    ) -> None:
        """Set J += Σ k ℓ(x, Y) and D = k ∂ℓ/∂x; with `db` also its sum over rows.

        x is S[L] if matched, else Z[L]; D may be x.
        k is the row weight over the batch's weight: (rows, 1), or 0-d if all rows have the same
        weight. J is 0-d float64.
        """

    def map(
        self, program: Program, arrays: Mapping[str, Array], scalars: Mapping[str, Array]
    ) -> None:
        """Run elementwise statements over flat vectors in one pass.

        `scalars` are 0-d arrays for the keys of `program.folded`.
        """

    def sum_squares(self, v: Array) -> float:
        """Return Σ v², summed in double precision (waits for the result)."""

    def sum_abs(self, v: Array) -> float:
        """Return Σ |v|, summed in double precision (waits for the result)."""


class EagerOps(Ops, Protocol):
    """Operations for a step that calls them one by one, without a graph.

    Attributes:
        quietly: calls a function with the given arguments and without overflow warnings.
        places: an int64 array: `step` and `first`, which replays read, and the address of row
            numbers.
    """

    places: Array

    quietly: Callable[..., Any]

    def map_scratch(self, program: Program, size: int, dtype: str) -> list[Buffer]:
        """Return the arrays that `map` over vectors of `size` entries needs, for the plan."""

    def record(self, run: Callable[[], None]) -> EagerRecording:
        """Record the operations that `run` calls, without executing them."""

    def renew(self) -> None:
        """Drop work that another thread had under way here when the process was forked."""

    def gather(self, source: Array, rows: slice | Array, out: Array, stage: Array | None) -> None:
        """Set out = source[rows], cast through `stage` (of source's dtype) if the dtypes differ."""


class Input:
    """An array that can differ at each replay: rows in the caller's memory."""

    def __init__(self, array: Array = None):
        self.array = array

    @property
    def T(self) -> Transposed:
        """The transpose of the current array."""
        return Transposed(self)


class Transposed:
    """The transpose of an `Input`."""

    def __init__(self, source: Input):
        self.source = source
