"""Formulas: text made of names, numbers, `+ - * /`, integer powers and the functions below.

`parse` accepts nothing else, so a formula from a file can do no harm. Formulas can be parsed,
composed, differentiated and evaluated for scalars; `program.py` compiles them for arrays.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import operator
import os
import threading
from collections.abc import Callable, Mapping, Sequence

from mlpcore.checks.errors import shown
from mlpcore.core import special

LONGEST = 4000  # characters of a formula, since formulas are also read from files
FUNCTIONS = (
    *("maximum", "minimum", "tanh", "exp", "expm1", "log", "log1p", "abs", "sqrt", "sign"),
    *("positive", "sin", "cos", *special.SMOOTH, *special.NAMES),
)
POWERS = range(-8, 17)  # allowed exponents
BINARY = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_ARGUMENTS = {"maximum": 2, "minimum": 2, "pow": 2}
_COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_OPERATORS[ast.Div] = operator.truediv
# ast.parse in two threads at once, one in a garbage collection, is a SystemError in CPython 3.11
_parsing = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    _after = _parsing.release
    os.register_at_fork(before=_parsing.acquire, after_in_parent=_after, after_in_child=_after)


def _unlimited(function: Callable[[float], float]) -> Callable[[float], float]:
    """Return the function with infinity in place of OverflowError: 1 / (1 + exp(1000)) is 0."""

    def value(x: float) -> float:
        try:
            return function(x)
        except OverflowError:
            return math.inf

    return value


_SCALAR: dict[str, Callable[..., float]] = {
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


def text(value: object, name: str) -> str:
    """Return a formula as a Python string, still unparsed; raise a TypeError that names it."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name}: a formula is a string such as 'maximum(s, 0)'; got {type(value).__name__}"
        )
    return str.__str__(value)


def parse(formula: str, names: Sequence[str] | None = None) -> ast.expr:
    """Return the checked syntax tree of a formula.

    Args:
        formula: the text.
        names: the variables that it may read; None: any.

    Raises:
        ValueError: the text is not a formula, or uses something that formulas do not support;
            says what.
    """
    return _read(formula, lambda tree: _check(tree, formula, names))


def _read(formula: str, check: Callable[[ast.expr], None]) -> ast.expr:
    """Return Python's syntax tree of a text that passes `check`; raise a ValueError otherwise."""
    if len(formula) > LONGEST:
        raise ValueError(
            f"formula {shown(formula)} has {len(formula):,} characters; at most {LONGEST:,} are "
            "read"
        )
    try:
        with _parsing:
            tree = ast.parse(formula, mode="eval").body
        check(tree)
    except SyntaxError as error:
        raise ValueError(f"formula {shown(formula)} cannot be read: {error.msg}") from None
    except UnicodeEncodeError:
        raise ValueError(
            f"formula {shown(formula)} cannot be read: UTF-8 has no such character"
        ) from None
    except (RecursionError, MemoryError):  # brackets nested too deeply for Python's parser
        raise ValueError(f"formula {shown(formula)} is nested too deeply") from None
    return tree


def _check(node: ast.AST, formula: str, names: Sequence[str] | None) -> None:
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
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            parts = [left, right]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            if exponent_of(right) not in POWERS:
                raise ValueError(
                    f"formula {shown(formula)}: the exponent of {shown(ast.unparse(node))} must be "
                    f"a whole number from {POWERS[0]} to {POWERS[-1]}; for others write "
                    "exp(exponent * log(base))"
                )
            parts = [left]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            parts = [operand]
        case ast.Call(func=ast.Name(), args=parts, keywords=[]):
            _check_call(node, formula, names)
        case _:
            raise _outside(node, formula)
    for part in parts:
        _check(part, formula, names)


def _check_call(node: ast.Call, formula: str, names: Sequence[str] | None) -> None:
    # smooth(x) is x, composed of pieces that meet smoothly; kept(x), only in dropout's formulas, is
    # 0 if x is -0, else 1
    name = ast.unparse(node.func)
    if name == "pow" and names is not None:
        raise ValueError(
            f"formula {shown(formula)}: pow is for the scalars of updates only; write s ** 2"
        )
    if name not in (*FUNCTIONS, "smooth", *(("pow", "kept") if names is None else ())):
        raise _outside(node, formula)
    if len(node.args) != _ARGUMENTS.get(name, 1):
        raise ValueError(
            f"formula {shown(formula)}: {name} takes {_ARGUMENTS.get(name, 1)} argument(s)"
        )


def _outside(node: ast.AST, formula: str) -> ValueError:
    return ValueError(
        f"formula {shown(formula)}: {shown(ast.unparse(node))} is not allowed in formulas (names, "
        f"numbers, + - * /, ** with a whole exponent, {', '.join(FUNCTIONS)})"
    )


def exponent_of(node: ast.expr) -> int:
    """Return the exponent of a power, or one that is rejected if it is not a literal integer."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as n)) if not isinstance(
            n, bool
        ):
            return -n
        case ast.Constant(value=int() as n) if not isinstance(n, bool):
            return n
    return POWERS.stop


def reads(formula: str) -> frozenset[str]:
    """Return the variables that a formula reads: `reads("1 - z * z") == {"z"}`."""
    return frozenset(variables(parse(formula)))


def variables(tree: ast.AST) -> set[str]:
    """Return the variables that a checked tree reads."""
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and id(node) not in functions
    }


def statements_of(text: str) -> list[tuple[str, ast.expr]]:
    """Return the statements `target = formula; …` as pairs of target and checked tree."""
    halves = (statement.partition("=") for statement in text.split(";"))
    return [(target.strip(), parse(formula.strip())) for target, _, formula in halves]


def where(formula: str, **names: str) -> str:
    """Return the formula with each name replaced by its definition, which may use later names.

    `where("e / (1 + e)", e="exp(w)", w="minimum(s, 45)")`. Repeated parts are computed once.
    """
    for name, meaning in names.items():
        formula = substitute(formula, {name: meaning})
    return formula


def substitute(formula: str, replacements: Mapping[str, str]) -> str:
    """Return the formula with variables replaced by other formulas.

    `substitute("a * z", {"z": "s + 1"}) == "a * (s + 1)"`.
    """

    class Replace(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return parse(replacements[node.id]) if node.id in replacements else node

    return ast.unparse(Replace().visit(parse(formula)))


def differentiate(formula: str, slopes: Mapping[str, str]) -> str:
    """Return the derivative of a formula, given those of its variables (0 for the others).

    `differentiate("1 - z * z", {"z": "a"}) == "-(a * z + z * a)"`. Where pieces of a formula meet,
    the derivative is that of the piece for smaller variables, in `maximum`, `minimum` and softplus
    alike: so the derivatives of a smooth formula are right to any order. Outside `smooth`, the
    slope of `abs` at its kink is `sign`; the slopes of `positive` and `sign` are 0.
    """

    def of(node: ast.expr) -> str:
        match node:
            case ast.Constant():
                return "0"
            case ast.Name(id=name):
                return slopes.get(name, "0")
            case ast.UnaryOp(operand=u):
                return _plus("0", of(u), "-")
            case ast.BinOp(left=u, op=ast.Add(), right=v):
                return _plus(of(u), of(v))
            case ast.BinOp(left=u, op=ast.Sub(), right=v):
                return _plus(of(u), of(v), "-")
            case ast.BinOp(left=u, op=ast.Mult(), right=v):
                return _plus(_times(of(u), ast.unparse(v)), _times(ast.unparse(u), of(v)))
            case ast.BinOp(left=u, op=ast.Pow(), right=exponent):
                n, base = exponent_of(exponent), f"({ast.unparse(u)})"
                if n in (0, 1):
                    return of(u) if n else "0"
                power = f"{base} ** ({n}) / {base}" if n < 0 else f"{base} ** {n - 1}"
                power = base if n == 2 else power
                return _times(f"{n} * {power}", of(u))
            case ast.BinOp(left=u, right=v):  # a quotient
                over = _plus(of(u), _times(f"({ast.unparse(u)}) / ({ast.unparse(v)})", of(v)), "-")
                return "0" if over == "0" else f"({over}) / ({ast.unparse(v)})"
            case ast.Call(func=ast.Name(id="maximum" | "minimum" as name), args=[u, v]):
                first = _above(ast.BinOp(u, ast.Sub(), v))
                larger, smaller = (of(u), of(v)) if name == "maximum" else (of(v), of(u))
                return _plus(_times(first, larger), _times(f"1 - {first}", smaller))
            # softplus(u) - maximum(u, 0); follows the same convention as maximum
            case ast.Call(
                func=ast.Name(id="log1p"),
                args=[
                    ast.Call(
                        ast.Name("exp"), [ast.UnaryOp(ast.USub(), ast.Call(ast.Name("abs"), [u]))]
                    )
                ],
            ):
                text, first = ast.unparse(u), _above(u)
                return _times(
                    f"(1 - {first}) * sigmoid({text}) - {first} * sigmoid(-({text}))", of(u)
                )
            case ast.Call(func=ast.Name(id=name), args=[u]):
                return _times(_OUTER[name].format(ast.unparse(u)), of(u))
        raise AssertionError(ast.dump(node))

    return ast.unparse(parse(of(_Pieces().visit(parse(formula)))))


def _times(u: str, v: str) -> str:
    return "0" if "0" in (u, v) else v if u == "1" else u if v == "1" else f"({u}) * ({v})"


def _plus(u: str, v: str, sign: str = "+") -> str:
    if v == "0":
        return u
    return (v if sign == "+" else f"-({v})") if u == "0" else f"{u} {sign} ({v})"


class _Pieces(ast.NodeTransformer):
    """Replaces smooth(x) by x, where each abs(u) becomes u (2 positive(u) - 1)."""

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
    """Return the formula that is 1 if `node` > 0 and 0 otherwise.

    At 0 it takes the value for smaller variables: 0 for x, 1 for -x.
    """
    match node:
        case ast.BinOp(left=u, op=ast.Sub(), right=ast.Constant(value=0)):
            return _above(u)
        case ast.BinOp(left=u, op=ast.Sub(), right=v) if not variables(u):
            return f"(1 - positive({ast.unparse(v)} - ({ast.unparse(u)})))"
        case ast.UnaryOp(operand=u):
            return f"(1 - {_above(u)})"
    return f"positive({ast.unparse(node)})"


_OUTER = {  # f'(u) of each function f
    "tanh": "4 * sigmoid(2 * ({0})) * sigmoid(-2 * ({0}))",
    **dict.fromkeys(("exp", "expm1"), "exp({0})"),
    "log": "1 / ({0})",
    "log1p": "1 / (1 + ({0}))",
    "abs": "sign({0})",
    "sqrt": "0.5 / sqrt({0})",
    **dict.fromkeys(("sign", "positive"), "0"),
    "sigmoid": "sigmoid({0}) * sigmoid(-({0}))",
    "softplus": "sigmoid({0})",
    "log_cosh": "tanh({0})",
    "sin": "cos({0})",
    "cos": "-sin({0})",
    "erf": "1.1283791670955126 * exp(-(({0}) * ({0})))",
    "erfc": "-1.1283791670955126 * exp(-(({0}) * ({0})))",
    "normcdf": "normpdf({0})",
    "normpdf": "-(({0}) * normpdf({0}))",
}


def derive(formula: str, by: str) -> str:
    """Return the slope of a checked formula, for a user who omits it.

    Raises:
        ValueError: it exceeds the maximum length of a formula.
    """
    try:
        return differentiate(formula, {by: "1"})
    except (RecursionError, ValueError):
        what = f"slope: the derivative of {shown(formula)}"
        raise ValueError(f"{what} is too long for a formula; pass the slope yourself") from None


def kinks(formula: str) -> list[str]:
    """Return formulas that change sign at a kink: `kinks("maximum(s, 0)") == ["s - 0"]`."""
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
    """Return the value of a formula of scalars, in double precision."""
    return float(scalar(formula)(values))


@functools.lru_cache(256)
def scalar(formula: str) -> Callable[[Mapping[str, float]], float]:
    """Compile a formula of scalars into a function of its variables, in double precision."""
    try:
        return scalar_of(parse(formula))
    except KeyError as error:
        raise ValueError(f"formula {shown(formula)}: {error.args[0]} is for arrays only") from None


def holds(condition: str, **values: float) -> bool:
    """Return True if a condition on a parameter holds, e.g. `holds("0 < q < 1", q=0.5)`."""

    def check(tree: ast.expr) -> None:
        if not isinstance(tree, ast.Compare) or not {*map(type, tree.ops)} <= {*_COMPARISONS}:
            raise ValueError(f"{shown(condition)} is not a comparison such as '0 < q < 1'")
        for part in (tree.left, *tree.comparators):
            _check(part, condition, tuple(values))

    tree = _read(condition, check)
    assert isinstance(tree, ast.Compare)
    parts = [scalar_of(part)(values) for part in (tree.left, *tree.comparators)]
    return all(
        _COMPARISONS[type(op)](left, right)
        for op, (left, right) in zip(tree.ops, itertools.pairwise(parts), strict=True)
    )


def scalar_of(node: ast.expr) -> Callable[[Mapping[str, float]], float]:
    """Compile a checked tree into a function of its variables, in double precision."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return lambda names: value
        case ast.Name(id=name):
            return operator.itemgetter(name)
        case ast.UnaryOp(operand=operand):
            u = scalar_of(operand)
            return lambda names: -u(names)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, n = scalar_of(left), exponent_of(right)
            return lambda names: float(base(names)) ** n
        case ast.BinOp(left=left, op=op, right=right):
            u, v, operation = scalar_of(left), scalar_of(right), _OPERATORS[type(op)]
            return lambda names: operation(u(names), v(names))
        case ast.Call(func=ast.Name(id=name), args=[x]) if name in special.SMOOTH:
            statements = statements_of(special.SMOOTH[name])
            body, inner = [(out, scalar_of(part)) for out, part in statements], scalar_of(x)
            return lambda names: _last(body, inner(names))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            function, parts = _SCALAR[name], [scalar_of(x) for x in arguments]
            return lambda names: function(*[part(names) for part in parts])
    raise AssertionError(ast.dump(node))


def _last(body: Sequence[tuple[str, Callable[[Mapping[str, float]], float]]], x: float) -> float:
    """Return the value at x of `out`, which a function's last statement sets."""
    values = {"x": x}
    for target, value in body:
        values[target] = value(values)
    return values["out"]
