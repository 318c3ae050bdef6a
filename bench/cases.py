"""The measured cases: named networks, the points of each suite, and shared settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
DECAY, BETAS, EPSILON = 1e-2, (0.9, 0.999), 1e-8  # of AdamW; decay acts on weights, not on biases
STATES = {"SGD": 0, "AdamW": 2}  # vectors of the parameters' length kept by an optimizer
# the learning rate while timing: weights and gradients hardly change, none becomes denormal
TIMED_RATE = 1e-8
STEPS = 10  # steps whose losses are compared
START = 10.0  # seconds for a process to import its library and take the first steps
COMPILE = {  # seconds more for a compiler
    "torch-compile": 40.0, "torch-compile-graph": 40.0, "jax": 15.0, "jax-scan": 15.0,
    "jax-chunks": 15.0,
}  # fmt: skip
CALIBRATE = 2.0  # seconds for a process to choose the steps per block, and to exit
POOL = 1000  # rows in the case of one row at a time


@dataclass(frozen=True)
class Case:
    """A network and its loss: `sizes` n_0 … n_L, hidden activation, "cross_entropy" (softmax) or
    "squared_error".
    """

    name: str
    sizes: tuple[int, ...]
    activation: str
    loss: str
    online: bool = False
    data: str = "normal"

    @property
    def output(self) -> str:
        """Activation of the last layer."""
        return "softmax" if self.loss == "cross_entropy" else "identity"

    @property
    def parameters(self) -> int:
        """Numbers in all W and b."""
        return sum((m + 1) * n for m, n in zip(self.sizes, self.sizes[1:], strict=False))

    @property
    def rate(self) -> float:
        """Learning rate of the ten compared steps: the losses change, and none diverges."""
        return 0.05 / max(self.sizes)


_ALL = [
    Case("784-128-10", (784, 128, 10), "relu", "cross_entropy"),
    Case("784-512-512-10", (784, 512, 512, 10), "relu", "cross_entropy"),
    Case("64-64-64-64-1", (64, 64, 64, 64, 1), "tanh", "squared_error"),
    Case("gelu", (256, 1024, 1024, 256), "gelu", "squared_error"),
    Case("wide", (4096,) * 5, "relu", "squared_error"),
    Case("deep", (256,) * 17, "tanh", "squared_error"),
    Case("narrow", (64,) * 5, "relu", "squared_error"),
    Case("latency", (256,) * 4, "relu", "squared_error"),
    Case("tabular", (173, 128, 64, 2), "relu", "cross_entropy", data="flights"),
    Case("online", (2, 8, 8, 1), "sigmoid", "squared_error", online=True),
]
CASES = {case.name: case for case in _ALL}


@dataclass(frozen=True)
class Point:
    """One row of a result: a case, batch size, optimizer, precision and device."""

    case: str
    batch: int
    optimizer: str = "SGD"
    precision: str = "float32"
    device: str = "cpu"

    @property
    def key(self) -> str:
        """Name of the point in a result, such as `784-128-10/128/SGD/float32/cpu`."""
        return f"{self.case}/{self.batch}/{self.optimizer}/{self.precision}/{self.device}"


@dataclass(frozen=True)
class Suite:
    """Points and how they are measured.

    Attributes:
        rounds: interleaved repeats; `seconds` per timed block, after a `pause`.
        peers: implementations to compare with mlpcore; `memory`: True to measure peak memory, on a
            CPU in separate processes.
        limit: seconds of blocks that a point may take; beyond it there are fewer rounds, at least
            6.
        patience: seconds that a process may take for an answer, compilation included.
        budget: seconds for the whole run, 0 for no limit; a point expected to end later is left for
            another run.
        expected: what the command prints before it starts.
    """

    points: Sequence[Point]
    peers: Sequence[str]
    rounds: int = 11
    seconds: float = 0.1
    pause: float = 0.1
    memory: bool = True
    limit: float = 60.0
    patience: float = 300.0
    budget: float = 0.0
    expected: str = ""
    light: Sequence[str] = field(default=())  # peers of the points in `sweep`
    sweep: frozenset[str] = frozenset()

    def peers_of(self, point: Point) -> Sequence[str]:
        """Return the peers of one point."""
        return self.light if point.key in self.sweep else self.peers

    def reckoned(self, point: Point) -> float:
        """Return the seconds that a point should take at most.

        mlpcore starts twice, one after the other, then the peers start and compile side by side.
        """
        peers = self.peers_of(point)
        compiling = max((COMPILE.get(name, 0.0) for name in peers), default=0.0)
        return (2 + bool(peers)) * START + compiling + (2 + len(peers)) * CALIBRATE + self.limit


def _points(
    case: str,
    batches: Sequence[int],
    optimizers: str = "SGD AdamW",
    precisions: str = "float32",
    device: str = "cpu",
):
    return [
        Point(case, m, o, p, device)
        for p in precisions.split()
        for m in batches
        for o in optimizers.split()
    ]


TABLE = [  # the table of docs/performance.md
    *_points("784-128-10", (32, 128, 512)),
    *_points("784-512-512-10", (128, 1024, 8192)),
    *_points("64-64-64-64-1", (32, 1024, 65536)),
    *_points("gelu", (512,)),
]
_CPU_PEERS = ("torch", "torch-compile", "torch-chunks", "jax", "jax-scan", "jax-chunks", "sklearn")
_GPU_LIGHT = ("torch-graph", "jax-scan")
_GPU_PEERS = ("torch", "torch-compile", "torch-graph", "torch-compile-graph", "jax-scan")
_CPU_SWEEP = [
    *_points("64-64-64-64-1", (1, 8192, 262144, 1048576), "SGD"),
    *_points("784-128-10", (1, 8192), "AdamW"),
    *_points("tabular", (256, 16384), "AdamW"),
    *_points("deep", (1, 64, 1024), "AdamW"),
    *_points("wide", (128,), "SGD"),
    *_points("narrow", (1024, 65536), "AdamW"),
    *_points("online", (1,), "SGD"),
]
_GPU = [  # what matters most comes first
    *_points("wide", (8192,), "AdamW", "bfloat16", "cuda"),
    *_points("latency", (128,), "AdamW", "float32", "cuda"),
    *_points("narrow", (2**18,), "AdamW", "float16", "cuda"),
    *_points("784-512-512-10", (1024,), "AdamW", "tf32", "cuda"),
]
_GPU_LARGE = _points("784-512-512-10", (65536,), "AdamW", "tf32", "cuda")
_GPU_SWEEP = [
    *_points("wide", (8192,), "AdamW", "tf32", "cuda"),
    *_points("narrow", (2**18,), "SGD", "float32", "cuda"),
    *_points("784-512-512-10", (128, 8192), "AdamW", "tf32", "cuda"),
    *_points("narrow", (128, 8192, 1048576), "AdamW", "float16", "cuda"),
    *_points("wide", (1024,), "AdamW", "bfloat16", "cuda"),
    *_points("deep", (1024,), "AdamW", "tf32", "cuda"),
    *_points("tabular", (65536,), "AdamW", "tf32", "cuda"),
]
_ON_GPU: dict[str, Any] = {"rounds": 9, "seconds": 0.03, "pause": 0.01, "limit": 8, "patience": 90}

SUITES = {
    "quick": Suite(
        [Point("784-128-10", 128, "AdamW"), Point("64-64-64-64-1", 8192, "SGD")],
        ("torch", "jax-scan", "sklearn"),
        rounds=6, seconds=0.03, pause=0.05, limit=5, expected="under a minute on two cores",
    ),
    "step": Suite(TABLE, (), rounds=21, seconds=0.15, memory=False, expected="about 7 minutes"),
    "cpu": Suite(
        [*TABLE, *_CPU_SWEEP], _CPU_PEERS,
        expected="about an hour on two cores with every peer, 10 minutes with none; "
        "it can be interrupted and resumed",
    ),
    "gpu": Suite(
        [*_GPU, *_GPU_LARGE], _GPU_PEERS, **_ON_GPU, budget=480,
        expected="at most 8 minutes on one GPU; repeat the command to measure what does not fit",
        light=_GPU_LIGHT, sweep=frozenset(point.key for point in _GPU_LARGE),
    ),
    "gpu-sweep": Suite(
        _GPU_SWEEP, ("torch", *_GPU_LIGHT, "warp-nn"), **_ON_GPU,
        expected="about 12 minutes on one GPU (estimated)",
    ),
}  # fmt: skip
