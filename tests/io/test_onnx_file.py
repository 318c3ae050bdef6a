"""An ONNX file computes what the network computes: every activation and output, both dtypes,
extreme inputs, in onnxruntime.
"""

import json
import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

import mlpcore as mc
from mlpcore.cli import main
from mlpcore.cli.export import export
from mlpcore.core import activations
from mlpcore.core.formulas import FUNCTIONS
from mlpcore.tables.standardizer import Standardizer

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
EDGES = np.array(
    [
        0,
        1e-30,
        1e-12,
        1e-6,
        3e-4,
        0.01,
        0.1,
        0.3,
        0.49999,
        0.5,
        0.50001,
        0.7,
        1,
        2,
        3,
        5,
        8,
        10,
        15,
        20,
        30,
        50,
        80,
        100,
        700,
        1e4,
    ]
)
S = np.sort(np.concatenate([-EDGES, EDGES[1:], np.linspace(-12, 12, 201)]))


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, X):
    return session(path).run(["Z"], {"X": X})[0]


def layer(spec, dtype, folder):
    """One activation by itself, on the numbers S: ours and onnxruntime's."""
    net = mc.MLP([1, 1], output=spec, bias=False, dtype=dtype)
    net.W[1][...] = 1
    net.to_onnx(folder / "net.onnx")
    s = S[:, None].astype(dtype)
    return s, net.predict(s), run(folder / "net.onnx", s)


SPECS = [*activations.names(), ("sigmoid", 3.0), ("leaky_relu", 0.3), ("elu", 2.0)]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_activation_is_the_networks_up_to_rounding_at_extreme_inputs_too(
    spec, dtype, tmp_path
):
    s, ours, theirs = layer(spec, dtype, tmp_path)
    assert theirs.dtype == dtype
    assert np.isfinite(ours).sum() > 150
    scale = (
        np.maximum(abs(ours), 1)
        if spec not in ("exp", "elu", "selu", "tanh", "identity")
        else abs(ours)
    )
    infinite = ~np.isfinite(ours)
    np.testing.assert_array_equal(ours[infinite], theirs[infinite])
    error = abs(ours[~infinite] - theirs[~infinite]) / np.maximum(
        scale[~infinite], np.finfo(dtype).tiny
    )
    assert error.max() <= 16 * EPS[dtype], s[~infinite][error.argmax()]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("formula", "reference"),
    [("expm1(s)", np.expm1), ("log1p(s)", np.log1p), ("maximum(s, 0) + log1p(exp(-abs(s)))", None)],
)
def test_functions_that_onnx_lacks_keep_their_digits_near_0_and_their_limits(
    formula, reference, dtype, tmp_path
):
    _, ours, theirs = layer(mc.Activation("own", formula, "1"), dtype, tmp_path)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    np.testing.assert_allclose(theirs, ours, rtol=16 * EPS[dtype], atol=np.finfo(dtype).tiny)
    if reference is not None:
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(
                theirs,
                reference(S[:, None].astype(dtype)),
                rtol=16 * EPS[dtype],
                atol=np.finfo(dtype).tiny,
            )


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("function", sorted({*FUNCTIONS, "-"} - {"maximum", "minimum"}))
def test_every_function_of_the_formulas_has_its_form(function, dtype, tmp_path):
    _, ours, theirs = layer(mc.Activation("own", f"{function}(s)", "1"), dtype, tmp_path)
    zeros = 16 * EPS[dtype] if function in ("sin", "cos") else np.finfo(dtype).tiny
    np.testing.assert_allclose(theirs, ours, rtol=16 * EPS[dtype], atol=zeros)


@pytest.mark.parametrize(
    "value",
    [
        "2",
        "a + 1",
        "s",
        "s / a - a / (1 + s * s)",
        "minimum(s, a) * maximum(0.5, s)",
        "-s",
        "exp(s) * exp(s)",
    ],
)
def test_activations_of_a_users_own_with_constants_and_parameters(value, tmp_path):
    _, ours, theirs = layer(mc.Activation("own", value, "1", parameter=3.0), "float64", tmp_path)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(theirs, ours, rtol=16 * EPS["float64"], atol=0)


@pytest.mark.parametrize("dtype", EPS)
def test_learned_parameters_are_arrays_of_the_file_and_prelu_a_node(dtype, tmp_path):
    own = mc.Activation(
        "own", "tanh(a * s) + a", "a * (1 - tanh(a * s) * tanh(a * s))", 0.5, learned="per output"
    )
    net = mc.MLP([5, 7, 6, 4], [("prelu", 0.1, "per output"), own], "prelu", dtype=dtype, seed=2)
    rng = np.random.default_rng(1)
    for a in net.a[1:]:
        a[...] = rng.uniform(-1, 1, a.shape)
    net.to_onnx(tmp_path / "net.onnx")
    X = rng.standard_normal((64, 5)).astype(dtype)
    np.testing.assert_allclose(
        run(tmp_path / "net.onnx", X), net.predict(X), rtol=1e3 * EPS[dtype], atol=1e2 * EPS[dtype]
    )
    graph = onnx.load(tmp_path / "net.onnx").graph
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    for l in (1, 2, 3):
        np.testing.assert_array_equal(arrays[f"a{l}"], net.a[l])
    assert [[*node.input] for node in graph.node if node.op_type == "PRelu"] == [
        ["S1", "a1"],
        ["S3", "a3"],
    ]


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("output", [*activations.names(output=True), ("sigmoid", 0.5)], ids=str)
def test_every_output_of_a_whole_network_agrees(output, scale, dtype, tmp_path):
    net = mc.MLP([5, 7, 6, 4], ["silu", "tanh"], output, dtype=dtype, seed=2)
    net.W[3][...] *= scale  # pre-activations near ±100
    net.parameters[net.layout.weights :] = np.linspace(-1, 1, net.layout.size - net.layout.weights)
    net.to_onnx(tmp_path / "net.onnx")
    X = np.random.default_rng(0).standard_normal((64, 5)).astype(dtype)
    ours, theirs = net.predict(X), run(tmp_path / "net.onnx", X)
    if output == "exp":  # whose relative error is that of s
        ours, theirs = (
            np.log(np.clip(x, np.finfo(dtype).tiny, np.finfo(dtype).max)) for x in (ours, theirs)
        )
    assert np.abs(ours - theirs).max() <= 50 * EPS[dtype] * max(1, np.abs(ours).max(), scale)
    if output == "softmax":
        assert np.isfinite(theirs).all()
        np.testing.assert_allclose(theirs.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_nan_goes_through(spec, tmp_path):
    net = mc.MLP([1, 1], output=spec)
    net.to_onnx(tmp_path / "net.onnx")
    X = np.array([[np.nan], [1]], np.float32)
    np.testing.assert_array_equal(np.isnan(run(tmp_path / "net.onnx", X)), np.isnan(net.predict(X)))


def test_softmax_of_rows_far_apart_does_not_overflow(tmp_path):
    net = mc.MLP([3, 3], output="softmax", bias=False)
    net.W[1][...] = np.eye(3)
    net.to_onnx(tmp_path / "net.onnx")
    X = np.array([[100, -100, 0], [1e4, 0, -1e4], [-1e4, -1e4, -1e4]], np.float32)
    np.testing.assert_allclose(run(tmp_path / "net.onnx", X), net.predict(X), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", EPS)
def test_log_softmax_keeps_the_digits_of_probabilities_near_1(dtype, tmp_path):
    net = mc.MLP([3, 3], output="log_softmax", bias=False, dtype=dtype)
    net.W[1][...] = np.eye(3)
    net.to_onnx(tmp_path / "net.onnx")
    X = np.array(
        [[0, -20, -30], [5, 5, -60], [1e4, 0, -1e4], [1, 2, 3], [7, 7, 7], [np.nan, 0, 0]], dtype
    )
    np.testing.assert_allclose(
        run(tmp_path / "net.onnx", X),
        net.predict(X),
        rtol=8 * EPS[dtype],
        atol=np.finfo(dtype).tiny,
    )


@pytest.mark.parametrize("bias", [True, False])
def test_tied_weights_are_stored_once_and_biases_are_left_out_where_there_are_none(bias, tmp_path):
    net = mc.MLP([6, 4, 4, 4, 6], "tanh", bias=bias, tied={3: 2, 4: "1.T"}, dtype="float64")
    net.to_onnx(tmp_path / "net.onnx")
    stored = {
        array.name: tuple(array.dims)
        for array in onnx.load(tmp_path / "net.onnx").graph.initializer
    }
    assert {name: shape for name, shape in stored.items() if name[0] in "Wb"} == {
        "W1": (6, 4), "W2": (4, 4),
        **({f"b{l}": (n,) for l, n in enumerate(net.sizes) if l} if bias else {}),
    }  # fmt: skip
    X = np.random.default_rng(0).standard_normal((9, 6))
    np.testing.assert_allclose(
        run(tmp_path / "net.onnx", X), net.predict(X), rtol=1e-13, atol=1e-15
    )


def test_any_number_of_rows_goes_in_and_the_opset_is_pinned(tmp_path):
    net = mc.MLP([3, 8, 2])
    net.to_onnx(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    assert [(x.domain, x.version) for x in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    one = session(tmp_path / "net.onnx")
    assert [(x.name, x.shape) for x in (*one.get_inputs(), *one.get_outputs())] == [
        ("X", ["rows", 3]),
        ("Z", ["rows", 2]),
    ]
    for rows in (1, 2, 1000):
        X = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
        np.testing.assert_allclose(one.run(None, {"X": X})[0], net.predict(X), rtol=2e-5, atol=1e-6)


# -- what lies around the network ------------------------------------------------------------------


def test_standardisation_of_columns_and_target_is_part_of_the_file(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.normal(50, 20, (40, 3))
    net = mc.MLP([3, 5, 2], "tanh", dtype="float64")
    mean, scale = X.mean(axis=0), X.std(axis=0)
    net.to_onnx(
        tmp_path / "net.onnx",
        mean=mean,
        scale=scale,
        target_mean=[7, -1],
        target_scale=[100, 0.5],
        about={"classes": ["a"]},
    )
    wanted = net.predict((X - mean) / scale) * [100, 0.5] + [7, -1]
    np.testing.assert_allclose(run(tmp_path / "net.onnx", X), wanted, rtol=1e-13)
    assert json.loads(
        session(tmp_path / "net.onnx").get_modelmeta().custom_metadata_map["classes"]
    ) == ["a"]


@pytest.mark.parametrize("classes", [True, False])
def test_a_model_of_the_command_line_takes_raw_columns(classes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    X = rng.normal(30, 10, (300, 4)).astype(np.float32)
    y = X @ [1.0, -2.0, 0.5, 3.0] + 1000
    np.savez(
        "table.npz", X=X, Y=np.array(["low", "high"])[(y > y.mean()).astype(int)] if classes else y
    )
    main(["train", "table.npz", "--epochs", "2", "--hidden", "8", "--quiet"])
    net = export("table.safetensors", "table.onnx")
    model, tensors, _ = mc.MLP.load_with("table.safetensors")
    wanted = model.predict(Standardizer(tensors["mean"], tensors["scale"]).apply(X))
    if not classes:
        wanted = wanted * tensors["target scale"] + tensors["target mean"]
    np.testing.assert_allclose(run("table.onnx", X), wanted, rtol=1e-5)
    np.testing.assert_array_equal(net.parameters, model.parameters)
    names = json.loads(session("table.onnx").get_modelmeta().custom_metadata_map["classes"])
    assert sorted(names) == (["high", "low"] if classes else [])


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"mean": [1, 2]}, r"mean must have shape \(3,\)"),
        ({"scale": [1, 0, 1]}, "scale must not be 0"),
        ({"mean": [0, 1e300, 0]}, "mean must be finite in the network's dtype, float32"),
        (
            {"target_scale": [-1e300, 0]},
            "target_scale must be finite in the network's dtype, float32",
        ),
        ({"scale": [1, 1e-300, 1]}, "scale must not be 0 anywhere in float32"),
        ({"target_scale": [1, 1e-50]}, "target_scale must not be 0 anywhere in float32"),
        ({"scale": [1, np.nan, 1]}, "scale must be finite; row 1"),
        ({"target_mean": ["a", "b"]}, "target_mean must hold real numbers"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name_and_nothing_is_written(rows, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        mc.MLP([3, 2]).to_onnx(tmp_path / "net.onnx", **rows)
    assert not os.listdir(tmp_path)


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    net = mc.MLP([3, 2])
    net.W[1][0, :] = np.nan, np.inf
    with pytest.raises(ValueError, match="the network's parameters must be finite; 2 are not"):
        net.to_onnx(tmp_path / "net.onnx")
    assert not os.listdir(tmp_path)


def test_rows_beyond_float32_go_into_a_float64_network(tmp_path):
    mc.MLP([3, 2], dtype="float64").to_onnx(
        tmp_path / "net.onnx", mean=[0, 1e300, 0], scale=[1, 1e-300, 1]
    )


def test_without_onnx_and_without_a_folder_it_says_so(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="cannot be written"):
        mc.MLP([3, 2]).to_onnx(tmp_path / "nowhere" / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'mlpcore\[onnx\]'"):
        mc.MLP([3, 2]).to_onnx(tmp_path / "net.onnx")


def test_parameters_beyond_what_protobuf_holds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mlpcore.io.onnx_file.LARGEST", 31)
    with pytest.raises(ValueError, match="32 bytes; an ONNX file holds at most 2 GiB"):
        mc.MLP([3, 2]).to_onnx(tmp_path / "net.onnx")
    assert not os.listdir(tmp_path)
