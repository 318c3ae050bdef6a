"""log_softmax as an output: its digits, its place in files and checks, and cross-entropy behind it,
which is softmax's.
"""

import mpmath
import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import sheet

rng = np.random.default_rng(0)
X, LABELS = rng.standard_normal((60, 4)), rng.integers(0, 3, 60)


def _log_sum(row):
    return mpmath.log(sum(mpmath.exp(mpmath.mpf(t) - max(row)) for t in row))


def layer(S):
    net = mc.MLP([S.shape[1]] * 2, output="log_softmax", bias=False, dtype=S.dtype)
    net.W[1][...] = np.eye(S.shape[1])
    return net.predict(S)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_probabilities_keep_their_digits_near_0_and_far_below(dtype):
    S = np.array(
        [
            [0, -20, -30],
            [1e4, 0, -1e4],
            [-80, 0, -100],
            [3, 3, 3],
            [1, 2, 3],
            [-1e30, 0, 1e30],
            [2, 2, -50],
        ],
        dtype,
    )
    with mpmath.workdps(60):
        exact = [[float(s - _log_sum(row) - max(row)) for s in row]
                 for row in (list(map(mpmath.mpf, row)) for row in S.tolist())]  # fmt: skip
    np.testing.assert_allclose(
        layer(S), exact, rtol=4 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny
    )


def test_not_a_number_stays_in_its_row():
    S = np.array([[np.nan, 1, 2], [1, 2, 3], [-np.inf, 0, 0]], np.float32)
    Z = np.empty_like(S)
    NumpyOps().bias_activation(S, None, sheet.ACTIVATIONS["log_softmax"], Z)
    np.testing.assert_array_equal(np.isnan(Z), [[True] * 3, [False] * 3, [False] * 3])
    np.testing.assert_allclose(Z[2], [-np.inf, -np.log(2), -np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_under_cross_entropy_it_trains_to_the_bit_as_softmax_does_and_predicts_its_logarithm(soft):
    Y = np.eye(3)[LABELS] * 0.9 + 0.1 / 3 if soft else LABELS
    one, other = (
        mc.MLP([4, 8, 3], "tanh", output, seed=1) for output in ("softmax", "log_softmax")
    )
    for net in (one, other):
        mc.Trainer(net, optimizer=mc.Adam(1e-2)).fit(X, Y, epochs=5, batch_size=16, progress=False)
    np.testing.assert_array_equal(one.parameters, other.parameters)
    np.testing.assert_allclose(other.predict(X), np.log(one.predict(X)), rtol=1e-4)
    assert mc.Trainer(one).evaluate(X, LABELS) == mc.Trainer(other).evaluate(X, LABELS)
    assert mc.Trainer(other).evaluate(X, LABELS)["accuracy"] == np.mean(
        other.predict(X).argmax(axis=1) == LABELS
    )


@pytest.mark.parametrize(
    "loss",
    ["cross_entropy", "squared_error", ("huber", 0.5), mc.Loss("power", "(z - y) ** 4")],
    ids=str,
)
def test_gradients_are_right_under_every_loss_that_it_may_have(loss):
    net = mc.MLP([4, 6, 3], "tanh", "log_softmax", dtype="float64", seed=2)
    assert mc.check_gradients(
        net, X, LABELS if loss == "cross_entropy" else rng.standard_normal((60, 3)), loss
    ).ok


def test_it_goes_into_files_and_comes_back(tmp_path):
    net = mc.MLP([4, 6, 3], "tanh", "log_softmax", seed=2)
    net.save(tmp_path / "net.safetensors")
    again = mc.MLP.load(tmp_path / "net.safetensors")
    assert again.activations[-1] == sheet.ACTIVATIONS["log_softmax"]
    np.testing.assert_array_equal(again.predict(X), net.predict(X))


def test_the_loss_by_itself_takes_its_outputs_exponentials_and_refuses_the_logarithms():
    net, loss = mc.MLP([4, 3], output="log_softmax", dtype="float64"), mc.loss("cross_entropy")
    with pytest.raises(
        ValueError, match=r"Z must hold probabilities for cross_entropy, at least 0; got -"
    ):
        loss(net.predict(X), LABELS)
    assert loss(np.exp(net.predict(X)), LABELS)[0] == pytest.approx(
        mc.Trainer(net).evaluate(X, LABELS)["loss"]
    )


def test_it_is_for_the_output_alone_and_takes_no_parameter():
    for spec in ("log_softmax", sheet.ACTIVATIONS["log_softmax"], ("log_softmax", 1.0)):
        with pytest.raises(
            ValueError, match=r"activations\[0\]: log_softmax is for the output layer only"
        ):
            mc.MLP([4, 3, 2], [spec])
    with pytest.raises(ValueError, match=r"output: log_softmax takes no parameter; got 1.0"):
        mc.MLP([4, 2], output=("log_softmax", 1.0))
    with pytest.raises(
        ValueError, match=r"loss 'poisson' needs output .* the network has 'log_softmax'"
    ):
        mc.Trainer(mc.MLP([4, 2], output="log_softmax"), "poisson")
