"""Compiled formulas on arrays: instruction by instruction, in pieces that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from mlpcore.backends.numpy import programs
from mlpcore.backends.numpy.tape import Recorder
from mlpcore.core.activation import Activation
from mlpcore.core.ops import Array
from mlpcore.core.program import Program

UFUNCS = (
    "add", "subtract", "multiply", "divide", "negative", "maximum", "minimum", "tanh", "exp",
    "expm1", "log", "log1p", "abs", "sqrt", "sign", "sin", "cos",
)  # fmt: skip


class FormulaOps(Recorder):
    """The part of the operations that runs programs."""

    def __init__(self, xp: Any = np):
        super().__init__(xp)
        self._functions = {
            "copy": xp.positive,
            "positive": partial(xp.greater, casting="unsafe"),
            "kept": partial(xp.not_equal, casting="unsafe"),
            **{name: getattr(xp, name) for name in UFUNCS},
        }

    def map(
        self, program: Program, arrays: Mapping[str, Array], scalars: Mapping[str, Array]
    ) -> None:
        """Run elementwise statements over flat vectors, in pieces that stay in cache."""
        first, step = next(iter(arrays.values())), programs.PIECE
        registers = self._registers(program.registers, (min(step, first.size),), first.dtype)
        for start in range(0, first.size, step):
            pieces = {name: array[start : start + step] for name, array in arrays.items()}
            size = min(step, first.size - start)
            self._run(program, {**pieces, **scalars}, [register[:size] for register in registers])

    def _run(self, compiled: Program, arrays: Mapping[str, Array], registers: list[Array]) -> None:
        """Run each instruction of a program; `arrays` also holds scalars by their folded keys."""
        places = _flat({**arrays, **{f"r{i}": register for i, register in enumerate(registers)}})
        for name, operands, out in compiled.instructions:
            function, arguments = self._functions[name], [places[x] for x in operands]
            if name == "positive":
                self._do(function, *arguments, 0, places[out])
            elif name == "kept":
                bits = arguments[0].view(f"uint{8 * arguments[0].dtype.itemsize}")
                negative_zero = self._constant(1 << 8 * bits.dtype.itemsize - 1, bits)
                self._do(function, bits, negative_zero, places[out])
            elif name in ("maximum", "minimum"):  # NumPy 2.4 requires `out` as a keyword
                self._do(partial(function, out=places[out]), *arguments)
            else:
                self._do(function, *arguments, places[out])

    def _formula(self, compiled: Program, arrays: dict[str, Array], activation: Activation) -> None:
        """Run a program on matrices of one shape, in pieces if they are contiguous."""
        first = next(iter(arrays.values()))
        constants, flat = self._given(compiled, activation, first.dtype), _flat(arrays)
        if any(array.ndim for array in constants.values()):
            for pieces, registers in self._pieces(arrays, compiled.registers):
                self._run(compiled, {**pieces, **constants}, registers)
        elif flat is not arrays:
            self.map(compiled, flat, constants)
        else:
            registers = self._registers(compiled.registers, first.shape, first.dtype)
            self._run(compiled, {**arrays, **constants}, registers)

    def _given(self, compiled: Program, activation: Activation, dtype: Any) -> dict[str, Array]:
        """Return a program's constants and the learned parameter, 0-d or (n,)."""
        constants = self._constants(compiled, activation.scalars, dtype)
        if activation.a is not None:
            constants["a"] = activation.a.reshape(()) if activation.a.size == 1 else activation.a
        return constants

    def _pieces(
        self, arrays: Mapping[str, Array], registers: int
    ) -> Iterator[tuple[dict[str, Array], list[Array]]]:
        """Yield matrices of one shape by rows that stay in cache, with registers of that size."""
        first = next(iter(arrays.values()))
        (m, n), few = first.shape, programs.piece_rows(*first.shape)
        own = self._registers(registers, (few, n), first.dtype)
        for start in range(0, m, few):
            rows = slice(start, min(m, start + few))
            yield (
                {name: array[rows] for name, array in arrays.items()},
                [register[: rows.stop - start] for register in own],
            )

    def _registers(self, count: int, shape: tuple[int, ...], dtype: Any) -> list[Array]:
        return list(self._take("registers", (count, *shape), dtype))

    def _constants(
        self, compiled: Program, scalars: Mapping[str, float], dtype: Any
    ) -> dict[str, Array]:
        return {key: self.xp.asarray(value, dtype) for key, value in compiled.fold(scalars).items()}


def _flat(places: dict[str, Array]) -> dict[str, Array]:
    """Return the arrays flattened to one dimension, which is faster; else `places` itself.

    All but the 0-d ones must be contiguous and of one shape.
    """
    wide = [array for array in places.values() if array.ndim]
    if any(
        array.ndim == 1 or array.shape != wide[0].shape or not array.flags.c_contiguous
        for array in wide
    ):
        return places
    return {name: array.reshape(-1) if array.ndim else array for name, array in places.items()}
