"""`CpuDevice`: the Protocol `CudaDevice` on a CPU; each CUDA thread is a fiber (cuda_on_cpu.hpp).

What would be silent garbage on a GPU is an error here: arguments of another C++ type, accesses
outside the arrays that a kernel was given, memory freed under a recording, operations that break
one, an algorithm of another product, copies that overtake the work before them. Fresh memory is
poisoned: each float in it is NaN, each whole number the largest, or -1.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlpcore.backends.cuda.device import Launch
from mlpcore.backends.cuda.gemm import Algorithms, Product
from mlpcore.backends.cuda.ops import new_operations
from mlpcore.checks.arrays import host_array
from mlpcore.core.ops import Ops
from tests.backends.cuda.emulator import compiler

POISON = 0xFF
Extent = tuple[int, int]
SHARED = 47 << 10  # bytes of dynamic shared memory that a block may ask for, beside 1 KiB of static
NUMBERS = {
    "float": "float32", "double": "float64", "half_t": "float16", "bfloat16_t": "uint16",
    "bool": "bool",
    "int": "int32", "unsigned int": "uint32", "short int": "int16", "short unsigned int": "uint16",
    "long long int": "int64", "long long unsigned int": "uint64", "signed char": "int8",
    "unsigned char": "uint8",
}  # fmt: skip


def algorithm(product: Product, number: int) -> bytes:
    """A stand-in for a cuBLASLt algorithm: good for one product only."""
    return f"{number} {product}".encode()


class Memory(NamedTuple):
    """Memory that a kernel may touch.

    Attributes:
        extent: where it begins and ends.
        owner: the array that holds it.
    """

    extent: Extent
    owner: weakref.ref


class Argument(NamedTuple):
    """An argument as a launch takes it: by value; of an array, the address.

    Attributes:
        kind: its type: a NumPy dtype, or None for None.
        pointer: whether it is an array, or None.
        data: the bytes that are copied to the device.
        memory: what it leads to: the array's memory, or that of all addresses in a record.
    """

    kind: np.dtype | None
    pointer: bool
    data: bytes
    memory: tuple[Memory, ...] = ()


class Call(NamedTuple):
    """A launch of a kernel."""

    kernel: compiler.CpuKernel
    launch: Launch
    arguments: list[Argument]


class Recording:
    """The recorded calls, replayed on the contents that their addresses have at the time."""

    def __init__(self, device: CpuDevice):
        self.device = device
        self.calls: list[Call | Callable[[], None]] = []

    def replay(self) -> None:
        """Do it again."""
        for call in self.calls:
            if isinstance(call, Call):
                self.device.run(call)
            else:
                call()


class Mark:
    """A point of the stream, after `launches` launches; an upload's copy is made only when someone
    waits for its mark.
    """

    def __init__(self, launches: int, copy: Callable[[], None] | None = None):
        self.launches, self.copy, self.settled = launches, copy, False

    def reach(self) -> None:
        if self.copy:
            self.copy()
        self.copy = None


class CpuDevice:
    """A device of `multiprocessors`, whose threads run in this `order`: 0 in order, 1 reversed,
    else shuffled from this seed.

    `misalignment` is added to the address of all fresh memory, which is otherwise a multiple of
    256. NumPy arrays that a user passes count as the device's own, or, with `host_inputs`, as the
    host's.

    In a record that a kernel gets by value, fields of uint64 are addresses: those that `address`
    has given out, others inside fresh memory, or 0.
    """

    xp: Any = np
    name = "cuda:0"
    product_workspace = 1024
    captures = True
    library = "an emulator"
    host_inputs = False

    def __init__(self, multiprocessors: int = 3, order: int = 0, misalignment: int = 0):
        self.multiprocessors, self.order, self.misalignment = multiprocessors, order, misalignment
        self.lock = threading.RLock()
        self.choices: dict[bool, Algorithms] = {}
        self._recording: Recording | None = None
        self._recorder = 0  # the thread that records: others launch at once
        # what `seconds` gives
        self.times: Iterator[float] = (i * 0.6180339887 % 1 for i in itertools.count(1))
        self._behind: dict[bytes, list[Extent]] = {}  # the memory that a slot leads to
        self._memory: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
        self._addressed: dict[int, Memory] = {}  # by the address that was given out for it
        self._launches = 0
        self._last_use: dict[
            Extent, int
        ] = {}  # of memory that uploads write: the launch that read it last
        self._sources: dict[int, Mark] = {}  # of page-locked memory: the upload that reads it

    def active(self) -> contextlib.nullcontext:
        return contextlib.nullcontext()

    def operations(self, tf32: bool = False, deterministic: bool = False) -> Callable[[], Ops]:
        return new_operations(self, tf32, deterministic)

    def free_bytes(self) -> int:
        return 64 << 30

    def empty(self, nbytes: int) -> np.ndarray:
        self._not_while_recording("empty", alone=False)
        memory = np.full(nbytes + 256 + self.misalignment, POISON, np.uint8)
        self._memory[id(memory)] = memory
        begin = -extent(memory)[0] % 256 + self.misalignment
        return memory[begin : begin + nbytes]

    def address(self, array: np.ndarray) -> int:
        address = int(array.__array_interface__["data"][0])
        found = Memory(extent(array), weakref.ref(owner(array)))
        known = self._addressed.get(address, found)
        if known.owner() is found.owner():  # as far as any of its arrays that begin there
            wide = [
                f(x)
                for f, x in zip(
                    (min, max), zip(known.extent, found.extent, strict=True), strict=True
                )
            ]
            found = Memory((wide[0], wide[1]), found.owner)
        self._addressed[address] = found
        return address

    def kernel(self, source: str, name: str) -> compiler.CpuKernel:
        return compiler.kernel(source, name)

    def launch(
        self, kernel: compiler.CpuKernel, launch: Launch, arguments: Sequence[object]
    ) -> None:
        (grid_x, grid_y), (block_x, block_y), shared = launch
        if not (
            grid_x >= 1
            and 1 <= grid_y <= 65535
            and 1 <= block_x * block_y <= 1024
            and 0 <= shared <= SHARED
        ):
            raise ValueError(f"{kernel.name} cannot be launched with {launch}")
        call = Call(kernel, launch, [self._argument(x) for x in arguments])
        if self._records():
            self._recording.calls.append(call)
        else:
            compiler.compile_waiting()
            check(call)
            self.run(call)

    def bind(
        self, kernel: compiler.CpuKernel, launch: Launch, arguments: Sequence[object]
    ) -> Callable[[], None]:
        return functools.partial(self.launch, kernel, launch, tuple(arguments))

    def run(self, call: Call) -> None:
        """Run a checked launch now."""
        kernel, launch, arguments = call
        memory = [x for argument in arguments for x in argument.memory]
        if any(x.owner() is None for x in memory):
            raise RuntimeError(f"{kernel.name}: memory that a recording works on has been freed")
        ranges = [x.extent for x in memory]
        sets = any(x.kind is not None and x.kind.names and not x.pointer for x in arguments)
        for wanted, given in zip(kernel.types, arguments, strict=True):
            if wanted == "Slot*" and sets:
                self._behind[given.data] = list(ranges)
            elif wanted in ("Slot*", "const Slot*"):
                ranges += self._behind.get(given.data, [])
        self._launches += 1
        self._last_use |= {
            x: self._launches for x in self._last_use if any(overlap(x, y) for y in ranges)
        }
        cells = [ctypes.create_string_buffer(x.data, len(x.data)) for x in arguments]
        kernel.run(
            (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells)),
            (ctypes.c_uint * 7)(
                *launch.grid, *launch.block, launch.shared, self.order, len(ranges)
            ),
            (ctypes.c_size_t * (2 * len(ranges)))(*itertools.chain(*ranges)),
        )

    def algorithms(self, product: Product) -> Sequence[bytes]:
        self._not_while_recording("algorithms")
        return [algorithm(product, number) for number in range(2)]

    def multiply(
        self,
        product: Product,
        chosen: bytes,
        left: int,
        right: int,
        result: int,
        bias: int,
        aux: int,
        workspace: int,
    ) -> None:
        assert chosen in (algorithm(product, 0), algorithm(product, 1)), (
            f"{chosen!r} is not for {product}"
        )
        assert workspace, product
        owners = [
            weakref.ref(x)
            for x in self._memory.values()
            if holds(x, left, right, result, workspace)
        ]

        def run() -> None:
            if any(owner() is None for owner in owners):
                raise RuntimeError("a product of memory that has been freed")
            ctypes.memset(workspace, POISON, self.product_workspace)
            multiply(product, left, right, result, bias, aux)

        if self._records():
            self._recording.calls.append(run)
        else:
            run()

    def seconds(self, run: Callable[[], None]) -> float:
        self._not_while_recording("seconds")
        run()
        self._capture(run)
        return next(self.times)

    def record(self, run: Callable[[], None]) -> Recording:
        return self._capture(run)

    def _capture(self, run: Callable[[], None]) -> Recording:
        with self.lock:
            self._not_while_recording("record")
            self._recorder = threading.get_ident()
            self._recording = recording = Recording(self)
            try:
                run()
            finally:
                self._recording = None
        compiler.compile_waiting()
        for call in recording.calls:
            if isinstance(call, Call):
                check(call)
        return recording

    def follow(self, stream: object) -> str:
        assert stream in (None, "stream")
        return "stream"

    # -- arrays of the host and of the device --

    def holds(self, array: np.ndarray) -> bool:
        if not self.host_inputs:
            return True
        memory = owner(array)
        return self._memory.get(id(memory)) is memory

    def adopt(self, value: object, name: str) -> np.ndarray:
        return host_array(value, name)

    def to_device(self, array: np.ndarray) -> np.ndarray:
        native = array.dtype.newbyteorder("=")  # as CuPy does
        memory = self.empty(array.nbytes).view(native).reshape(array.shape)
        memory[...] = array
        return memory

    def to_host(self, array: np.ndarray) -> np.ndarray:
        self._not_while_recording("to_host", alone=False)
        return array.copy()

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return np.full(nbytes, POISON, np.uint8)

    def upload(self, source: np.ndarray, destination: np.ndarray, after: Mark | None) -> Mark:
        there, here, launches = (
            extent(destination),
            id(owner(source)),
            after.launches if after else 0,
        )
        # this memory, or parts of what lay there before
        before = [x for x in self._last_use if overlap(x, there)]
        last = max((self._last_use.pop(x) for x in before), default=0)
        if last > launches:
            raise RuntimeError("an upload into memory that earlier launches may still read")
        if here in self._sources and not self._sources[here].settled:
            raise RuntimeError("page-locked memory used again before its last upload was settled")

        def copy() -> None:
            if after:
                after.reach()
            destination[...] = source

        self._last_use[there] = last
        self._sources[here] = Mark(launches, copy)
        return self._sources[here]

    def mark(self) -> Mark:
        return Mark(self._launches)

    def wait(self, mark: Mark) -> None:
        mark.reach()

    def synchronize(self, mark: Mark) -> None:
        mark.reach()
        for upload in self._sources.values():
            upload.settled = upload.settled or upload.copy is None

    def _argument(self, x: object) -> Argument:
        match x:
            case None:
                return Argument(None, True, bytes(8))
            case np.ndarray(shape=()) if x.dtype.names:
                return Argument(x.dtype, False, x.tobytes(), self._behind_record(x))
            case np.ndarray():
                address = np.uint64(x.__array_interface__["data"][0])
                memory = Memory(extent(x), weakref.ref(owner(x)))
                return Argument(x.dtype, True, address.tobytes(), (memory,))
            case np.generic():
                return Argument(x.dtype, False, x.tobytes())
            case int() if not isinstance(x, bool):
                return Argument(np.dtype(np.int64), False, np.int64(x).tobytes())
            case float():
                return Argument(np.dtype(np.float64), False, np.float64(x).tobytes())
        raise TypeError(f"{type(x).__name__} as the argument of a kernel")

    def _behind_record(self, record: np.ndarray) -> tuple[Memory, ...]:
        """The memory behind the addresses in a record."""
        fields = [record[name] for name in record.dtype.names or ()]
        addresses = [
            int(x) for field in fields if field.dtype == np.uint64 for x in field.flat if x
        ]
        return tuple(map(self._memory_at, addresses))

    def _memory_at(self, address: int) -> Memory:
        known = self._addressed.get(address)
        if known is not None and known.owner() is not None:
            return known
        for memory in self._memory.values():
            if holds(memory, address):
                return Memory(extent(memory), weakref.ref(memory))
        if known is None:
            raise RuntimeError(f"a record leads to {address:#x}, which is no array's address")
        return known  # which has been freed

    def _records(self) -> bool:
        """Return whether this thread records."""
        return self._recording is not None and self._recorder == threading.get_ident()

    def _not_while_recording(self, what: str, alone: bool = True) -> None:
        """Raise an error if this thread records, or, for what goes `alone`, any thread."""
        if self._recording if alone else self._records():
            raise RuntimeError(f"{what} during a recording")


# -- memory and arguments --------------------------------------------------------------------------


def owner(array: np.ndarray) -> np.ndarray:
    """The array that holds the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def extent(array: np.ndarray) -> Extent:
    """Return the begin and end of an array's memory."""
    return np.lib.array_utils.byte_bounds(array)


def holds(array: np.ndarray, *addresses: int) -> bool:
    """Return True if one of the addresses lies in an array's memory."""
    begin, end = extent(array)
    return any(begin <= address < end for address in addresses)


def overlap(a: Extent, b: Extent) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def check(call: Call) -> None:
    """Raise a TypeError unless the arguments are of the kernel's own C++ types.

    `void*` takes any array, a pointer to a struct raw bytes, a struct by value a record of its
    size.
    """
    types = call.kernel.types
    if len(call.arguments) != len(types):
        raise TypeError(
            f"{call.kernel.name} takes {len(types)} arguments ({', '.join(types)}); got "
            f"{len(call.arguments)}"
        )
    for i, (wanted, given) in enumerate(zip(types, call.arguments, strict=True)):
        target, pointer = wanted.removeprefix("const ").removesuffix("*"), wanted.endswith("*")
        if given.kind is not None and given.kind.names and not pointer and target not in NUMBERS:
            size = call.kernel.sizes[i]
            if len(given.data) != size:
                got = f"a record of {len(given.data)}"
                raise TypeError(
                    f"{call.kernel.name}: argument {i} is {wanted!r} of {size} bytes; got {got}"
                )
            continue
        number = np.dtype(NUMBERS.get(target, np.uint8))
        right = given.kind is None or target == "void" or given.kind == number
        if pointer != given.pointer or not right:
            kind = f"{'an array of ' if given.pointer else ''}{given.kind}"
            raise TypeError(f"{call.kernel.name}: argument {i} is {wanted!r}; got {kind}")


# -- matrix products -------------------------------------------------------------------------------


def multiply(product: Product, left: int, right: int, result: int, bias: int, aux: int) -> None:
    """The product as cuBLASLt's documentation says it: column-major matrices at addresses, products
    summed in float.
    """
    p = product
    assert all((left, right, result)), p
    for address, promised in (
        (left, p.left_alignment),
        (right, p.right_alignment),
        (result, p.result_alignment),
        (bias, p.bias_alignment),
        (aux, p.aux_alignment),
    ):
        assert address % promised == 0, f"{address:#x} for {p}"
    compute = np.float64 if p.dtype == "float64" else np.float32
    storage = "float32" if p.dtype == "tf32" else p.dtype
    L = widen(
        matrix(left, (p.k, p.m) if p.transpose_left else (p.m, p.k), p.left_stride, storage),
        p.dtype,
    )
    R = widen(
        matrix(right, (p.n, p.k) if p.transpose_right else (p.k, p.n), p.right_stride, storage),
        p.dtype,
    )
    D = matrix(result, (p.m, p.n), p.result_stride, p.result_dtype)
    with np.errstate(all="ignore"):
        total = (L.T if p.transpose_left else L).astype(compute) @ (
            R.T if p.transpose_right else R
        ).astype(compute)
        D[...] = narrow(finish(p, total, D, bias, aux).astype(compute), p.result_dtype)


def finish(p: Product, total: np.ndarray, D: np.ndarray, bias: int, aux: int) -> np.ndarray:
    """Return the values stored in D: the sum with its old values (β = 1), after the epilogue."""
    if p.accumulate:
        total = total + widen(D, p.result_dtype)
    if p.epilogue:
        assert bias, p
        total = total + widen(matrix(bias, (p.m, 1), p.m, p.result_dtype), p.result_dtype)
    match p.epilogue:
        case "" | "bias":
            assert not aux, p
            return total
        case "relu":
            assert not aux, p
            return np.maximum(total, 0)
        case "gelu":
            assert aux, p
            matrix(aux, (p.m, p.n), p.result_stride, p.result_dtype)[...] = narrow(
                total, p.result_dtype
            )
            return total * (
                0.5 * np.tanh(math.sqrt(2 / math.pi) * (total + 0.044715 * total**3)) + 0.5
            )
    raise AssertionError(p)


def matrix(address: int, shape: tuple[int, int], stride: int, dtype: str) -> np.ndarray:
    """The column-major matrix at an address; bfloat16 as uint16."""
    rows, columns = shape
    assert stride >= rows, (shape, stride)
    kind = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    size = (stride * (columns - 1) + rows) * kind.itemsize
    memory = (ctypes.c_ubyte * size).from_address(address)
    return np.ndarray(shape, kind, memory, strides=(kind.itemsize, stride * kind.itemsize))


def widen(array: np.ndarray, dtype: str) -> np.ndarray:
    """Stored numbers as float32 (float64 as they are), rounded to what the multiplication reads."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "tf32":
        return _round(array.astype(np.float32), 13).view(np.float32)
    return array if dtype == "float64" else array.astype(np.float32)


def narrow(array: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as they are stored; bfloat16 as uint16."""
    if dtype == "bfloat16":
        return (_round(array.astype(np.float32), 16) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _round(array: np.ndarray, bits: int) -> np.ndarray:
    """The bits of float32 numbers without their last `bits`: to nearest, ties to even; NaN stays
    NaN.
    """
    whole = np.ascontiguousarray(array).view(np.uint32)
    rounded = (whole + np.uint32((1 << bits - 1) - 1) + (whole >> bits & 1)) >> bits << bits
    return np.where(np.isnan(array), np.uint32(0x7FFF0000), rounded.astype(np.uint32))
