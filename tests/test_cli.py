"""The command line, as a user calls it."""

import csv

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.cli import main


@pytest.fixture
def table(tmp_path):
    """An .npz file with two classes, told apart by the sign of a product."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((600, 5))
    np.savez(tmp_path / "table.npz", X=X, Y=np.where(X[:, 0] * X[:, 1] > 0, "same", "other"))
    return tmp_path / "table.npz"


def train(table, tmp_path, *more):
    return main(["train", str(table), "--out", str(tmp_path), "--quiet", *more])


def test_digits_reach_97_percent_on_held_out_rows_and_leave_a_model_and_a_picture(tmp_path, capsys):
    assert main(["train", "digits", "--out", str(tmp_path), "--quiet"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mlpcore "))
    assert float(line.split()[1]) >= 0.97
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert mc.MLP.load(tmp_path / "digits.safetensors").sizes[0] == 64


def test_predictions_of_a_saved_model_are_those_of_its_classes(table, tmp_path, capsys):
    assert train(table, tmp_path, "--epochs", "60") == 0
    assert main(["predict", str(tmp_path / "table.safetensors"), str(table), "--out", str(tmp_path / "p.csv")]) == 0
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    truth = np.load(table)["Y"]
    assert len(rows) == 600
    assert np.mean([row["prediction"] == label for row, label in zip(rows, truth, strict=True)]) > 0.9
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
            ["predict", str(tmp_path / "heights.safetensors"), str(tmp_path / "heights.npz"), "--out", str(tmp_path / "p.csv")]
        )
        == 0
    )
    with open(tmp_path / "p.csv", newline="") as file:
        predicted = np.array([float(row["prediction"]) for row in csv.DictReader(file)])
    assert np.abs(predicted - (170 + 10 * X[:, 0])).mean() < 2


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
        (["predict", "absent.safetensors", "digits"], ["absent.safetensors"]),
        (["plan", "784"], ["sizes", "784"]),
        (["plan", "10,5", "--memory-limit", "1 KB"], ["memory_limit", "parameters"]),
        (["plan", "10,5,1", "--output", "tanh", "--loss", "poisson"], ["poisson", "tanh"]),
    ],
)
def test_a_wrong_call_is_answered_with_one_line_that_names_it(arguments, words, tmp_path, capsys, monkeypatch):
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


def test_a_run_that_diverges_says_so_and_saves_nothing(table, tmp_path, capsys):
    assert train(table, tmp_path, "--learning-rate", "1e30") == 2
    error = capsys.readouterr().err
    assert "learning rate" in error
    assert not (tmp_path / "table.safetensors").exists()
