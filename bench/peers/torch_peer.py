"""PyTorch: eager, compiled, the whole step as one CUDA graph, and accumulating over chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.cases import BETAS, DECAY, EPSILON
from bench.peers import Unsupported
from bench.work import Work
from mlpcore.backends import machine

ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": lambda: nn.GELU(approximate="tanh"),
}


class Torch:
    """Linear layers, fused optimizer, autocast for half precisions; `way` names the variant."""

    def __init__(self, work: Work, way: str) -> None:
        self.work, self.case, self.way, self.device = (
            work,
            work.case,
            way,
            torch.device(work.device),
        )
        self.cuda = self.device.type == "cuda"
        if self.cuda and not torch.cuda.is_available():
            raise Unsupported("this PyTorch finds no CUDA device")
        if "graph" in way and not self.cuda:
            raise Unsupported("CUDA graphs need a GPU")
        if self.case.online and way != "eager":
            raise Unsupported("one row at a time: eager only")
        torch.set_num_threads(machine.usable_cpus())
        torch.backends.cuda.matmul.allow_tf32 = work.precision == "tf32"
        self.half = (
            getattr(torch, work.precision) if work.precision in ("float16", "bfloat16") else None
        )
        self.net = self._net()
        self.X, self.Y = (torch.from_numpy(array).to(self.device) for array in work.XY)
        self.chunks = work.chunks if "chunks" in way else [slice(0, work.batch)]
        self.note = f"accumulates over {len(self.chunks)} chunks" if "chunks" in way else ""
        self.rate: Any = (
            torch.tensor(self.case.rate, device=self.device) if "graph" in way else self.case.rate
        )
        self.optimizer = self._optimizer()
        # fused optimizers divide the gradient by this, as torch.amp.GradScaler has them do
        if work.precision == "float16":
            self.optimizer.grad_scale = torch.tensor(work.scale, device=self.device)
            self.optimizer.found_inf = torch.tensor(0.0, device=self.device)
        self.loss: Callable[..., Any] = (
            torch.compile(self._loss) if "compile" in way else self._loss
        )
        self.replay = self._capture_step() if "graph" in way else None

    def _net(self) -> nn.Sequential:
        sizes, layers = self.case.sizes, []
        for l, (m, n) in enumerate(itertools.pairwise(sizes)):
            linear = nn.utils.skip_init(nn.Linear, m, n)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(self.work.W[l].T))
                linear.bias.copy_(torch.from_numpy(self.work.b[l]))
            layers += [linear, ACTIVATIONS[self.case.activation]()]
        return nn.Sequential(*layers[:-1]).to(self.device)

    def _optimizer(self) -> Any:
        parameters = list(self.net.parameters())
        if self.work.optimizer == "SGD":
            return torch.optim.SGD(parameters, self.rate, fused=True)
        groups = [
            {"params": parameters[::2], "weight_decay": DECAY},
            {"params": parameters[1::2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, self.rate, BETAS, EPSILON, fused=True, capturable=self.cuda
        )

    def _loss(self, X: Any, Y: Any) -> Any:
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            out = self.net(X)
        if self.case.loss == "cross_entropy":
            return functional.cross_entropy(out.float(), Y)
        return (out.float() - Y).square().sum() * (0.5 / len(X))

    def _step(self, row: int = 0) -> Any:
        self.optimizer.zero_grad(set_to_none=True)
        total: Any = 0.0
        for part in self.chunks:
            share = (part.stop - part.start) / self.work.batch
            J = self.loss(
                self.X[part.start + row : part.stop + row],
                self.Y[part.start + row : part.stop + row],
            )
            (J * (share * self.work.scale)).backward()
            total = total + J.detach() * share
        self.optimizer.step()
        return total

    def _capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record `run` as a CUDA graph after three warm-up runs; return its replay and result."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        return graph.replay, result

    def _capture_step(self) -> Callable[[], Any]:
        self.rate.fill_(0)  # the warm-up runs must not change the weights
        self.optimizer.zero_grad(set_to_none=True)
        replay, J = self._capture(self._step)
        for state in self.optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value):
                    value.zero_()
        self.rate.fill_(self.case.rate)

        def step() -> Any:
            replay()
            return J

        return step

    def losses(self, count: int) -> list[float]:
        if self.replay:
            return [float(self.replay()) for _ in range(count)]
        return [float(self._step(i * self.work.batch % len(self.X))) for i in range(count)]

    def set_rate(self, rate: float) -> None:
        if torch.is_tensor(self.rate):
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def run(self, count: int) -> float | None:
        if self.replay:
            return self._timed(lambda i: self.replay(), count)
        return self._timed(lambda i: self._step(i * self.work.batch % len(self.X)), count)

    def _timed(self, run: Callable[[int], Any], count: int) -> float | None:
        if not self.cuda:
            for i in range(count):
                run(i)
            return None
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(count):
            run(i)
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    @property
    def gemms(self) -> Callable[[int], float | None] | None:
        """Run the step's GEMMs on the whole batch by torch.mm, on a GPU as a CUDA graph."""
        if self.case.online:
            return None
        options = {"device": self.device, "dtype": self.half or torch.float32}
        Z = [torch.randn(self.work.batch, n, **options) for n in self.case.sizes]
        D, S = [torch.randn_like(z) for z in Z], [torch.empty_like(z) for z in Z]
        W = [linear.weight.detach().to(options["dtype"]) for linear in self.net[::2]]
        dW, L = [torch.empty_like(w) for w in W], len(W)

        @torch.no_grad()
        def once() -> None:
            for l in range(L):
                torch.mm(Z[l], W[l].T, out=S[l + 1])
            for l in reversed(range(L)):
                torch.mm(D[l + 1].T, Z[l], out=dW[l])
                if l:
                    torch.mm(D[l + 1], W[l], out=S[l])

        replay = self._capture(once)[0] if self.cuda else once
        return lambda count: self._timed(lambda i: replay(), count)

    def peak(self) -> int | None:
        return int(torch.cuda.max_memory_allocated()) if self.cuda else None


def build(work: Work, way: str) -> Torch:
    return Torch(work, way)
