"""The structs shared by host and kernels, each defined once: slot, control block, segments.

The slot tells the kernels of a step what to read. The host fills a record and passes it by value
to the kernel `set_slot`, which stores it where a captured graph reads it; the graph advances it
from step to step. The control block stays on the device. Segments are the parts of the flat vectors
with their own settings; if no part has any, there are no segments.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SETTINGS = 12  # maximum number of scalars that the optimizer's formulas read
TOGETHER = 64  # maximum number of steps in one launch
APPLIED = 2  # `resume` of a slot whose gradient comes from the caller


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
    Field("rows", "const int64*", 1, "row numbers of the batch; null: all rows in order"),
    Field("source_rows", "int64", 1, "rows of X"),
    Field("first", "int64", 1, "entry of `rows`, or row of X, at which the batch begins"),
    Field("batch_row", "int64", 1, "number in the batch of the row given by `first`"),
    Field("batch_rows", "int64", 1, "offset of the launch's next step; 0: there is none"),
    Field("step", "int64", 1, "number of the update, from 1"),
    Field("turn", "int64", 1, "steps done since the slot was set"),
    Field(
        "answer", "double*", 1, "destination of J, status, step of first fault, Σ w; may be null"
    ),
    Field(
        "resume",
        "int64",
        1,
        "1: another part of the same step, sums continue; 2: the gradient is the caller's",
    ),
    Field("weight", "double", 1, "Σ w of the batch, or 0 if the device computes it"),
    Field(
        "settings", "double", SETTINGS, "learning rate, l1, l2, then other scalars of the formulas"
    ),
    Field("rates", "double", TOGETHER, "learning rates of this and the next steps"),
)
CONTROL_FIELDS = (
    Field("updates", "int64", 1, "done so far: t of the optimizer"),
    Field("fault_step", "int64", 1, "step of the first fault"),
    Field("good_steps", "int64", 1, "steps since the loss scale last changed"),
    Field("loss_scale", "double", 1, "for float16; else 1"),
    Field("reach", "double", 1, "bound of the first state vector's entries"),
    Field("skipped", "int64", 1, "updates left out because loss or gradient was not finite"),
    Field("status", "unsigned", 1, "faults: persistent, and no update follows one"),
    Field("skip", "unsigned", 1, "1 if this step's update is left out"),
)

SEGMENT_FIELDS = (
    Field("stop", "int64", 1, "one past the last entry"),
    Field("weights", "int64", 1, "1 for weights, which are decayed and penalised"),
    Field("frozen", "int64", 1, "1 if they do not change"),
    Field("rate", "double", 1, "factor of the learning rate"),
    Field("decay", "double", 1, "overrides the optimizer's unless below 0"),
    Field("missed", "int64", 1, "updates missed while frozen, subtracted from t"),
)


class Source(enum.IntEnum):
    """Indices into the slot's sources."""

    X, Y, WEIGHTS = range(3)


class Status(enum.IntFlag):
    """Faults in the control block's status."""

    NOT_FINITE = 1
    BAD_LABEL = 2
    BAD_WEIGHT = 4
    BAD_ROW = 8


class Scalar(enum.IntEnum):
    """Indices of a step's scalars: 1 / Σ w, loss scale, J, penalties, then the update's own."""

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
        array: the record, 0-d; a launch that takes it by value reads it again each time.
        words, numbers: its memory as 8-byte integers and floats, at the offsets in `WORD`;
            assigning to them costs a fraction of assigning to a field of the array.
    """

    def __init__(self) -> None:
        memory = np.zeros(SLOT.itemsize, np.uint8)
        self.array = memory.view(SLOT).reshape(())
        self.words, self.numbers = memory.data.cast("q"), memory.data.cast("d")


def declarations() -> str:
    """Return the C++ code of the structs and of the constants that index them."""
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
