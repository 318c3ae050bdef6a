"""Settings of single layers: rate, decay, frozen; on the CPU and on a device that it plays."""

import copy
import dataclasses
import os
import shutil

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.core.layout import Layout, Tie
from mlpcore.core.optimizers import segments
from mlpcore.engine import lanes as steps
from tests.backends.cuda.emulator.device import CpuDevice

COMPILED = shutil.which("g++") is not None or "CI" in os.environ
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not COMPILED, reason="needs g++"))
RNG = np.random.default_rng(0)
X, Y, W = RNG.standard_normal((24, 5)), RNG.standard_normal((24, 3)), RNG.random(24) + 0.1
LAYERS = {1: mc.Layer(rate=0.1, weight_decay=0.0), 2: mc.Layer(frozen=True), 4: mc.Layer(rate=3.0)}


@pytest.fixture
def device(request, monkeypatch):
    """ "cpu", or "cuda" on a device that is none."""
    if request.param == "cuda":
        monkeypatch.setitem(devices._opened, "cuda:0", CpuDevice())
    return request.param


def make(device="cpu", optimizer=None, dtype="float64", tied=None, bias=True, **settings):
    net = mc.MLP([5, 7, 7, 7, 3], "tanh", bias=bias, tied=tied, dtype=dtype, device=device, seed=1)
    return mc.Trainer(
        net, "squared_error", optimizer or mc.AdamW(0.01, 0.5, layers=LAYERS), **settings
    )


def by_entry(net, values, default):
    """A number for each entry of the flat vector, by the layer whose W or b it is in."""
    flat = np.full(net.layout.size, float(default))
    views, biases = net.layout.views(flat)
    for l, value in values.items():
        if l in net.layout.owners:
            views[l][...] = value
        if biases[l] is not None:
            biases[l][...] = value
    return flat


def reference(net, optimizer, gradient, states, t):
    """The parameters after an update, entry by entry with settings of its own."""
    layers = optimizer.layers
    rate = optimizer.learning_rate * by_entry(net, {l: x.rate for l, x in layers.items()}, 1.0)
    live = by_entry(net, {l: not x.frozen for l, x in layers.items()}, 1.0) == 1
    w, g = net.parameters.copy(), np.where(live, gradient, 0.0)
    if isinstance(optimizer, mc.SGD):
        states["v"] = np.where(
            live, optimizer.momentum * states.get("v", 0.0) - rate * g, states.get("v", 0.0)
        )
        return np.where(live, w + states["v"], w)
    decay = {
        l: optimizer.weight_decay if x.weight_decay is None else x.weight_decay
        for l, x in layers.items()
    }
    decay = by_entry(net, decay, optimizer.weight_decay) * (np.arange(w.size) < net.layout.weights)
    m, v = states.get("m", 0 * g), states.get("v", 0 * g)
    states["m"], states["v"] = (
        np.where(live, 0.9 * m + 0.1 * g, m),
        np.where(live, 0.999 * v + 0.001 * g * g, v),
    )
    root = np.sqrt(states["v"] / (1 - 0.999**t)) + 1e-8
    return np.where(live, w - rate * (states["m"] / (1 - 0.9**t) / root + decay * w), w)


OPTIMIZERS = {
    "adamw": lambda: mc.AdamW(0.01, 0.5, layers=LAYERS),
    "momentum": lambda: mc.SGD(
        0.1, 0.9, layers={1: mc.Layer(rate=0.1), 3: mc.Layer(frozen=True), 4: mc.Layer(rate=0.0)}
    ),
    "all frozen": lambda: mc.SGD(0.1, 0.9, layers={l: mc.Layer(frozen=True) for l in (1, 2, 3, 4)}),
}
NETS = {"plain": {}, "no bias": {"bias": False}, "tied": {"tied": {3: "2.T"}}}


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_layer_is_updated_by_its_own_settings(device, name, kind):
    trainer = make(device, OPTIMIZERS[name](), l2=0.1, **NETS[kind])
    net, states = trainer.net, {}
    for t in range(1, 5):
        # the gradient, penalties included, of all layers
        free = make(device, mc.SGD(0.1), l2=0.1, **NETS[kind])
        free.net.parameters[...] = net.parameters
        gradient = np.asarray(free.gradient(X, Y, W)[1])
        wanted = reference(net, trainer.optimizer, gradient, states, t)
        float(trainer.step(X, Y, W))
        np.testing.assert_allclose(net.parameters, wanted, rtol=1e-11, atol=1e-13)
    for key, vector in trainer._step.state.vectors.items():
        np.testing.assert_allclose(
            vector, states[key.removeprefix("state ")], rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_frozen_layer_keeps_its_bits_and_does_not_count_for_the_clip_norm(device, dtype):
    trainer = make(device, mc.SGD(1.0), dtype, l1=0.2)
    net, before = trainer.net, trainer.net.parameters.copy()
    gradient = np.array(trainer.gradient(X, Y)[1], np.float64)
    trainer = mc.Trainer(
        net, "squared_error", mc.SGD(1.0, layers={2: mc.Layer(frozen=True)}), l1=0.2, clip_norm=0.3
    )
    live = by_entry(net, {2: 0.0}, 1.0)
    np.testing.assert_allclose(trainer.gradient(X, Y)[1], gradient * live, rtol=1e-5, atol=1e-6)
    float(trainer.step(X, Y))
    length = np.linalg.norm(gradient * live)
    assert length > 0.3
    np.testing.assert_allclose(
        net.parameters, before - 0.3 / length * gradient * live, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(net.parameters[live == 0], before[live == 0])


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_settings_of_layers_may_change_between_steps_and_the_state_goes_on(device):
    trainer, plain = make(device, mc.AdamW(0.01, 0.5)), make(device, mc.AdamW(0.01, 0.5))
    for one in (trainer, plain):
        float(one.step(X, Y))
    # the same settings, said otherwise
    trainer.optimizer.layers = {1: mc.Layer(), 3: mc.Layer(weight_decay=0.5)}
    for one in (trainer, plain):
        float(one.step(X, Y))
    np.testing.assert_array_equal(trainer.net.parameters, plain.net.parameters)
    trainer.optimizer.layers = {l: mc.Layer(frozen=True) for l in (1, 2, 3, 4)}
    float(trainer.step(X, Y))
    np.testing.assert_array_equal(trainer.net.parameters, plain.net.parameters)
    trainer.optimizer.layers = {1: mc.Layer(frozen=True)}
    before = trainer.net.parameters.copy()
    float(trainer.step(X, Y))
    moved = trainer.net.parameters != before
    np.testing.assert_array_equal(moved, by_entry(trainer.net, {1: 0}, 1) == 1)
    trainer.optimizer.layers[9] = mc.Layer()
    with pytest.raises(ValueError, match=r"layers: the network has layers 1 … 4; got 9"):
        trainer.step(X, Y)


def adam(w, g, states, t, rate, hat=False, decay=0.0):
    """Adam's update as Kingma and Ba write it; t, one for each entry, is that entry's own count of
    updates.
    """
    live = g != 0
    m, v = (states.get(key, 0 * w) for key in "mv")
    m, v = np.where(live, 0.9 * m + 0.1 * g, m), np.where(live, 0.999 * v + 0.001 * g * g, v)
    states["m"], states["v"], t = m, v, np.maximum(t, 1)
    if hat:
        step = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-2)
    else:
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-2)
    return np.where(live, w - rate * (step + decay * w), w)


ADAMS = {
    "adam": (lambda: mc.Adam(0.01, epsilon=1e-2), {}),
    "adam_hat": (lambda: mc.Adam(0.01, epsilon=1e-2, epsilon_hat=True), {"hat": True}),
    "adamw": (lambda: mc.AdamW(0.01, 0.5, epsilon=1e-2), {"decay": 0.5}),
}
# each for some updates
FROZEN = [(1,), (1,), (), (2, 3), (2,), (2,), (), (1, 2, 3, 4), (), (1,), ()]


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
@pytest.mark.parametrize("how", ["goes on", "load", "load, then set", "copy"])
@pytest.mark.parametrize("name", ADAMS)
@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_a_thawed_layer_has_the_bias_correction_of_its_own_updates(
    device, how, name, kind, tmp_path
):
    make_it, settings = ADAMS[name]
    trainer = make(device, make_it(), **NETS[kind])
    rng, states = np.random.default_rng(7), {}
    counts, weights = (
        np.zeros(trainer.net.layout.size),
        np.arange(trainer.net.layout.size) < trainer.net.layout.weights,
    )
    given = {**settings, "decay": settings.get("decay", 0.0) * weights}
    for turn, frozen in enumerate(FROZEN):
        layers = {l: mc.Layer(frozen=True) for l in frozen}
        if how != "load, then set":
            trainer.optimizer.layers = layers
        if how.startswith("load"):
            trainer.save(tmp_path / "layers.safetensors")
            trainer = mc.Trainer.load(tmp_path / "layers.safetensors", device)
        elif how == "copy":
            trainer = copy.deepcopy(trainer)
        trainer.optimizer.layers = layers
        live = by_entry(trainer.net, dict.fromkeys(frozen, 0.0), 1.0)
        for _ in range(1 + turn % 3):
            gradient, counts = rng.standard_normal(counts.size), counts + live
            wanted = adam(
                np.array(trainer.net.parameters), gradient * live, states, counts, 0.01, **given
            )
            trainer.apply(gradient)
            np.testing.assert_allclose(trainer.net.parameters, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_the_first_steps_of_a_layer_that_is_thawed_late_are_of_one_rate(device):
    trainer = make(device, mc.Adam(1e-3, layers={1: mc.Layer(frozen=True)}), on_non_finite="skip")
    gradient = np.ones(trainer.net.layout.size)
    for i in range(490):
        trainer.apply(gradient if i % 70 else gradient * np.nan)  # skipped ones are no updates
    trainer.optimizer.layers = {}
    for _ in range(3):
        before = np.array(trainer.net.parameters)
        trainer.apply(gradient)
        np.testing.assert_allclose(before - trainer.net.parameters, 1e-3, rtol=1e-6)


def test_counts_of_layers_that_are_of_no_run_are_refused():
    trainer = make(optimizer=mc.Adam(layers={1: mc.Layer(frozen=True)}))
    trainer.step(X, Y)
    trainer.optimizer.layers = {}
    trainer.step(X, Y)
    vectors, facts = trainer._step.snapshot()
    assert (facts["updates"], facts["kept"], facts["missed"]) == (2, [], [(1, 1)])
    for wrong in (
        {"missed": [[1, 3]]},
        {"missed": [[1, -1]]},
        {"kept": [[1, 0.5]]},
        {"updates": -1},
    ):
        with pytest.raises(ValueError, match="updates, layers have seen"):
            trainer._step.restore(vectors, {**facts, **wrong})


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_runs_with_layers_of_their_own_settings_resume_and_apply_to_the_bit(device, tmp_path):
    def fit(one, **how):
        return one.fit(X, Y, epochs=3, batch_size=7, progress=False, **how)

    def leave(trainer, entry):
        trainer.save(tmp_path / "run")
        raise KeyboardInterrupt

    whole, left = make(device, dtype="float32"), make(device, dtype="float32")
    history = fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(left, callbacks=[leave])
    resumed = copy.deepcopy(mc.Trainer.load(tmp_path / "run", device))
    assert resumed.optimizer.layers == LAYERS
    assert fit(resumed)["loss"] == history["loss"]
    np.testing.assert_array_equal(resumed.net.parameters, whole.net.parameters)
    resumed.apply(resumed.gradient(X, Y)[1])
    float(whole.step(X, Y))
    np.testing.assert_array_equal(resumed.net.parameters, whole.net.parameters)
    frozen = resumed.net.parameters.copy()
    # of a frozen layer: counts for nothing
    resumed.apply(np.where(by_entry(resumed.net, {2: 1}, 0) == 1, np.nan, 0.0))
    live = by_entry(resumed.net, {2: 0}, 1) == 1
    np.testing.assert_array_equal(resumed.net.parameters[~live], frozen[~live])
    assert np.isfinite(resumed.net.parameters).all()


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_a_rate_that_overflows_in_one_layer_alone_leaves_the_step_out(device):
    layers = {4: mc.Layer(rate=1e20)}
    trainer = make(device, mc.SGD(1e20, layers=layers), "float32", on_non_finite="skip")
    before = trainer.net.parameters.copy()
    float(trainer.step(X, Y))
    np.testing.assert_array_equal(trainer.net.parameters, before)
    assert trainer.skipped == 1


@pytest.mark.parametrize("device", [CUDA], indirect=True)
@pytest.mark.parametrize("chunk_rows", ["auto", 5])
def test_low_precision_and_chunks_train_the_same_layers(device, chunk_rows):
    trainer = make(device, mc.SGD(0.1, layers=LAYERS | {1: mc.Layer(rate=0.1)}), "float32",
        precision="bfloat16",
                   chunk_rows=chunk_rows)  # fmt: skip
    exact = make("cpu", mc.SGD(0.1, layers=LAYERS | {1: mc.Layer(rate=0.1)}), "float32")
    before = trainer.net.parameters.copy()
    for _ in range(3):
        float(trainer.step(X, Y)), float(exact.step(X, Y))
    change, wanted = trainer.net.parameters - before, exact.net.parameters - before
    np.testing.assert_allclose(change, wanted, atol=3e-2 * abs(wanted).max())
    low = (trainer._step.capture.low.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(low, trainer.net.parameters, rtol=2**-8, atol=1e-7)
    assert not change[by_entry(trainer.net, {2: 1}, 0) == 1].any()


def test_lanes_and_workers_change_nothing(monkeypatch):
    plain = make(dtype="float32")
    monkeypatch.setattr(steps, "LANE_ENTRIES", 1)
    monkeypatch.setattr(steps.blas, "threads", lambda: 3)
    cut = make(dtype="float32")
    assert cut._step.lanes.count == 3
    for _ in range(3):
        plain.step(X, Y), cut.step(X, Y)
    np.testing.assert_allclose(cut.net.parameters, plain.net.parameters, rtol=1e-6)


def test_a_velocity_carried_over_goes_by_each_layers_rate():
    layers = {1: mc.Layer(rate=0.1), 3: mc.Layer(rate=0.0)}
    plain, turned = (make(optimizer=mc.SGD(0.1, 0.9, layers=layers)) for _ in range(2))
    for t in range(6):
        if t == 3:
            turned.optimizer.velocity = "gradients"
        plain.step(X, Y), turned.step(X, Y)
    np.testing.assert_allclose(turned.net.parameters, plain.net.parameters, rtol=1e-12)


def test_the_segments_cover_the_vector_and_equal_neighbours_are_one():
    layout = Layout((5, 7, 7, 7, 3), True, (Tie(3, 2, True),))
    found = segments(layout, LAYERS)
    assert [found[0].start, *(x.stop for x in found)] == [
        0,
        *(x.start for x in found[1:]),
        layout.size,
    ]
    assert [(x.stop, x.weights, x.layer) for x in found] == [
        (35, True, LAYERS[1]), (84, True, LAYERS[2]), (105, True, LAYERS[4]),
        (112, False, LAYERS[1]), (119, False, LAYERS[2]), (126, False, mc.Layer()),
        (129, False, LAYERS[4]),
    ]  # fmt: skip
    assert [(x.stop, x.weights) for x in segments(layout, {1: mc.Layer()})] == [
        (105, True),
        (129, False),
    ]
    assert len(segments(Layout((5, 3), False), {})) == 1


@pytest.mark.parametrize(
    ("make_it", "error", "words"),
    [
        (lambda: mc.Layer(rate=-1), ValueError, "Layer: rate must"),
        (lambda: mc.Layer(rate="x"), TypeError, "Layer: rate must"),
        (lambda: mc.Layer(weight_decay=-1), ValueError, "Layer: weight_decay must"),
        (lambda: mc.Layer(frozen=1), TypeError, "Layer: frozen must be True or False; got 1"),
        (
            lambda: mc.SGD(0.1, layers={1: mc.Layer(weight_decay=0.1)}),
            ValueError,
            "weight_decay is for AdamW and Lion",
        ),
        (lambda: mc.SGD(0.1, layers=[mc.Layer()]), TypeError, "SGD: layers must be a dict"),
        (lambda: mc.SGD(0.1, layers={1: 0.1}), TypeError, "SGD: layers must be a dict"),
        (lambda: mc.SGD(0.1, layers={"1": mc.Layer()}), TypeError, "SGD: layers must be a dict"),
        (lambda: mc.SGD(0.1, layers=None), TypeError, "SGD: layers must be a dict"),
        (
            lambda: make(optimizer=mc.SGD(0.1, layers={0: mc.Layer()})),
            ValueError,
            "layers 1 … 4; got 0",
        ),
        (
            lambda: make(optimizer=mc.SGD(0.1, layers={5: mc.Layer()})),
            ValueError,
            "layers 1 … 4; got 5",
        ),
    ],
)
def test_what_is_no_setting_of_a_layer_is_refused_by_name(make_it, error, words):
    with pytest.raises(error, match=words):
        make_it()


def test_an_optimizers_own_dict_is_not_the_callers():
    given = {1: mc.Layer(rate=0.5)}
    optimizer = mc.SGD(0.1, layers=given)
    given[2] = mc.Layer()
    assert optimizer.layers == {1: mc.Layer(rate=0.5)}
    assert dataclasses.replace(optimizer, learning_rate=0.2).layers == optimizer.layers
