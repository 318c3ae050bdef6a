"""The network that people hold: parameters, forward, backward, predict, save.

Z[0] = X,   Z[l] = σ_l(Z[l-1] W[l] + b[l]),   l = 1 … L
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import arrays, values
from mlpcore.checks.errors import DeviceUnavailable, shown
from mlpcore.core import activations as activation_sheet
from mlpcore.core import backprop
from mlpcore.core import losses as loss_sheet
from mlpcore.core.activations import Activation
from mlpcore.core.layout import Layout, Parameters, Tie, parse_ties
from mlpcore.core.ops import Buffer
from mlpcore.core.targets import mixed, weighed
from mlpcore.data.slices import MappedFile
from mlpcore.engine import derivatives
from mlpcore.engine.derivatives import Cotangent, Size, Tangent
from mlpcore.io import convert, kinds, model_file, onnx_file

Array = NDArray[Any]
DTYPES = ("float32", "float64")
MOST_LAYERS, MOST_PARAMETERS = 10_000, 2**58  # whose bytes, and some more, NumPy can count
PREDICT_BYTES = 8 << 20  # of a chunk's outputs in predict, unless the caller says how many rows
PREDICT_CUDA_BYTES = 256 << 20  # on a GPU
log = logging.getLogger("mlpcore")


@dataclass(frozen=True)
class Cache:
    """What a forward pass keeps for the backward pass.

    Attributes:
        Z: layer outputs (m, n_l), Z[0] = X.
        S: pre-activations (m, n_l) of the layers whose slope reads them; None elsewhere.
    """

    Z: tuple[Array, ...]
    S: tuple[Array | None, ...]

    @property
    def output(self) -> Array:
        """Z[L], (m, n_L)."""
        return self.Z[-1]

    def __repr__(self) -> str:
        kept = [l for l, s in enumerate(self.S) if s is not None]
        return f"Cache(Z[0] … Z[{len(self.Z) - 1}] of {len(self.Z[0])} rows, S of layers {kept}, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes that the cache costs beyond X."""
        return sum(z.nbytes for z in self.Z[1:]) + sum(s.nbytes for s in self.S if s is not None)


@dataclass(frozen=True)
class Gradient:
    """∂J/∂parameters, and on request the rest.

    Attributes:
        flat: all of it, laid out as `net.parameters`.
        W, b, a: views of it, index 0 None; a[l] None where the activation has no learned parameter.
        X: ∂J/∂X = G[0], (m, n_0), or None.
        D, G: every D[l] = ∂J/∂S[l] and G[l] = ∂J/∂Z[l], (m, n_l), or None unless kept.
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
        return f"Gradient(flat {self.flat.shape}, W[1] … W[{len(self.W) - 1}], b{learned}; {', '.join(more) or 'no X, D, G'})"


class MLP:
    """A multilayer perceptron.

    Args:
        sizes: widths n_0 … n_L, e.g. `[784, 512, 10]`.
        activations: of the hidden layers: one for all, or a list of L - 1. A name, `(name,
            parameter)` or `mc.Activation`. "prelu" learns its slope below 0: `("prelu", 0.25)` one
            for a layer, `("prelu", 0.25, "per output")` one for each output, from the value given
            (He et al. 2015).
        output: activation of the last layer; also "softmax" and "log_softmax".
        bias: whether layers have a bias.
        tied: layers that share a matrix, or its transpose, with one below: `{4: 1}`, `{4: "1.T"}`.
            Their biases stay apart.
        dtype: "float32" or "float64".
        init: "auto" (by activation), "he", "glorot", "lecun", or "zeros". Biases start at 0,
            learned parameters of activations at the value given.
        device: "auto", "cpu", "cuda", "cuda:1".
        seed: of the initial weights, drawn in float64 on the host: equal on every device.

    Attributes:
        W, b: tuples of views of `parameters`, index 0 None. `net.W[1][...] = …` writes into the
            network. A tied W[4] is the view W[1].T of the one matrix there is.
        a: a tuple of views of the activations' learned parameters, a[l] (1,) or (n_l,), None where
            there is none.
        parameters: the flat vector, all W, then all b, then all a.
        predicts_1d: whether `predict` and `logits` return (m,) in place of (m, 1); a trainer sets
            it by the Y that it is given.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
        DeviceUnavailable: the device cannot be used; says why.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activations: Any = "relu",
        output: Any = "identity",
        *,
        bias: bool = True,
        tied: Mapping[int, int | str] | None = None,
        dtype: Any = "float32",
        init: str = "auto",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        widths = _sizes(sizes)
        self.activations = _activations(activations, output, len(widths) - 1)
        ties = () if tied is None else parse_ties(tied, widths)
        self.layout = _layout(widths, values.boolean(bias, "bias"), ties, self.activations)
        try:
            self.dtype = np.dtype("" if dtype is None else dtype).newbyteorder("=")
        except (RuntimeError, TypeError, ValueError):
            raise TypeError(
                f"dtype must be one of {', '.join(DTYPES)}; got {shown(dtype)}"
            ) from None
        if self.dtype.name not in DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(DTYPES)}; got {shown(self.dtype.name)}"
            )
        for i, activation in enumerate(self.activations[1:]):
            if activation is not None and activation.parameter is not None:
                where = "output" if i == len(widths) - 2 else f"activations[{i}]"
                values.require_held(
                    activation.parameter,
                    self.dtype.name,
                    f"{where}: the parameter of {activation.name}",
                )
        self.device = devices.choose(device)
        self._predicts_1d = False
        self._set(self._drawn(init, values.seed(seed)))

    def _set(self, parameters: Array) -> None:
        """Take a flat vector of the host's as the parameters, on the network's device."""
        self._store = Parameters(self.layout, devices.to_device(self.device, parameters))

    def _drawn(self, init: str, seed: int) -> Array:
        """The initial parameters, on the host."""
        init = values.one_of(init, "init", ("auto", *activation_sheet.INITIAL, "zeros"))
        try:
            flat = np.zeros(self.layout.size, self.dtype)
        except MemoryError:
            count = f"{self.layout.size:,} parameters in {self.dtype.name}"
            raise MemoryError(f"sizes: there is no memory for {count}") from None
        for activation, a in zip(self.activations, self.layout.slopes(flat), strict=True):
            if activation is not None and a is not None:
                a[...] = activation.parameter
        if init == "zeros":
            return flat
        rng = np.random.default_rng(seed)
        sizes, L, W = self.layout.sizes, self.layout.layers, self.layout.views(flat)[0]
        for l in self.layout.owners:
            activation = self.activations[l]
            assert activation is not None
            if init == "auto":
                deviation = activation.standard_deviation(sizes[l - 1], sizes[l], output=l == L)
            else:
                deviation = Activation("identity", "s", "1", init=init).standard_deviation(
                    sizes[l - 1], sizes[l], False
                )
            draw = rng.standard_normal(W[l].shape)
            draw *= deviation
            W[l][...] = draw
        return flat

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key != "_store"}
        return state | {"parameters": devices.to_host(self.device, self.store.flat)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("parameters")
        vars(self).update(state)
        try:
            self.device = devices.choose(self.device)
        except DeviceUnavailable as reason:  # pickled on a machine with a GPU
            log.warning("a network of %s is put on the CPU: %s", self.device, reason)
            self.device = "cpu"
        self._set(parameters)  # a copy's views belong to the copy

    @property
    def store(self) -> Parameters:
        """Return the parameters' store; raise a RuntimeError if an update has left them half
        written.
        """
        self._store.require_whole()
        return self._store

    # read-only, so that nobody puts an array beside the one that is trained: write with
    # net.W[1][...] = …

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
        """Views of the biases, b[l] (n_l,); b[0], and every one without bias, is None."""
        self._store.exposed = True
        return self._store.b

    @property
    def a(self) -> tuple[Any, ...]:
        """Views of the activations' learned parameters, a[l] (1,) or (n_l,); None where there is
        none.
        """
        self._store.exposed = True
        return self._store.a

    @property
    def sizes(self) -> tuple[int, ...]:
        """The widths n_0 … n_L."""
        return self.layout.sizes

    @property
    def predicts_1d(self) -> bool:
        """Whether `predict` returns (m,): False at first, then as the Y of the last training step
        was.

        A residual y - predict(X) of y (m,) and a prediction (m, 1) would be (m, m), without an
        error.
        """
        return self._predicts_1d

    @predicts_1d.setter
    def predicts_1d(self, value: bool) -> None:
        if values.boolean(value, "predicts_1d") and self.sizes[-1] != 1:
            raise ValueError(f"predicts_1d must be False: the network has {self.sizes[-1]} outputs")
        self._predicts_1d = bool(value)

    @property
    def tied(self) -> dict[int, int | str]:
        """Which layers have no matrix of their own, as they were given: `{4: "1.T"}`."""
        return {
            layer: f"{owner}.T" if transposed else owner
            for layer, owner, transposed in self.layout.ties
        }

    def __repr__(self) -> str:
        hidden = ", ".join(
            str(a.spec) if isinstance(a.spec, tuple) else a.name
            for a in self.activations[1:-1]
            if a
        )
        last = self.activations[-1]
        assert last is not None
        size = f"{self.layout.size:,} parameters, {self.dtype.name} on {self.device}"
        ties = f", tied={self.tied}" if self.tied else ""
        return f"MLP({'-'.join(map(str, self.sizes))}, activations=[{hidden}], output={last.spec!r}{ties}; {size})"

    # -- forward and backward --

    def forward(self, X: ArrayLike) -> Cache:
        """Z[1] … Z[L] of the rows of X (m, n_0), kept for `backward`.

        Raises:
            TypeError, ValueError: X is not numeric, empty, or has another number of columns.
        """
        with devices.active(self.device):
            return self._forward(X, self.activations)

    def _forward(self, X: ArrayLike, activations: tuple[Activation | None, ...]) -> Cache:
        source = arrays.matrix(X, self.sizes[0], adopt=devices.adopter(self.device))
        xp = devices.module(self.device)
        with np.errstate(over="ignore"):
            Z0 = devices.to_device(self.device, source).astype(self.dtype, order="C", copy=False)
        Z: list[Array] = [Z0]
        S: list[Array | None] = [None]
        for l in range(1, self.layout.layers + 1):
            activation = activations[l]
            assert activation is not None
            keep = activation.slope_reads_s
            Z.append(xp.empty((len(Z0), self.sizes[l]), self.dtype))
            S.append(xp.empty_like(Z[l]) if keep else None)
        with np.errstate(all="ignore"):
            pre = [s if s is not None else z for s, z in zip(S, Z, strict=True)]
            bound = activation_sheet.bind(activations, self.store.a)
            backprop.forward(
                devices.operations(self.device, deterministic=True)(),
                self.store.W,
                self.store.b,
                bound,
                pre,
                Z,
            )
        return Cache(tuple(Z), tuple(S))

    def backward(
        self, cache: Cache, G: ArrayLike, *, input_gradient: bool = False, keep: bool = False
    ) -> Gradient:
        """The gradient for any G = ∂J/∂Z[L] (m, n_L). Neither `G` nor the cache is changed.

        Args:
            cache: of `forward`, with the parameters as they were then.
            G: ∂J/∂Z[L], e.g. from `mc.loss(...)`. Behind a softmax output its Jacobian is applied.
            input_gradient: also ∂J/∂X.
            keep: also every D[l] and G[l].

        Raises:
            TypeError, ValueError: G is not numeric or not of the output's shape.
        """
        if not isinstance(cache, Cache):
            raise TypeError(
                f"cache must be what net.forward(X) returned; got {type(cache).__name__}"
            )
        wanted = values.boolean(input_gradient, "input_gradient"), values.boolean(keep, "keep")
        with devices.active(self.device), np.errstate(all="ignore"):
            return self._backward(cache, G, *wanted)

    def _backward(self, cache: Cache, G: ArrayLike, input_gradient: bool, keep: bool) -> Gradient:
        given = arrays.matrix(G, self.sizes[-1], "G", devices.adopter(self.device))
        G_L = devices.to_device(self.device, given).astype(self.dtype, order="C", copy=False)
        xp = devices.module(self.device)
        like = [
            (self.sizes[l], bool(l) and bool(a and a.slope_reads_s))
            for l, a in enumerate(self.activations)
        ]
        same = like == [(z.shape[1], s is not None) for z, s in zip(cache.Z, cache.S, strict=True)]
        if not same or cache.output.dtype != self.dtype:
            raise ValueError(f"cache is of another network: {cache!r}")
        if G_L.shape != cache.output.shape:
            raise ValueError(
                f"G must have the output's shape {cache.output.shape}; got {G_L.shape}"
            )
        L = self.layout.layers
        flat = xp.zeros(self.layout.size, self.dtype)
        (dW, db), da = self.layout.views(flat), self.layout.slopes(flat)
        wanted = [input_gradient or keep, *[True] * L]
        Gs = [xp.empty_like(z) if want else None for z, want in zip(cache.Z, wanted, strict=True)]
        Gs[L] = G_L
        # D[L] must not overwrite the caller's G; the others may take the place of G[l] unless both
        # are wanted
        D: list[Any] = [None] + [
            xp.empty_like(z) if keep or l == L else Gs[l] for l, z in enumerate(cache.Z) if l
        ]
        S = [s if s is not None else z for s, z in zip(cache.S, cache.Z, strict=True)]
        ops = devices.operations(self.device, deterministic=True)()
        bound = activation_sheet.bind(self.activations, self.store.a, da)
        backprop.backward(ops, self.store.W, bound, S, cache.Z, Gs, D, dW, db, self.layout.repeats)
        kept: Any = (tuple(D), tuple(Gs)) if keep else (None, None)
        return Gradient(flat, dW, db, Gs[0] if input_gradient else None, kept[0], kept[1], da)

    def predict(
        self, X: ArrayLike, chunk_rows: int | None = None, *,
        memory_limit: float | str | None = None,
    ) -> Array:  # fmt: skip
        """Return Z[L] of the rows of X, computed chunk by chunk: memory does not grow with m beyond
        the result.

        It is (m, n_L); (m,) where the network has one output and was trained on a 1-D Y, see
        `predicts_1d`. It comes back in the array library of X (NumPy, CuPy, PyTorch, JAX, …) and on
        its device, in the network's dtype. Of a mapped file (`np.memmap`) the pages that have been
        read are given back to the system.

        Args:
            X: (m, n_0).
            chunk_rows: so many rows at a time; None: as many as 8 MiB hold, on a GPU 256 MiB.
            memory_limit: bytes, "2 GiB", or a share of the device's free memory ("50%" or 0.5),
                that the arrays of this call, its result and the parameters may take together; makes
                the chunks smaller.

        Raises:
            TypeError, ValueError: X is not numeric, empty, or has another number of columns;
                chunk_rows < 1.
            MemoryError: `memory_limit` cannot be kept; names the largest arrays.
        """
        return self._shaped(self._outputs(X, chunk_rows, self.activations, memory_limit))

    def logits(
        self, X: ArrayLike, chunk_rows: int | None = None, *,
        memory_limit: float | str | None = None,
    ) -> Array:  # fmt: skip
        """Return S[L], what goes into the output activation, in the shape that `predict` returns,
        and as it does.

        Behind softmax these are log-probabilities up to a number a row, behind sigmoid (a = 1)
        log-odds: with digits left where a probability is rounded to 0 or 1.

        Args, Raises: as `predict`.
        """
        activations = (*self.activations[:-1], activation_sheet.resolve("identity"))
        return self._shaped(self._outputs(X, chunk_rows, activations, memory_limit))

    def _shaped(self, output: Array) -> Array:
        return output.reshape(-1) if self._predicts_1d else output

    def _outputs(
        self, X: ArrayLike, chunk_rows: int | None, activations: tuple[Activation | None, ...],
        memory_limit: float | str | None = None,
    ) -> Array:  # fmt: skip
        """Return what `predict` does with these activations, always (m, n_L)."""
        source = arrays.matrix(X, self.sizes[0], adopt=devices.adopter(self.device))
        if chunk_rows is None:
            most = PREDICT_BYTES if self.device == "cpu" else PREDICT_CUDA_BYTES
            chunk_rows = max(1, most // (2 * sum(self.sizes) * self.dtype.itemsize))
        rows = values.positive_integer(chunk_rows, "chunk_rows")
        if memory_limit is not None:
            result_ = Buffer("output", (len(source), self.sizes[-1]), self.dtype.name, "a result")
            chunk = functools.partial(self._forward_buffers, activations)
            size = Size(memory_limit=memory_limit)
            rows = size.plan(self, len(source), rows, [result_], chunk).rows
        here = arrays.on_host(source)
        mapped = MappedFile.of(X) if len(source) > rows else None
        with devices.active(self.device):
            result: Array = (np if here else devices.module(self.device)).empty(
                (len(source), self.sizes[-1]), self.dtype
            )
            for start in range(0, len(source), rows):
                part = source[start : start + rows]
                result[start : start + rows] = self._output(part, activations, here)
                if mapped is not None:
                    mapped.give_back(part)
        returned: Array = arrays.in_library_of(X, result)
        return returned

    def _output(self, X: Array, activations: tuple[Activation | None, ...], to_host: bool) -> Array:
        output = self._forward(X, activations).output
        return devices.to_host(self.device, output) if to_host else output

    def _forward_buffers(
        self, activations: tuple[Activation | None, ...], rows: int
    ) -> list[Buffer]:  # fmt: skip
        """Return what a forward pass of so many rows allocates, for a plan."""
        buffers = [Buffer("X", (rows, self.sizes[0]), self.dtype.name, "rows of the chunk, cast")]
        for l in range(1, self.layout.layers + 1):
            activation = activations[l]
            assert activation is not None
            names = [f"Z[{l}]", f"S[{l}]"] if activation.slope_reads_s else [f"Z[{l}]"]
            shape, dtype = (rows, self.sizes[l]), self.dtype.name
            buffers += [Buffer(name, shape, dtype, f"of layer {l}") for name in names]
        return [*buffers, derivatives.temporaries(self, activations, rows)]

    # -- derivatives --

    def jvp(
        self, X: ArrayLike, dX: ArrayLike | None = None, dparameters: Any = None, *,
        chunk_rows: int | None = None, memory_limit: float | str | None = None,
    ) -> Tangent:  # fmt: skip
        """The output, and its differential dZ = (∂Z/∂X) dX + (∂Z/∂parameters) dparameters:
        `(output, tangent)`, (m, n_L) each.

        Args:
            X: (m, n_0).
            dX: (m, n_0), a direction for each row; None: X stays.
            dparameters: flat, laid out as `parameters`, or an object with such a `.flat`; None:
                they stay.
            chunk_rows: so many rows at a time; None: as many as fit the cache.
            memory_limit: as in `predict`.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
            MemoryError: `memory_limit` cannot be kept; names the largest arrays.
        """
        with devices.active(self.device), np.errstate(all="ignore"):
            return derivatives.jvp(self, X, dX, dparameters, Size(chunk_rows, memory_limit))

    def vjp(
        self, X: ArrayLike, V: ArrayLike, *, dX: ArrayLike | None = None, dV: ArrayLike | None = None,
        chunk_rows: int | None = None, memory_limit: float | str | None = None,
    ) -> Cotangent:  # fmt: skip
        """The gradient of ⟨V, Z⟩ by the parameters and by X: `(parameters, X)`, flat and (m, n_0).

        With dX and dV that of ⟨V, Z⟩ + ⟨dV, dZ⟩, where dZ = (∂Z/∂X) dX: what a loss with targets
        for a derivative needs, with V = ∂J/∂Z and dV = ∂J/∂dZ. dX itself counts as fixed.

        Args:
            X, dX: (m, n_0).
            V, dV: (m, n_L).
            chunk_rows: so many rows at a time; None: as many as fit the cache.
            memory_limit: as in `predict`.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
            MemoryError: `memory_limit` cannot be kept; names the largest arrays.
        """
        with devices.active(self.device), np.errstate(all="ignore"):
            return derivatives.vjp(self, X, V, dX, dV, Size(chunk_rows, memory_limit))

    def hvp(
        self, X: ArrayLike, Y: ArrayLike, v: Any, loss: Any = "squared_error", *, sample_weight: ArrayLike | None = None,
        chunk_rows: int | None = None, memory_limit: float | str | None = None,
    ) -> Array:  # fmt: skip
        """(∂²J/∂parameters²) v, exact, with J the mean loss over the rows as in `Trainer.step`
        without penalties; flat.

        Args:
            X, Y, sample_weight: the batch, as in `Trainer.step`.
            v: flat, laid out as `parameters`, or an object with such a `.flat`.
            loss: a name, `(name, parameter)` or `mc.Loss`.
            chunk_rows: so many rows at a time; None: as many as fit the cache.
            memory_limit: as in `predict`.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
            MemoryError: `memory_limit` cannot be kept; names the largest arrays.
        """
        with devices.active(self.device), np.errstate(all="ignore"):
            size = Size(chunk_rows, memory_limit)
            return derivatives.curvature_product(self, X, Y, v, loss, sample_weight, size, True)

    def gnvp(
        self, X: ArrayLike, Y: ArrayLike, v: Any, loss: Any = "squared_error", *, sample_weight: ArrayLike | None = None,
        chunk_rows: int | None = None, memory_limit: float | str | None = None,
    ) -> Array:  # fmt: skip
        """The Gauss-Newton product (∂x/∂parameters)ᵀ (∂²J/∂x²) (∂x/∂parameters) v, arguments as in
        `hvp`; flat.

        x is what the loss reads: S[L] where it and the output match (softmax and cross_entropy),
        else Z[L]. Schraudolph 2002.
        """
        with devices.active(self.device), np.errstate(all="ignore"):
            size = Size(chunk_rows, memory_limit)
            return derivatives.curvature_product(self, X, Y, v, loss, sample_weight, size, False)

    # -- copies and files --

    def copy(self, dtype: Any = None) -> MLP:
        """An independent network with equal parameters, on request in another dtype."""
        return self._copy(self.dtype if dtype is None else dtype, self.device)

    def _copy(self, dtype: Any, device: str) -> MLP:
        L = self.layout.layers
        net = MLP(
            self.sizes, list(self.activations[1:L]), self.activations[L], bias=self.layout.bias, tied=self.tied, dtype=dtype,
            init="zeros", device=device,
        )  # fmt: skip
        net.predicts_1d = self.predicts_1d
        net._set(devices.to_host(self.device, self.store.flat).astype(net.dtype))
        return net

    def to(self, device: str) -> MLP:
        """A copy of the network on another device ("cpu", "cuda", "cuda:1", "auto"); the network
        itself if it is there.

        Raises:
            DeviceUnavailable: the device cannot be used; says why.
        """
        chosen = devices.choose(device)
        return self if chosen == self.device else self._copy(self.dtype, chosen)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        tensors: dict[str, Array] | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Write the network to a safetensors file, atomically.

        Args:
            path: of the file.
            tensors: arrays to store beside the parameters, by name.
            about: what else to remember, as far as JSON can hold it and gives it back equal, but
                for tuples, which become lists: at most 100,000,000 bytes of it, in at most 100
                levels.

        Raises:
            OSError: the file cannot be written, or there is one that is no model of mlpcore, or the
                checkpoint of an unfinished run; what was there before is intact.
            TypeError, ValueError: names the argument, what was expected and what came.
        """
        named = {} if tensors is None else tensors
        if not isinstance(named, Mapping) or not all(
            isinstance(x, np.ndarray | np.generic) for x in named.values()
        ):
            raise TypeError(f"tensors must be a dict of NumPy arrays; got {shown(named)}")
        for name in named:
            if not isinstance(name, str) or name in ("parameters", "__metadata__"):
                raise ValueError(
                    f"tensors: {shown(name)} cannot be a name: it is no text, or the file's own"
                )
        kinds.require_replaceable(values.path(path), kinds.NETWORKS)
        parameters = devices.to_host(self.device, self.store.flat)
        header = {**self.header(), "about": {} if about is None else about}
        model_file.write(path, header, {"parameters": parameters, **named})

    def header(self) -> dict[str, Any]:
        """What a file says of the network beside its parameters, as far as JSON holds it."""
        rows = [_described(activation) for activation in self.activations if activation]
        named = {str(layer): owner for layer, owner in self.tied.items()}  # as JSON has it
        ties = {"tied": named} if named else {}
        flat = {"predicts_1d": True} if self.predicts_1d else {}
        return {"sizes": self.sizes, "bias": self.layout.bias, "activations": rows, **ties, **flat}

    def to_onnx(
        self, path: str | os.PathLike[str], *, mean: ArrayLike | None = None, scale: ArrayLike | None = None,
        target_mean: ArrayLike | None = None, target_scale: ArrayLike | None = None, about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write the network as an ONNX file (opset 17), atomically: "X" (rows, n_0) goes in, "Z"
        (rows, n_L) comes out.

        That is its shape whatever `predicts_1d` is.

        Args:
            path: of the file.
            mean, scale: (n_0,); with them columns go in as they are, and (X - mean) / scale is part
                of the file.
            target_mean, target_scale: (n_L,); with them Z target_scale + target_mean comes out.
            about: notes to store, e.g. class names, as far as JSON can hold them.

        Raises:
            ImportError: the package onnx is not installed.
            TypeError, ValueError: names the argument, what was expected and what came.
            OSError: the file cannot be written, or there is one that is no ONNX file; what was
                there before is intact.
        """
        rows = {
            name: None if value is None else arrays.row_of(value, n, name, adopt=devices.adopt_on_host)
            for name, value, n in (
                ("mean", mean, self.sizes[0]), ("scale", scale, self.sizes[0]),
                ("target_mean", target_mean, self.sizes[-1]), ("target_scale", target_scale, self.sizes[-1]),
            )
        }  # fmt: skip
        kinds.require_replaceable(values.path(path), ("onnx",))
        parameters = devices.to_host(self.device, self.store.flat)
        onnx_file.write(path, self.layout, self.activations, parameters, rows, about or {})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto") -> MLP:
        """The network of a file that `save` wrote.

        Raises:
            FileNotFoundError, OSError: it cannot be read.
            ValueError: it is no such file, a damaged one, or one of a newer version.
        """
        return cls.load_with(path, device)[0]

    @classmethod
    def load_with(
        cls, path: str | os.PathLike[str], device: str = "auto"
    ) -> tuple[MLP, dict[str, Array], dict[str, Any]]:
        """The network of a file, and the `tensors` and `about` that were saved with it."""
        devices.choose(device)
        header, tensors = model_file.read(path)
        return cls.from_header(path, header, tensors, device), tensors, header.get("about", {})

    @classmethod
    def from_header(
        cls, path: str | os.PathLike[str], header: Any, tensors: dict[str, Array], device: str
    ) -> MLP:
        """The network that a file's header describes; takes "parameters" out of `tensors`. Raises
        ValueError with the path.
        """
        try:
            parameters = tensors.pop("parameters")
            rows = [Activation(**row) for row in header["activations"]]
            tied = {int(layer): what for layer, what in header.get("tied", {}).items()}
            widths = _sizes(header["sizes"])
            size = _layout(
                widths,
                values.boolean(header["bias"], "bias"),
                parse_ties(tied, widths),
                (None, *rows),
            ).size
            if parameters.shape != (size,):
                raise ValueError(f"parameters of shape {parameters.shape} for a network of {size}")
            net = cls(
                widths, rows[:-1], rows[-1], bias=header["bias"], tied=tied, dtype=parameters.dtype, init="zeros",
                device=device,
            )  # fmt: skip
            net.predicts_1d = header.get("predicts_1d", False)
        except (
            ArithmeticError,
            AttributeError,
            KeyError,
            IndexError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            raise ValueError(f"{str(path)!r} does not hold a network: {error!r}") from None
        net._set(parameters)
        return net

    # -- models of other libraries --

    @classmethod
    def from_torch(cls, model: Any) -> MLP:
        """The network that a `torch.nn.Sequential` of Linear layers and activations is, with its
        weights copied.

        It predicts what `model.eval()` does: Dropout is left out. A matrix that two layers share is
        tied, their biases and slopes (PReLU) are not. Where some layers have a bias and others
        none, those others get one of 0. It lies where the weights do, in their dtype, float32 where
        that is float16 or bfloat16.

        Raises:
            TypeError, ValueError: a module that has no equal here; names its place.
        """
        return convert.from_torch(cls, model)

    def to_torch(self) -> Any:
        """A `torch.nn.Sequential` with copied weights that predicts the same. A transposed tie
        becomes a matrix of its own.

        Raises:
            ValueError: PyTorch has no equal of an activation; `mlpcore.torch.Module(net)` takes
                every network.
        """
        return convert.to_torch(self)

    @classmethod
    def from_sklearn(cls, model: Any, device: str = "auto") -> MLP:
        """The network of a fitted `MLPClassifier` or `MLPRegressor` of scikit-learn, with its
        weights copied.

        Its predictions are `model.predict` of a regressor, `model.predict_proba` of a classifier;
        of one with two classes, which has a single logistic output, `model.predict_proba(X)[:,
        1:]`.

        Raises:
            TypeError, ValueError: no such model, or not fitted.
        """
        return convert.from_sklearn(cls, model, device)


class LossFunction:
    """`J, G = mc.loss("cross_entropy")(Z, Y)`: a loss on an output, by itself."""

    def __init__(self, loss: loss_sheet.Loss):
        self.loss = loss

    def __repr__(self) -> str:
        return f"loss({self.loss})"

    def __call__(
        self, Z: ArrayLike, Y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> tuple[float, Array]:
        """Return J = Σ w ℓ / Σ w and G = ∂J/∂Z, in Z's dtype and shape: (m, n_L), or (m,) of one
        output.

        Y is as in `Trainer.step`.

        Raises:
            TypeError, ValueError: names the argument, what was expected and what came.
        """
        device = devices.of(Z, "Z")
        with devices.active(device):
            return self._on(device, Z, Y, sample_weight)

    def _on(
        self, device: str, Z: ArrayLike, Y: ArrayLike, sample_weight: ArrayLike | None
    ) -> tuple[float, Array]:
        xp, adopt = devices.module(device), devices.adopter(device)
        given = arrays.numeric(Z, "Z", adopt)
        raw = arrays.matrix(given[:, None] if given.ndim == 1 else given, None, "Z", adopt)
        with np.errstate(over="ignore"):
            output = xp.ascontiguousarray(
                raw, raw.dtype if raw.dtype.name in DTYPES else np.float64
            )
        rows, columns = output.shape
        target, classes = arrays.target(Y, rows, columns, self.loss, adopt=adopt)
        target = devices.to_device(device, target)
        w = arrays.weights(sample_weight, rows, adopt=adopt)
        if self.loss.class_weight is not None:
            w = weighed(
                self.loss,
                target,
                None if w is None else devices.to_device(device, w),
                np.float64,
                xp,
            )
        if w is None:
            share = xp.full(rows, 1 / rows)
        else:
            with np.errstate(over="ignore"):
                total = w.sum(dtype=np.float64)
            if arrays.on_host(w) and not np.isfinite(total):
                raise ValueError(
                    f"sample_weight sums to {total:g}, out of the range of float64: rescale the "
                    "weights"
                )
            share = devices.to_device(device, w / total)
        k = share.astype(output.dtype)[:, None]
        if self.loss.rowwise:
            if arrays.on_host(output) and (output < 0).any():
                least = f"got {output.min():g} (np.exp makes them of what log_softmax puts out)"
                raise ValueError(
                    f"Z must hold probabilities for cross_entropy, at least 0; {least}"
                )
            if classes:
                arrays.require_classes(target, columns)
            with np.errstate(all="ignore"):
                J, G = _cross_entropy(xp, output, target, self.loss, k)
            return J, arrays.in_library_of(Z, G.reshape(given.shape))
        G, J = xp.empty_like(output), xp.zeros((), np.float64 if device == "cpu" else output.dtype)
        objective = loss_sheet.pair(self.loss, None)
        with np.errstate(all="ignore"):
            Y_ = xp.ascontiguousarray(target, output.dtype)
            devices.operations(device)().loss(
                output, Y_, k, objective, G, None, J, accumulate=False
            )
        return float(J), arrays.in_library_of(Z, G.reshape(given.shape))


def _cross_entropy(
    xp: Any, Z: Array, Y: Array, loss: loss_sheet.Loss, k: Array
) -> tuple[float, Array]:
    """-Σ y log z from probabilities: J and G = -k y / z. A trainer evaluates it from S[L] instead."""
    hot = mixed(loss, Y, Z.shape[1], Z.dtype, xp)
    least = xp.maximum(Z, np.finfo(Z.dtype).tiny)
    return float(-xp.sum(k * hot * xp.log(least), dtype=np.float64)), -k * hot / least


def loss(
    spec: Any, *, class_weight: Any = None, label_smoothing: float | None = None, pos_weight: Any = None
) -> LossFunction:  # fmt: skip
    """Return the loss of this name, `(name, parameter)` or `mc.Loss`, as a function `(Z, Y,
    sample_weight=None) -> J, G`.

    Its attribute `loss` is an `mc.Loss` that `mc.Trainer`, `mc.check_gradients` and `net.hvp` take.

    Args:
        spec: the loss.
        class_weight, label_smoothing, pos_weight: as in `mc.Trainer`; class weights as a list.

    Raises:
        TypeError, ValueError: no such loss (with the nearest match), a parameter or an option that
            it does not take.
    """
    return LossFunction(
        loss_sheet.with_options(loss_sheet.resolve(spec), class_weight, label_smoothing, pos_weight)
    )


def _sizes(sizes: object) -> tuple[int, ...]:
    unordered = isinstance(sizes, str | bytes | Set | Mapping)
    if unordered or not isinstance(sizes, Iterable) or getattr(sizes, "shape", None) == ():
        raise TypeError(
            f"sizes must be a list of widths such as [784, 512, 10]; got {shown(sizes)}"
        )
    several = itertools.islice(sizes, MOST_LAYERS + 2)  # not more of a generator that never ends
    widths = tuple(values.positive_integer(n, f"sizes[{i}]") for i, n in enumerate(several))
    if len(widths) < 2:
        raise ValueError(f"sizes needs at least an input and an output width; got {list(widths)}")
    if len(widths) > MOST_LAYERS + 1:
        raise ValueError(f"sizes must be widths of at most {MOST_LAYERS:,} layers; got more")
    return widths


def _layout(
    widths: tuple[int, ...],
    bias: bool,
    ties: tuple[Tie, ...],
    activations: Sequence[Activation | None],
) -> Layout:
    learned = tuple(
        σ.learned_numbers(n) for n, σ in zip(widths, activations, strict=True) if σ is not None
    )
    layout = Layout(widths, bias, ties, learned if any(learned) else ())
    if layout.size > MOST_PARAMETERS:
        raise ValueError(
            f"sizes must make at most 2**58 parameters; {shown(list(widths))} make "
            f"{layout.size:.3g}"
        )
    return layout


def _described(activation: Activation) -> dict[str, Any]:
    """Return the arguments of an activation, for a file; files of networks without learned
    parameters say nothing of them.
    """
    values = {
        field.name: getattr(activation, field.name)
        for field in dataclasses.fields(Activation)
        if field.init
    }
    return (
        values
        if activation.learned
        else {name: value for name, value in values.items() if name != "learned"}
    )


def _activations(hidden: Any, output: Any, layers: int) -> tuple[Activation | None, ...]:
    one = isinstance(hidden, str | Activation) or (
        isinstance(hidden, tuple)
        and len(hidden) in (2, 3)
        and not isinstance(hidden[1], str | Activation | tuple | list)
    )
    if one:
        hidden = [hidden] * (layers - 1)
    elif not isinstance(hidden, list | tuple):
        raise TypeError(
            "activations must be a name, (name, parameter), mc.Activation or a list of them; got "
            f"{shown(hidden)}"
        )
    if len(hidden) != layers - 1:
        raise ValueError(
            f"activations must be one, or {layers - 1}, one for each hidden layer; got "
            f"{len(hidden)}"
        )
    resolved = [
        activation_sheet.resolve(spec, f"activations[{i}]") for i, spec in enumerate(hidden)
    ]
    return (None, *resolved, activation_sheet.resolve(output, "output", output=True))
