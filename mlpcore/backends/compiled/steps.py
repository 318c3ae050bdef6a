"""Many training steps in one call: the passes and products of a step, called in turn from C++."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlpcore.backends import formula_text
from mlpcore.backends.compiled import passes
from mlpcore.core.ops import Array, Call
from mlpcore.core.program import Program

SOURCES = {
    "float32": "float", "float64": "double", "int8": "signed char", "int16": "short",
    "int32": "int", "int64": "long long", "uint8": "unsigned char", "uint16": "unsigned short",
    "uint32": "unsigned int", "uint64": "unsigned long long", "bool": "bool",
}  # fmt: skip

BLOCK = 1024  # entries whose squares are summed at a time, as in cpu_steps.cpp


class Segment(NamedTuple):
    """A part of the flat vectors with its own update.

    Attributes:
        calls: the recorded update.
        scalars: 0-d arrays that it reads, in the order of the program's folded scalars.
        rate: factor of the learning rate.
        decay: weight decay.
        missed: updates that it missed, subtracted from `t`.
    """

    calls: Sequence[Call]
    scalars: Sequence[Array]
    rate: float
    decay: float
    missed: int


class Rule(NamedTuple):
    """An update and the bounds that keep it finite.

    Attributes:
        program: the statements.
        vectors: names of their vectors.
        constants: the settings by name.
        bounds: formulas of the state's and the change's bounds.
        floor, roots, halves: as in `engine.lanes.Bounds`.
    """

    program: Program
    vectors: Sequence[str]
    constants: Mapping[str, float]
    bounds: tuple[str, str]
    floor: float
    roots: float
    halves: float


class NotCompiled(Exception):
    """Part of a step is not compiled."""


def addresses(calls: Sequence[Call]) -> list[int]:
    """Return function and arguments of each call as addresses; raise NotCompiled."""
    found = []
    for function, *arguments in calls:
        if len(arguments) != 1 or not hasattr(arguments[0], "_obj"):
            raise NotCompiled
        structure = arguments[0]._obj
        found += [_address(function.library.run_part), ctypes.addressof(structure)]
    return found


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def gather(source: np.dtype[Any], to: Array, places: Array) -> Call:
    """Return the call that copies a batch's rows from an array of this dtype; raise NotCompiled.

    `point` gives it the array.
    """
    labels = to.dtype.name == "int64"
    if source.name not in SOURCES or not (source.kind in "iu" if labels else source.isnative):
        raise NotCompiled
    kind = SOURCES[source.name] if source.isnative else f"Swapped<{SOURCES[source.name]}>"
    given = {"to": to, "place": places, "m": len(to), "n": to.size // len(to)}
    target = "long long" if labels else passes.TYPES[to.dtype.name]
    return _call("gather Gather", target, given, options=(kind,))


def point(call: Call, source: Array) -> bool:
    """Make a call of `gather` read an array from now on; return False if it cannot."""
    size = source.itemsize
    if not isinstance(source, np.ndarray) or not source.flags.aligned:
        return False
    if any(stride % size for stride in source.strides):
        return False
    arguments = call[1]._obj
    arguments.row, arguments.column = [*(stride // size for stride in source.strides), 1][:2]
    arguments.source = source.ctypes.data
    return True


def advance(places: Array, rows: int) -> Call:
    """Return the call that moves on by a chunk of this many rows; raise NotCompiled."""
    return _call("advance Advance", "double", {"place": places, "rows": rows})


def penalize(w: Array, J: Array, l1: float, l2: float) -> Call:
    """Return the call that adds the penalties to J; raise NotCompiled."""
    given = {"w": w, "J": J, "n": w.size, "l1": l1, "l2": l2}
    return _call("penalize Penalize", passes.TYPES[w.dtype.name], given)


def _call(
    template: str,
    type: str,
    given: Mapping[str, Any],
    options: tuple[str, ...] = (),
) -> Call:
    run = passes.load(template, type, "", options)
    if run is None:
        raise NotCompiled
    return passes.call(run, template.split()[1], given)


class Share(NamedTuple):
    """The part of a worker in each step.

    Attributes:
        calls: add its rows' loss to J, and compute their gradient.
        places: where the calls read the step's number, the first row and the row numbers' address.
        J: 0-d, its loss.
        start: its first row in a batch.
    """

    calls: Sequence[Call]
    places: Array
    J: Array
    start: int


class StepLoop:
    """The loop over a net's training steps.

    Args:
        shares: the workers' parts. Those of several run one on each thread; a single one is
            recorded so that threads share its calls.
        then: calls that complete the gradient.
        segments: the updates.
        rule: their rule.
        g: the gradient, flat.
        rows: rows of a batch.
        clip_norm: the largest norm of the gradient, or None.

    Raises:
        NotCompiled: part of a step is not compiled.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        then: Sequence[Call],
        segments: Sequence[Segment],
        rule: Rule,
        g: Array,
        rows: int,
        clip_norm: float | None,
    ) -> None:
        names = ["rate", "decay", *(name for name in rule.constants if name != "decay")]
        formula = formula_text.update(rule.program, rule.vectors, names, (), "", rule.bounds)
        run = passes.load("run_steps Steps", passes.TYPES[g.dtype.name], formula)
        before = [*(call for share in shares for call in share.calls), *then]
        every = [*before, *(call for one in segments for call in one.calls)]
        calls = addresses(every)
        if run is None:
            raise NotCompiled
        self.reach = np.zeros(1)
        settings = [[0.0, one.decay, *(rule.constants[x] for x in names[2:])] for one in segments]
        numbers = [number.ctypes.data for one in segments for number in one.scalars]
        given = {
            "calls": np.array(calls, np.uintp), "updates": len(before), "calls_end": len(every),
            "ends": np.cumsum([len(share.calls) for share in shares], dtype=np.int64),
            "workers": len(shares),
            "places": np.array([share.places.ctypes.data for share in shares], np.uintp),
            "starts": np.array([share.start for share in shares], np.int64),
            "J": np.array([share.J.ctypes.data for share in shares], np.uintp), "g": g,
            "settings": np.array(settings), "numbers": np.array(numbers, np.uintp),
            "factors": np.array([[one.rate, one.missed] for one in segments], np.float64),
            "reach": self.reach, "segments": len(segments), "settings_each": len(names),
            "rows": rows, "n": g.size, "squares": np.empty(-(-g.size // BLOCK)),
            "clip_norm": math.inf if clip_norm is None else clip_norm, "floor": rule.floor,
            "roots": rule.roots, "halves": rule.halves,
        }  # fmt: skip
        self.call = passes.call(run, "Steps", given, alive=(shares, then, segments))
        self._structure: Any = self.call[1]._obj

    def set(
        self,
        rows: Array | None,
        number: int,
        updates: int,
        rates: Sequence[float],
        reach: float,
        threads: int,
    ) -> tuple[Array, Array, Array]:
        """Set up the next call; return its losses, its number of steps done, and what it reads.

        The arrays must live until the call is over.

        Args:
            rows: row numbers of the steps, or None: the first rows.
            number: number of the first step.
            updates: updates before it.
            rates: a learning rate for each step.
            reach: bound of the first state vector.
            threads: number of threads that share each step, which changes no bits.
        """
        self.reach[0], table = reach, np.array(rates, np.float64)
        losses, done, arguments = np.empty(len(rates)), np.zeros(1, np.int64), self._structure
        arguments.losses, arguments.done = losses.ctypes.data, done.ctypes.data
        arguments.rates = table.ctypes.data
        arguments.row_numbers = None if rows is None else rows.ctypes.data
        arguments.steps, arguments.number, arguments.threads = len(rates), number, threads
        arguments.done_before = updates
        return losses, done, table
