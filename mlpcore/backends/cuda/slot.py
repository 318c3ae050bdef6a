"""The structs that host and kernels share, each defined once: slot, control block, segments.

The slot tells the kernels of a step what to read. The host fills a record and passes it by value
to the kernel `set_slot`, which puts it where a captured graph reads it; the graph advances it from
step to step. The control block stays on the device. Segments are the parts of the flat vectors that
have settings of their own; without such settings there are none.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SETTINGS = 12  # scalars that the optimizer's formulas may read
TOGETHER = 64  # steps that one launch may hold
APPLIED = 2  # `resume` of a slot whose gradient is the caller's


class Field(NamedTuple):
    """A field of a struct: its name, C++ type, length, and a comment."""

    name: str
    type: str
    length: int
    comment: str


SLOT_FIELDS = (
    Field("source", "const void*", 3, "X, Y, row weights"),
    Field("row_stride", "int64", 3, "in entries"),
    Field("column_stride", "int64", 3, "in entries"),
    Field("rows", "const int64*", 1, "row numbers of the batch; null: all in order"),
    Field("source_rows", "int64", 1, "rows of X"),
    Field("first", "int64", 1, "entry of `rows`, or row of X, that the batch begins with"),
    Field("batch_row", "int64", 1, "number in the batch of the row that `first` stands for"),
    Field("batch_rows", "int64", 1, "how much further on the launch's next step begins; 0: none"),
    Field("step", "int64", 1, "number of the update, from 1"),
    Field("turn", "int64", 1, "steps done since the slot was set"),
    Field(
        "answer", "double*", 1, "where J, status, step of the first fault and Σ w go; may be null"
    ),
    Field(
        "resume",
        "int64",
        1,
        "1: a further part of the same step follows, sums go on; 2: the gradient is the caller's",
    ),
    Field("weight", "double", 1, "Σ w of the batch, or 0 where the device is to find it"),
    Field(
        "settings", "double", SETTINGS, "learning rate, l1, l2, then what else the formulas read"
    ),
    Field("rates", "double", TOGETHER, "learning rates of the steps from this one on"),
)
CONTROL_FIELDS = (
    Field("updates", "int64", 1, "done so far: t of the optimizer"),
    Field("fault_step", "int64", 1, "step of the first fault"),
    Field("good_steps", "int64", 1, "steps since the loss scale last changed"),
    Field("loss_scale", "double", 1, "of float16; 1 elsewhere"),
    Field("reach", "double", 1, "bound of the entries of the first state vector"),
    Field("skipped", "int64", 1, "updates left out because loss or gradient was not finite"),
    Field("status", "unsigned", 1, "faults: they stay, and no update happens after one"),
    Field("skip", "unsigned", 1, "whether this step's update is left out"),
)

SEGMENT_FIELDS = (
    Field("stop", "int64", 1, "the entry behind the last one"),
    Field("weights", "int64", 1, "whether these are weights, which decay and are penalised"),
    Field("frozen", "int64", 1, "whether they stay as they are"),
    Field("rate", "double", 1, "factor of the learning rate"),
    Field("decay", "double", 1, "in place of the optimizer's; below 0: the optimizer's"),
    Field("missed", "int64", 1, "updates that went by while they were frozen: t is less by them"),
)


class Source(enum.IntEnum):
    """Places in the slot's sources."""

    X, Y, WEIGHTS = range(3)


class Status(enum.IntFlag):
    """Faults in the control block's status."""

    NOT_FINITE = 1
    BAD_LABEL = 2
    BAD_WEIGHT = 4
    BAD_ROW = 8


class Scalar(enum.IntEnum):
    """Places of a step's scalars: 1 / Σ w, the loss scale, J, penalties, then the update's own."""

    SCALE, GAIN, LOSS, L1, L2, FIRST_OF_UPDATE = range(6)


def _dtype(fields: Sequence[Field]) -> np.dtype:
    numbers = {"int64": "i8", "double": "f8", "unsigned": "u4"}
    return np.dtype(
        [(x.name, numbers.get(x.type, "u8"), (x.length,) if x.length > 1 else ()) for x in fields]
    )


SLOT, CONTROL, SEGMENT = _dtype(SLOT_FIELDS), _dtype(CONTROL_FIELDS), _dtype(SEGMENT_FIELDS)
WORD = {name: offset // 8 for name, (_, offset, *_) in (SLOT.fields or {}).items()}  # 8 bytes each


class SlotRecord:
    """A slot on the host.

    Attributes:
        array: the record, 0-d; a launch that takes it by value reads it anew each time.
        words, numbers: its memory as integers and as floats of 8 bytes, at the places of `WORD`:
            assigning to them costs a fraction of assigning to a field of the array.
    """

    def __init__(self) -> None:
        memory = np.zeros(SLOT.itemsize, np.uint8)
        self.array = memory.view(SLOT).reshape(())
        self.words, self.numbers = memory.data.cast("q"), memory.data.cast("d")


def declarations() -> str:
    """Return the C++ of the structs and of the numbers that name places in them."""
    scalars = ", ".join(f"{x.name} = {x.value}" for x in Scalar)
    faults = ", ".join(f"{x.name} = {x.value}" for x in Status)
    return "\n".join(
        [
            f"constexpr int SETTINGS = {SETTINGS}, TOGETHER = {TOGETHER}, APPLIED = {APPLIED};",
            f"enum Scalar {{ {scalars} }};",
            f"enum Status : unsigned {{ {faults} }};",
            _struct("Slot", SLOT_FIELDS, SLOT),
            _struct("Control", CONTROL_FIELDS, CONTROL),
            _struct("Segment", SEGMENT_FIELDS, SEGMENT),
        ]
    )


def _struct(name: str, fields: Sequence[Field], dtype: np.dtype) -> str:
    lines = [
        f"  {x.type} {x.name}{f'[{x.length}]' if x.length > 1 else ''};  // {x.comment}"
        for x in fields
    ]
    check = f'static_assert(sizeof({name}) == {dtype.itemsize}, "the host packs {name} otherwise");'
    return "\n".join([f"struct {name} {{", *lines, "};", check])
