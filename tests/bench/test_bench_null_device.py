"""The device that computes nothing: it is a `CudaDevice`, and a trainer runs on it."""

import contextlib
import inspect

import numpy as np
import pytest

import mlpcore as mc
from bench import null_device
from bench.null_device import NullDevice
from mlpcore.backends import devices
from mlpcore.backends.cuda.device import CudaDevice
from mlpcore.checks.errors import DeviceUnavailable
from mlpcore.core.device import Device

MEMBERS = {**vars(Device), **vars(CudaDevice)}
METHODS = [name for name, one in MEMBERS.items() if inspect.isfunction(one) and name[0] != "_"]


def parameters(method):
    given = inspect.signature(method).parameters.values()
    return [(one.name, one.kind, one.default) for one in given]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_what_the_protocols_takes(name):
    assert parameters(getattr(NullDevice, name)) == parameters(getattr(CudaDevice, name))


def test_it_has_every_attribute_of_the_protocol():
    device = NullDevice()
    assert {"launch", "record", "to_host"} <= set(METHODS)
    assert all(
        hasattr(device, name) for name in Device.__annotations__ | CudaDevice.__annotations__
    )


@pytest.mark.parametrize("host_inputs", [False, True], ids=["on the device", "from the host"])
@pytest.mark.parametrize("precision", [None, "float16"])
def test_a_trainer_runs_and_nothing_is_computed(precision, host_inputs):
    rng = np.random.default_rng(0)
    X, Y = rng.random((20, 6), np.float32), rng.integers(0, 3, 20)
    with null_device.installed(NullDevice(host_inputs=host_inputs)):
        net = mc.MLP([6, 5, 3], output="softmax", device="cuda")
        before = net.parameters.copy()
        trainer = mc.Trainer(net, "cross_entropy", mc.AdamW(0.1), precision=precision)
        losses = [float(trainer.step(X, Y)) for _ in range(3)]
        history = trainer.fit(X, Y, epochs=2, batch_size=8, progress=False)
    assert losses == [0.0, 0.0, 0.0]
    assert history["loss"] == [0.0, 0.0]
    assert trainer.progress.step == 3 + 2 * 3
    np.testing.assert_array_equal(net.parameters, before)


def test_it_plays_cuda_only_inside_the_block():
    with contextlib.suppress(KeyError), null_device.installed() as device:
        assert devices.open_device("cuda:0") is device
        assert device.multiprocessors == 132
        raise KeyError("a fault")
    with pytest.raises(DeviceUnavailable):
        devices.open_device("cuda:0")


def test_its_memory_is_aligned_and_zero():
    memory = NullDevice().empty(1000)
    assert memory.size == 1000
    assert not memory.any()
    assert NullDevice().address(memory) % null_device.ALIGNMENT == 0
