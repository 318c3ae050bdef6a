"""Forward and backward passes over a user's rows: `net.forward`, `backward`, `predict`.

The functions here and in `derivatives.py` are methods of `mc.MLP`; they take any `Network`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlpcore.backends import devices
from mlpcore.checks import arrays, values
from mlpcore.core.activations import Activation, bind
from mlpcore.core.network import Cache, Gradient, Network, Pass, under_loss
from mlpcore.core.ops import Buffer
from mlpcore.data.slices import MappedFile
from mlpcore.engine.memory import Size, temporaries

Array = NDArray[Any]
Activations = tuple[Activation | None, ...]
Net = TypeVar("Net", bound=Network)
P = ParamSpec("P")
Result = TypeVar("Result")
PREDICT_BYTES = 8 << 20  # bytes of a chunk's outputs in predict, unless the caller sets chunk_rows
PREDICT_CUDA_BYTES = 256 << 20  # the same on a GPU


def on_its_device(
    function: Callable[Concatenate[Net, P], Result],
) -> Callable[Concatenate[Net, P], Result]:
    """Run a function of a network on its device, without floating-point warnings."""

    @functools.wraps(function)
    def run(net: Net, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with devices.find(net.device).active(), np.errstate(all="ignore"):
            return function(net, *args, **kwargs)

    return run


@on_its_device
def forward(net: Network, X: ArrayLike) -> Cache:
    """Return Z[1] … Z[L] of the rows of X (m, n_0), kept for `backward`.

    Raises:
        TypeError, ValueError: X is not numeric, is empty, or has the wrong number of columns.
    """
    return _forward(net, X, net.activations)


def _forward(net: Network, X: ArrayLike, activations: Activations) -> Cache:
    Z0 = to_rows(net, arrays.matrix(X, net.sizes[0], adopt=devices.find(net.device).adopt))
    xp = devices.find(net.device).xp
    sizes = net.sizes
    work = _pass(net, activations, Z0, lambda _, l: xp.empty((len(Z0), sizes[l]), net.dtype))
    work.forward()
    S = [None if s is z else s for s, z in zip(work.S, work.Z, strict=True)]
    return Cache(tuple(work.Z), tuple(S))


def _pass(
    net: Network, activations: Activations, X: Array, array: Callable[[str, int], Any]
) -> Pass:
    ops = devices.find(net.device).operations(deterministic=True)()
    return Pass(ops, net.store.W, net.store.b, bind(activations, net.store.a), X, array)


def to_rows(net: Network, array: Array, dtype: Any = None) -> Array:
    """Return an array in the network's dtype (or `dtype`), row-major, on the network's device."""
    moved: Array = devices.find(net.device).to_device(array)
    return moved.astype(net.dtype if dtype is None else dtype, order="C", copy=False)


@on_its_device
def backward(
    net: Network,
    cache: Cache,
    G: ArrayLike,
    *,
    input_gradient: bool = False,
    keep: bool = False,
) -> Gradient:
    """Return the gradient for any G = ∂J/∂Z[L] (m, n_L); `G` and the cache are not modified.

    Args:
        cache: result of `forward`; the parameters must not have changed since.
        G: ∂J/∂Z[L], e.g. from `mc.loss(...)`. For a softmax output its Jacobian is applied.
        input_gradient: True to also compute ∂J/∂X.
        keep: True to also keep every D[l] and G[l].

    Raises:
        TypeError, ValueError: G is not numeric, or does not have the output's shape.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be the result of net.forward(X); got {type(cache).__name__}")
    wants_X = values.boolean(input_gradient, "input_gradient")
    keeps = values.boolean(keep, "keep")
    G_L = to_rows(net, arrays.matrix(G, net.sizes[-1], "G", devices.find(net.device).adopt))
    _require_own(net, cache)
    if G_L.shape != cache.output.shape:
        raise ValueError(f"G must have the output's shape {cache.output.shape}; got {G_L.shape}")
    xp, Z = devices.find(net.device).xp, cache.Z
    flat = xp.zeros(net.layout.size, net.dtype)
    gradient = net.cut(flat)
    cached = {"Z": Z, "S": cache.S}
    work = _pass(net, net.activations, Z[0], lambda letter, l: cached[letter][l])
    between: list[Any] = [xp.empty_like(z) for z in Z[1:-1]]
    Gs = [xp.empty_like(Z[0]) if wants_X or keeps else None, *between, G_L]
    D = [None, *(map(xp.empty_like, Z[1:-1]) if keeps else between), xp.empty_like(G_L)]
    work.backward(Gs, D, gradient, net.layout.repeats)
    W, b, a = gradient
    X, kept_D, kept_G = Gs[0] if wants_X else None, tuple(D), tuple(Gs)
    return Gradient(flat, W, b, X, kept_D if keeps else None, kept_G if keeps else None, a)


def _require_own(net: Network, cache: Cache) -> None:
    """Raise a ValueError if shapes and dtype show that another network made a cache."""
    own = [
        (n, σ is not None and σ.slope_reads_s)
        for n, σ in zip(net.sizes, net.activations, strict=True)
    ]
    found = [(z.shape[1], s is not None) for z, s in zip(cache.Z, cache.S, strict=True)]
    if found != own or cache.output.dtype != net.dtype:
        raise ValueError(f"cache belongs to another network: {cache!r}")


# -- predictions


def predict(
    net: Network,
    X: ArrayLike,
    chunk_rows: int | None = None,
    *,
    memory_limit: float | str | None = None,
) -> Array:
    """Return Z[L] of the rows of X, computed in chunks: only the result's memory grows with m.

    It is (m, n_L), or (m,) if the network has one output and was trained on a 1-D Y, see
    `predicts_1d`. It is returned in the array library of X (NumPy, CuPy, PyTorch, JAX, …) and on
    its device, in the network's dtype. Pages of a mapped file (`np.memmap`) that have been read
    are released to the system.

    Args:
        X: (m, n_0).
        chunk_rows: number of rows at a time; None: as many as 8 MiB hold, on a GPU 256 MiB.
        memory_limit: bytes, "2 GiB", or a fraction of the device's free memory ("50%" or 0.5),
            which the arrays of this call, its result and the parameters may take together; reduces
            the chunks.

    Raises:
        TypeError, ValueError: X is not numeric, is empty, or has the wrong number of columns;
            chunk_rows < 1.
        MemoryError: `memory_limit` is too small; names the largest arrays.
    """
    output = outputs(net, X, chunk_rows, memory_limit)
    return output.reshape(-1) if net.predicts_1d else output


def logits(
    net: Network,
    X: ArrayLike,
    chunk_rows: int | None = None,
    *,
    memory_limit: float | str | None = None,
) -> Array:
    """Return S[L], the input of the output activation, in the shape that `predict` returns.

    For softmax these are log-probabilities up to a constant per row, for sigmoid (a = 1) log-odds:
    they keep digits even if a probability is rounded to 0 or 1.

    Args, Raises: as in `predict`.
    """
    output = outputs(net, X, chunk_rows, memory_limit, logits=True)
    return output.reshape(-1) if net.predicts_1d else output


def outputs(
    net: Network,
    X: ArrayLike,
    chunk_rows: int | None = None,
    memory_limit: float | str | None = None,
    *,
    logits: bool = False,
) -> Array:
    """Return Z[L] of the rows of X, or S[L], like `MLP.predict` but always (m, n_L)."""
    activations = under_loss(net.activations, logits)
    source = arrays.matrix(X, net.sizes[0], adopt=devices.find(net.device).adopt)
    if chunk_rows is None:
        most = PREDICT_BYTES if net.device == "cpu" else PREDICT_CUDA_BYTES
        chunk_rows = max(1, most // (2 * sum(net.sizes) * net.dtype.itemsize))
    rows = values.positive_integer(chunk_rows, "chunk_rows")
    shape = len(source), net.sizes[-1]
    if memory_limit is not None:
        output = Buffer("output", shape, net.dtype.name, "a result")
        size, chunk = Size(memory_limit=memory_limit), functools.partial(_buffers, net, activations)
        rows = size.plan(net, len(source), rows, [output], chunk).rows
    here = arrays.on_host(source)
    mapped = MappedFile.of(X) if len(source) > rows else None
    with devices.find(net.device).active(), np.errstate(all="ignore"):
        result: Array = (np if here else devices.find(net.device).xp).empty(shape, net.dtype)
        for start in range(0, len(source), rows):
            part = source[start : start + rows]
            found = _forward(net, part, activations).output
            result[start : start + rows] = (
                devices.find(net.device).to_host(found) if here else found
            )
            if mapped is not None:
                mapped.give_back(part)
    returned: Array = arrays.in_library_of(X, result)
    return returned


def _buffers(net: Network, activations: Activations, rows: int) -> list[Buffer]:
    """Return the allocations of a forward pass of this many rows, for a plan."""
    dtype = net.dtype.name
    buffers = [Buffer("X", (rows, net.sizes[0]), dtype, "rows of the chunk, cast")]
    for l, n in enumerate(net.sizes[1:], 1):
        sigma = activations[l]
        assert sigma is not None
        names = [f"Z[{l}]", f"S[{l}]"] if sigma.slope_reads_s else [f"Z[{l}]"]
        buffers += [Buffer(name, (rows, n), dtype, f"of layer {l}") for name in names]
    return [*buffers, temporaries(net, activations, rows)]
