"""The trial of a kernel on `CpuDevice`s whose threads run in three orders, which must leave the
same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlpcore.backends.cuda.device import Launch
from tests.backends.cuda.emulator.device import POISON, CpuDevice, extent, narrow, widen

ORDERS = (0, 1, 7)  # in order, reversed, shuffled
NAMES = {"float": "float32", "double": "float64", "half_t": "float16", "bfloat16_t": "bfloat16"}
EPSILON = {"float": 2.0**-23, "double": 2.0**-52, "half_t": 2.0**-10, "bfloat16_t": 2.0**-7}
# half the step between subnormal numbers
SMALLEST = {"float": 0.0, "double": 0.0, "half_t": 2.0**-25, "bfloat16_t": 0.0}
COMPUTE = {"float": "float", "double": "double", "half_t": "float", "bfloat16_t": "float"}


def stored(array: np.ndarray, T: str) -> np.ndarray:
    """Numbers as type T keeps them."""
    return narrow(np.asarray(array), NAMES[T])


def read(array: np.ndarray, T: str) -> np.ndarray:
    """Stored numbers in double."""
    return widen(array, NAMES[T]).astype(np.float64)


def computed(array: object, T: str) -> np.ndarray:
    """Numbers of the type that T is computed in."""
    return np.array(array, NAMES[COMPUTE[T]])


def fresh(shape: int | tuple[int, ...], T: str) -> np.ndarray:
    """Memory that nobody has written yet."""
    array = np.empty(shape, stored(np.zeros(1), T).dtype)
    array.view(np.uint8)[...] = POISON
    return array


def place(device: CpuDevice, array: np.ndarray | None) -> np.ndarray | None:
    """A copy of an array on a device, with its strides, and as much out of line as it is."""
    if array is None:
        return None
    begin, end = extent(array)
    memory = device.empty(end - begin + 16)[begin % 16 :]
    copy = np.ndarray(
        array.shape,
        array.dtype,
        memory,
        array.__array_interface__["data"][0] - begin,
        array.strides,
    )
    copy[...] = array
    return copy


def try_out(work: Callable[..., None], *arrays: np.ndarray | None) -> list[np.ndarray]:
    """The arrays after `work(device, *arrays)`, which gets them on a device; an array given twice
    is there once.
    """
    found = []
    for order in ORDERS:
        device = CpuDevice(order=order)
        placed = {id(x): place(device, x) for x in arrays}
        work(device, *(placed[id(x)] for x in arrays))
        found.append([placed[id(x)] for x in arrays])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a is b is None or a.tobytes() == b.tobytes(), (
                "the result depends on the order in which threads run"
            )
    return found[0]


def launch(source: str, name: str, shape: Launch, *arguments: object) -> list[object]:
    """The arguments after one launch. Counters (uint32) must be 0 before, and are 0 after it."""
    arrays = [x for x in arguments if isinstance(x, np.ndarray)]

    def work(device: CpuDevice, *placed: np.ndarray) -> None:
        rest = iter(placed)
        device.launch(
            device.kernel(source, name),
            shape,
            [next(rest) if isinstance(x, np.ndarray) else x for x in arguments],
        )

    after = iter(try_out(work, *arrays))
    found = [next(after) if isinstance(x, np.ndarray) else x for x in arguments]
    assert all(not x.any() for x in found if isinstance(x, np.ndarray) and x.dtype == np.uint32), (
        "counters are not 0 again"
    )
    return found


def close(
    got: np.ndarray, want: np.ndarray, T: str, ulps: float = 4, scale: np.ndarray | float = 1.0
) -> None:
    """`got` (numbers of T) is `want` up to rounding: half a unit of T, and `ulps` of the computing
    type beside `scale`.
    """
    got, want = read(got, T), np.asarray(want, np.float64)
    assert got.shape == want.shape
    computing = EPSILON[COMPUTE[T]]
    bound = (
        abs(want) * (ulps * computing + EPSILON[T] / 2)
        + ulps * computing * np.asarray(scale)
        + SMALLEST[T]
    )
    with np.errstate(invalid="ignore"):
        far = (
            ~(abs(got - want) <= bound)
            & ~(got == read(stored(want, T), T))
            & ~(np.isnan(got) & np.isnan(want))
        )
    assert not far.any(), (
        f"{far.sum()} of {far.size} differ: {got[far][0]} for {want[far][0]} at "
        f"{np.argwhere(far)[0]}, …"
    )
