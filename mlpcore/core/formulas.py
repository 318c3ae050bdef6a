"""The formula sheets: text in the common subset of C++ and Python, parsed, checked, and compiled into in-place array calls.

A sheet is a list of rows `MACRO(column, column, …)` between `//` comments. A formula is built from names, numbers (`T(0.5)`),
`+ - * /` and the functions below; nothing else passes, so a formula that comes from a file can do no harm.

    gelu's slope  →  Program: 15 ufunc calls on at most 3 registers; equal subexpressions computed once,
                     scalar subexpressions folded into 0-d arrays, registers reused as soon as they are free
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

LONGEST = 4000  # characters of a formula: those of files are read, too
FUNCTIONS = ("maximum", "minimum", "tanh", "exp", "expm1", "log", "log1p", "abs", "sqrt", "sign", "positive")
_BINARY = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_ARGUMENTS = {"maximum": 2, "minimum": 2, "pow": 2}
_COMPARISONS = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_SCALAR: dict[str, Callable[..., float]] = {
    "T": float,
    "maximum": max,
    "minimum": min,
    "abs": abs,
    "positive": lambda x: float(x > 0),
    "sign": lambda x: float((x > 0) - (x < 0)),
    **{name: getattr(math, name) for name in ("tanh", "exp", "expm1", "log", "log1p", "sqrt", "pow")},
}


# -- sheets ------------------------------------------------------------------------------------------------------------


def read_sheet(text: str, macro: str) -> list[list[str]]:
    """The rows of one macro, each a list of columns, in the order of the sheet."""
    text = re.sub(r"//.*", "", text)
    return [split_columns(text[start.end() :]) for start in re.finditer(rf"^{macro}\(", text, re.M)]


def split_columns(text: str) -> list[str]:
    """The comma-separated columns of `text` up to the bracket that closes the row; white space is folded."""
    columns, depth, begin = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth < 0 or (letter == "," and depth == 0):
            columns.append(" ".join(text[begin:i].split()))
            begin = i + 1
        if depth < 0:
            return columns
    raise ValueError(f"a row of a formula sheet is not closed: {text[:60]!r}")


# -- formulas ----------------------------------------------------------------------------------------------------------


def parse(formula: str, names: Sequence[str] | None = None) -> ast.expr:
    """The checked syntax tree of one formula; `names` are the variables it may read (None: any).

    Raises:
        ValueError: the text is not a formula, or uses something outside the common subset; says what.
    """
    if not isinstance(formula, str):
        raise TypeError(f"a formula is a string such as 'maximum(s, 0)'; got {type(formula).__name__}")
    if len(formula) > LONGEST:
        raise ValueError(f"formula {formula[:60]!r}… has {len(formula):,} characters; at most {LONGEST:,} are read")
    try:
        tree = ast.parse(formula, mode="eval").body
        _check(tree, formula, names)
    except SyntaxError as error:
        raise ValueError(f"formula {formula!r} cannot be read: {error.msg}") from None
    except (RecursionError, MemoryError):  # how Python's parser says that brackets are nested too deep
        raise ValueError(f"formula {formula[:60]!r}… is nested too deep") from None
    return tree


def _check(node: ast.AST, formula: str, names: Sequence[str] | None) -> None:
    more = ("T", "pow", "kept") if names is None else ("T",)  # kept: 0 where x is -0, else 1; for dropout's own formulas
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return
        case ast.Name(id=name):
            if names is not None and name not in names:
                parameter = " (give parameter=… for a parameter)" if name in ("a", "q") else ""
                raise ValueError(f"formula {formula!r} reads {name!r}; it may read {', '.join(names)}{parameter}")
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            parts = [left, right]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            parts = [operand]
        case ast.Call(func=ast.Name(id="pow")) if names is not None:
            raise ValueError(f"formula {formula!r}: pow is for the scalars of updates.def only; write s * s")
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in (*FUNCTIONS, *more):
            if len(parts) != _ARGUMENTS.get(name, 1):
                raise ValueError(f"formula {formula!r}: {name} takes {_ARGUMENTS.get(name, 1)} argument(s)")
        case _:
            raise ValueError(
                f"formula {formula!r}: {ast.unparse(node)!r} is outside the common subset of C++ and Python "
                f"(names, numbers, + - * /, {', '.join(FUNCTIONS)})"
            )
    for part in parts:
        _check(part, formula, names)


def reads(formula: str) -> frozenset[str]:
    """The variables that a formula reads: `reads("1 - z * z") == {"z"}`, so the output alone must be cached."""
    return frozenset(node.id for node in _variables(parse(formula)))


def _variables(tree: ast.AST) -> list[ast.Name]:
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in functions]


def substitute(formula: str, replacements: Mapping[str, str]) -> str:
    """The formula with variables replaced by other formulas: `substitute("a * z", {"z": "s + 1"}) == "a * (s + 1)"`."""

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return parse(replacements[node.id]) if node.id in replacements else node

    return ast.unparse(Replace().visit(parse(formula)))


def differentiate(formula: str, slopes: Mapping[str, str]) -> str:
    """The derivative of a formula, where `slopes` gives that of each variable (0 for the others).

    `differentiate("1 - z * z", {"z": "a"}) == "-(a * z + z * a)"`. Kinks count as positive(x) does: its own slope is 0.
    """

    def times(u: str, v: str) -> str:
        return "0" if "0" in (u, v) else v if u == "1" else u if v == "1" else f"({u}) * ({v})"

    def plus(u: str, v: str, sign: str = "+") -> str:
        if v == "0":
            return u
        return (v if sign == "+" else f"-({v})") if u == "0" else f"{u} {sign} ({v})"

    def of(node: ast.expr) -> str:
        match node:
            case ast.Constant():
                return "0"
            case ast.Name(id=name):
                return slopes.get(name, "0")
            case ast.UnaryOp(operand=u):
                return plus("0", of(u), "-")
            case ast.BinOp(left=u, op=ast.Add(), right=v):
                return plus(of(u), of(v))
            case ast.BinOp(left=u, op=ast.Sub(), right=v):
                return plus(of(u), of(v), "-")
            case ast.BinOp(left=u, op=ast.Mult(), right=v):
                return plus(times(of(u), ast.unparse(v)), times(ast.unparse(u), of(v)))
            case ast.BinOp(left=u, right=v):  # a quotient
                over = plus(of(u), times(f"({ast.unparse(u)}) / ({ast.unparse(v)})", of(v)), "-")
                return "0" if over == "0" else f"({over}) / ({ast.unparse(v)})"
            case ast.Call(func=ast.Name(id="maximum" | "minimum" as name), args=[u, v]):
                first = f"positive({ast.unparse(u)} - ({ast.unparse(v)}))"
                larger, smaller = (of(u), of(v)) if name == "maximum" else (of(v), of(u))
                return plus(times(first, larger), times(f"1 - {first}", smaller))
            case ast.Call(func=ast.Name(id=name), args=[u]):
                return times(_OUTER[name].format(ast.unparse(u)), of(u))
        raise AssertionError(ast.dump(node))

    return ast.unparse(parse(of(parse(formula))))


_OUTER = {  # f'(u) of each function f
    "T": "1", "tanh": "1 - tanh({0}) * tanh({0})", "exp": "exp({0})", "expm1": "exp({0})", "log": "1 / ({0})",
    "log1p": "1 / (1 + ({0}))", "abs": "sign({0})", "sqrt": "T(0.5) / sqrt({0})", "sign": "0", "positive": "0",
}  # fmt: skip


def kinks(formula: str) -> list[str]:
    """Formulas whose change of sign marks a kink: `kinks("maximum(s, 0)") == ["s - 0"]`. For the gradient check."""
    found = []
    for node in ast.walk(parse(formula)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            arguments = [f"({ast.unparse(x)})" for x in node.args]
            if node.func.id in ("maximum", "minimum"):
                found.append(" - ".join(arguments))
            elif node.func.id in ("abs", "sign", "positive"):
                found.append(arguments[0])
    return found


def evaluate_scalar(formula: str, **values: float) -> float:
    """The value of a formula of scalars, in double precision: the default of a parameter, a slope at one point."""
    return float(scalar(formula)(values))


@functools.lru_cache(256)
def scalar(formula: str) -> Callable[[Mapping[str, float]], float]:
    """Return a formula of scalars as a function of its variables' values, computed in double precision."""
    try:
        return _scalar(parse(formula))
    except KeyError as error:
        raise ValueError(f"formula {formula!r}: {error.args[0]} is for arrays only") from None


def holds(condition: str, **values: float) -> bool:
    """Whether a row's condition on its parameter holds, e.g. `holds("0 < q < 1", q=0.5)`."""
    tree = ast.parse(condition, mode="eval").body
    if not isinstance(tree, ast.Compare):
        raise ValueError(f"{condition!r} is not a comparison")
    for part in (tree.left, *tree.comparators):
        _check(part, condition, tuple(values))
    parts = [_scalar(part)(values) for part in (tree.left, *tree.comparators)]
    return all(
        _COMPARISONS[type(op)](left, right) for op, (left, right) in zip(tree.ops, itertools.pairwise(parts), strict=True)
    )


def _scalar(node: ast.expr) -> Callable[[Mapping[str, float]], float]:
    """A checked tree as a function of its variables' values, in double precision."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return lambda names: value
        case ast.Name(id=name):
            return operator.itemgetter(name)
        case ast.UnaryOp(operand=operand):
            u = _scalar(operand)
            return lambda names: -u(names)
        case ast.BinOp(left=left, op=op, right=right):
            u, v, operation = _scalar(left), _scalar(right), _OPERATORS[type(op)]
            return lambda names: operation(u(names), v(names))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            function, parts = _SCALAR[name], [_scalar(x) for x in arguments]
            return lambda names: function(*[part(names) for part in parts])
    raise AssertionError(ast.dump(node))


# -- programs ----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One array call: `out = function(*operands)`; operands and `out` are names bound to arrays before the run."""

    function: str
    operands: tuple[str, ...]
    out: str


class Program:
    """Statements `target = formula; …` compiled into steps.

    Attributes:
        steps: the calls in order. Operands are variables, folded scalars `k0, k1, …` and registers `r0, r1, …`.
        registers: how many registers, each of the arrays' shape, the steps need. Once the old value of a statement's
            target has been read for the last time, the target itself serves as a register.
        folded: the scalar subexpressions, evaluated in double by `fold`; `folded_text` holds their text.
        reads: the scalars that they depend on.
    """

    def __init__(self, statements: str, scalars: frozenset[str]):
        self.scalars = scalars
        self.folded: dict[str, Callable[[Mapping[str, float]], float]] = {}
        self.folded_text: dict[str, str] = {}
        self.steps: list[Step] = []
        self.registers = 0
        self.reads: list[str] = []
        self._keys: dict[str, str] = {}
        for statement in statements.split(";"):
            target, _, formula = statement.partition("=")
            self._compile(target.strip(), parse(formula.strip()))

    def fold(self, values: Mapping[str, float]) -> dict[str, float]:
        """The scalar subexpressions' values for these scalars."""
        return {key: float(value(values)) for key, value in self.folded.items()}

    def _compile(self, target: str, tree: ast.expr) -> None:
        nodes: list[tuple[str, tuple[str | int, ...]]] = []  # operands: names, or indices of earlier nodes
        seen: dict[str, int] = {}

        def visit(node: ast.expr) -> str | int:
            if not {name.id for name in _variables(node)} - self.scalars:
                return self._fold(node)
            if isinstance(node, ast.Name):
                return node.id
            key = ast.dump(node)
            call: tuple[str, tuple[str | int, ...]]
            if key not in seen:
                match node:
                    case ast.BinOp(left=left, op=op, right=right):
                        call = _BINARY[type(op)], (visit(left), visit(right))
                    case ast.UnaryOp(operand=operand):
                        call = "negative", (visit(operand),)
                    case ast.Call(func=ast.Name(id="T"), args=[x]):
                        return visit(x)
                    case ast.Call(func=ast.Name(id=name), args=arguments) if name != "pow":
                        call = name, tuple(visit(x) for x in arguments)
                    case _:
                        raise ValueError(f"{ast.unparse(node)!r}: pow takes scalars only")
                nodes.append(call)
                seen[key] = len(nodes) - 1
            return seen[key]

        root = visit(tree)
        if root == target:
            return
        if root != len(nodes) - 1 or isinstance(root, str):
            nodes.append(("copy", (root,)))
        last = {operand: i for i, (_, operands) in enumerate(nodes) for operand in operands}
        free = [f"r{i}" for i in reversed(range(self.registers))] + ([] if target in last else [target])
        place: dict[str | int, str] = {}
        for i, (function, operands) in enumerate(nodes):
            names = tuple(place.get(x, str(x)) for x in operands)
            for x in dict.fromkeys(operands):
                if last[x] == i and (x == target or isinstance(x, int)):
                    free.append(place.get(x, str(x)))
            if i == len(nodes) - 1:
                out = target
            else:
                if not free:
                    free.append(f"r{self.registers}")
                    self.registers += 1
                out = free.pop()
            place[i] = out
            self.steps.append(Step(function, names, out))

    def _fold(self, node: ast.expr) -> str:
        text = ast.unparse(node)
        if text not in self._keys:
            self._keys[text] = f"k{len(self._keys)}"
            self.folded[self._keys[text]] = _scalar(node)
            self.folded_text[self._keys[text]] = text
            self.reads += sorted({name.id for name in _variables(node)} - {*self.reads})
        return self._keys[text]


def check(argument: str, formula: str, variables: Sequence[str], scalars: Mapping[str, float]) -> None:
    """Raise an error that names the argument unless the formula reads only these names and its scalar parts have a value."""
    try:
        parse(formula, (*variables, *scalars))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument}: {error}") from None
    try:
        program(f"result = {formula}", frozenset(scalars)).fold(scalars)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"{argument}: formula {formula!r} has no value with {dict(scalars)}: {error}") from None


@functools.cache
def program(statements: str, scalars: frozenset[str]) -> Program:
    """The compiled program of these statements; the same object for the same text."""
    return Program(statements, scalars)
