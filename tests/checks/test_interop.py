"""Arrays of other libraries and of every kind go in; results come back in the library of X; nothing
is copied needlessly.
"""

import array
import functools
import shutil

import ml_dtypes
import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.checks import arrays
from tests.backends.cuda.emulator.device import CpuDevice

RNG = np.random.default_rng(0)
X = RNG.integers(-4, 5, (12, 4)).astype(np.float32)  # numbers that every type below holds exactly
V = RNG.integers(-2, 3, (12, 3)).astype(np.float32)
U = RNG.integers(1, 4, (12, 3)).astype(np.float32)
CLASSES = RNG.integers(0, 3, 12)
WEIGHTS = RNG.integers(1, 4, 12).astype(np.float32)


class Foreign:
    """An array that speaks DLPack and nothing else."""

    def __init__(self, there):
        self.there = there

    def __dlpack__(self, **more):
        return self.there.__dlpack__(**more)

    def __dlpack_device__(self):
        return self.there.__dlpack_device__()


class Spaced(Foreign):
    """One that has a namespace, as the array API standard asks."""

    def __array_namespace__(self, api_version=None):
        return Spaced

    @staticmethod
    def from_dlpack(x):
        return Spaced(np.from_dlpack(x))


class OnDevice(Foreign):
    """One that says it lies elsewhere."""

    def __init__(self, there, device):
        super().__init__(there)
        self.device = device

    def __dlpack_device__(self):
        return self.device


def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def jax():
    return pytest.importorskip("jax", reason="JAX is not installed").numpy


LIBRARIES = {
    "torch": lambda x: torch().from_numpy(x.copy()),
    "jax": lambda x: jax().asarray(x),
    "DLPack alone": lambda x: Foreign(x.copy()),
    "the array API": lambda x: Spaced(x.copy()),
    "the buffer protocol": lambda x: memoryview(x.copy()),
    "lists": lambda x: x.tolist(),
}


def address(x):
    if hasattr(x, "data_ptr"):
        return x.data_ptr()
    return (
        x.unsafe_buffer_pointer()
        if hasattr(x, "unsafe_buffer_pointer")
        else arrays.host_array(x, "x").ctypes.data
    )


def net(device="cpu"):
    return mc.MLP([4, 6, 3], "gelu", "softmax", device=device, seed=3)


def everything(network, X, V, U, CLASSES, WEIGHTS):
    """Return the results of every method that takes arrays."""
    twin = network.copy()
    trainer = mc.Trainer(twin, mc.Loss("sum", "y * z", "y + 0 * z"), mc.SGD(0.1))
    cache = network.forward(X)
    found = [
        *cache.Z[1:],
        network.backward(cache, V, input_gradient=True).X,
        network.predict(X, chunk_rows=5),
    ]
    found += [
        *network.jvp(X, X),
        *network.vjp(X, V),
        network.hvp(X, CLASSES, network.parameters, "cross_entropy"),
    ]
    found += [*mc.loss("squared_error")(V, U, WEIGHTS), *mc.loss("cross_entropy")(U, CLASSES)]
    found += [network.logits(X, chunk_rows=5), trainer.losses(X, V)]
    found += [float(trainer.step(X, V, WEIGHTS)), trainer.evaluate(X, V, WEIGHTS)["loss"]]
    trainer.fit(X, V, WEIGHTS, epochs=1, batch_size=5, progress=False)
    found += [twin.parameters]
    classifier = mc.Trainer(twin, "cross_entropy", mc.SGD(0.1))
    found += [
        float(classifier.step(X, CLASSES, WEIGHTS, rows=CLASSES)),
        mc.check_gradients(network, X, CLASSES).max_relative_error,
    ]
    return [arrays.host_array(x, "a result") for x in found]


@functools.cache
def expected():
    return everything(net(), X, V, U, CLASSES, WEIGHTS)


@pytest.mark.parametrize("library", LIBRARIES)
def test_arrays_of_every_library_go_in_at_every_door(library):
    convert = LIBRARIES[library]
    found = everything(net(), *map(convert, (X, V, U, CLASSES, WEIGHTS)))
    bound = 1e-6 if library == "lists" else 0  # lists are float64 to NumPy
    for one, other in zip(found, expected(), strict=True):
        np.testing.assert_allclose(one, other, rtol=bound, atol=bound)


@pytest.mark.parametrize("library", ["torch", "jax", "the array API"])
def test_what_belongs_to_the_rows_comes_back_in_the_library_of_x_sharing_memory_where_it_can(
    library, monkeypatch
):
    x, v = map(LIBRARIES[library], (X, V))
    given = []
    inner = arrays.in_library_of
    monkeypatch.setattr(
        arrays,
        "in_library_of",
        lambda value, array: given.append((array, inner(value, array))) or given[-1][1],
    )
    network = net()
    results = [
        network.predict(x),
        *network.jvp(x, x),
        network.vjp(x, v).X,
        mc.loss("squared_error")(v, v)[1],
    ]
    results += [mc.loss("cross_entropy")(LIBRARIES[library](abs(V)), CLASSES)[1]]
    for result in results:
        assert isinstance(result, type(x))
    for ours, theirs in given:
        # JAX copies what is not aligned to 64 bytes
        assert address(theirs) == address(ours) or library == "jax"
    assert len(given) == len(results)
    assert isinstance(network.vjp(x, v).parameters, np.ndarray)
    assert isinstance(network.forward(x).output, np.ndarray)


def test_a_result_for_numpy_or_a_list_is_numpys():
    for x in (X, X.tolist(), memoryview(X)):
        assert type(net().predict(x)) is np.ndarray


@pytest.mark.parametrize("library", ["torch", "jax", "DLPack alone", "the buffer protocol"])
def test_arrays_of_the_networks_dtype_are_read_where_they_lie(library):
    x, y, w = map(LIBRARIES[library], (X, V, WEIGHTS))
    assert net().forward(x).Z[0].ctypes.data == address(x)
    data = mc.Trainer(net(), mc.Loss("sum", "y * z", "y + 0 * z"))._intake.as_data(x, y, w)
    assert [a.ctypes.data for a in (data.X, data.Y, data.weights)] == [
        address(a) for a in (x, y, w)
    ]


def test_an_array_of_the_standard_library_is_an_array():
    weights = array.array("d", WEIGHTS.tolist())
    assert mc.Trainer(net()).evaluate(X, CLASSES, weights) == mc.Trainer(net()).evaluate(
        X, CLASSES, WEIGHTS
    )


# -- kinds of NumPy arrays, on both backends -------------------------------------------------------


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


KINDS = {
    "read-only": read_only,
    "Fortran order": lambda x: np.asfortranarray(x),
    "strided": lambda x: (
        np.repeat(np.repeat(x, 2, axis=0), 2, axis=-1)[::2, ..., ::2]
        if x.ndim == 2
        else np.repeat(x, 2)[::2]
    ),
    "negative strides": lambda x: np.flip(np.flip(x).copy()),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
    "long double": lambda x: x.astype(np.longdouble),
    "int8": lambda x: x.astype(np.int8),
    "int64": lambda x: x.astype(np.int64),
    "bfloat16": lambda x: x.astype(ml_dtypes.bfloat16),
    "float8": lambda x: x.astype(ml_dtypes.float8_e4m3fn),
}


def numbers_of(network, x, v, w):
    trainer = mc.Trainer(network.copy(), mc.Loss("sum", "y * z", "y + 0 * z"), mc.SGD(0.1))
    cache = network.forward(x)
    found = [
        cache.output,
        network.backward(cache, v).flat,
        network.predict(x),
        network.jvp(x, x).tangent,
    ]
    found += [
        network.vjp(x, v).parameters,
        float(trainer.step(x, v, w)),
        float(trainer.step(x, v, w, rows=[1, 1, 5])),
    ]
    trainer.fit(x, v, w, epochs=1, batch_size=5, progress=False)
    return [
        np.asarray(value)
        for value in (*found, trainer.evaluate(x, v, w)["loss"], trainer.net.parameters)
    ]


@pytest.mark.parametrize("where", ["cpu", "cuda", "cuda, rows on the host"])
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_every_kind_are_the_numbers_they_hold(kind, where, monkeypatch):
    if where != "cpu":
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        device = CpuDevice()
        device.host_inputs = "host" in where
        monkeypatch.setitem(devices._opened, "cuda:0", device)
    network = net(where.split(",")[0])
    plain = numbers_of(network, X, V, WEIGHTS)
    arrays = [KINDS[kind](x) for x in (X, V, WEIGHTS)]
    before = [x.copy() for x in arrays]
    for found, wanted in zip(numbers_of(network, *arrays), plain, strict=True):
        np.testing.assert_array_equal(found, wanted)
    for x, was in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, was)


def test_booleans_are_zeros_and_ones():
    for x in (X > 0, LIBRARIES["DLPack alone"](X > 0)):
        np.testing.assert_array_equal(net().predict(x), net().predict((X > 0).astype(np.float32)))


@pytest.mark.parametrize("library", [torch, jax])
def test_bfloat16_of_other_libraries_goes_in_exactly(library):
    xp = library()
    half = X.astype(ml_dtypes.bfloat16)
    x = xp.asarray(half) if xp.__name__ != "torch" else xp.from_numpy(X).bfloat16()
    found = net().predict(x)
    assert isinstance(found, type(x))
    np.testing.assert_array_equal(np.asarray(found), net().predict(X))


# -- what is refused -------------------------------------------------------------------------------


def test_structured_arrays_and_raw_bytes_are_no_numbers():
    for x in (np.zeros((3, 4), [("a", "f4")]), np.zeros((3, 4), "V2"), X.astype(complex)):
        with pytest.raises(TypeError, match="X must hold real numbers"):
            net().predict(x)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ((2, 0), "G is on a GPU, but the network is on the CPU"),
        ((13, 1), "G is on a GPU"),
        ((8, 0), "neither the CPU nor a CUDA"),
    ],
)
def test_an_array_on_another_device_is_refused_by_name(device, message):
    network = net()
    with pytest.raises(TypeError, match=message):
        network.backward(network.forward(X), OnDevice(V, device))


def test_page_locked_memory_is_the_hosts():
    np.testing.assert_array_equal(net().predict(OnDevice(X, (3, 0))), net().predict(X))


def test_a_loss_of_an_array_on_a_gpu_asks_for_that_gpu(monkeypatch):
    with pytest.raises(mc.DeviceUnavailable, match="cuda:1"):
        mc.loss("squared_error")(OnDevice(V, (2, 1)), V)


DOORS = {
    "X": lambda x: net().predict(x),
    "dX": lambda x: net().jvp(X, x),
    "Y": lambda x: mc.Trainer(net()).step(X, x),
    "sample_weight": lambda x: mc.Trainer(net()).fit(X, CLASSES, x, progress=False),
    "v": lambda x: net().hvp(X, CLASSES, x, "cross_entropy"),
    "gradient": lambda x: mc.check_gradients(net(), X, CLASSES, gradient=x),
    "Z": lambda x: mc.loss("squared_error")(x, V),
}


@pytest.mark.parametrize("name", DOORS)
def test_a_tensor_that_autograd_follows_is_refused_with_what_to_do(name):
    with pytest.raises(
        TypeError, match=rf"^{name} requires grad.*{name}\.detach\(\).*mlpcore\.torch\.Module"
    ):
        DOORS[name](torch().zeros(12, 4, requires_grad=True))


@pytest.mark.parametrize("name", DOORS)
def test_tensors_that_have_no_numbers_to_read_are_refused_by_name(name):
    t = torch()
    for x in (t.zeros(12, 4, device="meta"), t.zeros(12, 4).to_sparse()):
        with pytest.raises(
            TypeError,
            match=rf"^{name} (is on a device that cannot be read|cannot be read as an array)",
        ):
            DOORS[name](x)


def test_what_jax_traces_is_refused_by_name():
    jit = pytest.importorskip("jax", reason="JAX is not installed").jit
    with pytest.raises(TypeError, match="X cannot be read as an array"):
        jit(net().predict)(X)
