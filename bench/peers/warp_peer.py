"""NVIDIA's warp-nn: forward and backward by a Warp tape, on a GPU in one CUDA graph with the
update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import warp as wp
from warp_nn import nn, optimizers
from warp_nn.utils.graph import ScopedCapture

from bench.cases import BETAS, EPSILON
from bench.peers import Unsupported
from bench.work import Work

ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": lambda: nn.GELU(approximate="tanh"),
}


@wp.kernel(grid_stride=False)
def squared_error(Z: wp.array2d[float], Y: wp.array2d[float], scale: float, J: wp.array1d[float]):
    i, j = wp.tid()
    d = Z[i, j] - Y[i, j]
    wp.atomic_add(J, 0, 0.5 * scale * d * d)


class Warp:
    """float32 and squared error only; its Adam has no decoupled decay: less work than AdamW."""

    gemms: Callable[[int], float | None] | None = None

    def __init__(self, work: Work) -> None:
        self.work, case = work, work.case
        if case.loss != "squared_error" or case.online or work.precision not in ("float32", "tf32"):
            raise Unsupported("warp-nn is driven here for squared error in float32")
        wp.config.quiet = True
        self.device = wp.get_device("cuda:0" if work.device == "cuda" else "cpu")
        with wp.ScopedDevice(self.device):
            layers: list[Any] = []
            for W, b in zip(work.W, work.b, strict=True):
                linear = nn.Linear(*W.shape)
                linear.weight.data.assign(W.T)
                linear.bias.data.assign(b[:, None])
                layers += [linear, ACTIVATIONS[case.activation]()]
            self.net, self.parameters = nn.Sequential(*layers[:-1]), []
            for linear in layers[::2]:
                self.parameters += [linear.weight.data, linear.bias.data]
            self.X, self.Y = (
                wp.array(array, dtype=wp.float32, device=self.device) for array in work.XY
            )
            self.J = wp.zeros(1, dtype=wp.float32, requires_grad=True, device=self.device)
            settings: dict[str, Any] = {
                "lr": case.rate,
                "device": self.device,
                "disable_graph": True,
            }
            if work.optimizer == "SGD":
                self.optimizer: Any = optimizers.SGD(self.parameters, **settings)
            else:
                self.optimizer = optimizers.Adam(
                    self.parameters, betas=BETAS, eps=EPSILON, **settings
                )
        self.note = "Adam, without decay" if work.optimizer == "AdamW" else ""
        self.rate: float | None = None
        self.graph: Any = None

    def _step(self) -> None:
        tape = wp.Tape()
        self.J.zero_()
        with tape:
            Z = self.net(self.X)
            wp.launch(
                squared_error,
                Z.shape,
                [Z, self.Y, 1.0 / self.work.batch],
                [self.J],
                device=self.device,
            )
        tape.backward(self.J)
        self.optimizer.step(lr=self.rate)
        tape.zero()  # its gradients accumulate, also those of the cached outputs

    def losses(self, count: int) -> list[float]:
        values = []
        for _ in range(count):
            self._step()
            values.append(float(self.J.numpy()[0]))
        return values

    def set_rate(self, rate: float) -> None:
        self.rate = rate
        if self.device.is_cuda:
            with ScopedCapture(device=self.device) as capture:
                self._step()
            self.graph = capture.graph

    def run(self, count: int) -> float | None:
        start, stop = (
            wp.Event(self.device, enable_timing=True) if self.device.is_cuda else None
            for _ in range(2)
        )
        if self.device.is_cuda:
            wp.record_event(start)
        for _ in range(count):
            wp.capture_launch(self.graph) if self.graph else self._step()
        if self.device.is_cuda:
            wp.record_event(stop)
        wp.synchronize_device(self.device)
        return wp.get_event_elapsed_time(start, stop) / 1e3 if self.device.is_cuda else None

    def peak(self) -> int | None:
        return int(wp.get_mempool_used_mem_high(self.device)) if self.device.is_cuda else None


def build(work: Work, way: str) -> Warp:
    return Warp(work)
