"""The command line, as a user calls it."""

import contextlib
import csv
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.cli import main
from mlpcore.engine.cpu_step import CpuStep
from mlpcore.tables.table import Transformer
from mlpcore.training.learner import Learner


@pytest.fixture
def table(tmp_path):
    """An .npz file with two classes, told apart by the sign of a product."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((600, 5))
    np.savez(tmp_path / "table.npz", X=X, Y=np.where(X[:, 0] * X[:, 1] > 0, "same", "other"))
    return tmp_path / "table.npz"


def train(table, tmp_path, *more):
    return main(["train", str(table), "--out", str(tmp_path), "--quiet", *more])


def predict(table, folder):
    model, out = folder / "table.safetensors", folder / "p.csv"
    return main(["predict", str(model), str(table), "--out", str(out)])


@pytest.mark.slow
def test_digits_reach_97_percent_on_held_out_rows_and_leave_a_model_and_a_picture(tmp_path, capsys):
    assert main(["train", "digits", "--out", str(tmp_path), "--quiet"]) == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("mlpcore ")
    )
    assert float(line.split()[1]) >= 0.97
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert mc.MLP.load(tmp_path / "digits.safetensors").sizes[0] == 64


@pytest.mark.slow
def test_predictions_of_a_saved_model_are_those_of_its_classes(table, tmp_path, capsys):
    assert train(table, tmp_path, "--epochs", "60") == 0
    assert predict(table, tmp_path) == 0
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    truth = np.load(table)["Y"]
    assert len(rows) == 600
    assert (
        np.mean([row["prediction"] == label for row, label in zip(rows, truth, strict=True)]) > 0.85
    )
    assert all(abs(float(row["p(same)"]) + float(row["p(other)"]) - 1) < 1e-5 for row in rows)
    capsys.readouterr()


def test_regression_predicts_in_the_units_of_the_target(tmp_path, capsys):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((800, 3))
    np.savez(tmp_path / "heights.npz", X=X, Y=170 + 10 * X[:, 0])
    assert (
        main(
            [
                "train",
                str(tmp_path / "heights.npz"),
                "--out",
                str(tmp_path),
                "--quiet",
                "--hidden",
                "none",
                "--epochs",
                "40",
                "--learning-rate",
                "0.1",
            ]
        )
        == 0
    )
    assert "R2" in capsys.readouterr().out
    assert (
        main(
            [
                "predict",
                str(tmp_path / "heights.safetensors"),
                str(tmp_path / "heights.npz"),
                "--out",
                str(tmp_path / "p.csv"),
            ]
        )
        == 0
    )
    with open(tmp_path / "p.csv", newline="") as file:
        predicted = np.array([float(row["prediction"]) for row in csv.DictReader(file)])
    assert np.abs(predicted - (170 + 10 * X[:, 0])).mean() < 2


@pytest.mark.slow
def test_the_gradient_of_a_saved_model_checks_on_data_and_on_random_rows(table, tmp_path, capsys):
    train(table, tmp_path, "--epochs", "2")
    assert main(["check", str(tmp_path / "table.safetensors"), str(table)]) == 0
    assert main(["check", str(tmp_path / "table.safetensors"), "--rows", "16"]) == 0
    assert capsys.readouterr().out.count("gradient right") == 2


def test_the_medians_of_several_splits_are_printed(table, tmp_path, capsys):
    assert train(table, tmp_path, "--epochs", "2", "--splits", "3") == 0
    out = capsys.readouterr().out
    assert "medians, 3 splits" in out
    assert all(f"seed {seed}:" in out for seed in (0, 1, 2))


def test_the_plan_prints_what_the_trainer_plans(capsys):
    assert main(["plan", "784,512,10", "--batch", "65536"]) == 0
    expected = mc.Trainer(mc.MLP([784, 512, 10], output="softmax")).plan(65536)
    assert f"{expected.total_bytes:,} bytes" in capsys.readouterr().out


def test_info_names_the_blas_and_why_there_is_no_cuda(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "blas" in out
    assert "CUDA" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nosuch"], ["nosuch", "digits"]),
        (["train", "absent.npz"], ["absent.npz"]),
        (["train", "digits", "--hidden", "3,x"], ["--hidden", "3,x"]),
        (["train", "digits", "--epochs", "0"], ["epochs", "0"]),
        (["train", "digits", "--activation", "rellu"], ["rellu", "relu"]),
        (["train", "digits", "--device", "cuda"], ["device='cuda'", "CUDA"]),
        (["train", "digits", "--memory-limit", "1 KB"], ["memory_limit", "parameters"]),
        (["train", "digits", "--memory-limit", "much"], ["--memory-limit", "much"]),
        (["predict", "absent.safetensors", "digits"], ["absent.safetensors"]),
        (["plan", "784"], ["sizes", "784"]),
        (["plan", "10,5", "--memory-limit", "1 KB"], ["memory_limit", "parameters"]),
        (["plan", "10,5,1", "--output", "tanh", "--loss", "poisson"], ["poisson", "tanh"]),
    ],
)
def test_a_wrong_call_is_answered_with_one_line_that_names_it(
    arguments, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlpcore: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_model_of_other_columns_or_without_standardisation_is_refused(table, tmp_path, capsys):
    train(table, tmp_path, "--epochs", "1")
    assert main(["predict", str(tmp_path / "table.safetensors"), "digits"]) == 2
    assert "64 columns; the model takes 5" in capsys.readouterr().err
    mc.MLP([5, 2], output="softmax").save(tmp_path / "bare.safetensors")
    assert main(["predict", str(tmp_path / "bare.safetensors"), str(table)]) == 2
    assert "standardisation" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("note", "value"),
    [
        ("classes", ["same"]),
        ("classes", 3),
        ("loss", None),
        ("loss", "cross"),
        ("features", None),
        ("target", 5),
        (None, []),
    ],
)
def test_notes_that_do_not_fit_the_network_are_one_line_with_the_file(
    note, value, table, tmp_path, capsys
):
    train(table, tmp_path, "--epochs", "1")
    model = str(tmp_path / "table.safetensors")
    net, tensors, about = mc.MLP.load_with(model)
    net.save(model, tensors=tensors, about={**about, note: value} if note else value)
    for call in (
        ["predict", model, str(table), "--out", str(tmp_path / "p.csv")],
        ["check", model, str(table)],
    ):
        capsys.readouterr()
        assert main(call) == 2
        error = capsys.readouterr().err
        assert error.startswith("mlpcore: ")
        assert error.count("\n") == 1
        assert model in error
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("note", "value"),
    [
        ("columns", ["size"]),
        ("columns", {"size": "number", "kind": "category"}),
        ("labels", "words"),
        ("features", ["size"]),
        ("columns", {"size": {"kind": "number", "labels": "text", "origin": 0.0, "missing": True}}),
        ("columns", {"size": {"kind": "number", "labels": "", "origin": "0", "missing": True}}),
        ("format", "1"),
        ("columns", {"size": {"kind": "number"}}),
        ("columns", {}),
        ("columns", None),
        ("format", None),
        ("format", 0),
    ],
)
def test_notes_of_a_table_that_do_not_fit_are_one_line_with_the_file(
    note, value, shops, tmp_path, capsys
):
    train(shops, tmp_path, "--target", "price", "--epochs", "1")
    model = str(tmp_path / "shops.safetensors")
    net, tensors, about = mc.MLP.load_with(model)
    for notes, arrays in (
        ({**about, note: value}, tensors),
        (about, {**tensors, "target mean": np.zeros(2, np.float32)}),
    ):
        net.save(model, tensors=arrays, about=notes)
        capsys.readouterr()
        assert main(["predict", model, str(shops), "--out", str(tmp_path / "p.csv")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert model in error
        assert "train again" in error


def test_a_run_without_a_terminal_draws_no_bar_and_one_with_it_does(
    table, tmp_path, capsys, monkeypatch
):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert main(["train", str(table), "--out", str(tmp_path), "--epochs", "1"]) == 0
        assert ("epoch 1/1" in capsys.readouterr().err) == terminal


def test_a_folder_of_data_and_a_file_as_out_are_refused(table, tmp_path, capsys):
    assert main(["train", str(tmp_path), "--target", "late"]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["train", str(table), "--out", str(tmp_path / "price.safetensors")]) == 2
    assert "--out must be a folder" in capsys.readouterr().err
    assert not (tmp_path / "price.safetensors").exists()


def test_export_without_onnx_says_what_to_install(table, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", str(tmp_path / "t.safetensors"), str(tmp_path / "t.onnx")]) == 2
    assert 'pip install "mlpcore[cli,onnx]"' in capsys.readouterr().err


def test_a_run_that_diverges_says_so_and_saves_nothing(table, tmp_path, capsys):
    assert train(table, tmp_path, "--learning-rate", "1e30") == 2
    error = capsys.readouterr().err
    assert "learning rate" in error
    assert not (tmp_path / "table.safetensors").exists()


# -- tables


@pytest.fixture
def shops(tmp_path):
    """A CSV file with numbers, gaps, categories and an id; `price` depends on them, `dear` is
    whether it is high.
    """
    rng = np.random.default_rng(0)
    size, kind = rng.uniform(10, 100, 400), rng.choice(["flat", "house"], 400)
    price = 3 * size + 100 * (kind == "house")
    with open(tmp_path / "shops.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "size", "kind", "price", "dear"])
        for i in range(400):
            writer.writerow(
                [
                    f"n{i}",
                    "" if i % 40 == 7 else size[i],
                    kind[i],
                    price[i],
                    ["no", "yes"][int(price[i] > 200)],
                ]
            )
    return tmp_path / "shops.csv"


def test_a_table_of_classes_is_trained_on_and_predicted_as_in_training(shops, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(
            [
                "train",
                str(shops),
                "--target",
                "dear",
                "--as",
                "price=out",
                "--out",
                str(out),
                "--quiet",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "to predict: dear, 2 classes (no, yes)" in said
    assert "400 values in 400 rows" in said  # why the id is left out
    assert (
        float(next(line for line in said.splitlines() if line.startswith("mlpcore ")).split()[2])
        > 0.9
    )
    assert (out / "shops.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(shops.read_text().splitlines()))
    without = tmp_path / "new.csv"
    without.write_text("kind,size\n" + "".join(f"{row['kind']},{row['size']}\n" for row in rows))
    results = []
    for data in (shops, without):  # with and without the target, the columns in another order
        assert (
            main(
                [
                    "predict",
                    str(out / "shops.safetensors"),
                    str(data),
                    "--out",
                    str(tmp_path / "p.csv"),
                ]
            )
            == 0
        )
        results.append((tmp_path / "p.csv").read_text())
    assert results[0] == results[1]
    predicted = [row["prediction"] for row in csv.DictReader(results[0].splitlines())]
    assert np.mean([p == row["dear"] for p, row in zip(predicted, rows, strict=True)]) > 0.9
    said = capsys.readouterr().out
    assert said.count("compared with its column dear: AUC") == 1
    assert main(["check", str(out / "shops.safetensors"), str(shops)]) == 0
    assert "gradient right" in capsys.readouterr().out


def test_a_table_with_a_quantity_is_predicted_in_its_units_from_parquet_too(
    shops, tmp_path, capsys
):
    frame = pd.read_csv(shops).drop(columns="dear")
    frame.to_parquet(tmp_path / "shops.parquet")
    assert (
        main(
            [
                "train",
                str(tmp_path / "shops.parquet"),
                "--target",
                "price",
                "--out",
                str(tmp_path),
                "--quiet",
            ]
        )
        == 0
    )
    assert "price, a quantity (regression)" in capsys.readouterr().out
    assert (
        main(
            [
                "predict",
                str(tmp_path / "shops.safetensors"),
                str(shops),
                "--out",
                str(tmp_path / "p.csv"),
            ]
        )
        == 0
    )
    predicted = pd.read_csv(tmp_path / "p.csv")["prediction"]
    assert np.median(np.abs(predicted - frame["price"])) < 20
    said = capsys.readouterr().out
    assert float(said.split("R2 ")[1].split(",")[0]) > 0.9


def test_groups_of_a_table_stay_whole(tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = "".join(f"{rng.normal():.3f},p{i % 20},{rng.normal():.3f}\n" for i in range(200))
    (tmp_path / "t.csv").write_text("a,person,y\n" + lines)
    assert (
        main(
            [
                "train",
                str(tmp_path / "t.csv"),
                "--target",
                "y",
                "--groups",
                "person",
                "--out",
                str(tmp_path),
                "--quiet",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "140 training, 20 validation, 40 test rows of 14 + 2 + 4 groups of person" in said


def test_what_a_new_table_holds_and_the_training_did_not_is_said(shops, tmp_path, capsys):
    assert (
        main(
            [
                "train",
                str(shops),
                "--target",
                "price",
                "--epochs",
                "1",
                "--out",
                str(tmp_path),
                "--quiet",
            ]
        )
        == 0
    )
    model = str(tmp_path / "shops.safetensors")
    (tmp_path / "new.csv").write_text("kind,size,dear\nboat,10,no\nflat,20,yes\n")
    assert (
        main(["predict", model, str(tmp_path / "new.csv"), "--out", str(tmp_path / "p.csv")]) == 0
    )
    said = capsys.readouterr().out
    assert "note: kind: values not seen in training, such as 'boat', in 1 row(s)" in said
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 3
    (tmp_path / "p.csv").unlink()
    (tmp_path / "less.csv").write_text("kind,dear\nboat,no\n")
    for data, word in (("less.csv", "no column 'size'"), ("table.npz", "takes a table")):
        assert main(["predict", model, str(tmp_path / data), "--out", str(tmp_path / "p.csv")]) == 2
        assert word in capsys.readouterr().err
        assert not (tmp_path / "p.csv").exists()
    assert main(["check", model, str(tmp_path / "new.csv")]) == 2
    assert "no column 'price'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("a,y\n1,2\n", [], ["--target"]),
        ("a,y\n1,2\n", ["--target", "z"], ["--target", "'z'", "a, y"]),
        ("a,y\n1,2\n", ["--target", "y"], ["'2' in every row"]),
        ("a,y\n1,2\n2,3\n", ["--target", "y"], ["2 rows", "too few"]),
        ("a,y\n1,2\n3\n", ["--target", "y"], ["#3"]),
        ("a,y\n1,2\n", ["--target", "y", "--as", "a"], ["--as", "COLUMN=KIND"]),
        ("a,y\n1,2\n", ["--target", "y", "--as", "a=text"], ["--as a", "category"]),
        (
            "a,y\n1,2\n",
            ["--target", "y", "--as", "a=out", "--as", "a=number"],
            ["--as", "'a' twice"],
        ),
        ("a,y\n1,2\n", ["--target", "y", "--as", "y=out"], ["--as y=out", "--target"]),
        (
            "a,y\n1,2\n",
            ["--target", "y", "--groups", "a", "--as", "a=out"],
            ["--as a=out", "--groups"],
        ),
    ],
)
def test_a_table_that_cannot_be_trained_on_leaves_one_line_and_nothing_else(
    text, more, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(text)
    assert main(["train", "t.csv", "--out", "out", *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_options_for_tables_are_refused_elsewhere(table, capsys):
    for option, value in (("--target", "Y"), ("--groups", "X"), ("--as", "X=out")):
        assert main(["train", str(table), option, value]) == 2
        assert f"{option} is for tables" in capsys.readouterr().err
    assert main(["train", "digits", "--task", "regression"]) == 2
    assert "--task is for tables and .npz files" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_is_streamed_on_demand_or_where_memory_is_short(
    shops, tmp_path, capsys, monkeypatch
):
    path, out = tmp_path / "shops.parquet", tmp_path / "out"
    pd.concat([pd.read_csv(shops)] * 10).to_parquet(path, row_group_size=200)
    call = [
        "train",
        str(path),
        "--target",
        "dear",
        "--as",
        "price=out",
        "--as",
        "id=out",
        "--quiet",
        "--epochs",
        "4",
    ]
    assert main([*call, "--out", str(out), "--stream", "--every", "1 epoch"]) == 0
    said = capsys.readouterr().out
    assert "4,000 rows, read in pieces" in said
    line = next(line for line in said.splitlines() if line.startswith("seed 0:"))
    training, validation, test = (
        int(number.replace(",", "")) for number in re.findall(r"([0-9,]+) [tv]", line)
    )
    assert training + validation + test == 4000
    assert 700 < test < 900
    assert (
        float(next(line for line in said.splitlines() if line.startswith("mlpcore ")).split()[2])
        > 0.9
    )
    first = mc.MLP.load(out / "shops.safetensors").parameters
    assert (
        main(
            [
                "predict",
                str(out / "shops.safetensors"),
                str(shops),
                "--out",
                str(tmp_path / "p.csv"),
            ]
        )
        == 0
    )
    assert "accuracy" in capsys.readouterr().out
    assert main([*call, "--out", str(out), "--stream", "--resume"]) == 0
    assert "is already complete" in capsys.readouterr().out
    assert np.array_equal(mc.MLP.load(out / "shops.safetensors").parameters, first)
    monkeypatch.setattr(devices.HOST, "free_bytes", lambda: 1 << 20)
    assert main([*call, "--out", str(tmp_path / "by itself")]) == 0
    assert "read in pieces" in capsys.readouterr().out
    for more, word in ((["--groups", "kind"], "has 2 value(s)"), (["--splits", "0"], "--splits")):
        assert main([*call, *more, "--stream", "--out", str(tmp_path / "other")]) == 2
        assert word in capsys.readouterr().err
    assert main(["train", str(shops), "--target", "dear", "--stream"]) == 2
    assert "only Parquet" in capsys.readouterr().err


def onnx_output(path, X):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"X": X.astype(np.float32)}
    )[0]


def test_an_exported_model_of_an_archive_takes_its_columns_as_they_are(table, tmp_path, capsys):
    assert train(table, tmp_path, "--epochs", "2") == 0
    assert main(["export", str(tmp_path / "table.safetensors"), str(tmp_path / "table.onnx")]) == 0
    assert "the file standardises them" in capsys.readouterr().out
    assert predict(table, tmp_path) == 0
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    p = np.array([[float(row["p(other)"]), float(row["p(same)"])] for row in rows])
    np.testing.assert_allclose(
        onnx_output(tmp_path / "table.onnx", np.load(table)["X"]), p, atol=1e-5
    )


def test_an_exported_model_of_a_table_says_which_columns_it_takes_in_which_order(
    shops, tmp_path, capsys
):
    assert (
        main(
            [
                "train",
                str(shops),
                "--target",
                "price",
                "--epochs",
                "2",
                "--out",
                str(tmp_path),
                "--quiet",
            ]
        )
        == 0
    )
    model = str(tmp_path / "shops.safetensors")
    capsys.readouterr()
    assert main(["export", model, str(tmp_path / "shops.onnx")]) == 0
    said = capsys.readouterr().out
    names = [line.split(None, 1)[1] for line in said.splitlines() if line.startswith("  ")]
    assert names[:2] == ["size", "missingindicator_size"]
    assert names[2:4] == ["kind_flat", "kind_house"]
    assert "network alone" in said
    rows = list(csv.DictReader(shops.read_text().splitlines()))
    assert main(["predict", model, str(shops), "--out", str(tmp_path / "p.csv")]) == 0
    predicted = [float(line) for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    _, tensors, about = mc.MLP.load_with(model)
    transformer = Transformer.restore(tensors, about, len(names))
    X = transformer.apply(transformer.read(shops)[0])
    assert X.shape == (len(rows), len(names))
    np.testing.assert_allclose(onnx_output(tmp_path / "shops.onnx", X)[:, 0], predicted, rtol=1e-4)


# -- what the figures are of


def predicted(model, data, tmp_path, capsys):
    """Return the output of `predict` after the line of the file, and the predictions."""
    capsys.readouterr()
    assert main(["predict", str(model), str(data), "--out", str(tmp_path / "p.csv")]) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    return said[said.index("compared with") :] if "compared with" in said else "", rows


def test_rows_whose_label_the_model_does_not_know_count_as_wrong_and_are_said(
    shops, tmp_path, capsys
):
    assert (
        main(
            [
                "train",
                str(shops),
                "--target",
                "dear",
                "--as",
                "price=out",
                "--out",
                str(tmp_path),
                "--quiet",
            ]
        )
        == 0
    )
    model, new = tmp_path / "shops.safetensors", tmp_path / "new.csv"
    new.write_text(
        "kind,size,dear\nhouse,99,yes\nhouse,99,oui\nhouse,99,si\nhouse,99,da\nhouse,99,ja\n"
    )
    said, rows = predicted(model, new, tmp_path, capsys)
    assert [row["prediction"] for row in rows] == ["yes"] * 5
    assert said.startswith(
        "compared with its column dear: accuracy 0.2000 on 5 rows; 4 have a label that the model "
        "does not know, such as 'oui': "
        "counted as wrong\n  of the 1 row with a label that it knows: accuracy 1.0000, log loss 0."
    )
    new.write_text("kind,size,dear\nhouse,99,yes\nhouse,99,no\nhouse,99,\nhouse,99,si\n")
    said, _ = predicted(model, new, tmp_path, capsys)
    assert (
        "accuracy 0.3333 on 3 of 4 rows; 1 has a label that the model does not know, such as 'si': "
        "counted as wrong" in said
    )
    assert "counted as wrong; left out: 1 row has no value\n" in said
    assert "of the 2 rows with a label that it knows: AUC 0.5000, accuracy 0.5000" in said
    new.write_text("kind,size,dear\nhouse,99,\n")
    said, _ = predicted(model, new, tmp_path, capsys)
    assert said == (
        "compared with its column dear: no figures, since no row has a label; left out: 1 row "
        "has no value\n"
    )


@pytest.mark.slow
def test_rows_without_a_number_in_a_quantity_are_left_out_and_said(shops, tmp_path, capsys):
    call = ["--target", "price", "--as", "dear=out", "--out", str(tmp_path), "--quiet"]
    assert main(["train", str(shops), *call]) == 0
    model, new = tmp_path / "shops.safetensors", tmp_path / "new.csv"
    new.write_text(
        "kind,size,price\nhouse,50,250\nflat,50,150\nflat,50,n/k\nflat,50,\nflat,50,inf\n"
    )
    said, rows = predicted(model, new, tmp_path, capsys)
    errors = [float(rows[i]["prediction"]) - y for i, y in enumerate((250, 150))]
    rmse, r2 = np.sqrt(np.mean(np.square(errors))), 1 - np.sum(np.square(errors)) / 5000
    assert (
        f"R2 {r2:.4f}, RMSE {rmse:.4f} on 2 of 5 rows; left out: 1 row has no value and 2 rows "
        "have no finite number" in said
    )
    assert "such as 'n/k'\n" in said
    assert main(["check", str(model), str(new)]) == 0
    assert "2 of 5 rows have a target" in capsys.readouterr().out
    frame = pd.read_csv(shops)
    frame.loc[:19, "price"], frame.loc[20:39, "price"] = np.nan, np.inf
    frame.to_csv(shops, index=False)
    assert main(["train", str(shops), *call, "--epochs", "1", "--force"]) == 0
    said = capsys.readouterr().out
    assert "360 rows; 40 more have no price (infinite in 20 of them); these are not used" in said


@pytest.mark.slow
def test_an_archive_with_some_of_the_classes_is_judged_by_those_of_the_model(
    table, tmp_path, capsys
):
    assert train(table, tmp_path, "--epochs", "60") == 0
    model = tmp_path / "table.safetensors"
    with np.load(table) as old:
        X, Y = old["X"], old["Y"]
    for labels, wrong in ((("same",), 0), (("same", "other"), 0), (("same", "third"), 1)):
        known = Y == "same"
        np.savez(
            tmp_path / "some.npz",
            X=X[known],
            Y=np.array(labels)[np.arange(known.sum()) % len(labels)],
        )
        said, rows = predicted(model, tmp_path / "some.npz", tmp_path, capsys)
        right = [row["prediction"] == labels[i % len(labels)] for i, row in enumerate(rows)]
        assert f"accuracy {np.mean(right):.4f}" in said
        assert ("counted as wrong" in said) == bool(wrong)
    np.savez(tmp_path / "none.npz", X=X)
    assert predicted(model, tmp_path / "none.npz", tmp_path, capsys)[0] == ""
    np.savez(tmp_path / "third.npz", X=X, Y=["third"] * len(X))
    assert main(["check", str(model), str(tmp_path / "third.npz")]) == 2
    assert "no row has a target that the model knows" in capsys.readouterr().err


# -- targets as they were


@pytest.mark.slow
@pytest.mark.parametrize("origin", [1.7e9, 10**15, 2**60])
@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_a_quantity_far_from_0_is_learnt_and_judged_as_the_same_one_around_0(
    origin, suffix, tmp_path, capsys
):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 3))
    e = np.rint(1000 * (X @ [1.0, 2.0, -1.0] + 0.1 * rng.normal(size=400))).astype(np.int64)
    figures = []
    for name, shift in (("near", 0), ("far", origin)):
        x = np.rint(1000 * X).astype(np.int64) + int(shift)
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "npz":
            np.savez(path, X=x, Y=e + int(shift))
        else:
            frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": e + int(shift)})
            frame.to_parquet(path) if suffix == "parquet" else frame.to_csv(path, index=False)
        more = ["--task", "regression", *([] if suffix == "npz" else ["--target", "y"])]
        assert (
            train(
                path, tmp_path, "--epochs", "20", "--batch", "32", "--learning-rate", "0.01", *more
            )
            == 0
        )
        lines = [
            line.split()
            for line in capsys.readouterr().out.splitlines()
            if line.startswith(("mlpcore ", "mean only"))
        ]
        said, rows = predicted(tmp_path / f"{name}.safetensors", path, tmp_path, capsys)
        again = [
            float(word.strip(",")) for word in said.split(": ")[1].split() if word[0].isdigit()
        ]
        figures.append(
            [float(lines[0][1]), float(lines[0][2]), float(lines[1][2]), float(lines[1][3]), *again]
        )
        errors = [
            int(float(row["prediction"])) - int(shift) - int(y)
            for row, y in zip(rows, e, strict=True)
        ]
        assert abs(np.sqrt(np.mean(np.square(errors))) - again[1]) <= 1 + 2**-53 * int(shift)
    np.testing.assert_allclose(figures[1], figures[0], rtol=2e-3)
    assert figures[1][0] > 0.9


@pytest.mark.slow
def test_a_tiny_and_a_huge_quantity_have_figures_of_their_size(tmp_path, capsys):
    X = np.random.default_rng(0).normal(size=(300, 2))
    for unit in (1e-300, 1e-9, 1e300):
        np.savez(tmp_path / "t.npz", X=X * unit, Y=X.sum(axis=1) * unit)
        assert (
            train(
                tmp_path / "t.npz",
                tmp_path,
                "--hidden",
                "none",
                "--learning-rate",
                "0.05",
                "--force",
            )
            == 0
        )
        line = next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith("mlpcore ")
        )
        assert float(line.split()[1]) > 0.95
        assert 0 < float(line.split()[2]) < 0.3 * unit


@pytest.mark.slow
def test_the_task_of_an_archive_is_said_and_can_be_chosen(tmp_path, capsys):
    X = np.random.default_rng(0).normal(size=(300, 2))
    np.savez(tmp_path / "t.npz", X=X, Y=np.rint(3 * X[:, 0]).astype(int))
    for task, word in (
        (None, "treated as classes"),
        ("regression", "a quantity (regression)"),
        ("classification", "classes ("),
    ):
        assert (
            train(
                tmp_path / "t.npz",
                tmp_path,
                "--epochs",
                "1",
                "--force",
                *(["--task", task] if task else []),
            )
            == 0
        )
        said = capsys.readouterr().out
        assert word in said
        assert ("--task" in said) == (task is None)
    np.savez(tmp_path / "t.npz", X=X, Y=np.rint(300 * X[:, 0]).astype(int))
    assert train(tmp_path / "t.npz", tmp_path, "--epochs", "1", "--force") == 0
    assert "treated as a quantity (for classes: --task classification)" in capsys.readouterr().out


def test_an_export_says_which_columns_float32_is_too_coarse_for(tmp_path, capsys):
    pytest.importorskip("onnx")
    X = np.random.default_rng(0).normal([0, 1.7e9], 1, (100, 2))
    np.savez(tmp_path / "t.npz", X=X, Y=X[:, 0] + 1e12)
    assert train(tmp_path / "t.npz", tmp_path, "--epochs", "1") == 0
    assert main(["export", str(tmp_path / "t.safetensors"), str(tmp_path / "t.onnx")]) == 0
    said = capsys.readouterr().out
    assert "note: X is float32, too coarse for x1, with means far larger" in said
    assert "note: Z is float32, too coarse for the target" in said


# -- runs that go on


def command(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "mlpcore", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(number, status, table, tmp_path, capsys):
    call = ["train", table, "--quiet", "--batch", 8, "--patience", 100, "--epochs", 40]
    out, kept = tmp_path / "out", tmp_path / "out" / "table.checkpoint.safetensors"
    run = command(
        *call, "--out", out, "--every", "7 steps", "--epochs", 100_000, "--patience", 100_000
    )
    while not kept.exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == status
    assert "repeat the command with --resume" in errors
    assert "Traceback" not in errors
    assert not (out / "table.safetensors").exists()

    stopped, entire = tmp_path / "stopped", tmp_path / "entire"
    assert main([*map(str, call), "--out", str(entire)]) == 0
    real, steps = Learner.update, []

    def stop(learner, *rest):
        steps.append(1)
        if len(steps) == 501:
            signal.raise_signal(number)
        return real(learner, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", stop)
        patch.setattr(CpuStep, "together", lambda *_: 1)
        with contextlib.suppress(SystemExit):
            assert main([*map(str, call), "--out", str(stopped), "--resume"]) == 130
    assert len(steps) == 501
    assert main([*map(str, call), "--out", str(stopped), "--resume"]) == 0
    assert "resuming in epoch" in capsys.readouterr().out
    models = [(folder / "table.safetensors").read_bytes() for folder in (entire, stopped)]
    assert models[0] == models[1]
    assert main([*map(str, call), "--out", str(stopped), "--resume"]) == 0
    assert "is already complete" in capsys.readouterr().out
    assert (stopped / "table.safetensors").read_bytes() == models[0]


@pytest.mark.slow
def test_another_call_does_not_go_on_with_a_run(table, shops, tmp_path, capsys):
    call = ["--out", str(tmp_path), "--quiet", "--epochs", "2"]
    assert main(["train", str(table), *call, "--every", "1 epoch"]) == 0
    for option, value, word in (
        ("--epochs", "3", "--epochs was 2"),
        ("--hidden", "8", "--hidden"),
        ("--seed", "1", "--seed"),
    ):
        assert main(["train", str(table), *call, "--resume", option, value]) == 2
        assert word in capsys.readouterr().err
    with np.load(table) as old:
        X, Y = old["X"], old["Y"]
    X[0, 0] += 1
    np.savez(table, X=X, Y=Y)
    assert main(["train", str(table), *call, "--resume"]) == 2
    assert "the data differ" in capsys.readouterr().err
    assert main(["train", str(table), *call, "--every", "1 epoch", "--force"]) == 0  # begins anew
    assert "already complete" not in capsys.readouterr().out
    assert main(["train", str(table), *call, "--resume"]) == 0
    assert "already complete" in capsys.readouterr().out
    mc.Trainer(mc.MLP([5, 2], output="softmax")).save(tmp_path / "own.safetensors")
    assert (
        main(
            [
                "train",
                str(table),
                *call,
                "--resume",
                "--checkpoint",
                str(tmp_path / "own.safetensors"),
            ]
        )
        == 2
    )
    assert "call that started it is not recorded" in capsys.readouterr().err
    assert main(["train", str(table), *call, "--resume", "--splits", "2"]) == 2
    assert "--splits" in capsys.readouterr().err
    assert main(["train", str(table), *call, "--every", "now and then"]) == 2
    assert "every" in capsys.readouterr().err


def test_no_output_replaces_a_file_that_is_something_else(table, tmp_path, capsys):
    """Neither the data, nor the model, nor a file of the user's own."""
    before, own = table.read_bytes(), tmp_path / "config.json"
    own.write_text("mine")
    assert train(table, tmp_path, "--epochs", "1") == 0
    model = (tmp_path / "table.safetensors").read_bytes()
    for path, said in (
        (table, "is where the data are"),
        (tmp_path / "table.safetensors", "is where the model goes"),
        (tmp_path / "table.png", "is where the picture goes"),
        (own, "not a checkpoint of mlpcore train; name another file"),
        (tmp_path / "gone" / "x", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        assert train(table, tmp_path, "--epochs", "1", "--checkpoint", str(path)) == 2
        assert said in capsys.readouterr().err
    for path, said in (
        (table, "is where the data are"),
        (tmp_path / "table.safetensors", "is where the model is"),
    ):
        assert (
            main(["predict", str(tmp_path / "table.safetensors"), str(table), "--out", str(path)])
            == 2
        )
        assert said in capsys.readouterr().err
    assert (
        train(
            table, tmp_path, "--epochs", "1", "--checkpoint", str(tmp_path / "config.safetensors")
        )
        == 0
    )
    assert (table.read_bytes(), own.read_text()) == (before, "mine")
    assert (tmp_path / "table.safetensors").read_bytes() == model
    capsys.readouterr()


def test_a_limit_in_bytes_is_one_and_a_negative_seed_is_named(table, tmp_path, capsys):
    assert train(table, tmp_path, "--epochs", "1", "--memory-limit", "100000000") == 0
    assert train(table, tmp_path, "--epochs", "1", "--memory-limit", "7", "--force") == 2
    assert "memory_limit 7 bytes is less than" in capsys.readouterr().err
    assert train(table, tmp_path, "--seed", "-1") == 2
    assert "--seed must be at least 0" in capsys.readouterr().err


def test_medians_are_over_the_splits_that_have_the_figure(capsys):
    from types import SimpleNamespace

    from mlpcore.cli.train import _print_medians

    runs = [{"AUC": 0.5, "accuracy": 0.25}, {"accuracy": 0.75}, {"AUC": 1.0, "accuracy": 0.5}]
    _print_medians([SimpleNamespace(results={"mlpcore": figures}) for figures in runs])
    title, line = capsys.readouterr().out.strip().splitlines()
    assert title.split() == ["medians,", "3", "splits", "AUC", "accuracy"]
    assert line.split() == ["mlpcore", "0.7500", "0.5000"]
