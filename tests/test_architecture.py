"""The promises of docs/architecture.md about the shape of the code, read from the code."""

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends import kernel_files
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import loss, losses, sheet
from mlpcore.core.ops import EagerOps, Ops

PACKAGE = Path(mc.__file__).parent
FLOORS = [  # a room imports rooms of the floors before its own, and itself
    ["checks", "_version"], ["core"], ["backends"], ["data"], ["io"], ["engine"], ["training"],
    ["mlp"], ["trainer", "gradcheck", "tables"], ["__init__"], ["estimators", "cli", "torch"],
    ["__main__"],
]  # fmt: skip
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
ALONE = {"io": {"checks", "core"}}  # and imports no others of the floors before its own
TOP = {"__init__", "__main__", "_version", "gradcheck", "mlp", "torch", "trainer"}
MODULES = sorted(PACKAGE.rglob("*.py"))
LINES, CLASS_LINES, FUNCTION_LINES, COLUMNS = 450, 300, 60, 100


def name(path):
    """`mlpcore/core/layout.py` is "core.layout"; a package's `__init__.py` is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


every_module = pytest.mark.parametrize("path", MODULES, ids=[name(path) for path in MODULES])


def imports(path):
    """Absolute names of a module's imports, those in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path):
    """The modules of this package that a module imports."""
    known = {name(m) for m in MODULES}
    found = set()
    for target in imports(path):
        if target == "mlpcore":
            found.add("__init__")
        elif target.startswith("mlpcore."):
            parts = target.split(".")[1:]
            while parts and ".".join(parts) not in known:
                parts.pop()
            found.add(".".join(parts) or "__init__")
    return found


def test_the_reader_of_imports_sees_imports(tmp_path):
    """The tests below could not fail if it saw none."""
    assert own(PACKAGE / "trainer.py") >= {"mlp", "training.callbacks"}
    assert "core.optimizers" in own(PACKAGE / "__init__.py")
    file = tmp_path / "one.py"
    file.write_text(
        "import typing\nif typing.TYPE_CHECKING:\n    from mlpcore.trainer import Trainer\n"
        "def f():\n    import mlpcore.core.layout\n"
    )
    assert own(file) == {"trainer", "core.layout"}


def test_at_the_top_of_the_package_is_only_what_users_import():
    assert {name(path) for path in PACKAGE.glob("*.py")} == TOP


def test_every_room_has_a_floor_and_every_floor_is_lived_on():
    rooms = {name(path).split(".")[0] for path in MODULES}
    assert rooms == set(FLOOR), "FLOORS and docs/architecture.md know other rooms"


@every_module
def test_imports_point_one_way(path):
    room = name(path).split(".")[0]
    for target in own(path):
        other = target.split(".")[0]
        if other == room:
            continue
        assert FLOOR[other] < FLOOR[room], f"{name(path)} must not import {target}"
        assert other in ALONE.get(room, {other}), f"{name(path)} must not import {target}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name(path): own(path) - {name(path)} for path in MODULES}
    done, under_way = set(), []

    def visit(module):
        assert module not in under_way, f"a circle: {' -> '.join([*under_way, module])}"
        if module in done:
            return
        under_way.append(module)
        for target in graph[module]:
            visit(target)
        done.add(under_way.pop())

    for module in graph:
        visit(module)


# -- sizes


def length(node):
    """Lines of a function or class; of a function without its docstring and decorators."""
    lines = node.end_lineno - node.lineno + 1
    if isinstance(node, ast.ClassDef) or ast.get_docstring(node) is None:
        return lines
    return lines - (node.body[0].end_lineno - node.body[0].lineno + 1)


@every_module
def test_files_classes_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert length(node) <= CLASS_LINES, node.name
        elif isinstance(node, ast.FunctionDef):
            assert length(node) <= FUNCTION_LINES, node.name


# -- what stays outside


def test_the_mathematics_needs_numpy_alone_and_its_heart_not_even_that():
    for path in (PACKAGE / "core").glob("*.py"):
        outside = {target.split(".")[0] for target in imports(path)} - {"mlpcore", "__future__"}
        foreign = {target for target in outside if target not in _standard()}
        assert foreign <= {"numpy"}, path.name
        if path.name in (
            "backprop.py",
            "layout.py",
            "formulas.py",
            "activations.py",
            "losses.py",
            "optimizers.py",
            "ops.py",
        ):
            assert not foreign, path.name


def _standard():
    import sys

    return sys.stdlib_module_names


def test_cupy_and_pickle_stay_outside():
    for path in MODULES:
        roots = {target.split(".")[0] for target in imports(path)}
        if name(path).split(".")[0] != "backends":
            assert "cupy" not in roots, path
        assert not roots & {"pickle", "joblib", "shelve"}, path
        if name(path) not in ("torch", "io.convert"):
            assert "torch" not in roots, path


def test_nothing_evaluates_text():
    for path in MODULES:
        calls = {
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile", "__import__"}, path


def test_the_recurrences_fit_on_one_screen():
    assert len((PACKAGE / "core" / "backprop.py").read_text().splitlines()) <= 50


def test_a_backend_has_the_operations_of_the_protocol_with_the_same_signatures():
    every = {**vars(Ops), **vars(EagerOps)}
    wanted = {n: f for n, f in every.items() if inspect.isfunction(f) and not n.startswith("_")}
    assert len(wanted) > 10
    for operation, function in wanted.items():
        theirs = list(inspect.signature(getattr(NumpyOps, operation)).parameters.values())
        ours = list(inspect.signature(function).parameters.values())
        assert [(p.name, p.kind, p.default) for p in theirs] == [
            (p.name, p.kind, p.default) for p in ours
        ], operation
    public = {n for n, f in inspect.getmembers(NumpyOps, inspect.isfunction) if n[0] != "_"}
    assert public == set(wanted)


# -- one row ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "spec"),
    [
        (
            mc.Activation("softsign", "s / (1 + abs(s))", "(1 - abs(z)) * (1 - abs(z))"),
            "softsign",
        ),
        (
            mc.Activation(
                "bent",
                "a * s * tanh(s)",
                "a * (tanh(s) + s * (1 - tanh(s) * tanh(s)))",
                parameter=0.5,
                condition="a > 0",
                init="he",
            ),
            ("bent", 1.5),
        ),
    ],
    ids=["softsign", "bent"],
)
def test_adding_an_activation_is_one_row(monkeypatch, tmp_path, row, spec):
    with pytest.raises(ValueError, match="unknown name"):
        mc.MLP([3, 5, 2], "softsig", spec if isinstance(spec, str) else spec[0])
    monkeypatch.setitem(sheet.ACTIVATIONS, row.name, row)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((100, 3))
    Y = np.tanh(X @ rng.standard_normal((3, 2)))
    net = mc.MLP([3, 8, 8, 2], [spec, "tanh"], spec)
    assert mc.check_gradients(net, X, Y, "squared_error").ok
    history = mc.Trainer(net, loss="squared_error", optimizer=mc.Adam(1e-2)).fit(
        X, Y, epochs=20, batch_size=16, progress=False
    )
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    net.save(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(
        mc.MLP.load(tmp_path / "net.safetensors").predict(X), net.predict(X)
    )
    if row.condition:
        with pytest.raises(ValueError, match="must satisfy a > 0"):
            mc.MLP([3, 5, 2], (row.name, -1.0))


def test_adding_a_loss_and_a_matched_pair_is_a_row_each(monkeypatch):
    row = mc.Loss("fourth", "(z - y) ** 4", "4 * (z - y) ** 3")
    behind = loss.Matched("(s - y) ** 4", "4 * (s - y) ** 3")
    monkeypatch.setitem(sheet.LOSSES, "fourth", row)
    monkeypatch.setitem(sheet.MATCHED, ("fourth", "identity"), behind)
    X, Y = np.random.default_rng(0).standard_normal((2, 50, 3))
    net = mc.MLP([3, 5, 3], "tanh")
    assert losses.pair(losses.resolve("fourth"), net.activations[-1]).matched
    assert mc.check_gradients(net, X, Y, "fourth").ok
    assert mc.check_gradients(mc.MLP([3, 5, 3], "tanh", "tanh"), X, Y, "fourth").ok


def test_without_its_kernels_the_library_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_files, "_PLACES", (tmp_path / "here",))
    with pytest.raises(FileNotFoundError, match=r"kernels.*here"):
        kernel_files.folder()


# -- words -----------------------------------------------------------------------------------------


def test_the_public_names_are_those_of_the_design_and_each_is_there():
    promised = {
        "MLP",
        "Trainer",
        "SGD",
        "Adam",
        "AdamW",
        "RMSprop",
        "Lion",
        "Activation",
        "Loss",
        "EarlyStopping",
        "loss",
        "check_gradients",
        "info",
        "DeviceUnavailable",
        "NonFiniteLoss",
        "Constant",
        "StepDecay",
        "Cosine",
        "InverseScaling",
        "Adaptive",
    }
    assert promised <= set(mc.__all__)
    assert len(set(mc.__all__)) == len(mc.__all__)
    for public in mc.__all__:
        assert hasattr(mc, public)
    assert mc.__version__


@pytest.mark.parametrize("public", mc.__all__)
def test_each_public_name_and_each_of_its_methods_has_a_docstring(public):
    thing = getattr(mc, public)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        assert not (thing.__doc__ or "").startswith(f"{public}("), (
            "a dataclass's signature is no docstring"
        )
        for method, value in vars(thing).items():
            if not method.startswith("_") and (
                inspect.isfunction(value)
                or isinstance(value, property | classmethod | staticmethod)
            ):
                assert inspect.getdoc(value), f"{public}.{method}"


@every_module
def test_each_module_and_each_public_function_and_class_in_it_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


CLAUSE = re.compile(r"(What|Whether|How|That|Which|Who|Where|When|Why|Of)\b")


def docstrings(path):
    """(name, docstring) of a module and everything in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "name", "the module"), text, getattr(node, "col_offset", 0)


@every_module
def test_the_first_line_of_a_docstring_is_a_whole_sentence(path):
    for where, text, indent in docstrings(path):
        first = text.splitlines()[0]
        quotes = 3 if "\n" in text else 6
        room = COLUMNS - quotes - (indent + 4 if where != "the module" else 0)
        assert len(first) <= room, f"{where}: {first}"
        assert first.endswith((".", ":")), f"{where}: {first}"
        assert not CLAUSE.match(first), f"{where}: {first}"
