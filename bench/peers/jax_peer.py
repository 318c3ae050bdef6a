"""JAX: one jitted call per step, or all steps in one `lax.scan`, whole or in chunks."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

# otherwise JAX reserves three quarters of the GPU
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from jax import lax

from bench.cases import BETAS, DECAY, EPSILON
from bench.peers import Unsupported
from bench.work import Work

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
}
MULTIPLICATION = {
    "float32": "float32",
    "tf32": "tensorfloat32",
    "bfloat16": "bfloat16",
    "float16": "default",
}


class Jax:
    """The step as a pure function of (parameters, state); the optimizer decays only weights."""

    def __init__(self, work: Work, way: str) -> None:
        self.work, self.case, self.scan = work, work.case, "scan" in way
        if work.device == "cuda" and jax.default_backend() != "gpu":
            raise Unsupported("this JAX finds no CUDA device")
        jax.config.update("jax_default_matmul_precision", MULTIPLICATION[work.precision])
        self.half = jnp.dtype(work.precision) if work.precision in ("float16", "bfloat16") else None
        device = jax.devices()[0]
        self.X, self.Y = (jax.device_put(array, device) for array in work.XY)
        self.chunks = work.chunks if "chunks" in way else [slice(0, work.batch)]
        self.note = f"accumulates over {len(self.chunks)} chunks" if "chunks" in way else ""
        parameters = [(jnp.array(W), jnp.array(b)) for W, b in zip(work.W, work.b, strict=True)]
        zeros = [
            jax.tree.map(jnp.zeros_like, parameters)
            for _ in range(0 if work.optimizer == "SGD" else 2)
        ]
        self.carry = (parameters, zeros, jnp.zeros((), jnp.int32))
        self.rate = self.case.rate
        self.steps = jax.jit(self._steps, static_argnames="count", donate_argnums=0)

    def _loss(self, parameters: Any, X: Any, Y: Any) -> Any:
        """Return J of some rows times their share of the batch."""
        half = (lambda a: a) if self.half is None else (lambda a: a.astype(self.half))
        Z, last = half(X), len(parameters) - 1
        for l, (W, b) in enumerate(parameters):
            Z = Z @ half(W) + half(b)
            Z = Z if l == last else ACTIVATIONS[self.case.activation](Z)
        Z = Z.astype(jnp.float32)
        if self.case.loss == "cross_entropy":
            value = -jnp.take_along_axis(jax.nn.log_softmax(Z), Y[:, None], axis=1).sum()
        else:
            value = 0.5 * jnp.square(Z - Y).sum()
        return value * (self.work.scale / self.work.batch)

    def _gradient(self, parameters: Any, X: Any, Y: Any) -> tuple[Any, Any]:
        """Return J and its gradient: equal chunks in a scan, then the rest."""
        one = jax.value_and_grad(self._loss)
        rows, count = self.chunks[0].stop, len(self.chunks)
        if count == 1:
            total = one(parameters, X, Y)
        else:
            equal = self.work.batch // rows

            def add(total: Any, chunk: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, one(parameters, *chunk)), None

            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
            cut = [array[: equal * rows].reshape(equal, rows, *array.shape[1:]) for array in (X, Y)]
            total, _ = lax.scan(add, zero, tuple(cut))
            if equal * rows < self.work.batch:
                total, _ = add(total, (X[equal * rows :], Y[equal * rows :]))
        return (
            jax.tree.map(lambda value: value / self.work.scale, total)
            if self.work.scale != 1
            else total
        )

    def _step(self, carry: Any, rate: Any, X: Any, Y: Any) -> tuple[Any, Any]:
        parameters, state, t = carry
        if self.case.online:
            X, Y = (lax.dynamic_slice_in_dim(array, t % len(array), 1) for array in (X, Y))
        J, g = self._gradient(parameters, X, Y)
        t = t + 1
        if not state:
            return (jax.tree.map(lambda w, d: w - rate * d, parameters, g), state, t), J
        m = jax.tree.map(lambda m, d: BETAS[0] * m + (1 - BETAS[0]) * d, state[0], g)
        v = jax.tree.map(lambda v, d: BETAS[1] * v + (1 - BETAS[1]) * d * d, state[1], g)
        a, c = 1 - BETAS[0] ** t.astype(jnp.float32), 1 - BETAS[1] ** t.astype(jnp.float32)

        def update(w: Any, m: Any, v: Any) -> Any:
            decay = DECAY if w.ndim == 2 else 0.0
            return w * (1 - rate * decay) - rate * (m / a) / (jnp.sqrt(v / c) + EPSILON)

        return (jax.tree.map(update, parameters, m, v), [m, v], t), J

    def _steps(self, carry: Any, rate: Any, X: Any, Y: Any, count: int) -> tuple[Any, Any]:
        if not self.scan:
            return self._step(carry, rate, X, Y)
        return lax.scan(lambda carry, _: self._step(carry, rate, X, Y), carry, None, length=count)

    def _advance(self, count: int) -> Any:
        self.carry, J = self.steps(self.carry, self.rate, self.X, self.Y, count=count)
        return J

    def losses(self, count: int) -> list[float]:
        return [float(J.reshape(())) for J in (self._advance(1) for _ in range(count))]

    def set_rate(self, rate: float) -> None:
        self.rate = rate

    def run(self, count: int) -> None:
        if self.scan:
            self._advance(count)
        else:
            for _ in range(count):
                self._advance(1)
        jax.block_until_ready(self.carry)

    @property
    def gemms(self) -> Callable[[int], float | None] | None:
        """The step's GEMMs on the whole batch in one jitted call, which allocates its outputs."""
        if self.case.online:
            return None
        keys = iter(jax.random.split(jax.random.key(0), 2 * len(self.case.sizes)))
        normal = functools.partial(jax.random.normal, dtype=self.half or jnp.float32)
        Z = [normal(next(keys), (self.work.batch, n)) for n in self.case.sizes]
        D = [normal(next(keys), (self.work.batch, n)) for n in self.case.sizes]
        W = [jnp.array(w, Z[0].dtype) for w in self.work.W]

        @jax.jit
        def once(Z: Any, D: Any, W: Any) -> Any:
            forward = [z @ w for z, w in zip(Z, W, strict=False)]
            dW = [z.T @ d for z, d in zip(Z, D[1:], strict=False)]
            return forward, dW, [d @ w.T for d, w in zip(D[2:], W[1:], strict=True)]

        def run(count: int) -> None:
            out: Any = None
            for _ in range(count):
                out = once(Z, D, W)
            jax.block_until_ready(out)

        return run

    def peak(self) -> int | None:
        statistics = jax.devices()[0].memory_stats() if self.work.device == "cuda" else None
        return statistics and int(statistics["peak_bytes_in_use"])


def build(work: Work, way: str) -> Jax:
    return Jax(work, way)
