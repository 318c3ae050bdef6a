"""Losses, gradients and updates that overflow name their step and layer, and change nothing."""

import numpy as np
import pytest

import mlpcore as mc

RNG = np.random.default_rng(0)

X, Y = (
    RNG.standard_normal((60, 4)).astype(np.float32),
    RNG.standard_normal((60, 2)).astype(np.float32),
)


def make(device="cpu", activations="tanh", optimizer=None, **settings):
    net = mc.MLP([4, 6, 5, 2], activations, device=device, seed=3)
    return mc.Trainer(net, "squared_error", optimizer or mc.SGD(0.01), **settings)


CASES = {  # hidden activations, weights that overflow → the layer where it begins
    "the outputs of layer 2": ("relu", {1: 1e20, 2: 1e30}, 2),
    "the outputs of layer 3": ("relu", {1: 1e15, 2: 1e15, 3: 1e15}, 3),
    "the loss alone": ("relu", {}, None),
    "the first layer": ("exp", {1: 1e4}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_an_overflow_names_step_learning_rate_and_layer_and_changes_nothing(case, device):
    activations, scales, layer = CASES[case]
    trainer = make(device, activations)
    # outputs and gradient are finite, the squares of the outputs are not
    if case == "the loss alone":
        trainer.net.parameters[...] = 0
        trainer.net.b[3][...] = 1e20
    for l, scale in scales.items():
        trainer.net.W[l][...] = scale
    before = trainer.net.parameters.copy()
    with pytest.raises(
        mc.NonFiniteLoss, match=r"step 1: .*learning rate 0\.01; the parameters are unchanged"
    ) as caught:
        float(trainer.fit(abs(X), Y, epochs=1, batch_size=60, progress=False)["loss"][0])
    assert (caught.value.step, caught.value.learning_rate, caught.value.layer) == (1, 0.01, layer)
    assert (f"; it began in layer {layer} of 3" in str(caught.value)) == (layer is not None)
    np.testing.assert_array_equal(trainer.net.parameters, before)
    assert trainer.progress.step == 0


def test_a_gradient_that_overflows_behind_a_finite_loss_names_its_layer(device):
    trainer = make(device, "identity")
    trainer.net.parameters[...] = 0
    trainer.net.W[3][...] = 1e30
    with pytest.raises(mc.NonFiniteLoss) as caught:
        trainer.fit(X, 1e16 * np.ones_like(Y), epochs=1, batch_size=60, progress=False)
    assert caught.value.layer == 2
    assert np.isfinite(trainer.net.parameters).all()


def batches():
    """Ten batches of rows, of which the third and seventh overflow."""
    rows = X.copy()
    rows[[13, 40]] = 1e30
    return [(rows[i : i + 6], Y[i : i + 6]) for i in range(0, 60, 6)]


@pytest.mark.parametrize(
    "optimizer", [mc.AdamW(1e-2), mc.SGD(0.01, momentum=0.9)], ids=["adamw", "momentum"]
)
def test_steps_that_overflow_are_skipped_and_counted_and_leave_no_trace(optimizer, device):
    one = make(device, "relu", optimizer, on_non_finite="skip")
    other = make(device, "relu", optimizer)
    for x, y in batches():
        one.step(x, y)
        if abs(x).max() < 1e20:
            other.step(x, y)
    assert one.skipped == 2
    assert one.progress.step == 10
    assert other.progress.step == 8
    np.testing.assert_array_equal(one.net.parameters, other.net.parameters)


def test_the_history_says_how_many_steps_were_skipped_and_its_loss_is_that_of_the_others(
    device, tmp_path
):
    rows = X.copy()
    rows[13] = 1e30
    trainer = make(device, "relu", on_non_finite="skip")
    history = trainer.fit(rows, Y, epochs=2, batch_size=6, shuffle=False, progress=False)
    assert history["skipped"] == [1, 2]
    assert np.isfinite(history["loss"]).all()
    trainer.save(tmp_path / "run")
    again = mc.Trainer.load(tmp_path / "run", device)
    assert again.skipped == 2
    assert again.on_non_finite == "skip"
    assert float(again.step(X, Y)) == float(trainer.step(X, Y))


def test_after_an_overflow_the_checkpoint_is_that_of_before_and_goes_on(device, tmp_path):
    class Spoil(mc.Callback):
        def step_end(self, trainer, J):
            if trainer.progress.step == 25:
                trainer.net.W[1][...] = 1e30
                trainer.net.W[2][...] = 1e30

    path, trainer = tmp_path / "run", make(device, "relu")
    with pytest.raises(mc.NonFiniteLoss):
        trainer.fit(
            X,
            Y,
            epochs=5,
            batch_size=6,
            progress=False,
            checkpoint=path,
            every="10 steps",
            callbacks=[Spoil()],
        )
    again = mc.Trainer.load(path, device)
    assert again.progress.step == 20
    whole = make(device, "relu")
    whole.fit(X, Y, epochs=5, batch_size=6, progress=False)
    again.fit(X, Y, epochs=5, batch_size=6, progress=False)
    np.testing.assert_array_equal(again.net.parameters, whole.net.parameters)


def test_a_setting_that_is_neither_raise_nor_skip_is_refused():
    with pytest.raises(ValueError, match="on_non_finite: unknown name 'ignore'"):
        make(on_non_finite="ignore")


def test_numbers_that_underflow_train_whatever_numpys_error_state():
    with np.errstate(all="raise"):
        trainer = mc.Trainer(mc.MLP([3, 1]), "squared_error")
        trainer.fit(1e-300 * np.eye(3), np.arange(3) * 1e-200, epochs=1, progress=False)
    assert np.isfinite(trainer.net.parameters).all()
