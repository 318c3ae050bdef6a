"""The arrays that the NumPy backend itself needs for a chunk, as lines of the plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from mlpcore.backends.numpy import programs
from mlpcore.backends.numpy.programs import piece_rows
from mlpcore.core.dropout import Dropped
from mlpcore.core.ops import Buffer, ChunkShape
from mlpcore.core.program import Program


def of_chunk(chunk: ChunkShape) -> list[Buffer]:
    """Return the arrays that the operations of a chunk need."""
    rows, dtype = chunk.rows, chunk.dtype
    buffers = [Buffer("ones", (rows,), dtype, "db = 1ᵀ D")]
    if registers := _registers(chunk):
        buffers.append(Buffer("registers", (registers,), dtype, "intermediate results of formulas"))
    buffers += [*_of_loss(chunk), *_of_dropout(chunk), *_of_output(chunk), *_of_sums(chunk)]
    return buffers


def of_map(program: Program, size: int, dtype: str) -> list[Buffer]:
    """Return the arrays that `map` over vectors of `size` entries needs."""
    shape = max(1, program.registers) * min(programs.PIECE, size)
    return [Buffer("registers", (shape,), dtype, "of the update, for one piece at a time")]


def _registers(chunk: ChunkShape) -> int:
    """Return the total entries of all registers that any one formula of the chunk needs."""
    rows, sizes, dtype, objective = chunk.rows, chunk.sizes, chunk.dtype, chunk.objective
    registers = 0
    for l, activation in enumerate(chunk.activations):
        if activation is None or activation.rowwise or _matched(chunk, l):
            continue
        value = programs.value(activation, dtype, in_place=not activation.slope_reads_s)
        slope = programs.slope(activation, dtype, "z")
        count = max(value.registers if value else 0, slope.registers)
        piece = min(programs.PIECE, rows * sizes[l])
        if activation.a is not None:
            count = max(count, 1 + programs.by_parameter(activation, dtype).registers)
            piece = piece_rows(rows, sizes[l]) * sizes[l]
        registers = max(registers, count * piece)
    if objective.output.rowwise and not objective.matched:
        registers = max(registers, rows * sizes[-1])
    if not objective.loss.rowwise:
        value, slope = programs.loss(objective, dtype, in_place=objective.matched)
        count = 1 + max(value.registers, slope.registers)
        registers = max(registers, count * rows * sizes[-1])
    return registers


def _matched(chunk: ChunkShape, l: int) -> bool:
    """Return True if layer l is the output and its formula is part of the loss's."""
    return l == len(chunk.sizes) - 1 and chunk.objective.matched


def _of_loss(chunk: ChunkShape) -> Iterator[Buffer]:
    rows, dtype, classes, loss = chunk.rows, chunk.dtype, chunk.sizes[-1], chunk.objective.loss
    if loss.rowwise:
        yield Buffer("softmax", (rows * classes,), dtype, "exponentials")
        why = "maximum, sums and label entry per row"
        yield Buffer("row sums", (4, rows), dtype, why)
        yield Buffer("row numbers", (rows,), "int64", "0, 1, 2, …")
        yield Buffer("label entries", (2, rows), "int64", "position of each row's label")
    if loss.columns:
        why = "class weights or pos_weight of the loss"
        yield Buffer("column weights", (classes,), dtype, why)


def _of_dropout(chunk: ChunkShape) -> Iterator[Buffer]:
    rows, layers = chunk.rows, zip(chunk.sizes, chunk.activations, strict=True)
    dropped = [n for n, activation in layers if isinstance(activation, Dropped)]
    if dropped:
        piece = max(piece_rows(rows, n) * n for n in dropped)
        bits = 8 * np.dtype(chunk.dtype).itemsize
        yield Buffer("mask numbers", (max(rows, *dropped),), "uint32", "0, 1, 2, …")
        yield Buffer("mask keys", (2, rows + max(dropped)), "uint32", "of rows and columns")
        yield Buffer("draws", (piece,), "uint32", "for entries of Z, a piece at a time")
        yield Buffer("mask", (piece,), f"int{bits}", "all bits set for dropped entries")


def _of_output(chunk: ChunkShape) -> Iterator[Buffer]:
    rows, objective = chunk.rows, chunk.objective
    if objective.output.rowwise and not objective.matched:
        yield Buffer("row sum", (rows,), chunk.dtype, "softmax: maximum, sum")
        if objective.output.logarithmic:
            yield Buffer("row numbers", (rows,), "int64", "0, 1, 2, …")
            why = "their columns and positions"
            yield Buffer("largest entries", (2, rows), "int64", why)


def _of_sums(chunk: ChunkShape) -> Iterator[Buffer]:
    sizes, dtype = chunk.sizes, chunk.dtype
    learned = [
        n
        for l, (n, activation) in enumerate(zip(sizes, chunk.activations, strict=True))
        if activation is not None and activation.a is not None and not _matched(chunk, l)
    ]
    if chunk.accumulates:
        largest = max(a * b for a, b in itertools.pairwise(sizes))
        yield Buffer("dW of a chunk", (largest,), dtype, "before it is added to dW")
    if chunk.accumulates or learned:
        yield Buffer("db of a chunk", (max(sizes[1:]),), dtype, "before it is added to db")
    if learned:
        why = "before it is added up or added to da"
        yield Buffer("da by output", (max(learned),), dtype, why)
