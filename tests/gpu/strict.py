"""`StrictDevice`: the emulated device, its arrays as unlike NumPy's as CuPy's are.

NumPy takes none of them for its own, none is written from a NumPy array, the two meet in no
operation, and everything that is picked out of one is an array again. What would be a TypeError on
a GPU is one here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlpcore.checks.arrays import host_array
from tests.backends.cuda.emulator.device import CpuDevice

METHODS = (
    "sum",
    "min",
    "max",
    "any",
    "all",
    "argmax",
    "argmin",
    "take",
    "copy",
    "ravel",
    "mean",
    "fill",
    "cumsum",
)


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of the device's."""

    def __init__(self, array: np.ndarray):
        self.array = array

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)
    size = property(lambda self: self.array.size)
    nbytes = property(lambda self: self.array.nbytes)
    strides = property(lambda self: self.array.strides)
    flags = property(lambda self: self.array.flags)
    T = property(lambda self: DeviceArray(self.array.T))
    device = property(lambda self: type("Device", (), {"id": 0})())
    flat = property(lambda self: iter(()))  # there is one, and nobody should look at it
    __cuda_array_interface__ = property(lambda self: self.array.__array_interface__)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __array__(self, *arguments: object, **more: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> object:
        if method != "__call__":
            return NotImplemented
        kwargs = {key: own(x[0]) if key == "out" else x for key, x in kwargs.items()}
        return wrap(ufunc(*map(own, inputs), **kwargs))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> object:
        return wrap(function(*map(own, args), **{key: own(x) for key, x in kwargs.items()}))

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(name)
        return lambda *args, **kwargs: wrap(getattr(self.array, name)(*map(own, args), **kwargs))

    def reshape(self, *shape: Any) -> DeviceArray:
        return DeviceArray(self.array.reshape(*shape))

    def view(self, dtype: Any) -> DeviceArray:
        return DeviceArray(self.array.view(dtype))

    def astype(
        self,
        dtype: Any,
        order: str = "K",
        casting: Any = None,
        subok: Any = None,
        copy: bool = True,
    ) -> DeviceArray:
        array = self.array.astype(dtype, order, copy=copy)
        return self if array is self.array else DeviceArray(array)

    def __getitem__(self, index: Any) -> DeviceArray:
        return DeviceArray(np.asarray(self.array[_index(index)]))

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        self.array[_index(index)] = own(value)

    def __len__(self) -> int:
        return len(self.array)

    def __float__(self) -> float:
        return float(self.array)

    def __int__(self) -> int:
        return int(self.array)

    def __bool__(self) -> bool:
        return bool(self.array)

    def __format__(self, spec: str) -> str:
        return format(self.array[()], spec)


def own(x: Any) -> Any:
    """Return the value of an argument; a NumPy array is not one."""
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return x.array if isinstance(x, DeviceArray) else x


def wrap(x: Any) -> Any:
    """A result as the device's array."""
    if isinstance(x, list | tuple):
        return type(x)(map(wrap, x))
    return DeviceArray(np.asarray(x)) if isinstance(x, np.ndarray | np.generic) else x


def _index(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    found = tuple(x.array if isinstance(x, DeviceArray) else x for x in parts)
    return found if isinstance(index, tuple) else found[0]


class Module:
    """NumPy's functions on the device's arrays."""

    ndarray = DeviceArray

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)
        if isinstance(function, type) or not callable(function):
            return function
        return lambda *args, **kwargs: wrap(
            function(*map(own, args), **{key: own(x) for key, x in kwargs.items()})
        )

    def matmul(
        self, a: DeviceArray, b: DeviceArray, out: DeviceArray | None = None, **none: object
    ) -> Any:
        """`out` by name alone."""
        assert not none
        product = np.matmul(own(a), own(b))
        if out is None:
            return wrap(product)
        out.array[...] = product
        return out

    def asarray(self, x: Any, dtype: Any = None) -> DeviceArray:
        if isinstance(x, DeviceArray) and dtype in (None, x.dtype):
            return x
        return DeviceArray(np.array(x.array if isinstance(x, DeviceArray) else x, dtype))

    array = asarray

    def asnumpy(self, x: Any) -> np.ndarray:
        return np.array(x.array) if isinstance(x, DeviceArray) else np.asarray(x)


def bare(x: Any) -> Any:
    """A device's array as `CpuDevice` takes it."""
    return x.array if isinstance(x, DeviceArray) else x


class StrictDevice(CpuDevice):
    """A `CpuDevice` whose arrays are `DeviceArray`s; NumPy's lie on the host."""

    xp: Any = Module()
    host_inputs = True
    index = 0

    def __init__(self) -> None:
        super().__init__()
        self.entered = 0  # how often `active` holds

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1

    def run(self, call: Any) -> None:
        assert self.entered, "on a second GPU this would be launched on the first"
        super().run(call)

    def empty(self, nbytes: int) -> Any:
        return DeviceArray(super().empty(nbytes))

    def address(self, array: Any) -> int:
        return super().address(bare(array))

    def launch(self, kernel: Any, launch: Any, arguments: Any) -> None:
        host = [x for x in arguments if isinstance(x, np.ndarray) and not x.dtype.names]
        assert not host, "an array of the host's as a kernel's argument"
        super().launch(kernel, launch, [bare(x) for x in arguments])

    def holds(self, array: Any) -> bool:
        return isinstance(array, DeviceArray)

    def adopt(self, value: object, name: str) -> Any:
        return value if isinstance(value, DeviceArray) else host_array(value, name)

    def to_device(self, array: Any) -> Any:
        if isinstance(array, DeviceArray):
            return array
        memory = DeviceArray(super().empty(array.nbytes)).view(array.dtype).reshape(array.shape)
        memory.array[...] = array
        return memory

    def to_host(self, array: Any) -> np.ndarray:
        return super().to_host(bare(array))

    def upload(self, source: np.ndarray, destination: Any, after: Any) -> Any:
        return super().upload(source, bare(destination), after)
