"""The launch plan of a training step, counted on a null device: no GPU is needed.

    python bench/launch_plan.py [--case narrow] [--no-epilogues]

It counts the nodes of a step's graphs, the host's launches for a step (of graphs and of single
kernels), and the bytes that kernels and products read and write: each array once when it is read
and once when it is written. Partial sums, counters, the slot and the workspace of the products are
left out. Every epilogue of the product library is assumed to pay off.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

import mlpcore as mc
from bench import bounds, null_device
from bench.cases import CASES, Case, Point
from mlpcore.backends.cuda.gemm import Product
from mlpcore.backends.cuda.source import TYPES

POINTS = (
    Point("wide", 8192, "AdamW", "bfloat16", "cuda"),
    Point("latency", 128, "AdamW", "float32", "cuda"),
    Point("narrow", 2**18, "AdamW", "float16", "cuda"),
    Point("784-512-512-10", 1024, "AdamW", "float32", "cuda"),
    Point("784-512-512-10", 1024, "AdamW", "tf32", "cuda"),
)
SIZES = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}  # bytes per entry
REGISTERS, SHARED = 256 << 10, 227 << 10  # bytes of one multiprocessor
LATENCY = 1.5e-6, 3e-6  # seconds of a node that depends on the one before
BANDWIDTH = 3.0e12  # bytes a second
FIT_STEPS = 64  # steps of the epoch in which the launches of `fit` are counted
LEGEND = """\
Counted on a device that computes nothing, not measured. Nodes: kernels and products in the graphs
of a `trainer.step(X, Y)`. Launches: of graphs + of single kernels, by the host, in such a step; and
both together in a step of `fit`. All run on one stream, so that nodes and single kernels form one
chain, reckoned at 1.5 to 3 us each. Read, written: each array that a kernel or product reads or
writes, once each time; moved is their sum. Least: X and Y read once; the parameters read once by
the products in the layers' type; by the update, parameters and optimizer state read and written,
the gradient written and read, a low-precision copy written. A hidden Z[l], and every D[l], count as
written and read once each, unless they can stay on the chip: where the whole batch's fit into the
registers of all multiprocessors (256 KiB each), or where the parameters and a float32 gradient fit
into the registers and shared memory (227 KiB) of one multiprocessor, which then takes the rows tile
by tile."""


# -- events on the device --------------------------------------------------------------------------


class Call(NamedTuple):
    """A launch of a kernel: its instance, e.g. "gather<float, half_t, 8>", and its arguments."""

    source: str
    name: str
    arguments: tuple[Any, ...]

    @property
    def kernel(self) -> str:
        """The name without template arguments."""
        return self.name.partition("<")[0]

    @property
    def template(self) -> list[str]:
        """The template arguments."""
        return [part.strip() for part in self.name.partition("<")[2].removesuffix(">").split(",")]

    def nbytes(self, *indices: int) -> int:
        """Return the bytes of the arrays among these arguments; None has none."""
        return sum(0 if self.arguments[i] is None else self.arguments[i].nbytes for i in indices)

    def constant(self, name: str) -> str:
        """Return the value of a constant in the kernel's source, e.g. "true" for "reads_z"."""
        found = re.search(rf"\b{name} = (\w+)", self.source)
        if found is None:
            raise ValueError(f"the source of {self.name} does not define {name}")
        return found[1]


class Multiplication(NamedTuple):
    """A product, and whether it reads a bias and writes the pre-activation."""

    product: Product
    bias: bool
    aux: bool

    @property
    def kernel(self) -> str:
        """The name in the table."""
        return f"product + {self.product.epilogue}" if self.product.epilogue else "product"


Node = Call | Multiplication


class Graph:
    """A recording of nodes; a replay is an event of its device."""

    def __init__(self, device: NotingDevice, nodes: list[Node]):
        self.device, self.nodes = device, nodes

    def replay(self) -> None:
        """Record the launch of the graph."""
        self.device.events.append(self)


class NotingDevice(null_device.NullDevice):
    """A null device that records its launches.

    Attributes:
        events: launches by the host, in order: graphs, or single kernels and products.
        epilogues: whether a product with an activation counts as faster than two launches.
    """

    def __init__(self, epilogues: bool = True):
        super().__init__()
        self.epilogues = epilogues
        self.events: list[Graph | Node] = []
        self._recorded: list[Node] | None = None

    def kernel(self, source: str, name: str) -> tuple[str, str]:
        """Return source and name."""
        return source, name

    def launch(self, kernel: tuple[str, str], launch: Any, arguments: Sequence[object]) -> None:
        """Record a launch."""
        self._note(Call(*kernel, tuple(map(_as_it_is, arguments))))

    def bind(
        self,
        kernel: tuple[str, str],
        launch: Any,
        arguments: Sequence[object],
    ) -> Callable[[], None]:
        """Return a function that records the launch with its current arguments."""
        return lambda: self.launch(kernel, launch, arguments)

    def multiply(
        self, product: Product, algorithm: bytes, left: int, right: int, result: int, bias: int,
        aux: int, workspace: int,
    ) -> None:  # fmt: skip
        """Record a product."""
        self._note(Multiplication(product, bool(bias), bool(aux)))

    def seconds(self, run: Callable[[], None]) -> float:
        """Return one microsecond per node of `run`; always 1 if epilogues do not pay off."""
        before = len(self.events)
        run()
        nodes = sum(len(nodes_of(event)) for event in self.events[before:])
        del self.events[before:]
        return 1e-6 * nodes if self.epilogues else 1e-6

    def record(self, run: Callable[[], None]) -> Graph:
        """Return the nodes that `run` launches, as a graph."""
        self._recorded = nodes = []
        try:
            run()
        finally:
            self._recorded = None
        return Graph(self, nodes)

    def _note(self, node: Node) -> None:
        (self.events if self._recorded is None else self._recorded).append(node)


def _fields(argument: Any) -> Sequence[str]:
    """Return the field names of a structured value, () for anything else."""
    return getattr(getattr(argument, "dtype", None), "names", None) or ()


def _as_it_is(argument: Any) -> object:
    """Return a copy of a structured value, which is passed by value; anything else itself."""
    return argument.copy() if _fields(argument) and argument.ndim == 0 else argument


def nodes_of(event: Graph | Node) -> list[Node]:
    """Return the nodes of a launch by the host."""
    return event.nodes if isinstance(event, Graph) else [event]


# -- bytes -----------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """Bytes read and written."""

    read: int
    written: int


def entry(name: str) -> int:
    """Return the bytes of a C++ type."""
    dtype = next(dtype for dtype, text in TYPES.items() if text == name)
    return SIZES[dtype] if dtype in SIZES else np.dtype(dtype).itemsize


def _gather(call: Call) -> Moved:
    return Moved(call.arguments[1].size * entry(call.template[0]), call.nbytes(1))


def _bias_activation(call: Call) -> Moved:
    keeps = call.template[3] == "true"
    return Moved(call.nbytes(0, 1), call.nbytes(2, *[0] * keeps))


def _activation_gradient(call: Call) -> Moved:
    slope = [i for i, name in ((1, "reads_s"), (2, "reads_z")) if call.constant(name) == "true"]
    return Moved(call.nbytes(0, *slope, *_accumulated(call, 9, 4)), call.nbytes(3, 4))


def _activation_gradient_learned(call: Call) -> Moved:
    read, written = _activation_gradient(call)
    return Moved(read + call.nbytes(*_accumulated(call, 9, 11)), written + call.nbytes(11))


def _elementwise_loss(call: Call) -> Moved:
    m, n = call.arguments[14:16]
    return Moved(
        call.nbytes(0, 6, *_accumulated(call, 16, 9)) + _given(call, m * n, m), call.nbytes(8, 9)
    )


def _softmax_cross_entropy(call: Call) -> Moved:
    m, n = call.arguments[15:17]
    targets = m if call.arguments[6] else m * n
    read = call.nbytes(0, 7, *_accumulated(call, 17, 10)) + _given(call, targets, m)
    return Moved(read, call.nbytes(9, 10))


def _given(call: Call, targets: int, rows: int) -> int:
    """Return the bytes of a loss's targets and row weights, from arrays or through the slot."""
    weights = rows * entry(call.template[2]) if call.arguments[5] else 0
    return targets * entry(call.template[1]) + weights


def _update(call: Call) -> Moved:
    writes = int(call.constant("writes"))
    return Moved(call.nbytes(*range(4)), call.nbytes(4, *(i for i in range(4) if writes >> i & 1)))


def _accumulated(call: Call, flag: int, sums: int) -> list[int]:
    """Return the position of the sums, which are also read if the argument `flag` is true."""
    return [sums] if call.arguments[flag] else []


# The bytes that a call moves, by kernel; the numbers are positions among the kernel's arguments.
MODEL: dict[str, Callable[[Call], Moved]] = {
    "set_slot": lambda call: Moved(0, 0),
    "recast": lambda call: Moved(call.nbytes(0), call.nbytes(1)),
    "gather": _gather,
    "sum_weights": lambda call: Moved(call.arguments[5] * entry(call.template[0]), 0),
    "bias_activation": _bias_activation,
    "bias_activation_dropout": _bias_activation,
    "bias_activation_learned": _bias_activation,
    "bias_activation_learned_dropout": _bias_activation,
    "activation_gradient": _activation_gradient,
    "activation_gradient_learned": _activation_gradient_learned,
    "softmax": lambda call: Moved(call.nbytes(0, 1), call.nbytes(2)),
    "softmax_gradient": lambda call: Moved(call.nbytes(0, 1), call.nbytes(2)),
    "log_softmax": lambda call: Moved(call.nbytes(0, 1), call.nbytes(2)),
    "log_softmax_gradient": lambda call: Moved(call.nbytes(0, 1), call.nbytes(2)),
    "elementwise_loss": _elementwise_loss,
    "softmax_cross_entropy": _softmax_cross_entropy,
    "prepare_update": lambda call: Moved(call.nbytes(4), 0),  # also w, with penalties
    "update": _update,
}


def moved(node: Node) -> Moved:
    """Return the bytes that a node reads and writes.

    Raises:
        ValueError: the kernel is not in `MODEL`.
    """
    if isinstance(node, Call):
        if node.kernel not in MODEL:
            raise ValueError(
                f"bench/launch_plan.py does not know which arrays the kernel "
                f"{node.kernel!r} reads and writes: add it to MODEL, which has {', '.join(MODEL)}"
            )
        return MODEL[node.kernel](node)
    p = node.product
    factors = SIZES[p.dtype] * (p.m * p.k + p.k * p.n)
    result = SIZES[p.result_dtype] * p.m * p.n
    bias = node.bias * SIZES[p.result_dtype] * p.m
    return Moved(factors + bias + p.accumulate * result, result + node.aux * result)


def least(case: Case, point: Point, multiprocessors: int) -> int:
    """Return the least bytes that a step must move, as defined in LEGEND."""
    item, wide = SIZES[point.precision], SIZES["float32"]
    low = item != wide
    count = bounds.traffic(case, point.batch, point.optimizer) + 2 * wide * case.parameters
    count += (1 + low) * item * case.parameters
    outputs = case.sizes[1:]
    in_all = point.batch * sum(outputs) * item <= multiprocessors * REGISTERS
    in_one = case.parameters * (item + wide) <= REGISTERS + SHARED
    if not in_all and not in_one:
        count += 2 * item * point.batch * (sum(outputs[:-1]) + sum(outputs))
    return count


# -- counting --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaunchPlan:
    """The counts of one step.

    Attributes:
        title: network, precision and batch.
        graphs, singles: launches of graphs, and of kernels outside of graphs.
        kernels: how often each kernel runs, in the order of their first runs.
        nodes: kernels and products in the graphs.
        moved: bytes read and written.
        least: bytes that a step must move.
        fit_launches: launches per step in `fit`.
    """

    title: str
    graphs: int
    singles: int
    kernels: Counter[str]
    nodes: int
    moved: Moved
    least: int
    fit_launches: float

    @property
    def chain(self) -> int:
        """Number of nodes and single kernels, which run one after the other."""
        return self.nodes + self.singles


def data(case: Case, rows: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Return X and Y of zeros, which take no memory until written."""
    X = np.zeros((rows, case.sizes[0]), dtype)
    classes = case.loss == "cross_entropy"
    return X, np.zeros(rows, np.int64) if classes else np.zeros((rows, case.sizes[-1]), dtype)


def steady(device: NotingDevice, trainer: mc.Trainer, X: Any, Y: Any) -> list[Graph | Node]:
    """Return the host's launches for a step once everything is recorded."""
    for _ in range(3):
        device.events.clear()
        trainer.step(X, Y)
    return list(device.events)


def count(case: Case, point: Point, epilogues: bool = True) -> LaunchPlan:
    """Count a step of AdamW on a device of 132 multiprocessors."""
    precision = None if point.precision == "float32" else point.precision
    with null_device.installed(NotingDevice(epilogues)) as device:
        assert isinstance(device, NotingDevice)
        net = mc.MLP(case.sizes, case.activation, case.output, init="zeros", device="cuda")
        optimizer = getattr(mc, point.optimizer)(1e-3)
        trainer = mc.Trainer(net, case.loss, optimizer, precision=precision)
        events = steady(device, trainer, *data(case, point.batch))
        many = trainer.prepare(*data(case, FIT_STEPS * point.batch, "uint8"))
        runs = []
        for _ in range(2):  # the first records, the second replays
            device.events.clear()
            trainer.fit(many, epochs=1, batch_size=point.batch, shuffle=False, progress=False)
            runs.append(len(device.events))
    kernels: Counter[str] = Counter()
    read = written = 0
    for node in itertools.chain(*map(nodes_of, events)):
        kernels[node.kernel] += 1
        one = moved(node)
        read, written = read + one.read, written + one.written
    graphs = [event for event in events if isinstance(event, Graph)]
    return LaunchPlan(
        f"{'-'.join(map(str, case.sizes))}, {point.precision}, {point.batch:,} rows",
        len(graphs), len(events) - len(graphs), kernels, sum(len(graph.nodes) for graph in graphs),
        Moved(read, written), least(case, point, device.multiprocessors), runs[-1] / FIT_STEPS,
    )  # fmt: skip


# -- the table -------------------------------------------------------------------------------------

HEAD = (
    "step", "nodes", "launches", "launches in fit", "kernels", "read", "written", "least",
    "moved / least", "chain", "at 1.5 to 3 us each", "bytes at 3 TB/s",
)  # fmt: skip


def size(count: int) -> str:
    """Return `1500000` as "1.50 MB"."""
    unit, factor = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / factor:.2f} {unit}"


def row(plan: LaunchPlan) -> str:
    """Return a plan as a row of the table."""
    kernels = ", ".join(f"{name} {times}" for name, times in plan.kernels.items())
    together = sum(plan.moved)
    fast, slow = (1e6 * plan.chain * seconds for seconds in LATENCY)
    cells = (
        plan.title, plan.nodes, f"{plan.graphs} + {plan.singles}", f"{plan.fit_launches:.3g}",
        kernels, *map(size, (*plan.moved, plan.least)), f"{together / plan.least:.2f}", plan.chain,
        f"{fast:.0f} to {slow:.0f} us", f"{1e6 * together / BANDWIDTH:,.1f} us",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def table(plans: Sequence[LaunchPlan]) -> str:
    """Return the plans as a Markdown table."""
    return "\n".join([f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *map(row, plans)])


def main(arguments: Sequence[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    names = {p: f"{p.key} {'-'.join(map(str, CASES[p.case].sizes))}" for p in POINTS}
    parser.add_argument("--case", default="", help="only those whose names or sizes contain this")
    never = "assume that no activation in a product's epilogue pays off"
    parser.add_argument("--no-epilogues", action="store_true", help=never)
    options = parser.parse_args(arguments)
    points = [point for point, name in names.items() if options.case in name]
    if not points:
        known = "; ".join(names.values())
        parser.error(f"--case {options.case!r}: expected a part of one of {known}")
    plans = [count(CASES[point.case], point, not options.no_epilogues) for point in points]
    print(table(plans), LEGEND, sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
