"""mlpcore through its public API."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import mlpcore as mc
from bench.cases import BETAS, DECAY, EPSILON, POOL
from bench.peers import Unsupported
from bench.work import Work
from mlpcore.backends import devices

ENTRIES = 1 << 23  # of X in `fit`


class Mlpcore:
    """`trainer.step` on the batch; one row at a time, `trainer.fit` with a batch size of 1."""

    def __init__(self, work: Work) -> None:
        self.work, case = work, work.case
        net = mc.MLP(case.sizes, case.activation, case.output, device=work.device)
        self.xp = devices.find(net.device).xp
        for l, (W, b) in enumerate(zip(work.W, work.b, strict=True), start=1):
            net.W[l][...], net.b[l][...] = self.xp.asarray(W), self.xp.asarray(b)
        rate = case.rate
        optimizer = (
            mc.SGD(rate) if work.optimizer == "SGD" else mc.AdamW(rate, DECAY, *BETAS, EPSILON)
        )
        precision = None if work.precision == "float32" else work.precision
        # a copy leaves no views, so that no step has to remake its low-precision weights
        self.trainer = mc.Trainer(net.copy(), case.loss, optimizer, precision=precision)
        self.X, self.Y = (self.xp.asarray(array) for array in work.XY)
        plan = self.trainer.plan(work.batch)
        self.note = (
            f"chunks of {plan.rows:,} rows x {plan.workers}"
            if hasattr(plan, "workers")
            else f"chunks of {plan.rows:,} rows"
        )
        self.plan_bytes, self.chunk_rows = plan.total_bytes, plan.rows

    def losses(self, count: int) -> list[float]:
        m = self.work.batch
        parts = [slice(i * m % len(self.X), i * m % len(self.X) + m) for i in range(count)]
        return [float(self.trainer.step(self.X[part], self.Y[part])) for part in parts]

    def set_rate(self, rate: float) -> None:
        self.trainer.optimizer.learning_rate = rate

    def run(self, count: int) -> float | None:
        return self._timed(self._fit if self.work.case.online else self._steps, count)

    def _steps(self, count: int) -> None:
        for _ in range(count):  # on a GPU this does not wait: the event after them does
            self.trainer.step(self.X, self.Y)

    def _fit(self, count: int) -> None:
        epochs, rest = divmod(count, POOL)
        fit = functools.partial(self.trainer.fit, batch_size=1, shuffle=False, progress=False)
        if epochs:
            fit(self.X, self.Y, epochs=epochs)
        if rest:
            fit(self.X[:rest], self.Y[:rest], epochs=1)

    def _timed(self, run: Callable[[int], None], count: int) -> float | None:
        if self.xp.__name__ != "cupy":
            run(count)
            return None
        start, stop = self.xp.cuda.Event(), self.xp.cuda.Event()
        start.record()
        run(count)  # on the current stream
        stop.record()
        stop.synchronize()
        return float(self.xp.cuda.get_elapsed_time(start, stop)) / 1e3

    @property
    def gemms(self) -> Callable[[int], float | None] | None:
        """Return a function that runs the step's GEMMs alone, or None if unavailable."""
        if self.work.case.online:
            return None
        once = gemms(self.trainer, self.X, self.Y)

        def run(count: int) -> None:
            for _ in range(count):
                once()

        return lambda count: self._timed(run, count)

    def peak(self) -> int | None:
        return (
            int(self.xp.get_default_memory_pool().total_bytes())
            if self.xp.__name__ == "cupy"
            else None
        )


class MlpcoreFit(Mlpcore):
    """`trainer.fit` on copies of the batch, one after the other, without shuffling."""

    def __init__(self, work: Work) -> None:
        if work.device != "cpu" or work.case.online:
            raise Unsupported("only on a CPU, and not row by row, where `mlpcore` itself is fit")
        super().__init__(work)
        self.copies = max(4, min(64, ENTRIES // self.X.size))
        self.rows = [np.tile(array, (self.copies, *[1] * (array.ndim - 1))) for array in work.XY]
        # checked beforehand, as they are once in a fit of many epochs
        self.prepared: dict[int, Any] = {}

    def _steps(self, count: int) -> None:
        for batches, epochs in ((self.copies, count // self.copies), (count % self.copies, 1)):
            if batches and epochs:
                self._fit_prepared(batches, epochs)

    def _fit_prepared(self, batches: int, epochs: int) -> None:
        m, trainer = self.work.batch, self.trainer
        if batches not in self.prepared:
            self.prepared[batches] = trainer.prepare(*(rows[: batches * m] for rows in self.rows))
        trainer.fit(
            self.prepared[batches], epochs=epochs, batch_size=m, shuffle=False, progress=False
        )


def gemms(trainer: mc.Trainer, X: Any, Y: Any) -> Callable[[], None]:
    """Run the GEMMs of one step on the whole batch, into preallocated outputs.

    On CUDA they are those of the captured step, chunk by chunk and with its algorithms, as a
    separate graph.
    """
    net = trainer.net
    if net.device != "cpu":
        return trainer.parts(X, Y).products.replay
    from mlpcore.backends.numpy.ops import NumpyOps

    ops, L = NumpyOps(), len(net.sizes) - 1
    cache = net.forward(X)
    _, G = mc.loss(trainer.loss)(cache.output, Y)
    D = net.backward(cache, G, keep=True).D
    Z, S, dW = (
        cache.Z,
        [ops.xp.empty_like(z) for z in cache.Z],
        [ops.xp.empty_like(W) for W in net.W],
    )

    def run() -> None:
        for l in range(1, L + 1):
            ops.gemm(Z[l - 1], net.W[l], S[l])
        for l in range(L, 0, -1):
            ops.gemm(Z[l - 1].T, D[l], dW[l])
            if l > 1:
                ops.gemm(D[l], net.W[l].T, S[l - 1])

    return run


def build(work: Work, way: str) -> Mlpcore:
    try:
        return (MlpcoreFit if way == "fit" else Mlpcore)(work)
    except mc.DeviceUnavailable as error:
        raise Unsupported(str(error)) from error
