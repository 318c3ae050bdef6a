"""The network as a layer of PyTorch; networks from PyTorch's models and back: gradients, shared
memory, equal predictions.
"""

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.core import activations
from mlpcore.io import convert

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
Module = pytest.importorskip("mlpcore.torch").Module
prune = pytest.importorskip("torch.nn.utils.prune")


def net(hidden="tanh", output="identity", dtype="float64", **settings):
    return mc.MLP([4, 6, 5, 3], hidden, output, dtype=dtype, seed=1, **settings)


def rows(count=7, dtype=torch.float64, **more):
    X = torch.from_numpy(np.random.default_rng(0).standard_normal((count, 4))).to(dtype)
    return X.requires_grad_(**more) if more else X


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("output", ["identity", "softmax", ("sigmoid", 2.0)], ids=str)
@pytest.mark.parametrize("hidden", ["tanh", "gelu", "softplus", "mish"])
def test_gradcheck_passes_for_the_input_and_the_parameters(hidden, output):
    module = Module(net(hidden, output))

    def call(X, flat):
        return torch.func.functional_call(module, {"flat": flat}, (X,))

    flat = module.flat.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (rows(requires_grad=True), flat))
    assert torch.autograd.gradcheck(module, (rows(requires_grad=True),))


def test_gradcheck_passes_with_tied_weights_and_without_bias():
    module = Module(mc.MLP([4, 3, 3, 4], "tanh", tied={3: "1.T"}, bias=False, dtype="float64"))
    flat = module.flat.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda flat: torch.func.functional_call(module, {"flat": flat}, (rows(),)), (flat,)
    )


def test_gradients_are_those_of_the_same_network_made_of_torch_layers():
    ours = mc.MLP([4, 6, 5, 3], ["relu", "gelu"], dtype="float64", seed=1)
    module, theirs = Module(ours), ours.to_torch()
    X, Y = rows(requires_grad=True), rows()[:, :3]
    other = X.detach().clone().requires_grad_()
    for model, x in ((module, X), (theirs, other)):
        ((model(2 * x) - Y) ** 2).mean().backward()
    torch.testing.assert_close(X.grad, other.grad, rtol=1e-12, atol=1e-15)
    weights = [p.grad.T.flatten() for p in theirs.parameters() if p.ndim == 2]
    biases = [p.grad for p in theirs.parameters() if p.ndim == 1]
    torch.testing.assert_close(
        module.flat.grad, torch.cat([*weights, *biases]), rtol=1e-12, atol=1e-15
    )


def test_a_layer_used_twice_gets_the_sum_of_both_gradients():
    ours = mc.MLP([4, 4], "tanh", "tanh", dtype="float64")
    module, X = Module(ours), rows()
    module(module(X)).sum().backward()
    twice = mc.MLP([4, 4, 4], "tanh", "tanh", dtype="float64")
    for l in (1, 2):
        twice.W[l][...] = ours.W[1]
    grad = twice.backward(twice.forward(X), np.ones((7, 4)))
    np.testing.assert_allclose(
        module.flat.grad.numpy()[:16].reshape(4, 4), grad.W[1] + grad.W[2], rtol=1e-12
    )


def test_what_needs_no_gradient_gets_none():
    module = Module(net())
    module(rows()).sum().backward()
    assert module.flat.grad is not None
    X = rows(requires_grad=True)
    module.flat.requires_grad_(False)
    module.flat.grad = None
    module(X).sum().backward()
    assert module.flat.grad is None
    assert X.grad is not None
    assert not module(rows()).requires_grad


def test_second_derivatives_are_refused_where_they_would_be_taken_as_0():
    X = rows(requires_grad=True)
    J = Module(net())(X).sum()
    with pytest.raises(
        RuntimeError,
        match=r"first derivatives only, no create_graph=True; use net\.jvp, net\.vjp",
    ):
        torch.autograd.grad(J, X, create_graph=True)


@pytest.mark.parametrize("what", ["output", "parameters", "X"])
def test_writing_between_forward_and_backward_into_what_backward_reads_is_an_error(what):
    module, X = Module(net(output="tanh")), rows(requires_grad=True) * 1
    Z = module(X)
    J = (2 * Z).sum()
    with torch.no_grad():
        {"output": Z, "parameters": module.flat, "X": X}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        J.backward()


# -- memory ----------------------------------------------------------------------------------------


def test_no_array_is_copied_on_the_way(monkeypatch):
    ours = net()
    module, X, seen = Module(ours), rows(requires_grad=True), {}
    forward, backward = mc.MLP.forward, mc.MLP.backward
    monkeypatch.setattr(mc.MLP, "forward", lambda net, X: seen.setdefault("cache", forward(net, X)))
    monkeypatch.setattr(
        mc.MLP, "backward", lambda net, *a, **k: seen.setdefault("gradient", backward(net, *a, **k))
    )
    assert module.flat.data_ptr() == ours.parameters.ctypes.data
    Z = module(X)
    assert X.data_ptr() == seen["cache"].Z[0].ctypes.data
    assert Z.data_ptr() == seen["cache"].output.ctypes.data
    Z.sum().backward()
    assert X.grad.data_ptr() == seen["gradient"].X.ctypes.data
    assert module.flat.grad.data_ptr() == seen["gradient"].flat.ctypes.data


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam", "RMSprop"])
def test_torchs_optimizers_train_the_network_in_place_as_they_train_torchs_layers(name):
    ours = net("relu")
    theirs, module, X, Y = ours.to_torch(), Module(ours), rows(50), rows(50)[:, 1:] ** 2
    losses = []
    for model in (module, theirs):
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            J = ((model(X) - Y) ** 2).mean()
            J.backward()
            optimizer.step()
        losses.append(J.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert (
        losses[0]
        < 0.9 * ((mc.MLP([4, 6, 5, 3], "relu", dtype="float64", seed=1).predict(X) - Y) ** 2).mean()
    )
    np.testing.assert_allclose(
        ours.predict(X.numpy()), theirs(X).detach().numpy(), rtol=1e-7, atol=1e-9
    )


def test_a_trainer_and_a_module_share_one_network():
    ours = net()
    module = Module(ours)
    mc.Trainer(ours, "squared_error", mc.SGD(0.1)).step(rows(), rows()[:, :3])
    np.testing.assert_array_equal(module(rows()).detach().numpy(), ours.forward(rows()).output)


def test_a_module_keeps_its_column_where_the_network_predicts_without_it():
    ours = mc.MLP([4, 6, 1])
    trainer = mc.Trainer(ours)
    trainer.step(rows().numpy(), rows()[:, 0].numpy())
    assert ours.predict(rows()).ndim == 1
    with torch.no_grad():
        assert Module(ours)(rows()).shape[1:] == (1,)


def _assign(module, numbers):
    module.flat = torch.nn.Parameter(numbers)


def _data(module, numbers):
    module.flat.data = numbers


def _vector(module, numbers):
    torch.nn.utils.vector_to_parameters(numbers, module.parameters())


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("put", [_assign, _data, _vector])
def test_other_memory_for_flat_is_copied_into_the_networks_at_the_next_call(put, context):
    ours, X = net(), rows()
    module, numbers = Module(ours), torch.linspace(-1, 1, ours.parameters.size, dtype=torch.float64)
    put(module, numbers.clone())
    with context():
        Z = module(X)
    assert module.net is ours
    assert module.flat.data_ptr() == ours.parameters.ctypes.data
    np.testing.assert_array_equal(ours.parameters, numbers)
    np.testing.assert_allclose(Z.detach(), ours.predict(X), rtol=1e-12)
    assert list(module.state_dict()) == ["flat"]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(X).sum().backward()
    optimizer.step()
    assert (ours.parameters != numbers.numpy()).any()
    assert module.flat.data_ptr() == ours.parameters.ctypes.data


@pytest.mark.parametrize("follow", [copy.deepcopy, lambda module: module.double()])
def test_copies_and_moves_take_along_other_memory_that_flat_got(follow):
    module = Module(net(dtype="float32"))
    _vector(module, torch.full_like(module.flat, 0.25))
    twin = follow(module)
    assert (twin.net.parameters == 0.25).all()
    assert twin.flat.data_ptr() == twin.net.parameters.ctypes.data


def test_other_memory_for_flat_between_forward_and_backward_is_an_error_after_the_next_call():
    module = Module(net())
    J = module(rows()).sum()
    _vector(module, torch.ones_like(module.flat))
    module(rows())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        J.backward()


def test_another_flat_for_one_call_leaves_the_network_as_it_is():
    ours = net()
    module, before = Module(ours), ours.parameters.copy()
    for other in (torch.zeros_like(module.flat), torch.nn.Parameter(torch.zeros_like(module.flat))):
        Z = torch.func.functional_call(module, {"flat": other}, (rows(),))
        assert not Z.any()
    np.testing.assert_array_equal(ours.parameters, before)
    assert module.flat.data_ptr() == ours.parameters.ctypes.data
    with pytest.raises(
        ValueError, match=r"flat has shape \(1,\); the network's parameters have \(83,\)"
    ):
        torch.func.functional_call(module, {"flat": torch.zeros(1, dtype=torch.float64)}, (rows(),))


def test_without_gradients_it_predicts_and_keeps_no_cache(monkeypatch):
    module, X = Module(net()), rows(requires_grad=True)
    expected = module(X).detach()
    monkeypatch.setattr(mc.MLP, "forward", None)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            Z = module(X)
        assert not Z.requires_grad
        torch.testing.assert_close(Z, expected, rtol=1e-14, atol=1e-15)


# -- memory that processes share -------------------------------------------------------------------


def _overwrite(module):
    with torch.no_grad():
        module.flat.fill_(7)
        module(rows())
        module.flat[0] = 8


SHARED = [  # how parameters come to be shared, and how the other process begins
    (Module.share_memory, "fork"),
    (Module.share_memory, "spawn"),
    (lambda module: module.flat.share_memory_(), "fork"),
    (lambda module: module.flat.share_memory_(), "spawn"),
    (lambda module: None, "spawn"),  # sending them shares them
]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "start"), SHARED)
def test_another_process_writes_the_parameters_once_they_are_shared(share, start):
    module, before = Module(net()), net().parameters
    share(module)
    process = torch.multiprocessing.get_context(start).Process(target=_overwrite, args=(module,))
    np.testing.assert_array_equal(module.flat.detach(), before)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert module.flat[:3].tolist() == [8, 7, 7]
    module(rows())
    assert module.net.parameters[:3].tolist() == [8, 7, 7]
    assert module.flat.is_shared()


def test_shared_parameters_stay_shared_and_the_networks():
    ours = net()
    module = Module(ours)
    module(rows()).sum().backward()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert module.share_memory() is module
    assert module.flat.grad.is_shared()
    shared = module.net
    assert shared is not ours
    other = Module(mc.MLP([4, 6, 5, 3], "tanh", dtype="float64", seed=9))
    for change in (
        lambda: module.share_memory(),
        lambda: module.double().cpu().to("cpu"),
        lambda: module.load_state_dict(other.state_dict()),
        lambda: module.load_state_dict(Module(ours).state_dict(), assign=True),
        lambda: torch.nn.utils.vector_to_parameters(
            torch.ones_like(module.flat), module.parameters()
        ),
        lambda: optimizer.step(),
        lambda: mc.Trainer(shared, "squared_error", mc.SGD(0.1)).step(rows(), rows()[:, :3]),
    ):
        change()
        module(rows())
        assert module.net is shared
        assert module.flat.is_shared()
        assert module.flat.data_ptr() == shared.parameters.ctypes.data
    for twin in (
        copy.deepcopy(module),
        copy.deepcopy(module).float(),
        pickle.loads(pickle.dumps(module)),
    ):
        assert twin.flat.data_ptr() == twin.net.parameters.ctypes.data
        before = module.flat.detach().clone()
        twin.flat.data.zero_()
        torch.testing.assert_close(module.flat.detach(), before)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file)["flat"], module.flat.detach())


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrized_parameters_train_their_originals_and_are_not_moved_silently():
    module, plain = Module(net()), Module(net())
    torch.nn.utils.parametrize.register_parametrization(module, "flat", Doubled())
    plain.flat.data *= 2
    for one in (module, plain):
        one(rows()).sum().backward()
    torch.testing.assert_close(module(rows()), plain(rows()))
    torch.testing.assert_close(module.parametrizations.flat.original.grad, 2 * plain.flat.grad)
    module.double()  # nothing to move
    for move in (module.float, module.share_memory):
        with pytest.raises(
            RuntimeError, match=r"flat is computed from other tensors \(parametrize, prune\)"
        ):
            move()
    torch.nn.utils.parametrize.remove_parametrizations(module, "flat")
    assert module.float().net.dtype == np.float32


# -- what PyTorch does with modules ----------------------------------------------------------------


def test_leading_axes_stay_and_other_dtypes_are_cast_there_and_back():
    module, X = Module(net()), rows(24)
    Z = module(X)
    torch.testing.assert_close(module(X.reshape(2, 3, 4, 4)), Z.reshape(2, 3, 4, 3))
    assert module(X[0]).shape == (3,)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        x = X.to(dtype).requires_grad_()
        found = module(x)
        found.sum().backward()
        assert found.dtype == torch.float64
        assert x.grad.dtype == dtype
        torch.testing.assert_close(found, Z, rtol=0, atol=bound)
    torch.testing.assert_close(
        module(torch.ones(2, 4, dtype=torch.int64)), module(torch.ones(2, 4))
    )
    strided = X.repeat_interleave(2, dim=1)[:, ::2]
    torch.testing.assert_close(module(strided), Z)
    torch.testing.assert_close(module(X.T.contiguous().T), Z)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_rows_give_no_rows_and_zero_gradients(shape):
    module, X = (
        Module(net(dtype="float32")),
        torch.zeros(shape, dtype=torch.float64, requires_grad=True),
    )
    Z = module(X)
    assert Z.shape == (*shape[:-1], 3)
    assert Z.dtype == torch.float32
    Z.sum().backward()
    assert X.grad.shape == shape
    assert module.flat.grad.shape == module.flat.shape
    assert not module.flat.grad.any()
    with torch.no_grad():
        assert module(X).shape == Z.shape


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_go_out_and_in_and_the_network_follows(assign):
    one, other = net(), mc.MLP([4, 6, 5, 3], "tanh", dtype="float64", seed=9)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), Module(one))
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.flat"]
    file = io.BytesIO()
    torch.save(Module(one).state_dict(), file)
    file.seek(0)
    Module(other).load_state_dict(torch.load(file), assign=assign)
    np.testing.assert_array_equal(one.parameters, other.parameters)


def test_a_deep_copy_has_a_network_of_its_own():
    module = Module(net())
    module.flat.requires_grad_(False)
    module.eval()
    twin = copy.deepcopy(module)
    assert twin.flat.data_ptr() == twin.net.parameters.ctypes.data != module.flat.data_ptr()
    assert not twin.flat.requires_grad
    assert not twin.training
    twin.flat.zero_()
    assert not twin.net.parameters.any()
    assert module.net.parameters.any()
    torch.testing.assert_close(copy.deepcopy(module)(rows()), module(rows()))


def test_double_and_float_take_the_network_along():
    ours = net(dtype="float32")
    model = torch.nn.Sequential(Module(ours))
    model(rows(dtype=torch.float32)).sum().backward()
    model.float()
    model.cpu()
    assert model[0].net is ours
    gradient = model[0].flat.grad.clone()
    model.double()
    module = model[0]
    assert module.net is not ours
    assert module.net.dtype == np.float64
    assert module.flat.data_ptr() == module.net.parameters.ctypes.data
    assert isinstance(module.flat, torch.nn.Parameter)
    torch.testing.assert_close(module.flat.grad, gradient.double())
    np.testing.assert_array_equal(module.net.parameters, ours.parameters)
    module(rows()).sum().backward()


@pytest.mark.parametrize(
    "move", [lambda m: m.half(), lambda m: m.to("meta"), lambda m: m.to("cuda:7")]
)
def test_a_move_that_cannot_be_made_is_refused_and_changes_nothing(move):
    module = Module(net())
    ours, before = module.net, module.flat.detach().clone()
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        move(module)
    assert module.net is ours
    assert module.flat.data_ptr() == ours.parameters.ctypes.data
    torch.testing.assert_close(module.flat.detach(), before)


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (np.zeros((2, 4)), TypeError, "X must be a torch.Tensor; got ndarray"),
        (torch.zeros(2, 5), ValueError, r"X has shape \(2, 5\); the last axis must be 4"),
        (torch.tensor(1.0), ValueError, "the last axis must be 4"),
        (torch.zeros(2, 4, device="meta"), ValueError, "X is on meta, the module on cpu"),
    ],
)
def test_bad_input_is_refused_by_name(X, error, message):
    with pytest.raises(error, match=message):
        Module(net())(X)
    with pytest.raises(TypeError, match=r"net must be an mc\.MLP; got Linear"):
        Module(torch.nn.Linear(2, 2))


@pytest.mark.slow
# PyTorch's own, where its graph breaks
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_calls_the_layer_as_it_is():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Module(net(dtype="float32")))
    X = rows(dtype=torch.float32)
    Z = torch.compile(model, backend="eager")(X)
    Z.sum().backward()
    torch.testing.assert_close(Z, model(X))
    assert model[1].flat.grad.any()
    assert model[0].weight.grad.any()


def test_it_prints_the_network():
    assert "MLP(4-6-5-3" in repr(torch.nn.Sequential(Module(net())))


@pytest.mark.slow
def test_importing_mlpcore_imports_no_torch():
    code = (
        "import sys, mlpcore; assert 'torch' not in sys.modules; "
        "import mlpcore.torch; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# -- from_torch, to_torch --------------------------------------------------------------------------

KINDS = [
    *(name for name in convert.TORCH if name in activations.names()),
    ("leaky_relu", 0.2),
    ("elu", 1.7),
    "identity",
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_to_torch_and_back_predicts_the_same_for_every_activation_that_both_have(kind, dtype):
    for output in (kind, "softmax", "log_softmax"):
        ours = mc.MLP([4, 8, 3], kind, output, dtype=dtype, seed=2)
        ours.parameters[...] *= 3
        ours.b[1][...] = np.linspace(-40, 40, 8)
        model, X = ours.to_torch(), rows(50).to(getattr(torch, dtype))
        assert all(p.dtype == X.dtype for p in model.parameters())
        bound = 1e-5 if dtype == "float32" else 1e-13
        np.testing.assert_allclose(
            model(X).detach().numpy(), ours.predict(X.numpy()), rtol=bound, atol=10 * bound
        )
        again = mc.MLP.from_torch(model)
        assert again.activations == ours.activations
        np.testing.assert_array_equal(again.parameters, ours.parameters)
        assert not np.shares_memory(again.parameters, model[0].weight.detach().numpy())


def test_all_of_our_activations_but_exp_have_an_equal_in_torch():
    assert {*activations.names(output=True)} - {*convert.TORCH} == {"identity", "exp"}


def test_both_forms_of_gelu_go_over_and_back_each_as_itself():
    nn, s = torch.nn, torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    for approximate, name in (("none", "gelu_erf"), ("tanh", "gelu")):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.GELU(approximate)).double()
        with torch.no_grad():
            model[0].weight[...] = 1
        ours = mc.MLP.from_torch(model)
        assert ours.activations[1].name == name
        assert ours.to_torch()[1].approximate == approximate
        torch.testing.assert_close(ours.predict(s), model(s).detach(), rtol=1e-14, atol=1e-15)
    values = mc.MLP.from_torch(nn.Sequential(nn.Linear(1, 1), nn.ReLU6())).activations[1]
    assert values == activations.resolve("relu6")


def test_a_model_with_log_softmax_trains_as_it_does_under_torchs_nll_loss():
    nn = torch.nn
    model = nn.Sequential(
        nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3), nn.LogSoftmax(dim=1)
    ).double()
    ours, X, Y = mc.MLP.from_torch(model), rows(50), torch.arange(50) % 3
    torch.testing.assert_close(ours.predict(X), model(X).detach())
    theirs = nn.NLLLoss()(model(X), Y)
    theirs.backward()
    trainer = mc.Trainer(ours)
    assert trainer.loss.name == "cross_entropy"
    J, gradient = trainer.gradient(X, Y)
    np.testing.assert_allclose(J, theirs.detach().numpy(), rtol=1e-12)
    dW, db = ours.layout.views(gradient)
    np.testing.assert_allclose(dW[1], model[0].weight.grad.numpy().T, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(db[2], model[2].bias.grad.numpy(), rtol=1e-9, atol=1e-15)
    out = ours.forward(X)
    by_hand = ours.backward(out, np.where(np.arange(3) == Y.numpy()[:, None], -1 / 50, 0)).flat
    np.testing.assert_allclose(by_hand, gradient, rtol=1e-9, atol=1e-15)


def test_learned_slopes_go_to_torch_and_back_and_their_gradients_agree():
    ours = mc.MLP(
        [4, 6, 5, 2],
        [("prelu", 0.1, "per output"), ("prelu", -0.2)],
        ("prelu", 0.4, "per output"),
        dtype="float64",
    )
    ours.parameters[...] += 0.3 * np.random.default_rng(0).standard_normal(ours.layout.size)
    model, X = ours.to_torch(), rows(50)
    assert [(module.num_parameters, module.init) for module in model[1::2]] == [
        (6, 0.1),
        (1, -0.2),
        (2, 0.4),
    ]
    output = model(X)
    np.testing.assert_allclose(
        output.detach().numpy(), ours.predict(X.numpy()), rtol=1e-13, atol=1e-14
    )
    again = mc.MLP.from_torch(model)
    assert again.activations == ours.activations
    np.testing.assert_array_equal(again.parameters, ours.parameters)
    V = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    output.backward(V)
    mine = ours.backward(ours.forward(X.numpy()), V.numpy())
    for l, prelu in enumerate(model[1::2], 1):
        np.testing.assert_allclose(mine.a[l], prelu.weight.grad.numpy(), rtol=1e-12, atol=1e-13)
        assert not np.shares_memory(again.a[l], prelu.weight.detach().numpy())
    np.testing.assert_allclose(mine.W[1], model[0].weight.grad.numpy().T, rtol=1e-12, atol=1e-13)


def test_a_module_trains_learned_slopes():
    ours = mc.MLP([4, 6, 2], ("prelu", 0.1, "per output"), seed=1)
    module, before = Module(ours), ours.a[1].copy()
    torch.nn.functional.mse_loss(module(rows(50).float()), torch.ones(50, 2)).backward()
    torch.optim.SGD(module.parameters(), 0.5).step()
    assert (ours.a[1] != before).all()


@pytest.mark.parametrize("count", [2, 4])
def test_a_prelu_of_another_width_is_refused(count):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.PReLU(count))
    with pytest.raises(ValueError, match=r"model\[1\].*num_parameters must be 1 or 3"):
        mc.MLP.from_torch(model)


def test_a_model_with_all_that_may_stand_in_it_predicts_what_eval_does():
    nn = torch.nn
    model = nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5),
        nn.Sequential(nn.Linear(4, 6, bias=False), nn.Identity(), nn.ReLU(), nn.Dropout()),
        nn.Linear(6, 5), nn.Linear(5, 3), nn.Softplus(), nn.AlphaDropout(0.1),
    ).double()  # fmt: skip
    ours = mc.MLP.from_torch(model)
    assert [a.name for a in ours.activations[1:]] == ["relu", "identity", "softplus"]
    np.testing.assert_allclose(
        ours.predict(rows(50)).numpy(), model.eval()(rows(50)).detach().numpy(), rtol=1e-7
    )
    assert mc.MLP.from_torch(nn.Linear(4, 2, bias=False)).layout.bias is False


def test_shared_matrices_are_tied_there_and_back():
    shared = torch.nn.Linear(5, 5)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), shared, torch.nn.Tanh(), shared)
    ours = mc.MLP.from_torch(model)
    assert ours.tied == {3: 2}
    X = rows(dtype=torch.float32)
    torch.testing.assert_close(ours.predict(X), model(X).detach())
    back = ours.to_torch()
    assert back[3].weight is back[1].weight
    encoder = mc.MLP([4, 3, 4], "tanh", tied={2: "1.T"})
    torch.testing.assert_close(encoder.to_torch()(X).detach(), encoder.predict(X))


def test_weights_of_half_precision_become_a_float32_network_of_the_same_numbers():
    for half in (torch.bfloat16, torch.float16):
        layer = torch.nn.Linear(2, 3).to(half)
        ours = mc.MLP.from_torch(layer)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours.W[1], layer.weight.detach().float().numpy().T)


def _own():
    class Linear(torch.nn.Linear):
        pass

    return Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda nn: nn.Sequential(nn.Linear(2, 3), nn.Softplus(beta=2)),
            ValueError,
            r"model\[1\]: .*beta must be 1",
        ),
        (
            lambda nn: nn.Sequential(nn.Linear(2, 3), nn.Hardtanh(-2, 1)),
            ValueError,
            "min_val must be -1",
        ),
        (
            lambda nn: nn.Sequential(nn.Linear(2, 3), nn.Softmax(dim=0)),
            ValueError,
            "dim must be 1 or -1",
        ),
        (
            lambda nn: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
            TypeError,
            r"model\[1\] must be one of torch.nn's Sequential",
        ),
        (
            lambda nn: nn.Sequential(nn.Sequential(nn.Conv1d(1, 1, 1))),
            ValueError,
            r"model\[0\]\[0\]",
        ),
        (
            lambda nn: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.ReLU()),
            ValueError,
            r"model\[2\]: ReLU\(\) has no place here: from_torch",
        ),
        (
            lambda nn: nn.Sequential(nn.Linear(2, 3), nn.Softmax(1), nn.Linear(3, 1)),
            ValueError,
            "softmax is for the output",
        ),
        (
            lambda nn: nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3)),
            ValueError,
            "layer 1 gives 3 numbers, the next takes 2",
        ),
        (lambda nn: nn.Sequential(), ValueError, "no Linear layer"),
        (lambda nn: nn.Linear(2, 3, device="meta"), TypeError, "a device that cannot be read"),
        (lambda nn: _own(), ValueError, "has no place here"),
        (lambda nn: "model", ValueError, "'model' has no place here: .*at most one activation"),
    ],
)
def test_what_has_no_equal_here_is_refused_with_its_place(make, error, message):
    with pytest.raises(error, match=message):
        mc.MLP.from_torch(make(torch.nn))


def _pre_hook(nn):
    nn[0].register_forward_pre_hook(lambda module, given: None)


def _replaced_forward(nn):
    nn[1].forward = torch.sin


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (_pre_hook, r"\[0\]: Linear"),
        (
            lambda nn: nn[1].register_forward_hook(lambda module, given, out: 2 * out),
            r"\[1\]: ReLU",
        ),
        (
            lambda nn: nn[2].register_forward_hook(lambda module, given, out: 2 * out),
            r"\[2\]: Dropout",
        ),
        (lambda nn: nn.register_forward_hook(lambda module, given, out: 2 * out), ": Sequential"),
        (lambda nn: prune.l1_unstructured(nn[0], "weight", 0.5), r"\[0\]: Linear"),
        (_replaced_forward, r"\[1\]: ReLU"),
    ],
)
def test_modules_that_compute_more_than_their_class_does_are_refused_with_their_place(
    change, place
):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Dropout())
    mc.MLP.from_torch(model)
    change(model)
    with pytest.raises(
        ValueError, match=f"(?s)^model{place}.* has forward hooks .*remove them first"
    ):
        mc.MLP.from_torch(model)


@pytest.mark.parametrize("spec",
    ["exp", ("sigmoid", 2.0), mc.Activation("relu", "s * positive(s)", "positive(z)"),
    mc.Activation("leaky_relu", "maximum(s, 0) + a * minimum(s, 0)", "a + (1 - a) * positive(s)",
        0.1, learned="per layer"),
], ids=str)  # fmt: skip
def test_what_has_no_equal_in_torch_is_refused_with_its_layer(spec):
    with pytest.raises(
        ValueError, match=r"layer 2: PyTorch has no module that equals .*mlpcore\.torch\.Module"
    ):
        mc.MLP([2, 3, 1], "relu", spec).to_torch()
