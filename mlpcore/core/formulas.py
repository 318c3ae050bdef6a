"""The formula sheets: text in the common subset of C++ and Python, parsed, checked, and compiled
into in-place array calls.

A sheet is a list of rows `MACRO(column, column, …)` between `//` comments. A formula is built from
names, numbers (`T(0.5)`), `+ - * /`, whole powers and the functions below; nothing else passes, so
a formula that comes from a file can do no harm.

    gelu's slope  →  Program: 15 ufunc calls on at most 3 registers; equal subexpressions computed
    once,
                     scalar subexpressions folded into 0-d arrays, registers reused as soon as they
                     are free
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

from mlpcore.checks.errors import named, shown
from mlpcore.core import special

LONGEST = 4000  # characters of a formula: those of files are read, too
FUNCTIONS = (
    "maximum", "minimum", "tanh", "exp", "expm1", "log", "log1p", "abs", "sqrt", "sign", "positive", "sin", "cos",
    *special.SMOOTH, *special.NAMES,
)  # fmt: skip
POWERS = range(-8, 17)  # exponents
_BINARY = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_ARGUMENTS = {"maximum": 2, "minimum": 2, "pow": 2}
_COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _unlimited(function: Callable[[float], float]) -> Callable[[float], float]:
    """Return the function with infinity where Python raises OverflowError: 1 / (1 + exp(1000)) is
    0.
    """

    def value(x: float) -> float:
        try:
            return function(x)
        except OverflowError:
            return math.inf

    return value


_SCALAR: dict[str, Callable[..., float]] = {
    "T": float,
    "smooth": float,
    "maximum": max,
    "minimum": min,
    "abs": abs,
    "positive": lambda x: float(x > 0),
    "sign": lambda x: float((x > 0) - (x < 0)),
    "normcdf": lambda x: 0.5 * math.erfc(-x * math.sqrt(0.5)),
    "normpdf": lambda x: math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    **{
        name: getattr(math, name)
        for name in ("tanh", "log", "log1p", "sqrt", "pow", "sin", "cos", "erf", "erfc")
    },
    **{name: _unlimited(getattr(math, name)) for name in ("exp", "expm1")},
}


# -- sheets
# ------------------------------------------------------------------------------------------------------------


def read_sheet(text: str, macro: str) -> list[list[str]]:
    """The rows of one macro, each a list of columns, in the order of the sheet."""
    text = re.sub(r"//.*", "", text)
    return [split_columns(text[start.end() :]) for start in re.finditer(rf"^{macro}\(", text, re.M)]


def split_columns(text: str) -> list[str]:
    """The comma-separated columns of `text` up to the bracket that closes the row; white space is
    folded.
    """
    columns, depth, begin = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth < 0 or (letter == "," and depth == 0):
            columns.append(" ".join(text[begin:i].split()))
            begin = i + 1
        if depth < 0:
            return columns
    raise ValueError(f"a row of a formula sheet is not closed: {text[:60]!r}")


# -- formulas
# ----------------------------------------------------------------------------------------------------------


def text(value: object, name: str) -> str:
    """Return a formula as a Python string, not parsed yet, or raise a TypeError that names it."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name}: a formula is a string such as 'maximum(s, 0)'; got {type(value).__name__}"
        )
    return str.__str__(value)


def parse(formula: str, names: Sequence[str] | None = None) -> ast.expr:
    """The checked syntax tree of one formula; `names` are the variables it may read (None: any).

    Raises:
        ValueError: the text is not a formula, or uses something outside the common subset; says
            what.
    """
    if len(formula) > LONGEST:
        raise ValueError(
            f"formula {shown(formula)} has {len(formula):,} characters; at most {LONGEST:,} are "
            "read"
        )
    try:
        tree = ast.parse(formula, mode="eval").body
        _check(tree, formula, names)
    except SyntaxError as error:
        raise ValueError(f"formula {shown(formula)} cannot be read: {error.msg}") from None
    except UnicodeEncodeError:
        raise ValueError(
            f"formula {shown(formula)} cannot be read: UTF-8 has no such character"
        ) from None
    except (
        RecursionError,
        MemoryError,
    ):  # how Python's parser says that brackets are nested too deep
        raise ValueError(f"formula {shown(formula)} is nested too deep") from None
    return tree


def _check(node: ast.AST, formula: str, names: Sequence[str] | None) -> None:
    # smooth(x) is x, made of pieces that meet smoothly; kept(x) is 0 where x is -0, else 1, for
    # dropout's own formulas
    more = ("T", "smooth", *(("pow", "kept") if names is None else ()))
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return
        case ast.Name(id=name):
            if names is not None and name not in names:
                parameter = " (give parameter=… for a parameter)" if name in ("a", "q") else ""
                raise ValueError(
                    f"formula {shown(formula)} reads {shown(name)}; it may read "
                    f"{', '.join(names)}{parameter}"
                )
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            parts = [left, right]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            if _exponent(right) not in POWERS:
                raise ValueError(
                    f"formula {shown(formula)}: the exponent of {shown(ast.unparse(node))} must be "
                    "a "
                    f"whole number from {POWERS[0]} to {POWERS[-1]}; for others write exp(exponent "
                    "* log(base))"
                )
            parts = [left]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            parts = [operand]
        case ast.Call(func=ast.Name(id="pow")) if names is not None:
            raise ValueError(
                f"formula {shown(formula)}: pow is for the scalars of updates.def only; write s ** "
                "2"
            )
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in (
            *FUNCTIONS,
            *more,
        ):
            if len(parts) != _ARGUMENTS.get(name, 1):
                raise ValueError(
                    f"formula {shown(formula)}: {name} takes {_ARGUMENTS.get(name, 1)} argument(s)"
                )
        case _:
            raise ValueError(
                f"formula {shown(formula)}: {shown(ast.unparse(node))} is outside the common "
                "subset of C++ and Python "
                f"(names, numbers, + - * /, ** with a whole exponent, {', '.join(FUNCTIONS)})"
            )
    for part in parts:
        _check(part, formula, names)


def _exponent(node: ast.expr) -> int:
    """Return the exponent of a power; one that is refused where it is not a whole number that is
    written out.
    """
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as n)) if not isinstance(
            n, bool
        ):
            return -n
        case ast.Constant(value=int() as n) if not isinstance(n, bool):
            return n
    return POWERS.stop


def reads(formula: str) -> frozenset[str]:
    """The variables that a formula reads: `reads("1 - z * z") == {"z"}`, so the output alone must
    be cached.
    """
    return frozenset(node.id for node in _variables(parse(formula)))


def _variables(tree: ast.AST) -> list[ast.Name]:
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in functions
    ]


def substitute(formula: str, replacements: Mapping[str, str]) -> str:
    """The formula with variables replaced by other formulas: `substitute("a * z", {"z": "s + 1"})
    == "a * (s + 1)"`.
    """

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return parse(replacements[node.id]) if node.id in replacements else node

    return ast.unparse(Replace().visit(parse(formula)))


def written_out(text: str) -> str:
    """The formula of a sheet's `name = formula; …; formula`, with what the names stand for in their
    places.

    `written_out("e = exp(s); e / (1 + e)") == "exp(s) / (1 + exp(s))"`.
    """
    *parts, formula = text.split(";")
    known: dict[str, str] = {}
    for part in parts:
        name, _, meaning = part.partition("=")
        known[name.strip()] = substitute(meaning.strip(), known)
    return substitute(formula.strip(), known) if known else formula


def differentiate(formula: str, slopes: Mapping[str, str]) -> str:
    """The derivative of a formula, where `slopes` gives that of each variable (0 for the others).

    `differentiate("1 - z * z", {"z": "a"}) == "-(a * z + z * a)"`. Where pieces of a formula meet,
    it is that of the piece for smaller variables, in `maximum`, `minimum` and softplus alike: so
    the derivatives of a smooth formula are right, of any order. A kink of `abs` counts as `sign`
    does, outside `smooth`; the slopes of `positive` and `sign` are 0.
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
            case ast.BinOp(left=u, op=ast.Pow(), right=exponent):
                n, base = _exponent(exponent), f"({ast.unparse(u)})"
                if n in (0, 1):
                    return of(u) if n else "0"
                power = (
                    f"{base} ** ({n}) / {base}"
                    if n < 0
                    else base
                    if n == 2
                    else f"{base} ** {n - 1}"
                )
                return times(f"{n} * {power}", of(u))
            case ast.BinOp(left=u, right=v):  # a quotient
                over = plus(of(u), times(f"({ast.unparse(u)}) / ({ast.unparse(v)})", of(v)), "-")
                return "0" if over == "0" else f"({over}) / ({ast.unparse(v)})"
            case ast.Call(func=ast.Name(id="maximum" | "minimum" as name), args=[u, v]):
                first = _above(ast.BinOp(u, ast.Sub(), v))
                larger, smaller = (of(u), of(v)) if name == "maximum" else (of(v), of(u))
                return plus(times(first, larger), times(f"1 - {first}", smaller))
            case ast.Call(
                func=ast.Name(id="log1p"),
                args=[
                    ast.Call(ast.Name("exp"), [ast.UnaryOp(operand=ast.Call(ast.Name("abs"), [u]))])
                ],
            ):  # softplus(u) - maximum(u, 0), which meets the slope of such a maximum
                text, first = ast.unparse(u), _above(u)
                return times(
                    f"(1 - {first}) * sigmoid({text}) - {first} * sigmoid(-({text}))", of(u)
                )
            case ast.Call(func=ast.Name(id=name), args=[u]):
                return times(_OUTER[name].format(ast.unparse(u)), of(u))
        raise AssertionError(ast.dump(node))

    return ast.unparse(parse(of(_Pieces().visit(parse(formula)))))


class _Pieces(ast.NodeTransformer):
    """Takes smooth(x) apart: x, with each abs(u) written as u (2 positive(u) - 1), whose slope
    jumps where others' do.
    """

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace a call of `smooth`."""
        if not (isinstance(node.func, ast.Name) and node.func.id == "smooth"):
            return self.generic_visit(node)

        class Abs(ast.NodeTransformer):
            def visit_Call(self, node: ast.Call) -> ast.AST:
                self.generic_visit(node)
                if isinstance(node.func, ast.Name) and node.func.id == "abs":
                    return parse(
                        f"({ast.unparse(node.args[0])}) * (2 * {_above(node.args[0])} - 1)"
                    )
                return node

        apart: ast.AST = Abs().visit(self.visit(node.args[0]))
        return apart


def _above(node: ast.expr) -> str:
    """Return the formula that is 1 where `node` > 0 and 0 elsewhere; at 0 the one for smaller
    variables, 0 of x and 1 of -x.
    """
    match node:
        case ast.BinOp(left=u, op=ast.Sub(), right=ast.Constant(value=0)):
            return _above(u)
        case ast.BinOp(left=u, op=ast.Sub(), right=v) if not _variables(u):
            return f"(1 - positive({ast.unparse(v)} - ({ast.unparse(u)})))"
        case ast.UnaryOp(operand=u):
            return f"(1 - {_above(u)})"
    return f"positive({ast.unparse(node)})"


_OUTER = {  # f'(u) of each function f
    "T": "1", "tanh": "4 * sigmoid(2 * ({0})) * sigmoid(T(-2) * ({0}))", "exp": "exp({0})", "expm1": "exp({0})",
    "log": "1 / ({0})", "log1p": "1 / (1 + ({0}))", "abs": "sign({0})", "sqrt": "T(0.5) / sqrt({0})", "sign": "0",
    "positive": "0", "sigmoid": "sigmoid({0}) * sigmoid(-({0}))", "softplus": "sigmoid({0})", "log_cosh": "tanh({0})",
    "sin": "cos({0})", "cos": "-sin({0})", "erf": "T(1.1283791670955126) * exp(-(({0}) * ({0})))",
    "erfc": "T(-1.1283791670955126) * exp(-(({0}) * ({0})))", "normcdf": "normpdf({0})", "normpdf": "-(({0}) * normpdf({0}))",
}  # fmt: skip


def derive(formula: str, by: str) -> str:
    """Return the slope of a checked formula, for a user who leaves it out.

    Raises:
        ValueError: it is longer than a formula may be.
    """
    try:
        return differentiate(formula, {by: "1"})
    except (RecursionError, ValueError):
        raise ValueError(
            f"slope: the derivative of {shown(formula)} would be too long a formula; give it "
            "yourself"
        ) from None


def kinks(formula: str) -> list[str]:
    """Formulas whose change of sign marks a kink: `kinks("maximum(s, 0)") == ["s - 0"]`. For the
    gradient check.
    """
    found = []

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "smooth":
                return
            arguments = [f"({ast.unparse(x)})" for x in node.args]
            if node.func.id in ("maximum", "minimum"):
                found.append(" - ".join(arguments))
            elif node.func.id in ("abs", "sign", "positive"):
                found.append(arguments[0])
        for part in ast.iter_child_nodes(node):
            look(part)

    look(parse(formula))
    return found


def evaluate_scalar(formula: str, **values: float) -> float:
    """The value of a formula of scalars, in double precision: the default of a parameter, a slope
    at one point.
    """
    return float(scalar(formula)(values))


@functools.lru_cache(256)
def scalar(formula: str) -> Callable[[Mapping[str, float]], float]:
    """Return a formula of scalars as a function of its variables' values, computed in double
    precision.
    """
    try:
        return _scalar(parse(formula))
    except KeyError as error:
        raise ValueError(f"formula {shown(formula)}: {error.args[0]} is for arrays only") from None


def holds(condition: str, **values: float) -> bool:
    """Whether a row's condition on its parameter holds, e.g. `holds("0 < q < 1", q=0.5)`."""
    tree = ast.parse(condition, mode="eval").body
    if not isinstance(tree, ast.Compare):
        raise ValueError(f"{condition!r} is not a comparison")
    for part in (tree.left, *tree.comparators):
        _check(part, condition, tuple(values))
    parts = [_scalar(part)(values) for part in (tree.left, *tree.comparators)]
    return all(
        _COMPARISONS[type(op)](left, right)
        for op, (left, right) in zip(tree.ops, itertools.pairwise(parts), strict=True)
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
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, n = _scalar(left), _exponent(right)
            return lambda names: float(base(names)) ** n
        case ast.BinOp(left=left, op=op, right=right):
            u, v, operation = _scalar(left), _scalar(right), _OPERATORS[type(op)]
            return lambda names: operation(u(names), v(names))
        case ast.Call(func=ast.Name(id=name), args=[x]) if name in special.SMOOTH:
            body, inner = (
                [(target, _scalar(part)) for target, part in _statements(special.SMOOTH[name])],
                _scalar(x),
            )
            return lambda names: _last(body, inner(names))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            function, parts = _SCALAR[name], [_scalar(x) for x in arguments]
            return lambda names: function(*[part(names) for part in parts])
    raise AssertionError(ast.dump(node))


def _last(body: Sequence[tuple[str, Callable[[Mapping[str, float]], float]]], x: float) -> float:
    """Return the value of the last of a function's statements at x."""
    values = {"x": x}
    for target, value in body:
        values[target] = value(values)
    return values["out"]


# -- programs
# ----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One array call: `out = function(*operands)`; operands and `out` are names bound to arrays
    before the run.
    """

    function: str
    operands: tuple[str, ...]
    out: str


class Program:
    """Statements `target = formula; …` compiled into steps.

    Attributes:
        steps: the calls in order. Operands are variables, folded scalars `k0, k1, …` and registers
            `r0, r1, …`.
        registers: how many registers, each of the arrays' shape, the steps need. Once the old value
            of a statement's target has been read for the last time, the target itself serves as a
            register.
        folded: the scalar subexpressions, evaluated in double by `fold`; `folded_text` holds their
            text.
        reads: the scalars that they depend on.

    With a dtype the functions of `special` are compiled into steps, too; without, they are steps
    themselves.
    """

    def __init__(self, statements: str, scalars: frozenset[str], dtype: str | None = None):
        self.scalars, self.dtype = scalars, dtype
        self.folded: dict[str, Callable[[Mapping[str, float]], float]] = {}
        self.folded_text: dict[str, str] = {}
        self.steps: list[Step] = []
        self.registers = 0
        self.reads: list[str] = []
        self._keys: dict[str, str] = {}
        for target, formula in _statements(statements):
            self._compile(target, formula)

    def fold(self, values: Mapping[str, float]) -> dict[str, float]:
        """The scalar subexpressions' values for these scalars."""
        return {key: float(value(values)) for key, value in self.folded.items()}

    def _compile(self, target: str, tree: ast.expr) -> None:
        nodes: list[
            tuple[str, tuple[str | int, ...]]
        ] = []  # operands: names, or indices of earlier nodes
        seen: dict[tuple[str, tuple[str | int, ...]], int] = {}

        def call(function: str, *operands: str | int) -> int:
            if (function, operands) not in seen:
                seen[function, operands] = len(nodes)
                nodes.append((function, operands))
            return seen[function, operands]

        def visit(node: ast.expr, local: Mapping[str, str | int] | None = None) -> str | int:
            """Add what computes a node; inside the body of a function, `local` are its variables."""
            if not {name.id for name in _variables(node)} - (
                self.scalars if local is None else frozenset()
            ):
                return self._fold(node)
            match node:
                case ast.Name(id=name):
                    return name if local is None else local[name]
                case ast.BinOp(left=left, op=ast.Pow(), right=exponent):
                    return power(visit(left, local), _exponent(exponent))
                case ast.BinOp(left=left, op=op, right=right):
                    return call(_BINARY[type(op)], visit(left, local), visit(right, local))
                case ast.UnaryOp(operand=operand):
                    return call("negative", visit(operand, local))
                case ast.Call(func=ast.Name(id="T" | "smooth"), args=[x]):
                    return visit(x, local)
                case ast.Call(func=ast.Name(id="sigmoid"), args=[x]):
                    one = self._fold(ast.Constant(1))
                    return call(
                        "divide",
                        one,
                        call("add", one, call("exp", visit(self._negative(x), local))),
                    )
                case ast.Call(func=ast.Name(id=name), args=[x]) if name in special.SMOOTH:
                    return inside(special.SMOOTH[name], visit(x, local))
                case ast.Call(func=ast.Name(id=name), args=[x]) if (
                    self.dtype and name in special.NAMES
                ):
                    return inside(special.body(name, self.dtype), visit(x, local))
                case ast.Call(func=ast.Name(id=name), args=arguments) if name != "pow":
                    return call(name, *(visit(x, local) for x in arguments))
            raise ValueError(f"{shown(ast.unparse(node))}: pow takes scalars only")

        def power(u: str | int, n: int) -> str | int:
            if n <= 0:
                one = self._fold(ast.Constant(1))
                return call("divide", one, power(u, -n)) if n else one
            if n == 1:
                return u
            half = power(u, n // 2)
            square = call("multiply", half, half)
            return call("multiply", square, u) if n % 2 else square

        def inside(body: str, x: str | int) -> str | int:
            local = {"x": x}
            for target, formula in _statements(body):
                local[target] = visit(formula, local)
            return local["out"]

        root = visit(tree)
        if root == target:
            return
        if root != len(nodes) - 1 or isinstance(root, str):
            nodes.append(("copy", (root,)))
        last = {operand: i for i, (_, operands) in enumerate(nodes) for operand in operands}
        free = [f"r{i}" for i in reversed(range(self.registers))] + (
            [] if target in last else [target]
        )
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

    def _negative(self, u: ast.expr) -> ast.expr:
        """The tree of -u; a minus goes into a scalar factor, where it costs nothing."""
        match u:
            case ast.UnaryOp(operand=x):
                return x
            case ast.BinOp(left=k, op=ast.Mult() | ast.Div() as op, right=x) if (
                not {name.id for name in _variables(k)} - self.scalars
            ):
                return ast.BinOp(ast.UnaryOp(ast.USub(), k), op, x)
            case ast.BinOp(left=x, op=ast.Sub(), right=y):
                return ast.BinOp(y, ast.Sub(), x)
        return ast.UnaryOp(ast.USub(), u)

    def _fold(self, node: ast.expr) -> str:
        text = ast.unparse(node)
        if text not in self._keys:
            self._keys[text] = f"k{len(self._keys)}"
            self.folded[self._keys[text]] = _scalar(node)
            self.folded_text[self._keys[text]] = text
            self.reads += sorted({name.id for name in _variables(node)} - {*self.reads})
        return self._keys[text]


def _statements(text: str) -> list[tuple[str, ast.expr]]:
    """Return the statements `target = formula; …` as targets and checked trees."""
    halves = (statement.partition("=") for statement in text.split(";"))
    return [(target.strip(), parse(formula.strip())) for target, _, formula in halves]


def check(
    argument: str, formula: str, variables: Sequence[str], scalars: Mapping[str, float]
) -> None:
    """Raise an error that names the argument unless the formula reads only these names and its
    scalar parts have a value.
    """
    try:
        parse(formula, (*variables, *scalars))
    except (TypeError, ValueError) as error:
        raise named(argument, error) from None
    try:
        numbers = program(f"result = {formula}", frozenset(scalars)).fold(scalars)
        if not all(map(math.isfinite, numbers.values())):
            raise ArithmeticError("a part of it is not finite")
    except (ArithmeticError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{argument}: formula {shown(formula)} has no value with {dict(scalars)}: {error}"
        ) from None


@functools.cache
def program(statements: str, scalars: frozenset[str], dtype: str | None = None) -> Program:
    """The compiled program of these statements; the same object for the same text."""
    return Program(statements, scalars, dtype)
