"""What a backend does: every array operation of the engine, and no other.

The recurrences of `backprop.py` are written once against this Protocol. A call either runs at once
(eager) or, inside `record`, is noted and runs at each `replay()`: on NumPy a list of in-place
calls, on CUDA a graph. Arrays are of the backend's kind, row-major unless said otherwise; sizes and
aliasing are the planner's business.
"""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mlpcore.core.activations import Activation
from mlpcore.core.formulas import Program
from mlpcore.core.losses import Objective

Array = Any


class Buffer(NamedTuple):
    """One line of the plan: an array that the engine will allocate.

    Attributes:
        name: as in the derivation where it is one of its letters.
        shape: of the array.
        dtype: its NumPy name, e.g. "float32".
        why: what it is for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    why: str


def storage(dtype: str) -> str:
    """The NumPy dtype in which numbers of a type are stored: bfloat16, which NumPy does not know,
    as its bits.
    """
    return "uint16" if dtype == "bfloat16" else dtype


def accumulator(dtype: str) -> str:
    """The dtype of sums, gradients, targets and weights of rows beside layers of `dtype`: float32
    for half types.
    """
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def row_major(A: Array, B: Array, C: Array) -> tuple[Array, Array, Array]:
    """The same product with a row-major result: Cᵀ = Bᵀ Aᵀ, where C is the transpose of a row-major
    array.
    """
    return (B.T, A.T, C.T) if C.strides[0] < C.strides[1] else (A, B, C)


Call = tuple[Any, ...]  # a function and its arguments


class Recording(Protocol):
    """A recorded run of operations."""

    def replay(self) -> None:
        """Do them again, on the same arrays."""


class EagerRecording(Recording, Protocol):
    """A recorded run whose calls can be looked at."""

    @property
    def calls(self) -> Sequence[Call]:
        """Functions, each with its arguments."""


def make(calls: Iterable[Call]) -> None:
    """Make calls in C, one after the other.

    Python looks for signals, and for exceptions that other threads have sent, only while it
    interprets. So no interrupt comes between two functions that are written in C, as NumPy's are.
    """
    collections.deque(itertools.starmap(operator.call, calls), 0)


class Ops(Protocol):
    """The operations of one stream of work: arrays in, arrays overwritten, nothing returned.

    Attributes:
        xp: the array module: NumPy or CuPy.
        stages: whether rows of another dtype are gathered into a buffer of that dtype before they
            are cast.
        gathers: whether the targets and weights of a chunk's rows are gathered into buffers, as X
            is.
        step: the number of the step, which masks of dropout are drawn from; on CUDA the slot, which
            holds it.
        first: likewise, the row of the batch that a chunk begins with; on CUDA of the rows that the
            slot begins with.
    """

    xp: Any
    stages: bool
    gathers: bool
    step: Any
    first: int

    def empty(self, nbytes: int) -> Array:
        """`nbytes` of uninitialised memory, as a 1-D uint8 array."""

    def scratch(
        self,
        rows: int,
        sizes: tuple[int, ...],
        dtype: str,
        activations: tuple[Activation | None, ...],
        objective: Objective,
        accumulates: bool,
    ) -> list[Buffer]:
        """The arrays of its own that the backend needs for a chunk of up to `rows` rows, for the
        plan.
        """

    def use(self, scratch: Mapping[str, Array]) -> None:
        """Take these arrays, as `scratch` listed them, instead of allocating at each call."""

    def record(self, run: Callable[[], None]) -> Recording:
        """The operations that `run` calls, recorded instead of executed. A backend may call `run`
        twice, to prepare itself.
        """

    def gemm(self, A: Array, B: Array, C: Array, accumulate: bool = False) -> None:
        """C = A B, or C += A B. All may be transposed views, A an input that changes between
        replays.
        """

    def bias_activation(self, S: Array, b: Array | None, activation: Activation, Z: Array) -> None:
        """S += b; Z = σ(S), row by row, and what a `Dropped` activation drops -0. Z may be S."""

    def layer(
        self, A: Array, W: Array, b: Array | None, activation: Activation, S: Array, Z: Array
    ) -> None:
        """S = A W + b; Z = σ(S): `gemm` and `bias_activation`, which a backend may do in one."""

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
        """D = G ⊙ σ'(S, Z); db = Σ_rows D, or db += Σ_rows D. D may be G or Z; S, Z and G are
        otherwise kept.

        Where the activation is bound to a `da`: da = Σ G ⊙ ∂z/∂a over the rows, and over the
        outputs if they share a, or +=.
        """

    def curvature(
        self, G: Array, H: Array, T: Array, S: Array, Z: Array, activation: Activation, D: Array, db: Array | None,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        """D = G ⊙ σ' + H ⊙ T ⊙ σ'', the derivative of ⟨H, σ' ⊙ T⟩ beside G's; db as in
        `activation_gradient`.

        Behind a softmax, whose slope mixes a row, likewise. D may be Z. T is overwritten. No `da`
        is written.
        """

    def scale_rows(self, A: Array, k: Array) -> None:
        """A = k ⊙ A, with k 0-d or (rows, 1)."""

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
        """J += Σ k ℓ(x, Y) and D = k ∂ℓ/∂x; with `db` also its sum over rows. x is S[L] if matched,
        else Z[L]; D may be x.

        k is the row weight over the batch's weight: (rows, 1), or 0-d where all rows weigh the
        same. J is 0-d float64.
        """

    def map(
        self, program: Program, arrays: Mapping[str, Array], scalars: Mapping[str, Array]
    ) -> None:
        """Elementwise statements over flat vectors in one pass; `scalars` are 0-d arrays for the
        keys of `program.folded`.
        """

    def sum_squares(self, v: Array) -> float:
        """Σ v², summed in double precision (waits for it)."""

    def sum_abs(self, v: Array) -> float:
        """Σ |v|, summed in double precision (waits for it)."""


class EagerOps(Ops, Protocol):
    """Operations for a step that calls them one by one, without a graph.

    Attributes:
        quietly: calls a function with its arguments where overflow raises no warning.
    """

    quietly: Callable[..., Any]

    def map_scratch(self, program: Program, size: int, dtype: str) -> list[Buffer]:
        """List the arrays that `map` over vectors of `size` entries needs, for the plan."""

    def record(self, run: Callable[[], None]) -> EagerRecording:
        """The operations that `run` calls, recorded instead of executed."""

    def renew(self) -> None:
        """Give up what another thread was doing here when the process was forked."""

    def gather(self, source: Array, rows: slice | Array, out: Array, stage: Array | None) -> None:
        """Out = source[rows], cast to out's dtype by way of `stage` (source's dtype) where the
        dtypes differ.
        """


class Input:
    """An array that may be another one at each replay: the rows of a chunk where the caller keeps
    them.
    """

    def __init__(self, array: Array = None):
        self.array = array

    @property
    def T(self) -> Transposed:
        """Its transpose, whatever the array is at the time."""
        return Transposed(self)


class Transposed:
    """The transpose of an `Input`."""

    def __init__(self, source: Input):
        self.source = source
