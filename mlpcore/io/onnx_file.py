"""Networks as ONNX files, for inference elsewhere: opset 17, one Gemm for each layer.

    input "X" (rows, n_0)      Z[0] = (X - mean) / scale
    output "Z" (rows, n_L)     Z = Z[L] · target_scale + target_mean

Activations are written out in primitive operations. A formula is compiled to the same `Program`
that NumPy and CUDA run, so every activation, including user-defined ones, computes the same
operations in the same order. ONNX lacks expm1 and log1p: they are composed so that no digits are
lost near 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks import arrays
from mlpcore.core.activations import Activation, resolve
from mlpcore.core.architecture import Architecture
from mlpcore.core.formulas import reads
from mlpcore.core.program import program
from mlpcore.io.atomic import replacing
from mlpcore.io.model_file import as_json, require_text

Array = NDArray[Any]
OPSET, IR = 17, 8  # matching versions that every runtime since 2022 reads
NUMBERS, PARTS = {1, 5}, {2, 3, 4, 6, 7, 8, 14, 20, 25, 26}  # fields of ModelProto in onnx.proto
NEEDED = {1, 7}  # required fields: the version of the format, and the graph
LARGEST = (2 << 30) - (1 << 20)  # largest size in bytes of arrays in a protobuf message
SAME = {
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "negative": "Neg",
    "maximum": "Max", "minimum": "Min", "tanh": "Tanh", "exp": "Exp", "log": "Log", "abs": "Abs",
    "sqrt": "Sqrt", "sign": "Sign", "copy": "Identity", "sin": "Sin", "cos": "Cos",
}  # fmt: skip


def as_rows(
    sizes: Sequence[int], given: Mapping[str, Any], adopt: Callable[[object, str], Array]
) -> dict[str, Array | None]:
    """Return "mean" and "scale" (n_0,), "target_mean" and "target_scale" (n_L,), checked.

    Raises:
        TypeError, ValueError: one is not numeric or has another shape; names it.
    """
    return {
        name: None
        if value is None
        else arrays.row_of(value, sizes[-1 if name.startswith("target") else 0], name, adopt=adopt)
        for name, value in given.items()
    }


def write(
    path: str | os.PathLike[str],
    architecture: Architecture,
    parameters: Array,
    rows: Mapping[str, Array | None],
    about: Mapping[str, Any],
) -> None:
    """Write a network as an ONNX file, atomically, in the dtype of its parameters.

    Args:
        path: path of the file.
        architecture: architecture of the network; a tied matrix is stored once.
        parameters: flat, on the host.
        rows: as `as_rows` returns them.
        about: notes to store; JSON must be able to hold them.

    Raises:
        ImportError: the package onnx is not installed.
        ValueError: the parameters exceed the 2 GiB of an ONNX file; or in their dtype, they or
            `rows` are not finite, or "scale" contains 0.
        TypeError, ValueError: `about` is not a dict with text keys, or JSON cannot hold it.
        OSError: the file cannot be written; the existing file is left intact.
    """
    notes = _notes(about)
    try:
        from onnx import checker, helper, numpy_helper
    except ImportError:
        raise ImportError("ONNX files need the package onnx: pip install 'mlpcore[onnx]'") from None
    if parameters.nbytes > LARGEST:
        raise ValueError(
            f"the parameters are {parameters.nbytes:,} bytes; an ONNX file holds at most 2 GiB"
        )
    if not np.isfinite(parameters).all():
        raise ValueError(
            f"the network's parameters must be finite; {np.sum(~np.isfinite(parameters)):,} are not"
        )
    layout, _, dtype = architecture
    graph = _Graph(dtype)
    _add_network(graph, architecture, parameters, _cast(rows, dtype))
    number = helper.np_dtype_to_tensor_dtype(dtype)
    nodes = [
        helper.make_node(op, given, [out], name=out, **attributes)
        for op, given, out, attributes in graph.nodes
    ]
    ends = [
        helper.make_tensor_value_info(end, number, ["rows", n])
        for end, n in zip("XZ", layout.sizes[:: layout.layers], strict=True)
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in graph.arrays.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "mlpcore", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="mlpcore",
    )
    helper.set_model_props(model, notes)
    checker.check_model(model)
    with replacing(path) as file:
        file.write(model.SerializeToString())


def _cast(rows: Mapping[str, Array | None], dtype: np.dtype[Any]) -> dict[str, Array]:
    """Return the rows that are not None in this dtype; raise a ValueError unless finite."""
    with np.errstate(over="ignore", under="ignore"):
        cast = {name: row.astype(dtype) for name, row in rows.items() if row is not None}
    for name, row in cast.items():
        if not np.isfinite(row).all():
            raise ValueError(
                f"{name} must be finite in the network's dtype, {dtype}; it holds numbers "
                "beyond its range"
            )
        if name in ("scale", "target_scale") and not row.all():
            raise ValueError(f"{name} must not be 0 anywhere in {dtype}, the network's dtype")
    return cast


def _notes(about: Mapping[str, Any]) -> dict[str, str]:
    """Return notes as text; values that are not text become JSON."""
    if not isinstance(about, Mapping):
        raise TypeError(f"about must be a dict; got {about!r:.100}")
    notes = {}
    for key, value in about.items():
        require_text(key, "about: the key")
        notes[key] = value if isinstance(value, str) else as_json(value, "about")
        require_text(notes[key], f"about[{key!r:.100}]")
    return notes


def is_onnx(path: str | os.PathLike[str]) -> bool:
    """Return True for an ONNX model, judged by tags and lengths of its outermost fields."""
    with open(path, "rb") as file:
        size, seen = os.fstat(file.fileno()).st_size, set()
        while file.tell() < size:
            field, coding = divmod(_varint(file), 8)
            value = _varint(file)
            if value < 0 or field not in {0: NUMBERS, 2: PARTS}.get(coding, ()):
                return False
            file.seek(value if coding == 2 else 0, os.SEEK_CUR)
            seen.add(field)
        return file.tell() == size and seen >= NEEDED


def _varint(file: BinaryIO) -> int:
    """Read a protobuf varint, seven bits per byte; return -1 at the end of the file."""
    value = 0
    for i in range(10):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 127) << 7 * i
        if byte[0] < 128:
            return value
    return -1


class _Graph:
    """Nodes and constant arrays, in the order in which they are added.

    Attributes:
        nodes: (operation, inputs, output, attributes).
        arrays: constants by name.
    """

    def __init__(self, dtype: np.dtype[Any]):
        self.dtype = dtype
        self.nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        self.arrays: dict[str, Array] = {}

    def node(self, op: str, *given: str, out: str = "", **attributes: Any) -> str:
        """Add an operation; return the name of its output."""
        out = out or f"{op}_{len(self.nodes)}"
        self.nodes.append((op, list(given), out, attributes))
        return out

    def array(self, name: str, array: Array) -> str:
        """Add a constant; return its name."""
        self.arrays[name] = np.ascontiguousarray(array, self.dtype)
        return name

    def number(self, value: float) -> str:
        """Add a 0-d constant unless there is an equal one; return its name."""
        return self.array(f"number_{float(value)!r}", np.array(value))

    def call(self, function: str, *given: str) -> str:
        """Add a function of the formula language; return the name of its output."""
        if function in SAME:
            return self.node(SAME[function], *given)
        (u,), node, one = given, self.node, self.number(1)
        if function == "positive":
            return node("CastLike", node("Greater", u, self.number(0)), one)
        if function == "expm1":
            # e^u - 1 = 2 t / (1 - t) with t = tanh(u/2): exact near 0; the plain form if t nears 1
            t = node("Tanh", node("Mul", u, self.number(0.5)))
            near = node("Div", node("Add", t, t), node("Sub", one, t))
            tiny = node("Less", node("Abs", u), self.number(1e-20))  # where runtimes may flush t
            near = node("Where", tiny, u, near)
            return node(
                "Where", node("Less", u, self.number(0.5)), near, node("Sub", node("Exp", u), one)
            )
        assert function == "log1p", function
        # u log(w) / (w - 1), w the rounded 1 + u, whose error cancels (Goldberg 1991, theorem 4)
        w = node("Add", u, one)
        rounded, log = node("Sub", w, one), node("Log", w)
        exact, tiny = node("Equal", rounded, u), node("Equal", rounded, self.number(0))
        safe = node("Where", tiny, one, rounded)
        return node(
            "Where", exact, log, node("Where", tiny, u, node("Mul", log, node("Div", u, safe)))
        )


def _add_network(
    graph: _Graph, architecture: Architecture, parameters: Array, rows: Mapping[str, Array]
) -> None:
    """Add all nodes, from "X" to "Z"."""
    layout, activations, _ = architecture

    def shifted(z: str, op: str, name: str) -> str:
        return graph.node(op, z, graph.array(name, rows[name])) if name in rows else z

    (W, b), a = layout.views(parameters), layout.slopes(parameters)
    ties = {tie.layer: tie for tie in layout.ties}
    z = shifted(shifted("X", "Sub", "mean"), "Div", "scale")
    for l in range(1, layout.layers + 1):
        tie, activation = ties.get(l), activations[l]
        assert activation is not None
        owner = f"W{tie.owner}" if tie else graph.array(f"W{l}", W[l])
        bias = [graph.array(f"b{l}", b[l])] if layout.bias else []
        s = graph.node(
            "Gemm", z, owner, *bias, out=f"S{l}", transB=int(tie is not None and tie.transposed)
        )
        z = _activation(graph, activation if a[l] is None else activation.bound(a[l]), s, f"a{l}")
    z = shifted(shifted(z, "Mul", "target_scale"), "Add", "target_mean")
    graph.node("Identity", z, out="Z")


def _log_softmax(graph: _Graph, s: str) -> str:
    """Add log_softmax as the backends compute it; return the name of its output.

    The LogSoftmax of runtimes is not used: it rounds log-probabilities above -6e-8 to 0.
    """
    node, zero, one = graph.node, graph.number(0), graph.number(1)
    graph.arrays["columns"] = np.array([1])  # an axis
    below = node("Sub", s, node("ReduceMax", s, axes=[1]))
    largest = node("Equal", below, zero)
    others = node("ReduceSum", node("Where", largest, zero, node("Exp", below)), "columns")
    ties = node("Sub", node("ReduceSum", node("CastLike", largest, one), "columns"), one)
    return node("Sub", below, graph.call("log1p", node("Add", others, ties)))


def _activation(graph: _Graph, activation: Activation, s: str, a: str) -> str:
    """Add σ(s), with a learned parameter as the array `a`; return the name of its output."""
    if activation.rowwise:
        return (
            _log_softmax(graph, s) if activation.logarithmic else graph.node("Softmax", s, axis=1)
        )
    learned = {} if activation.a is None else {"a": graph.array(a, activation.a)}
    if learned and activation.value == resolve("prelu").value:
        return graph.node("PRelu", s, a)
    compiled = program(f"z = {activation.value}", frozenset(activation.scalars), graph.dtype.name)
    numbers = {key: graph.number(value) for key, value in compiled.fold(activation.scalars).items()}
    places = {"s": s, **numbers, **learned}  # current value of each variable or register
    for function, operands, out in compiled.instructions:
        places[out] = graph.call(function, *(places[name] for name in operands))
    z = places["z"]
    constant = "s" not in reads(activation.value)
    return graph.node("Expand", z, graph.node("Shape", s)) if constant else z
