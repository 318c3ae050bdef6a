"""The network that people hold: initial weights, views, predict, copies, files, devices, what
importing costs.
"""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import mlpcore as mc
from mlpcore.io import model_file

# -- initial weights -------------------------------------------------------------------------------


def deviation(hidden, n_in=300, n_out=500, **settings):
    net = mc.MLP([n_in, n_out, 2], hidden, seed=1, **settings)
    return float(net.W[1].std()), net


@pytest.mark.parametrize(
    ("hidden", "variance"),
    [
        ("relu", 2 / 300), ("leaky_relu", 2 / 300), ("elu", 2 / 300), ("softplus", 2 / 300),
        ("gelu", 2 / 300),
        ("silu", 2 / 300),
        ("mish", 2 / 300), ("selu", 1 / 300), ("tanh", 2 / 800), ("identity", 2 / 800),
        ("hard_tanh", 2 / 800),
        ("exp", 2 / 800),
        ("sigmoid", 2 / 800 / 0.25**2), (("sigmoid", 2.0), 2 / 800 / 0.5**2),
        (("sigmoid", 0.5), 2 / 800 / 0.125**2),
    ],
)  # fmt: skip
def test_hidden_weights_have_the_variance_of_their_activation_and_biases_start_at_zero(
    hidden, variance
):
    found, net = deviation(hidden)
    # 150,000 numbers: 0.2% is one standard error
    assert found == pytest.approx(np.sqrt(variance), rel=0.01)
    assert abs(net.W[1].mean()) < 0.01 * found
    assert not net.b[1].any()
    assert not net.b[2].any()


def test_a_name_of_init_overrides_the_activations_own():
    for init, variance in (("he", 2 / 300), ("glorot", 2 / 800), ("lecun", 1 / 300)):
        for hidden in ("relu", ("sigmoid", 4.0)):
            assert deviation(hidden, init=init)[0] == pytest.approx(np.sqrt(variance), rel=0.01)
    assert not deviation("relu", init="zeros")[1].parameters.any()


def test_the_output_layer_follows_glorot_and_the_sigmoids_a():
    def output(spec):
        return mc.MLP([300, 200], output=spec, seed=1).W[1].std()

    assert output("softmax") == pytest.approx(np.sqrt(2 / 500), rel=0.01)
    assert output("identity") == pytest.approx(np.sqrt(2 / 500), rel=0.01)
    assert output("sigmoid") == pytest.approx(np.sqrt(2 / 500), rel=0.01)
    assert output(("sigmoid", 2.0)) == pytest.approx(output("sigmoid") / 2, rel=1e-6)


def test_a_net_of_sigmoid_a_starts_with_the_same_outputs_whatever_a():
    """Substituting a s for s: the nets are one and the same up to the scale of W."""
    X = np.random.default_rng(0).standard_normal((50, 10))
    outputs = [
        mc.MLP([10, 20, 20, 1], ("sigmoid", a), ("sigmoid", a), dtype="float64", seed=3).predict(X)
        for a in (0.5, 1.0, 4.0)
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-12)
    np.testing.assert_allclose(outputs[2], outputs[1], rtol=1e-12)


def test_a_seed_draws_the_same_weights_in_every_dtype_and_another_seed_others():
    nets = {
        (dtype, seed): mc.MLP([5, 6, 2], dtype=dtype, seed=seed)
        for dtype in ("float32", "float64")
        for seed in (0, 1)
    }
    np.testing.assert_array_equal(
        nets["float32", 0].parameters, nets["float64", 0].parameters.astype(np.float32)
    )
    assert (nets["float64", 0].parameters[:42] != nets["float64", 1].parameters[:42]).all()
    assert nets["float32", 0].dtype == np.float32


def test_a_custom_activation_says_how_its_weights_start():
    for init, variance in (("he", 2 / 300), ("lecun", 1 / 300)):
        assert deviation(mc.Activation("mine", "s", "1", init=init))[0] == pytest.approx(
            np.sqrt(variance), rel=0.01
        )
    assert deviation(mc.Activation("steep", "4 * s", "4"))[0] == pytest.approx(
        np.sqrt(2 / 800) / 4, rel=0.01
    )
    assert np.isfinite(deviation(mc.Activation("flat at 0", "s * s", "2 * s"))[0])


# -- views -----------------------------------------------------------------------------------------


def test_weights_cannot_be_replaced_but_written_into():
    net = mc.MLP([3, 4, 2])
    for part in (net.W, net.b):
        with pytest.raises(TypeError, match="tuple"):
            part[1] = np.zeros(())
    net.W[1][...] = 7
    net.b[2][0] = 5
    assert (net.parameters[:12] == 7).all()
    assert net.parameters[-2] == 5
    assert net.W[0] is net.b[0] is None
    assert mc.MLP([3, 4, 2], bias=False).b == (None, None, None)


def test_writing_into_the_flat_vector_shows_in_the_views_and_in_predictions():
    net = mc.MLP([2, 1], dtype="float64")
    net.parameters[...] = [2.0, 3.0, 4.0]
    np.testing.assert_array_equal(net.predict([[1.0, 10.0]]), [[36.0]])


# -- forward and predict ---------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["identity", "softmax", "gelu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_predict_equals_forward_whatever_the_chunk(output, dtype):
    net = mc.MLP([5, 8, 3], "mish", output, dtype=dtype)
    X = np.random.default_rng(0).standard_normal((101, 5))
    whole = net.forward(X).output
    for rows in (None, 1, 2, 50, 101, 1000):
        found = net.predict(X, chunk_rows=rows)
        assert found.dtype == dtype
        assert found.shape == (101, 3)
        np.testing.assert_allclose(found, whole, rtol=0, atol=20 * float(np.finfo(dtype).eps))
    if output == "softmax":
        np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("output", ["identity", "softmax", ("sigmoid", 2.0), "exp"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_are_what_the_output_activation_takes(output, dtype):
    net = mc.MLP([5, 8, 3], "mish", output, dtype=dtype, seed=1)
    X = np.random.default_rng(0).standard_normal((101, 5))
    S = net.forward(X).Z[1].astype(np.float64) @ net.W[2] + net.b[2]
    for rows in (None, 1, 50):
        found = net.logits(X, chunk_rows=rows)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, S, rtol=0, atol=20 * float(np.finfo(dtype).eps))
    σ = {
        "identity": lambda s: s,
        "softmax": lambda s: np.exp(s) / np.exp(s).sum(axis=1)[:, None],
        "exp": np.exp,
    }
    Z = σ.get(output, lambda s: 1 / (1 + np.exp(-2 * s)))(S)
    np.testing.assert_allclose(
        net.predict(X),
        Z,
        rtol=40 * float(np.finfo(dtype).eps),
        atol=40 * float(np.finfo(dtype).eps),
    )


def test_logits_tell_rows_apart_whose_probabilities_are_rounded_to_1():
    net = mc.MLP([1, 1], [], "sigmoid", init="zeros")
    net.W[1][...] = 1
    X = [[20.0], [40.0], [1e6]]
    np.testing.assert_array_equal(net.predict(X), np.ones((3, 1)))
    np.testing.assert_array_equal(net.logits(X), X)


# -- one output of a 1-D Y -------------------------------------------------------------------------


def lines(rows=40):
    """Return X and a y (m,) of one number a row."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, 3))
    return X, X.sum(axis=1)


TRAINED = {
    "fit": lambda trainer, X, Y: trainer.fit(X, Y, epochs=1, progress=False),
    "fit on a stream": lambda trainer, X, Y: trainer.fit(
        lambda: [(X, Y)], epochs=1, progress=False
    ),
    "step": lambda trainer, X, Y: trainer.step(X, Y, rows=[0, 1]),
    "step of what is prepared": lambda trainer, X, Y: trainer.step(trainer.prepare(X, Y)),
    "gradient": lambda trainer, X, Y: trainer.gradient(X, Y),
}


@pytest.mark.parametrize("how", TRAINED)
def test_predictions_have_the_shape_of_the_y_that_was_trained_on(how):
    X, y = lines()
    trainer = mc.Trainer(mc.MLP([3, 4, 1]))
    assert trainer.net.predict(X).shape == trainer.net.logits(X).shape == (40, 1)
    trainer.evaluate(X, y)
    assert not trainer.net.predicts_1d
    TRAINED[how](trainer, X, y)
    assert trainer.net.predicts_1d
    assert (y - trainer.net.predict(X)).shape == trainer.net.logits(X, chunk_rows=7).shape == (40,)
    np.testing.assert_array_equal(trainer.net.predict(X), trainer.net.forward(X).output[:, 0])
    TRAINED[how](trainer, X, y[:, None])
    assert (y[:, None] - trainer.net.predict(X)).shape == (40, 1)


def test_a_step_that_fails_leaves_the_shape_of_predictions_as_it_was():
    X, y = lines()
    trainer = mc.Trainer(mc.MLP([3, 4, 1]))
    trainer.step(X, y)
    with pytest.raises(mc.NonFiniteLoss):
        trainer.step(X * 1e38, y[:, None] * 1e30)
    assert trainer.net.predict(X).shape == (40,)


def test_a_probability_of_a_1_d_y_too_is_1_d_but_not_that_of_classes():
    X, y = lines()
    trainer = mc.Trainer(mc.MLP([3, 1], output="sigmoid"))
    trainer.step(X, y > 0)
    assert ((trainer.net.predict(X) > 0.5) == (y > 0)).shape == (40,)
    for outputs in (1, 2):
        trainer = mc.Trainer(mc.MLP([3, outputs], output="softmax"))
        trainer.step(X, (y > 0) * (outputs - 1))
        assert trainer.net.predict(X).shape == (40, outputs)


def test_copies_files_and_checkpoints_remember_the_shape_of_predictions(tmp_path):
    X, y = lines()
    trainer = mc.Trainer(mc.MLP([3, 4, 1]))
    trainer.step(X, y)
    trainer.net.save(tmp_path / "net")
    trainer.save(tmp_path / "trainer")
    net, again = trainer.net, mc.Trainer.load(tmp_path / "trainer")
    others = [
        net.copy(),
        net.copy("float64"),
        net.to("cpu"),
        pickle.loads(pickle.dumps(net)),
        mc.MLP.load(tmp_path / "net"),
        mc.MLP.load(tmp_path / "trainer"),
        again.net,
        pickle.loads(pickle.dumps(trainer)).net,
    ]
    for other in others:
        assert other.predict(X).shape == (40,)
    J, G = mc.loss("squared_error")(net.predict(X), y)
    assert pytest.approx(trainer.evaluate(X, y)["loss"]) == J
    np.testing.assert_allclose(G, (net.predict(X) - y) / 40, rtol=1e-5)
    net.predicts_1d = False
    assert net.predict(X).shape == (40, 1)
    with pytest.raises(ValueError, match="predicts_1d must be False: the network has 2 outputs"):
        mc.MLP([3, 2]).predicts_1d = True
    with pytest.raises(TypeError, match="predicts_1d must be True or False"):
        net.predicts_1d = 1


@pytest.mark.slow
def test_predicting_many_rows_takes_the_result_and_little_more():
    import tracemalloc

    net = mc.MLP([4, 256, 256, 1])
    X = np.zeros((60000, 4), np.float32)
    net.predict(X[:10])
    tracemalloc.start()
    result = net.predict(X)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - result.nbytes < 10 << 20  # its layers' outputs together take 118 MiB


def test_inputs_of_every_kind_predict_alike_and_are_not_changed():
    net = mc.MLP([4, 5, 2], "tanh")
    X = np.random.default_rng(0).integers(-4, 5, (9, 4)).astype(np.float32)
    expected = net.predict(X)
    fixed = X.copy()
    fixed.flags.writeable = False
    for kind in (X.astype(np.float64), X.astype(np.int8), X.tolist(), np.asfortranarray(X),
        np.repeat(X, 2, axis=1)[:, ::2],
        fixed,
                 X.astype(">f4"), X.astype(np.float16)):  # fmt: skip
        before = np.array(kind)
        np.testing.assert_array_equal(net.predict(kind), expected)
        np.testing.assert_array_equal(kind, before)


def test_large_inputs_overflow_without_a_warning():
    net = mc.MLP([1, 1, 1], "exp")
    net.parameters[...] = 1e3
    assert np.isinf(net.predict([[1e3]])).all()
    assert net.predict([[1e300]]).shape == (1, 1)  # beyond float32 already


# -- copies ----------------------------------------------------------------------------------------


def test_a_copy_is_equal_and_independent():
    net = mc.MLP([3, 4, 2], [("sigmoid", 2.0)], "softmax", bias=False, seed=4)
    copy = net.copy()
    np.testing.assert_array_equal(copy.parameters, net.parameters)
    assert (copy.activations, copy.sizes, copy.dtype) == (net.activations, net.sizes, net.dtype)
    copy.W[1][...] = 0
    assert net.W[1].all()
    assert net.copy("float64").dtype == np.float64
    np.testing.assert_array_equal(net.copy("float64").parameters, net.parameters)


def test_a_network_says_what_it_is():
    text = repr(mc.MLP([3, 4, 4, 2], [("sigmoid", 2.0), "tanh"], "softmax"))
    for part in (
        "3-4-4-2",
        "('sigmoid', 2.0)",
        "tanh",
        "softmax",
        "46 parameters",
        "float32 on cpu",
    ):
        assert part in text


# -- files -----------------------------------------------------------------------------------------

CUBIC = mc.Activation("cubic", "a * s * s * s + s", "3 * a * s * s + 1", 0.3, init="lecun")
NETS = [
    mc.MLP([3, 4, 2], seed=1),
    mc.MLP([3, 2], output="softmax", bias=False, dtype="float64"),
    mc.MLP([3, 4, 5, 2], [("sigmoid", 2.5), ("leaky_relu", 0.2)], ("sigmoid", 0.5)),
    mc.MLP(
        [3, 4, 5, 2], [CUBIC, mc.Activation("own", "tanh(s)", "1 - z * z")], CUBIC, dtype="float64"
    ),
]


@pytest.mark.parametrize("net", NETS, ids=["plain", "softmax", "parameters", "custom"])
def test_a_network_comes_back_from_its_file_bit_for_bit(net, tmp_path):
    net.save(tmp_path / "net.safetensors")
    loaded = mc.MLP.load(str(tmp_path / "net.safetensors"))
    np.testing.assert_array_equal(loaded.parameters, net.parameters)
    assert loaded.parameters.dtype == net.parameters.dtype
    assert loaded.activations == net.activations
    assert loaded.layout == net.layout
    X = np.random.default_rng(0).standard_normal((7, 3))
    np.testing.assert_array_equal(loaded.predict(X), net.predict(X))
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    twice = tmp_path / "twice.safetensors"
    loaded.save(twice)
    assert twice.read_bytes() == (tmp_path / "net.safetensors").read_bytes()
    for a in loaded.activations[1:]:
        assert a.default == net.activations[loaded.activations.index(a)].default


def test_a_saved_network_can_be_trained_on(tmp_path):
    X, Y = np.random.default_rng(0).standard_normal((20, 3)), np.ones((20, 2))
    net = NETS[3].copy()
    net.save(tmp_path / "net.safetensors")
    loaded = mc.MLP.load(tmp_path / "net.safetensors")
    for n in (net, loaded):
        mc.Trainer(n, loss="squared_error").fit(X, Y, epochs=2, batch_size=7, progress=False)
    np.testing.assert_array_equal(net.parameters, loaded.parameters)
    assert (net.parameters != NETS[3].parameters).any()


def test_tensors_and_facts_saved_beside_the_network_come_back_also_from_views_that_are_not_contiguous(  # noqa: E501
    tmp_path,
):
    mean = np.arange(12.0).reshape(3, 4).T[::2]
    about = {"classes": ["a", "ß"], "rate": 0.1}
    NETS[0].save(tmp_path / "net.safetensors", tensors={"mean": mean}, about=about)
    net, tensors, found = mc.MLP.load_with(tmp_path / "net.safetensors")
    assert list(tensors) == ["mean"]
    np.testing.assert_array_equal(tensors["mean"], mean)
    np.testing.assert_array_equal(net.parameters, NETS[0].parameters)
    assert found == about


def test_a_tensor_cannot_take_the_place_of_the_parameters(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(ValueError, match="parameters"):
        NETS[0].save(path, tensors={"parameters": np.zeros(NETS[0].layout.size, np.float32)})
    assert not path.exists()


def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        NETS[0].save(tmp_path / "net.safetensors", about={"net": object()})
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_file_keeps_either_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    NETS[0].save(path)
    old = path.read_bytes()

    def fails(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="disk full"):
            NETS[1].save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    NETS[1].save(path)
    assert mc.MLP.load(path).sizes == (3, 2)


def test_nothing_is_written_where_the_folder_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        NETS[0].save(tmp_path / "no" / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    NETS[0].save(tmp_path / "net.safetensors")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "net.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def _file(path, header=None, tensors=None, **changes):
    """A model file as `save` writes it, with changes to its header; returns the path."""
    NETS[0].save(path)
    import safetensors

    with safetensors.safe_open(str(path), "numpy") as file:
        meta, found = (
            json.loads(file.metadata()["mlpcore"]),
            {"parameters": file.get_tensor("parameters")},
        )
    text = json.dumps({**meta, **changes}) if header is None else header
    held = found if tensors is None else tensors
    save_file(held, str(path), {"mlpcore": text, "digest": model_file._digest(text, held)})
    return path


def test_a_file_that_is_cut_short_or_changed_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    NETS[0].save(path)
    whole = path.read_bytes()
    for data in (
        b"",
        b"\0",
        whole[:7],
        whole[:40],
        whole[:-1],
        whole + b"\0",
        b"\xff" * 8 + whole[8:],
        b"not a model\n" * 9,
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"net\.safetensors.*(not a safetensors file|damaged)"):
            mc.MLP.load(path)


def test_a_file_of_another_program_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"parameters": np.zeros(3, np.float32)}, str(path), metadata)
        with pytest.raises(ValueError, match=r"other\.safetensors.*not one of mlpcore's"):
            mc.MLP.load(path)


def test_a_file_of_a_newer_version_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"version 99.*upgrade"):
        mc.MLP.load(_file(tmp_path / "net.safetensors", version=99))


@pytest.mark.parametrize(
    "changes",
    [
        {"header": "[" * 100_000},
        {"sizes": [3, 4]}, {"sizes": [3, 5, 2]}, {"sizes": "3-4-2"}, {"sizes": None},
        {"bias": "yes"}, {"activations": []},
        {"activations": [{"name": "x", "value": "__import__('os')", "slope": "1"}] * 2},
        {"activations": [["relu"]] * 2},
        {"activations": 3}, {"version": "one"}, {"version": None}, {"header": "not JSON"},
        {"header": "[]"}, {"header": "{}"},
        {"header": '{"version": 1}'}, {"tensors": {"other": np.zeros(3, np.float32)}},
        {"tensors": {"parameters": np.zeros(26, np.float16)}},
        {"tensors": {"parameters": np.zeros((2, 13), np.float32)}},
        {"tensors": {"parameters": np.zeros(26, np.int64)}},
    ],
    ids=lambda changes: str(changes)[:60],
)  # fmt: skip
def test_a_file_whose_header_and_tensors_do_not_make_a_network_is_refused_by_name(
    changes, tmp_path
):
    path = _file(tmp_path / "net.safetensors", **changes)
    with pytest.raises(ValueError, match=r"net\.safetensors"):
        mc.MLP.load(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        mc.MLP.load(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="a folder"):
        mc.MLP.load(tmp_path)


# -- devices ---------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_an_error_of_its_own_with_the_reason(tmp_path):
    NETS[0].save(tmp_path / "net.safetensors")
    calls = [
        lambda: mc.MLP([3, 2], device="cuda"),
        lambda: mc.MLP([3, 2], device="cuda:1"),
        lambda: NETS[0].to("cuda"),
        lambda: mc.MLP.load(tmp_path / "net.safetensors", device="cuda"),
    ]
    for call in calls:
        with pytest.raises(
            mc.DeviceUnavailable, match=r"device='cuda.*CuPy is not installed: pip install"
        ):
            call()
    assert mc.MLP([3, 2], device="auto").device == mc.MLP([3, 2], device="cpu").device == "cpu"
    assert NETS[0].to("cpu") is NETS[0]


def test_an_unknown_device_is_not_blamed_on_the_file(tmp_path):
    NETS[0].save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"^device must be"):
        mc.MLP.load(tmp_path / "net.safetensors", device="tpu")


def test_info_says_what_there_is():
    info = mc.info()
    assert {
        "device",
        "cuda",
        "cpu",
        "cpus",
        "cpu passes",
        "blas",
        "blas pinned by the environment",
        "python",
        "versions",
    } <= set(info)
    assert info["device"] == "cpu"
    assert info["versions"]["numpy"] == np.__version__
    assert info["cpus"] >= 1
    assert info["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert "CuPy" in info["cuda"]
    for blas in info["blas"]:
        assert blas["num_threads"] >= 1


@pytest.mark.slow
def test_info_sees_a_pin_of_the_environment():
    code = "import mlpcore as mc; print(mc.info()['blas pinned by the environment'])"
    for pin, expected in (
        ({"OPENBLAS_CORETYPE": "Haswell"}, "OPENBLAS_CORETYPE=Haswell"),
        ({}, "None"),
    ):
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
        } | pin
        assert (
            subprocess.run(
                [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
            ).stdout.strip()
            == expected
        )


# -- what importing costs --------------------------------------------------------------------------


def test_importing_and_training_load_none_of_the_heavy_packages():
    code = """
import sys
import mlpcore as mc
import numpy as np
trainer = mc.Trainer(mc.MLP([3, 2]), loss="squared_error")
trainer.fit(np.ones((9, 3)), np.ones((9, 2)), epochs=1, progress=False)
heavy = {"matplotlib", "sklearn", "pandas", "scipy", "cupy", "torch", "jax", "IPython", "ml_dtypes"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


def test_importing_changes_no_setting_of_the_process():
    code = """
import os, warnings, logging, numpy as np, threadpoolctl
see = lambda: (dict(os.environ), np.geterr(), list(warnings.filters), logging.root.handlers[:],
               logging.root.level, np.getbufsize(),
               [pool["num_threads"] for pool in threadpoolctl.threadpool_info()])
before = see()
import mlpcore
print(see() == before)
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
        == "True"
    )
