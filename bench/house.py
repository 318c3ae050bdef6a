"""The size of the code, and the path of the data through it.

    python bench/house.py [--json] [--calls]

Size: tokens of code in mlpcore/ (no comments, docstrings, blank lines or indentation), lines, the
longest file, class and function, and the share of lines above 100 columns. Trip: the calls
to mlpcore's own functions in a warm call of the trainer on the CPU, counted by `sys.setprofile`,
without lambdas and comprehensions; the number of functions and files involved, how often the file
changes from one call to the next, and the calls in each package.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import json
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

import mlpcore as mc

PACKAGE = Path(mc.__file__).resolve().parent
COLUMNS = 100
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Call = tuple[str, str]  # file within the package, qualified name


def docstrings(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Yield line and column of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            yield node.body[0].lineno, node.body[0].col_offset


def code_tokens(text: str) -> int:
    """Count the tokens of a module's code."""
    left_out = {*docstrings(ast.parse(text))}
    return sum(
        token.type not in (*LAYOUT, tokenize.ENDMARKER) and token.start not in left_out
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )


def lengths(text: str, kinds: type | tuple[type, ...]) -> dict[str, int]:
    """Return the lines of each class or function of a module, by its name."""
    return {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, kinds)
    }


def longest(found: dict[str, int]) -> dict[str, Any]:
    """Return the name of the longest one, and its lines."""
    name = max(found, key=lambda key: found[key])
    return {"name": name, "lines": found[name]}


def size(package: Path = PACKAGE) -> dict[str, Any]:
    """Measure a package's code."""
    texts = {
        path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")
    }
    lines = [line for text in texts.values() for line in text.splitlines()]

    def parts(kinds: type | tuple[type, ...]) -> dict[str, int]:
        return {
            f"{file}: {name}": count
            for file, text in texts.items()
            for name, count in lengths(text, kinds).items()
        }

    return {
        "tokens": sum(map(code_tokens, texts.values())),
        "files": len(texts),
        "lines": len(lines),
        "longest file": longest({file: len(text.splitlines()) for file, text in texts.items()}),
        "longest class": longest(parts(ast.ClassDef)),
        "longest function": longest(parts(FUNCTIONS)),
        "share of lines above 100 columns": sum(len(x) > COLUMNS for x in lines) / len(lines),
    }


def calls(trip: Callable[[], object], package: Path = PACKAGE) -> list[Call]:
    """Return the calls of the package's functions that a trip makes, in order."""
    folder, found = f"{package}/", list[Call]()

    def look(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        own = event == "call" and code.co_filename.startswith(folder)
        if own and not code.co_name.startswith("<"):
            found.append((code.co_filename.removeprefix(folder), code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        trip()
    finally:
        sys.setprofile(before)
    return found


def figures(found: list[Call]) -> dict[str, Any]:
    """Count a trip's calls, functions, files and packages."""
    files = [file for file, _ in found]
    return {
        "calls": len(found),
        "functions": len({*found}),
        "files": len({*files}),
        "changes of file": sum(a != b for a, b in itertools.pairwise(files)),
        "rooms": dict(Counter(file.split("/")[0].removesuffix(".py") for file in files)),
    }


def trips() -> dict[str, Callable[[], object]]:
    """Return the trips by name, each of a warm trainer."""
    rng = np.random.default_rng(0)
    X, Y = (rng.standard_normal((64, n)).astype(np.float32) for n in (8, 2))
    rows, fit = np.arange(32), {"epochs": 1, "batch_size": 32, "progress": False}
    found: dict[str, Callable[[], object]] = {}
    for name in ("step(X, Y)", "step(prepared, rows=...)", "fit, 2 batches"):
        net = mc.MLP([8, 16, 16, 2], "tanh", device="cpu", seed=1)
        trainer = mc.Trainer(net, "squared_error", mc.AdamW(1e-3))
        data = trainer.prepare(X, Y)
        found[name] = {
            "step(X, Y)": lambda trainer=trainer: trainer.step(X, Y),
            "step(prepared, rows=...)": lambda t=trainer, data=data: t.step(data, rows=rows),
            "fit, 2 batches": lambda trainer=trainer: trainer.fit(X, Y, **fit),
        }[name]
        for _ in range(3):
            found[name]()
    return found


def as_text(value: Any) -> str:
    """Return a figure as text: a share in percent, the calls of a trip on one line each."""
    if isinstance(value, list):
        return "".join(f"\n    {call}" for call in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {x}" for key, x in value.items())
    return f"{value:.2%}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> None:
    """Print size and trips, as text or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--calls", action="store_true", help="also list the calls of each trip")
    options = parser.parse_args(arguments)
    made = {name: calls(trip) for name, trip in trips().items()}
    result: dict[str, Any] = {"size": size(), "trips": {k: figures(v) for k, v in made.items()}}
    if options.calls:
        for name, found in made.items():
            result["trips"][name]["list"] = [": ".join(call) for call in found]
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for title, part in (("size", result["size"]), *result["trips"].items()):
        print(title)
        for key, value in part.items():
            if key == "list":
                print(*(f"    {call}" for call in value), sep="\n")
                continue
            if isinstance(value, dict):
                value = ", ".join(
                    f"{k} {v}" if key == "rooms" else f"{v}" for k, v in value.items()
                )
            print(f"  {key}: {value:.2%}" if isinstance(value, float) else f"  {key}: {value}")


if __name__ == "__main__":
    main()
