"""The weights of a network are views of its parameters, in copies too."""

import copy
import pickle

import numpy as np
import pytest

import mlpcore as mc


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), copy.copy]
)
def test_the_views_of_a_copied_network_are_of_its_own_parameters(clone):
    net = clone(mc.MLP([3, 4, 2]))
    assert np.shares_memory(net.W[1], net.parameters)
    net.parameters[...] = 0
    assert not net.predict(np.ones((2, 3))).any()


@pytest.mark.parametrize("name", ["W", "b", "parameters"])
def test_an_array_cannot_be_put_beside_the_one_that_is_trained(name):
    net = mc.MLP([3, 2])
    with pytest.raises(AttributeError):
        setattr(net, name, getattr(net, name))
