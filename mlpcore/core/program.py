"""The compiler of formulas: statements `target = formula; …` as in-place array calls.

gelu's slope  →  15 calls on at most 3 registers: equal subexpressions are computed once, scalar
                 subexpressions folded into numbers, registers reused as soon as they are free
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mlpcore.checks.errors import named, shown
from mlpcore.core import special
from mlpcore.core.formulas import BINARY, exponent_of, parse, scalar_of, statements_of, variables

_Operand = str | int  # a name, or the index of an earlier node


class Instruction(NamedTuple):
    """One array call, `out = function(*operands)`, on names bound to arrays before the run."""

    function: str
    operands: tuple[str, ...]
    out: str


class Program:
    """Statements `target = formula; …` compiled into instructions.

    With a dtype, the functions of `special` are also compiled into instructions; without one, they
    are instructions themselves.

    Attributes:
        instructions: the calls in order. Operands are variables, folded scalars `k0, k1, …` and
            registers `r0, r1, …`.
        registers: number of registers needed, each of the arrays' shape. Once the old value of a
            statement's target has been read for the last time, the target itself serves as a
            register.
        folded: the scalar subexpressions, evaluated in double by `fold`; `folded_text` holds their
            text.
        reads: the scalars that they depend on.
    """

    def __init__(self, statements: str, scalars: frozenset[str], dtype: str | None = None):
        self.scalars, self.dtype = scalars, dtype
        self.folded: dict[str, Callable[[Mapping[str, float]], float]] = {}
        self.folded_text: dict[str, str] = {}
        self.instructions: list[Instruction] = []
        self.registers = 0
        self.reads: list[str] = []
        self._keys: dict[str, str] = {}
        for target, formula in statements_of(statements):
            nodes = _Nodes(self)
            self._place(target, nodes, nodes.visit(formula))

    def fold(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values of the scalar subexpressions for these scalars."""
        return {key: float(value(values)) for key, value in self.folded.items()}

    def key(self, node: ast.expr) -> str:
        """Return the name of a scalar subexpression's value; a new one is added."""
        text = ast.unparse(node)
        if text not in self._keys:
            self._keys[text] = f"k{len(self._keys)}"
            self.folded[self._keys[text]] = scalar_of(node)
            self.folded_text[self._keys[text]] = text
            self.reads += sorted(variables(node) - {*self.reads})
        return self._keys[text]

    def _place(self, target: str, nodes: _Nodes, root: _Operand) -> None:
        """Add the instructions of a statement's nodes, and assign places to their results."""
        if root == target:
            return
        calls = nodes.calls
        if root != len(calls) - 1 or isinstance(root, str):
            calls.append(("copy", (root,)))
        last = {operand: i for i, (_, operands) in enumerate(calls) for operand in operands}
        free = [f"r{i}" for i in reversed(range(self.registers))]
        if target not in last:
            free.append(target)
        place: dict[_Operand, str] = {}
        for i, (function, operands) in enumerate(calls):
            names = tuple(place.get(x, str(x)) for x in operands)
            for x in dict.fromkeys(operands):
                if last[x] == i and (x == target or isinstance(x, int)):
                    free.append(place.get(x, str(x)))
            if i == len(calls) - 1:
                out = target
            else:
                if not free:
                    free.append(f"r{self.registers}")
                    self.registers += 1
                out = free.pop()
            place[i] = out
            self.instructions.append(Instruction(function, names, out))


class _Nodes:
    """The distinct calls of one statement, before their results have places.

    Attributes:
        calls: functions with their operands, which are names or indices of earlier calls.
    """

    def __init__(self, owner: Program):
        self.owner = owner
        self.calls: list[tuple[str, tuple[_Operand, ...]]] = []
        self._seen: dict[tuple[str, tuple[_Operand, ...]], int] = {}

    def visit(self, node: ast.expr, local: Mapping[str, _Operand] | None = None) -> _Operand:
        """Add the calls of a node; inside the body of a function, `local` holds its variables."""
        owner, call = self.owner, self._call
        if not variables(node) - (owner.scalars if local is None else frozenset()):
            return owner.key(node)
        match node:
            case ast.Name(id=name):
                return name if local is None else local[name]
            case ast.BinOp(left=left, op=ast.Pow(), right=exponent):
                return self._power(self.visit(left, local), exponent_of(exponent))
            case ast.BinOp(left=left, op=op, right=right):
                return call(BINARY[type(op)], self.visit(left, local), self.visit(right, local))
            case ast.UnaryOp(operand=operand):
                return call("negative", self.visit(operand, local))
            case ast.Call(func=ast.Name(id="smooth"), args=[x]):
                return self.visit(x, local)
            case ast.Call(func=ast.Name(id="sigmoid"), args=[x]):
                one = owner.key(ast.Constant(1))
                below = call("exp", self.visit(_negative(x, owner.scalars), local))
                return call("divide", one, call("add", one, below))
            case ast.Call(func=ast.Name(id=name), args=[x]) if name in special.SMOOTH:
                return self._inside(special.SMOOTH[name], self.visit(x, local))
            case ast.Call(func=ast.Name(id=name), args=[x]) if (
                owner.dtype and name in special.NAMES
            ):
                return self._inside(special.body(name, owner.dtype), self.visit(x, local))
            case ast.Call(func=ast.Name(id=name), args=arguments) if name != "pow":
                return call(name, *(self.visit(x, local) for x in arguments))
        raise ValueError(f"{shown(ast.unparse(node))}: pow takes scalars only")

    def _call(self, function: str, *operands: _Operand) -> int:
        if (function, operands) not in self._seen:
            self._seen[function, operands] = len(self.calls)
            self.calls.append((function, operands))
        return self._seen[function, operands]

    def _power(self, u: _Operand, n: int) -> _Operand:
        if n <= 0:
            one = self.owner.key(ast.Constant(1))
            return self._call("divide", one, self._power(u, -n)) if n else one
        if n == 1:
            return u
        half = self._power(u, n // 2)
        square = self._call("multiply", half, half)
        return self._call("multiply", square, u) if n % 2 else square

    def _inside(self, body: str, x: _Operand) -> _Operand:
        """Add the calls of a function's statements at x; return its value `out`."""
        local = {"x": x}
        for target, formula in statements_of(body):
            local[target] = self.visit(formula, local)
        return local["out"]


def _negative(u: ast.expr, scalars: frozenset[str]) -> ast.expr:
    """Return the tree of -u; the minus goes into a scalar factor if there is one, at no cost."""
    match u:
        case ast.UnaryOp(operand=x):
            return x
        case ast.BinOp(left=k, op=ast.Mult() | ast.Div() as op, right=x) if (
            not variables(k) - scalars
        ):
            return ast.BinOp(ast.UnaryOp(ast.USub(), k), op, x)
        case ast.BinOp(left=x, op=ast.Sub(), right=y):
            return ast.BinOp(y, ast.Sub(), x)
    return ast.UnaryOp(ast.USub(), u)


@functools.cache
def program(statements: str, scalars: frozenset[str], dtype: str | None = None) -> Program:
    """Return the compiled program of these statements; the same object for the same text."""
    return Program(statements, scalars, dtype)


def check(argument: str, formula: str, names: Sequence[str], scalars: Mapping[str, float]) -> None:
    """Raise an error that names the argument unless a formula can be computed.

    Args:
        argument: the argument's name in the error.
        formula: the formula.
        names: the arrays that it may read.
        scalars: the scalars that it may read, with values for which its scalar parts are finite.

    Raises:
        TypeError, ValueError: says which part is wrong.
    """
    try:
        parse(formula, (*names, *scalars))
    except (TypeError, ValueError) as error:
        raise named(argument, error) from None
    try:
        numbers = program(f"result = {formula}", frozenset(scalars)).fold(scalars)
        if not all(map(math.isfinite, numbers.values())):
            raise ArithmeticError("part of it is not finite")
    except (ArithmeticError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{argument}: formula {shown(formula)} has no value with {dict(scalars)}: {error}"
        ) from None
