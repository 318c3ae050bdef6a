"""A network as the engine and the files see it, and one pass over rows through its layers.

    Z[0] = X,   S[l] = Z[l-1] W[l] + b[l],   Z[l] = σ_l(S[l]),   l = 1 … L

Only `Pass` decides which arrays of a pass share memory:

    S[l] is Z[l]    unless σ_l' or ∂z/∂a reads S[l], or the caller wants every S
    σ_L = identity  if the loss matches the output: it reads S[L], which then is Z[L]
    G[l]            takes turns in one buffer: only two operations of its own layer read it
    D[l] is Z[l]    if Z is not kept: from D[l] on, the backward pass reads Z[l-1] and below
    D[l] is G[l]    if the caller keeps Z but not G, and l < L: G[L] belongs to the caller
    dS[l] is dZ[l]  unless a second backward pass reads dS
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mlpcore.checks import arrays, values
from mlpcore.core import backprop, differentials
from mlpcore.core.activations import Activation, bind, resolve
from mlpcore.core.architecture import Architecture
from mlpcore.core.backprop import Arrays
from mlpcore.core.layout import Parameters
from mlpcore.core.ops import Ops

Array = NDArray[Any]
IDENTITY = resolve("identity")


class Views(NamedTuple):
    """The views W, b and a of a flat vector with the parameters' layout; index 0 is None."""

    W: tuple[Any, ...]
    b: tuple[Any, ...]
    a: tuple[Any, ...] = ()


class Network:
    """The parameters of a network on its device, and everything needed to compute with them.

    Args:
        architecture: layer widths, activations, bias, ties and dtype.
        device: name of the device: "cpu", "cuda:0".
        flat: the parameters on that device; the network takes over this array.

    Attributes:
        layout: sizes, bias and ties, and the place of each parameter in the flat vector.
        activations: the activations of the layers; index 0 is None.
        dtype: dtype of the parameters.
        device: name of the device.
        predicts_1d: True if predictions are (m,) instead of (m, 1).
    """

    def __init__(self, architecture: Architecture, device: str, flat: Any) -> None:
        self.layout, self.activations, self.dtype = architecture
        self.device = device
        self._predicts_1d = False
        self._set(flat)

    def _set(self, flat: Any) -> None:
        """Use a flat vector on the network's device as the parameters."""
        self._store = Parameters(self.layout, flat)

    @property
    def architecture(self) -> Architecture:
        """Layer widths, activations, bias, ties and dtype."""
        return Architecture(self.layout, self.activations, self.dtype)

    @property
    def store(self) -> Parameters:
        """The parameters' store; raises a RuntimeError after an interrupted update."""
        self._store.require_whole()
        return self._store

    # read-only, so that the trained array is never replaced: write with net.W[1][...] = …

    @property
    def parameters(self) -> Array:
        """The flat vector: all W, then all b, then all a."""
        self._store.exposed = True
        flat: Array = self._store.flat
        return flat

    @property
    def W(self) -> tuple[Any, ...]:
        """Views of the weights, W[l] (n_{l-1}, n_l); W[0] is None."""
        self._store.exposed = True
        return self._store.W

    @property
    def b(self) -> tuple[Any, ...]:
        """Views of the biases, b[l] (n_l,); b[0] is None, as are all of them without bias."""
        self._store.exposed = True
        return self._store.b

    @property
    def a(self) -> tuple[Any, ...]:
        """Views of the activations' learned parameters, a[l] (1,) or (n_l,), or None."""
        self._store.exposed = True
        return self._store.a

    @property
    def sizes(self) -> tuple[int, ...]:
        """The widths n_0 … n_L."""
        return self.layout.sizes

    @property
    def tied(self) -> dict[int, int | str]:
        """Layers without a matrix of their own, in the user's notation: `{4: "1.T"}`."""
        return self.architecture.tied

    @property
    def predicts_1d(self) -> bool:
        """True if `predict` returns (m,): False at first, then set by Y of the last training step.

        Otherwise a residual y - predict(X) of y (m,) and a prediction (m, 1) would silently become
        (m, m).
        """
        return self._predicts_1d

    @predicts_1d.setter
    def predicts_1d(self, value: bool) -> None:
        if values.boolean(value, "predicts_1d") and self.sizes[-1] != 1:
            raise ValueError(f"predicts_1d must be False: the network has {self.sizes[-1]} outputs")
        self._predicts_1d = bool(value)

    def cut(self, flat: Any) -> Views:
        """Return the views of a flat vector with the parameters' layout."""
        return Views(*self.layout.views(flat), self.layout.slopes(flat))

    def to_flat(self, value: Any, name: str, adopt: Callable[[object, str], Any]) -> Any:
        """Return a user's flat vector, or the `.flat` of a non-array object, as an array.

        Raises:
            TypeError, ValueError: it is not numeric or not shaped like the parameters; names it.
        """
        flat = value if hasattr(value, "dtype") else getattr(value, "flat", value)
        array = arrays.numeric(flat, name, adopt)
        if array.shape != (self.layout.size,):
            wanted = f"be flat, shape ({self.layout.size},), laid out as net.parameters"
            raise ValueError(f"{name} must {wanted}; got {array.shape}")
        return array


# -- one pass over rows


def under_loss(
    activations: Sequence[Activation | None], matched: bool
) -> tuple[Activation | None, ...]:
    """Return a pass's activations; the last is the identity if the loss reads S[L] itself."""
    return (*activations[:-1], IDENTITY) if matched else tuple(activations)


def in_turn(buffer: Any, rows: int, widths: Sequence[int]) -> list[Any]:
    """Return a (rows, n) array for each layer; all of them share one buffer's memory in turn."""
    return [buffer[: rows * n].reshape(rows, n) for n in widths]


class Pass:
    """The arrays of one pass over some rows, and the recurrences on them.

    Args:
        ops: a backend's operations.
        W, b: views of the parameters.
        activations: of the layers, bound to their learned parameters; see `under_loss`.
        X: Z[0].
        array: returns memory for S[l], Z[l], dS[l] or dZ[l], called as `array("Z", l)`, only for
            those that do not share another's memory.
        apart: True if every S has memory of its own.

    Attributes:
        S, Z: pre-activations and outputs; index 0 is None and X.
        dS, dZ: their differentials, once `tangent` has run.
    """

    def __init__(
        self,
        ops: Ops,
        W: Arrays,
        b: Arrays,
        activations: Sequence[Activation | None],
        X: Any,
        array: Callable[[str, int], Any],
        apart: bool = False,
    ) -> None:
        self.ops, self.W, self.b, self.activations, self.array = ops, W, b, activations, array
        self.S: list[Any] = [None]
        self.Z: list[Any] = [X]
        self.dS: list[Any] = []
        self.dZ: list[Any] = []
        for l in range(1, len(W)):
            sigma = activations[l]
            assert sigma is not None
            self.Z.append(array("Z", l))
            self.S.append(array("S", l) if apart or sigma.slope_reads_s else self.Z[l])

    def forward(self) -> None:
        """Fill S and Z."""
        backprop.forward(self.ops, self.W, self.b, self.activations, self.S, self.Z)

    def backward(
        self,
        G: Arrays,
        D: Arrays,
        gradient: Views,
        repeats: Sequence[bool],
        accumulate: bool = False,
    ) -> None:
        """Fill D, the gradient (or add to it), and G[l] for l < L: see `backprop.backward`.

        If `gradient.a` is empty, the arrays that the activations are already bound to are filled.
        """
        W, S, Z, (dW, db, da) = self.W, self.S, self.Z, gradient
        a = [None if sigma is None else sigma.a for sigma in self.activations]
        activations = bind(self.activations, a, da) if da else self.activations
        backprop.backward(self.ops, W, activations, S, Z, G, D, dW, db, repeats, accumulate)

    def tangent(self, dX: Any, along: Views | None, apart: bool = False) -> None:
        """Fill S, Z and their differentials.

        Args:
            dX: dZ[0]; None: X does not change.
            along: the change of the parameters; None: they do not change.
            apart: True if every dS has memory of its own, for `second_backward`.
        """
        layers = range(1, len(self.W))
        self.dZ = [dX, *(self.array("dZ", l) for l in layers)]
        self.dS = [None, *(self.array("dS", l) if apart else self.dZ[l] for l in layers)]
        dW, db, da = along or (None, None, None)
        W, b, activations, S, Z, dS, dZ = self._arrays()
        differentials.forward(self.ops, W, b, activations, S, Z, dW, db, dS, dZ, da)

    def second_backward(
        self,
        G: Arrays,
        H: Arrays,
        top: tuple[Any, Any] | None,
        gradient: Views,
        repeats: Sequence[bool],
        along: Views | None,
        accumulate: bool = False,
    ) -> None:
        """Fill the second gradient, or add to it, after `tangent`: see `differentials.backward`.

        D overwrites Z, and E overwrites dZ, except D[L] and E[L] if `top` supplies these two.
        """
        dW, _, da = along or (None, None, None)
        D, E = self.Z, self.dZ
        if top is not None:
            D, E = [*D[:-1], top[0]], [*E[:-1], top[1]]
        W, _, activations, S, Z, dS, dZ = self._arrays()
        differentials.backward(
            self.ops,
            W,
            activations,
            S,
            Z,
            dS,
            dZ,
            G,
            H,
            D,
            E,
            gradient.W,
            gradient.b,
            repeats,
            dW,
            accumulate,
            gradient.a,
            da,
        )

    def _arrays(self) -> tuple[Any, ...]:
        return self.W, self.b, self.activations, self.S, self.Z, self.dS, self.dZ


# -- the results of a forward and a backward pass that users hold


@dataclass(frozen=True)
class Cache:
    """The arrays of a forward pass that the backward pass reads.

    Attributes:
        Z: layer outputs (m, n_l), Z[0] = X.
        S: pre-activations (m, n_l) of the layers whose slope reads them; None for the others.
    """

    Z: tuple[Array, ...]
    S: tuple[Array | None, ...]

    @property
    def output(self) -> Array:
        """Z[L], (m, n_L)."""
        return self.Z[-1]

    def __repr__(self) -> str:
        kept = [l for l, s in enumerate(self.S) if s is not None]
        outputs = f"Z[0] … Z[{len(self.Z) - 1}] of {len(self.Z[0])} rows"
        return f"Cache({outputs}, S of layers {kept}, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Size in bytes of the cache in addition to X."""
        return sum(z.nbytes for z in self.Z[1:]) + sum(s.nbytes for s in self.S if s is not None)


@dataclass(frozen=True)
class Gradient:
    """∂J/∂parameters and, on request, the other derivatives of the pass.

    Attributes:
        flat: the whole gradient, laid out as `net.parameters`.
        W, b, a: views of `flat`; index 0 is None, a[l] is None without a learned parameter.
        X: ∂J/∂X = G[0], (m, n_0), or None.
        D, G: every D[l] = ∂J/∂S[l] and G[l] = ∂J/∂Z[l], (m, n_l), if kept, else None.
    """

    flat: Array
    W: tuple[Array, ...]
    b: tuple[Array | None, ...]
    X: Array | None
    D: tuple[Array, ...] | None
    G: tuple[Array, ...] | None
    a: tuple[Array | None, ...] = ()

    def __repr__(self) -> str:
        more = [name for name in ("X", "D", "G") if getattr(self, name) is not None]
        learned = ", a" if any(a is not None for a in self.a) else ""
        views = f"W[1] … W[{len(self.W) - 1}], b{learned}"
        return f"Gradient(flat {self.flat.shape}, {views}; {', '.join(more) or 'no X, D, G'})"
