"""Checks of the arrays that users pass, made once in the public methods; inner code trusts them.

Each error names the argument, what was expected and what was passed. Arrays are copied only if
they cannot be used as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Adopt = Callable[[object, str], Array]
PLAIN = "fdeilqhbILQHB?"  # dtypes that need no conversion
_PIECE = 1 << 20  # entries checked at a time
_FEW = 2048  # entries gathered at a time: 16 KiB
# DLPack's device numbers: pageable and page-locked host memory; GPU and managed memory
_HOST, _CUDA = (1, 3), (2, 13)
# raised by libraries that cannot export an array
_UNREADABLE = (ValueError, TypeError, RuntimeError, BufferError)


class TargetForm(Protocol):
    """The part of a loss that decides which targets it accepts."""

    @property
    def takes_classes(self) -> bool:
        """True if Y may hold class indices."""

    def require_outputs(self, outputs: int) -> None:
        """Raise a ValueError if the loss cannot be computed from this many outputs."""


def gpu(value: object, name: str) -> int | None:
    """Return the number of the GPU that holds an array of any library; None for host memory.

    Raises:
        TypeError: the array is on another kind of device, or its device cannot be read.
    """
    if isinstance(value, np.ndarray):
        return None
    if hasattr(value, "__dlpack_device__"):
        try:
            kind, number = value.__dlpack_device__()
        except _UNREADABLE as error:
            raise TypeError(f"{name} is on a device that cannot be read: {_line(error)}") from None
        if kind not in (*_HOST, *_CUDA):
            raise TypeError(
                f"{name} is on a device that is neither the CPU nor a CUDA GPU (DLPack"
                f"device type {int(kind)})"
            )
        return int(number) if kind in _CUDA else None
    if hasattr(value, "__cuda_array_interface__"):
        device = getattr(value, "device", None)
        return int(getattr(device, "id", getattr(device, "index", None)) or 0)
    return None


def host_array(value: object, name: str) -> Array:
    """Return `value` as a NumPy array, without a copy.

    Raises:
        TypeError, ValueError: `value` is on a GPU or is not an array; names the argument.
    """
    if gpu(value, name) is not None:
        raise TypeError(
            f"{name} is on a GPU, but the network is on the CPU: pass NumPy arrays, or move the "
            "network with net.to('cuda')"
        )
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except _UNREADABLE as error:  # a ragged list, a sparse tensor, a tracer of JAX
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name} cannot be read as an array: {_line(error)}") from None
    is_frame = (
        array.dtype.kind == "O"
        and array.ndim == 2
        and hasattr(value, "dtypes")
        and hasattr(value, "items")
    )
    return _frame(value, name) if is_frame else array


def _frame(frame: Any, name: str) -> Array:
    """Return the columns of a pandas frame in a common dtype; missing numbers become NaN.

    Raises:
        TypeError: a column does not hold numbers; names the column.
    """
    columns = []
    for label, column in frame.items():
        if getattr(column.dtype, "kind", "O") not in "fiub":
            raise TypeError(
                f"{name} must hold real numbers; its column {label!r} is {column.dtype}"
            )
        values = np.asarray(column)
        columns.append(
            values if values.dtype.kind != "O" else column.to_numpy(np.float64, na_value=np.nan)
        )
    return np.column_stack(columns)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_library_of(value: object, array: Any) -> Any:
    """Return `array` in the array library of `value`, without a copy.

    JAX copies memory that does not meet its alignment.
    """
    if isinstance(value, np.ndarray | type(array)):
        return array
    torch = sys.modules.get("torch")  # already imported if `value` is a tensor
    if torch is not None and isinstance(value, torch.Tensor):
        return torch.from_dlpack(array)
    if hasattr(value, "__array_namespace__"):
        return value.__array_namespace__().from_dlpack(array)
    return array


def on_host(array: Array) -> bool:
    """Return True if values can be read without waiting; `DeviceLoss` checks those on a GPU."""
    return isinstance(array, np.ndarray)


def matrix(X: object, columns: int | None, name: str = "X", adopt: Adopt = host_array) -> Array:
    """Return a view of `X` as a 2-D numeric array (m, `columns`), m >= 1.

    `adopt` converts the argument; it may accept arrays on a GPU.

    Raises:
        TypeError: `X` is not numeric.
        ValueError: `X` is empty, or has the wrong number of axes or columns.
    """
    array = numeric(X, name, adopt)
    if array.ndim != 2:
        hint = (
            f"; for one row write {name}[None, :], for one column {name}[:, None]"
            if array.ndim == 1
            else ""
        )
        raise ValueError(
            f"{name} must have 2 axes, rows and columns; it has shape {array.shape}{hint}"
        )
    if array.size == 0:
        raise ValueError(f"{name} is empty: shape {array.shape}")
    if columns is not None and array.shape[1] != columns:
        raise ValueError(f"{name} has {array.shape[1]} columns; the network takes {columns}")
    return array


def numeric(value: object, name: str, adopt: Adopt = host_array) -> Array:
    """Return `value` as an array of real numbers; copy only if its dtype has to change.

    The types of ml_dtypes become float32, long doubles become float64.

    Raises:
        TypeError, ValueError: `value` is not numeric, is masked, requires grad or is on another
            device; names the argument.
    """
    # the usual case
    if type(value) is np.ndarray and adopt is host_array and value.dtype.char in PLAIN:
        return value
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise TypeError(
            f"{name} is a masked array with masked entries; fill them first, e.g. with "
            f"{name}.filled(0)"
        )
    if not isinstance(value, np.ndarray):
        if getattr(value, "requires_grad", False) is True:
            raise TypeError(
                f"{name} requires grad, but autograd stops here: pass {name}.detach(), or put the "
                "network into a model with "
                "mlpcore.torch.Module"
            )
        if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # not convertible to NumPy
            value = cast(Any, value).float()
    array = adopt(value, name)
    if array.dtype.kind == "V" and np.can_cast(array.dtype, np.float32):  # the types of ml_dtypes
        array = array.astype(np.float32)
    elif array.dtype.char == "g":
        with np.errstate(over="ignore"):
            array = array.astype(np.float64)
    if array.dtype.kind == "O" and array.ndim == 0:  # not an array at all
        hint = "; only fit and evaluate take it" if type(value).__name__ == "Parquet" else ""
        raise TypeError(f"{name} must hold real numbers; got {type(value).__name__}{hint}")
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers; its dtype is {array.dtype}")
    return array


def target(
    Y: object, rows: int, outputs: int, loss: TargetForm, name: str = "Y", adopt: Adopt = host_array
) -> tuple[Array, bool]:
    """Return `Y` in the form that the loss takes, and True if it holds class indices.

    Class indices are (m,) integers in 0 … n_L - 1; any other Y is (m, n_L) numbers. A 1-D Y becomes
    one column if the network has one output.

    Raises:
        TypeError, ValueError: `Y` is not numeric, has the wrong shape or length, or holds labels
            that are not classes (the first one is named).
    """
    array, classes = target_form(Y, rows, outputs, loss, name, adopt)
    if classes and on_host(array):
        require_classes(array, outputs, name)
    return array, classes


def target_form(
    Y: object, rows: int, outputs: int, loss: TargetForm, name: str = "Y", adopt: Adopt = host_array
) -> tuple[Array, bool]:  # fmt: skip
    """Return the same as `target`, but check only shape and dtype."""
    array = numeric(Y, name, adopt)
    loss.require_outputs(outputs)
    if array.ndim == 0 or len(array) != rows:
        raise ValueError(f"{name} has {0 if array.ndim == 0 else len(array)} rows; X has {rows}")
    if loss.takes_classes and array.ndim == 1:
        if array.dtype.kind not in "iu":
            raise ValueError(
                f"{name} holds class indices and must have an integer dtype; got {array.dtype}"
            )
        return array, True
    if array.ndim == 1 and outputs == 1:
        array = array[:, None]
    if array.shape != (rows, outputs):
        also = f" or ({rows},) class indices" if loss.takes_classes else ""
        raise ValueError(f"{name} must have shape ({rows}, {outputs}){also}; got {array.shape}")
    return array, False


def require_classes(array: Array, outputs: int, name: str = "Y", first: int = 0) -> None:
    """Raise a ValueError that names the first row without a valid class; rows start at `first`."""
    if array.min() < 0 or array.max() >= outputs:
        at = int(((array < 0) | (array >= outputs)).argmax())
        raise ValueError(
            f"{name} must hold classes 0 … {outputs - 1}; row {first + at} holds {array[at]}"
        )


def weights(
    sample_weight: object, rows: int, name: str = "sample_weight", adopt: Adopt = host_array
) -> Array | None:
    """Return row weights (m,), finite, not negative, not all zero; None for None.

    Raises:
        TypeError, ValueError: the weights are not of this form; the first bad row is named.
    """
    if sample_weight is None:
        return None
    array = numeric(sample_weight, name, adopt)
    if array.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one weight per row; got {array.shape}")
    if not on_host(array):
        return array
    for start in range(0, rows, 8192):  # in pieces, so that a step allocates almost nothing
        bad = ~(np.isfinite(array[start : start + 8192]) & (array[start : start + 8192] >= 0))
        if bad.any():
            at = start + int(np.argmax(bad))
            raise ValueError(f"{name} must be finite and not negative; row {at} holds {array[at]}")
    if not array.any():
        raise ValueError(f"{name} must not be all zero")
    return array


def row_of(value: object, columns: int, name: str, adopt: Adopt = host_array) -> Array:
    """Return `value` as one finite number per column, (columns,).

    Raises:
        TypeError, ValueError: `value` is not of this form; names the argument.
    """
    array = numeric(value, name, adopt)
    if array.shape != (columns,):
        raise ValueError(
            f"{name} must have shape ({columns},), one number per column; got {array.shape}"
        )
    require_finite(array, name)
    return array


def row_index(
    rows: object, count: int, name: str = "rows", adopt: Adopt = host_array
) -> Array | None:
    """Return row numbers (k,) as int64 in 0 … count - 1, k >= 1; None for None.

    Raises:
        TypeError, ValueError: the numbers are not of this form; the first bad one is named.
    """
    if rows is None:
        return None
    array = numeric(rows, name, adopt)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty list of row numbers; got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers; its dtype is {array.dtype}")
    if not on_host(array):
        return array.astype(np.int64, order="C", copy=False)
    if array.min() < 0 or array.max() >= count:
        at = int(np.argmax((array < 0) | (array >= count)))
        raise ValueError(f"{name} must lie in 0 … {count - 1}; entry {at} is {array[at]}")
    return np.ascontiguousarray(array, np.int64)


class Strided(np.ndarray):
    """Rows that are not row-major, aligned or native-endian: NumPy's own `take` would copy all."""

    def take(  # type: ignore[override]
        self, indices: Any, axis: int | None = None, out: Any = None, mode: str = "clip"
    ) -> Any:  # fmt: skip
        """Return the rows with these numbers, or write them to `out`, a few at a time."""
        rows = self.view(np.ndarray)
        if out is None:
            return rows[indices]
        few = max(1, _FEW // max(1, rows[:1].size))
        for start in range(0, len(indices), few):
            out[start : start + few] = rows[indices[start : start + few]]
        return out


def by_rows(array: Array) -> Array:
    """Return a view of the array whose `take` gathers rows without copying the whole array.

    That is the array itself if it is row-major, aligned and in the machine's byte order, or on a
    GPU, where rows with any strides can be gathered.
    """
    plain = not on_host(array) or (array.flags.c_contiguous and array.flags.aligned)
    if plain and array.dtype.isnative:
        return array
    return array.view(Strided)


def require_finite(array: Array, name: str, dtype: Any = np.float64, first: int = 0) -> None:
    """Raise a ValueError that names the first number that is not finite in `dtype`.

    The message gives row and column; `first` is the number of the array's first row.
    """
    if array.dtype.kind != "f":
        return
    largest = np.finfo(dtype).max
    step = max(1, _PIECE // max(1, array[:1].size))
    for start in range(0, len(array), step):
        piece = array[start : start + step]
        # allocates nothing of the piece's size if all are finite
        if not (-largest <= piece.min() and piece.max() <= largest):
            bad = ~(abs(piece) <= largest)
            place = np.unravel_index(int(bad.argmax()), bad.shape)
            row, rest = start + int(place[0]), place[1:]
            column = f", column {int(rest[0])}" if rest else ""
            value = array[(row, *rest)]
            beyond = f", out of the range of {np.dtype(dtype)}" if np.isfinite(value) else ""
            raise ValueError(
                f"{name} must be finite; row {first + row}{column} holds {value}{beyond}"
            )


def require_range(array: Array, low: float, high: float, name: str, first: int = 0) -> None:
    """Raise a ValueError that names the first row outside `low` … `high`; rows start at `first`."""
    if array.min() < low or array.max() > high:
        row = int(((array < low) | (array > high)).reshape(len(array), -1).any(axis=1).argmax())
        raise ValueError(f"{name} takes {low} … {high}; row {first + row} holds {array[row]}")


def require_distribution(Y: Array, name: str = "Y", first: int = 0) -> None:
    """Raise a ValueError that names the first row that is not a distribution."""
    step = max(1, _PIECE // 16 // max(1, Y[:1].size))
    for start in range(0, len(Y), step):
        piece = Y[start : start + step]
        bad = (piece < 0).any(axis=1) | (abs(piece.sum(axis=1, dtype=np.float64) - 1) > 1e-3)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"{name} must be one-hot, or each row a distribution over classes; row "
                f"{first + start + row} is {piece[row]}"
            )
