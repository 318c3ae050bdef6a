"""Whose file is it: what the commands write over, and what they refuse before any work."""

import contextlib
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import save_file

import mlpcore as mc
from mlpcore.cli import main
from mlpcore.cli.outputs import cell
from mlpcore.cli.report import figure
from mlpcore.engine.cpu_step import CpuStep
from mlpcore.io import model_file
from mlpcore.training.learner import Learner


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with t.npz and other.npz in it: two classes each."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("t", "other")):
        rng = np.random.default_rng(seed)
        X = rng.standard_normal((60, 3))
        np.savez(f"{name}.npz", X=X, Y=np.where(X[:, 0] > 0, "up", "down"))
    return tmp_path


def train(*more, data="t.npz"):
    return main(["train", data, "--quiet", "--epochs", "2", "--hidden", "4", "--batch", "8", *more])


def refused(capsys, status, *words):
    """Assert that the call was refused in one line that has all these words."""
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


def put(path, kind):
    """Put a file of some kind there; return its bytes."""
    net = mc.MLP([3, 2], output="softmax")
    if kind == "text":
        path.write_text("a,b\n1,2\n")
    elif kind == "another library's":
        save_file({"w": np.zeros(3)}, path)
    elif kind == "a library's model":
        net.save(path)
    elif kind == "a checkpoint":
        mc.Trainer(net).save(path)
    elif kind == "a picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    return path.read_bytes()


# -- train


@pytest.mark.slow
def test_the_same_call_gives_the_same_model_again_and_another_call_leaves_it(folder, capsys):
    assert train() == 0
    model = (folder / "t.safetensors").read_bytes()
    assert train() == 0
    assert (folder / "t.safetensors").read_bytes() == model
    capsys.readouterr()
    refused(
        capsys,
        train("--seed", "1"),
        "t.safetensors",
        "another call",
        "name another folder with --out",
        "--seed was 0 and is 1",
        "--force",
    )
    os.replace("other.npz", "t.npz")
    refused(capsys, train(), "another call", "the data differ")
    assert (folder / "t.safetensors").read_bytes() == model
    assert train("--force") == 0
    assert (folder / "t.safetensors").read_bytes() != model
    assert train() == 0
    assert train("--splits", "2") == 0  # whose model is that of the first


def test_a_forgotten_target_is_said_to_be_so_whatever_model_is_there(folder, capsys):
    (folder / "t.csv").write_text("a,b\n1,2\n")
    put(folder / "t.safetensors", "a library's model")
    refused(capsys, train(data="t.csv"), "t.csv: name the column to predict with --target")


@pytest.mark.slow
@pytest.mark.parametrize(("patience", "early"), [("1", True), ("2", False)])
def test_a_run_that_stops_before_its_last_epoch_is_said_to(folder, capsys, patience, early):
    rng = np.random.default_rng(0)
    np.savez("noise.npz", X=rng.standard_normal((60, 3)), Y=rng.integers(0, 2, 60).astype(str))
    rate = ("--learning-rate", "3", "--epochs", "3", "--patience", patience)
    assert train(*rate, data="noise.npz") == 0
    assert (", stopped early;" in capsys.readouterr().out) == early


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        ("t.safetensors", "text", "text"),
        ("t.safetensors", "another library's", "another library"),
        ("t.safetensors", "a library's model", "not made by this version"),
        ("t.safetensors", "a checkpoint", "checkpoint"),
        ("t.png", "a picture", "a picture (PNG)"),
        ("t.png", "text", "text"),
        ("t.checkpoint.safetensors", "a library's model", "not a checkpoint"),
        ("t.checkpoint.safetensors", "text", "text"),
    ],
)
def test_a_file_of_another_kind_is_refused_before_the_data_are_read(
    name, kind, word, folder, capsys
):
    before = put(folder / name, kind)
    data = (folder / "t.npz").read_bytes()
    (folder / "t.npz").write_bytes(b"no archive")
    refused(capsys, train("--every", "1 epoch"), name, word, "--force")
    (folder / "t.npz").write_bytes(data)
    assert (folder / name).read_bytes() == before
    assert train("--every", "1 epoch", "--force") == 0
    assert (folder / name).read_bytes() != before


def test_no_output_is_the_input_by_whatever_link_even_by_force(folder, capsys):
    assert train() == 0
    os.link("t.npz", "hard.safetensors")
    os.symlink("t.npz", "soft")
    before = (folder / "t.npz").read_bytes(), (folder / "t.safetensors").read_bytes()
    os.mkdir("out")
    os.symlink("../t.npz", "out/t.safetensors")
    calls = [
        ["train", "t.npz", "--out", "out"],
        ["train", "t.npz", "--checkpoint", "hard.safetensors"],
        ["predict", "t.safetensors", "t.npz", "--out", "soft"],
        ["predict", "t.safetensors", "soft", "--out", "t.npz"],
        ["predict", "t.safetensors", "t.npz", "--out", "./t.safetensors"],
        ["export", "t.safetensors", "t.safetensors"],
    ]
    os.link("t.safetensors", "hard.onnx")
    for call in (*calls, ["export", "t.safetensors", "hard.onnx"]):
        capsys.readouterr()
        refused(capsys, main([*call, "--force"]), "is where the ", "name another file")
    assert (folder / "t.npz").read_bytes(), (folder / "t.safetensors").read_bytes() == before


@contextlib.contextmanager
def meanwhile(action):
    """Do something in the middle of the training."""
    real = mc.Trainer.fit

    def fit(*rest, **settings):
        action()
        return real(*rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mc.Trainer, "fit", fit)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", ["text", "a library's model"])
@pytest.mark.parametrize("force", [False, True])
def test_what_appears_during_the_training_is_kept_and_so_is_the_model(
    before, kind, force, folder, capsys
):
    more = ["--force"] if force else []
    if before:
        assert train() == 0

    def appear():
        for name in ("t.safetensors", "t.png"):
            put(folder / "new", kind)
            os.replace("new", name)
        left.append((folder / "t.safetensors").read_bytes())

    left = []

    capsys.readouterr()
    with meanwhile(appear):
        status = train(*more)
    output, error = capsys.readouterr()
    assert status == 2
    assert "t.safetensors" in error
    assert "the model is in t.1.safetensors" in error
    assert "mlpcore predict t.1.safetensors" in output
    assert (folder / "t.safetensors").read_bytes() == left[0]
    assert main(["predict", "t.1.safetensors", "t.npz"]) == 0
    if not force:
        assert "note: no picture of the learning curve: t.png is not overwritten" in output
        with meanwhile(appear):
            assert train("--force") == 2
        assert (folder / "t.2.safetensors").exists()


def test_two_trainings_into_one_model_are_refused_at_the_start(folder, capsys):
    assert train() == 0
    with meanwhile(
        lambda: refused(capsys, train(), "t.safetensors", "another training is writing it")
    ):
        capsys.readouterr()
        assert train() == 0


def test_the_model_is_saved_though_the_last_checkpoint_is_not(folder, capsys):
    most = 30_000  # bytes: the checkpoint has more, the model has not
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        status = train("--hidden", "64,64", "--every", "9 epochs")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output, error = capsys.readouterr()
    assert status == 2
    assert "t.checkpoint.safetensors' cannot be written: File too large" in error
    assert output.index("saved t.safetensors") < output.index("to use it:")
    model = (folder / "t.safetensors").read_bytes()
    assert len(model) < most
    assert train("--hidden", "64,64") == 0
    net = mc.MLP.load("t.safetensors")
    (folder / "t.safetensors").write_bytes(model)
    assert np.array_equal(mc.MLP.load("t.safetensors").parameters, net.parameters)


@contextlib.contextmanager
def stopped_at(step):
    """Interrupt the training after so many steps."""
    real, steps = Learner.update, []

    def update(learner, *rest):
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)
        return real(learner, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", update)
        patch.setattr(CpuStep, "together", lambda *_: 1)
        yield


@pytest.mark.slow
def test_an_unfinished_run_is_not_begun_anew_by_mistake(folder, capsys):
    call = ["--every", "1 epoch", "--epochs", "3"]
    kept = folder / "t.checkpoint.safetensors"
    with stopped_at(8):
        assert train(*call) == 130
    assert capsys.readouterr().err == (
        "mlpcore: interrupted; stopped in epoch 2 of 3, after 2 of its batches, saved in "
        "t.checkpoint.safetensors; "
        "to continue, repeat the command with --resume\n"
    )
    before = kept.read_bytes()
    for more in ((), ("--seed", "1")):
        refused(
            capsys,
            train(*call, *more),
            "an unfinished run (in epoch 2 of 3",
            "--resume continues",
            "--force starts over",
        )
    refused(capsys, train(*call, "--seed", "1", "--resume", "--force"), "--seed was 0 and is 1")
    assert kept.read_bytes() == before
    real = mc.Trainer.save

    def killed(*rest, **settings):
        raise KeyboardInterrupt

    mc.Trainer.save = killed
    try:
        assert train(*call, "--seed", "1", "--force") == 130  # before its first save
    finally:
        mc.Trainer.save = real
    assert "nothing was saved" in capsys.readouterr().err
    assert kept.read_bytes() == before
    assert os.listdir() == sorted(["t.npz", "other.npz", kept.name], key=os.listdir().index)
    assert train(*call, "--resume") == 0
    assert "resuming in epoch 2 of 3" in capsys.readouterr().out
    resumed = (folder / "t.safetensors").read_bytes()
    assert train(*call, "--resume") == 0
    assert "is already complete" in capsys.readouterr().out
    assert train(*call) == 0  # the same call may begin anew
    assert (folder / "t.safetensors").read_bytes() == resumed
    capsys.readouterr()
    refused(
        capsys,
        train(*call, "--seed", "1", "--out", "new", "--checkpoint", kept.name),
        "checkpoint of another call",
    )
    assert train(*call, "--seed", "1", "--out", "new", "--checkpoint", kept.name, "--force") == 0


def forged(path, header, **changes):
    """Write a model file again with another header, its digest made to fit."""
    tensors = model_file.read(path)[1]
    model_file.write("forged.safetensors", {**header, **changes}, tensors)
    os.replace("forged.safetensors", path)


@pytest.mark.parametrize("resume", [False, True])
def test_a_checkpoint_that_tells_of_no_run_of_ours_is_damaged(resume, folder, capsys):
    with stopped_at(8):
        assert train("--every", "1 epoch", "--epochs", "3") == 130
    header = model_file.read("t.checkpoint.safetensors")[0]
    runs = ({}, [], 1, "x", {"epochs": 3}, {"epochs": "a", "epoch": None, "batch": {}})
    trainers = (None, [], "x", *({**header["trainer"], "run": run} for run in runs))
    for trainer in trainers:
        forged("t.checkpoint.safetensors", header, trainer=trainer)
        capsys.readouterr()
        more = ["--resume"] if resume else []
        status = train("--every", "1 epoch", "--epochs", "3", *more)
        refused(
            capsys,
            status,
            "--checkpoint t.checkpoint.safetensors",
            "a damaged checkpoint of mlpcore",
        )


@pytest.mark.slow
def test_a_file_that_is_only_to_be_read_is_refused_without_force(folder, capsys):
    assert train() == 0
    assert main(["predict", "t.safetensors", "t.npz"]) == 0
    saved = partial(train, "--every", "1 epoch")
    assert saved() == 0
    calls = {
        "t.safetensors": train,
        "t.png": train,
        "t.checkpoint.safetensors": saved,
        "predictions.csv": predict,
    }
    for name, call in calls.items():
        (folder / name).chmod(0o444)
        capsys.readouterr()
        refused(capsys, call(), name, "read-only", "--force")
        assert call("--force") == 0
        (folder / name).chmod(0o644)


def test_a_call_that_was_killed_is_refused_or_resumed_by_what_the_checkpoint_itself_says(
    folder, capsys
):
    with stopped_at(8):
        assert train("--every", "1 epoch") == 130
    capsys.readouterr()
    # no note that could disagree
    assert sorted(os.listdir()) == ["other.npz", "t.checkpoint.safetensors", "t.npz"]
    about = mc.MLP.load_with("t.checkpoint.safetensors")[2]
    assert about["call"]["--epochs"] == 2
    trainer = mc.Trainer.load("t.checkpoint.safetensors")
    assert trainer.about == about
    trainer.about = {**about, "call": {**about["call"], "--seed": 7}}
    trainer.save("t.checkpoint.safetensors")
    refused(capsys, train("--every", "1 epoch", "--resume"), "--seed was 7 and is 0")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda place: place.write_text("mine"), "is a file"),
        (lambda place: place.symlink_to("nowhere"), "broken link"),
        (lambda place: place.mkdir(mode=0o555), "not writable"),
    ],
)
def test_an_out_that_is_no_folder_to_write_in_is_refused_before_the_data_are_read(
    make, word, folder, capsys
):
    make(folder / "out")
    (folder / "mine").mkdir()
    (folder / "mine").chmod(0o777)
    user = os.geteuid()
    if user == 0:  # whom no permission binds
        folder.chmod(0o755)
        os.seteuid(65534)
    try:
        refused(capsys, train("--out", "out", data="absent.npz"), "--out out", word)
        refused(capsys, train("--out", "out/deeper", data="absent.npz"), "--out out/deeper", word)
        if word == "not writable":
            call = ["--out", "mine", "--checkpoint", "out/c"]
            refused(capsys, train(*call, data="absent.npz"), "--checkpoint out/c", word)
    finally:
        os.seteuid(user)


# -- predict


def predict(*more):
    return main(["predict", "t.safetensors", "t.npz", *more])


def test_predictions_replace_predictions_and_nothing_else(folder, capsys):
    assert train() == 0
    place = folder / "predictions.csv"
    assert predict() == 0
    first = place.read_text()
    assert predict() == 0
    place.write_text("prediction,p(down),p(up)\nanything\n")
    assert predict() == 0
    place.write_text("")
    assert predict() == 0
    assert place.read_text() == first
    capsys.readouterr()
    for text in ("prediction,p(down),p(up),mine\n", "prediction,p(down)\n", "name,price\na,1\n"):
        place.write_text(text)
        refused(capsys, predict(), "predictions.csv", "text", "--force")
        assert place.read_text() == text
    model = (folder / "t.safetensors").read_bytes()
    assert train(data="other.npz") == 0
    capsys.readouterr()
    refused(capsys, predict("--out", "other.safetensors"), "a model of mlpcore")
    assert predict("--force") == 0
    assert place.read_text() == first
    assert (folder / "t.safetensors").read_bytes() == model


@pytest.mark.slow
def test_a_dash_is_standard_output_and_leaves_it_to_the_predictions(folder, capfdbinary):
    assert train() == 0
    assert predict() == 0
    whole = (folder / "predictions.csv").read_bytes()
    for path in ("-", "/dev/fd/1"):
        capfdbinary.readouterr()
        call = [sys.executable, "-m", "mlpcore", "predict", "t.safetensors", "t.npz", "--out", path]
        done = subprocess.run(call, capture_output=True) if path != "-" else None
        status = 0 if done else predict("--out", path)
        said = capfdbinary.readouterr()
        assert status == 0
        assert (done.stdout if done else said.out) == whole
        assert b"60 predictions written to standard output\ncompared with its Y: " in (
            done.stderr if done else said.err
        )
    assert not (folder / "-").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t.npz", "t.safetensors"])
@pytest.mark.parametrize("out", ["-", "/dev/stdout"])
def test_predictions_are_not_appended_to_what_they_are_made_of(name, out, folder):
    assert train() == 0
    before = (folder / name).read_bytes()
    call = [
        sys.executable,
        "-m",
        "mlpcore",
        "predict",
        "t.safetensors",
        "t.npz",
        "--force",
        "--out",
        out,
    ]
    with open(name, "ab") as end:
        done = subprocess.run(call, stdout=end, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert f"--out {out} is where the " in done.stderr
    assert (folder / name).read_bytes() == before


def test_predictions_do_not_replace_what_has_appeared_meanwhile(folder, capsys):
    assert train() == 0
    real = mc.MLP.predict

    def slowly(*rest):
        put(folder / "predictions.csv", "text")
        return real(*rest)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mc.MLP, "predict", slowly)
        refused(capsys, predict(), "predictions.csv", "not predictions of this model")
    assert (folder / "predictions.csv").read_text() == "a,b\n1,2\n"


def test_parameters_and_predictions_that_are_not_finite_are_said(folder, capsys):
    np.savez("q.npz", X=np.arange(60.0).reshape(20, 3), Y=np.arange(20) / 7)
    assert train(data="q.npz") == 0
    header, tensors = model_file.read("q.safetensors")
    for value, status, words in (
        (1e30, 0, "rows is not finite: the numbers there are too large"),
        (np.nan, 2, "q.safetensors': its parameters are not all finite"),
    ):
        parameters = np.full_like(tensors["parameters"], value)
        model_file.write("q.safetensors", header, {**tensors, "parameters": parameters})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert main(["predict", "q.safetensors", "q.npz"]) == status
        output, error = capsys.readouterr()
        assert words in output + error
    huge = {
        "target scale": tensors["target scale"] * 0 + 1.7e308,
        "parameters": tensors["parameters"] * 100,
    }
    model_file.write("q.safetensors", header, {**tensors, **huge})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["predict", "q.safetensors", "q.npz"]) == 0
    assert "rows is not finite" in capsys.readouterr().out


def test_predictions_go_into_pipes_and_devices(folder, capsys):
    assert train() == 0
    assert predict() == 0
    os.mkfifo("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((folder / "pipe").read_bytes()))
    reader.start()
    assert predict("--out", "pipe") == 0
    reader.join()
    assert read == [(folder / "predictions.csv").read_bytes()]
    assert predict("--out", "/dev/null") == 0
    capsys.readouterr()
    refused(capsys, predict("--out", "/dev/full"), "/dev/full", "No space left")
    refused(capsys, predict("--out", "."), "is a folder")


# -- export


def test_an_export_replaces_that_of_the_same_model_and_nothing_else(folder, capsys):
    pytest.importorskip("onnx")
    assert train() == 0
    assert train(data="other.npz") == 0
    assert main(["export", "t.safetensors", "t.onnx"]) == 0
    before = (folder / "t.onnx").read_bytes()
    assert main(["export", "t.safetensors", "t.onnx"]) == 0
    capsys.readouterr()
    refused(
        capsys,
        main(["export", "other.safetensors", "t.onnx"]),
        "t.onnx",
        "ONNX file of another model",
        "--force",
    )
    refused(
        capsys,
        main(["export", "t.safetensors", "other.npz"]),
        "other.npz",
        "ZIP archive",
        "--force",
    )
    refused(capsys, main(["export", "t.safetensors", "-"]), "'-' is not a file name")
    assert (folder / "t.onnx").read_bytes() == before
    assert main(["export", "other.safetensors", "t.onnx", "--force"]) == 0
    assert (folder / "t.onnx").read_bytes() != before


# -- cells


def test_no_cell_of_predictions_is_a_formula_and_numbers_stay_as_they_are(folder, capsys):
    names = ["=1+1", "+3.5e2", "-1", "-x", "@sum(a1)", "a;=2", 'say "hi"', "plain", "＝1", "a=1"]
    rng = np.random.default_rng(0)
    np.savez("t.npz", X=rng.standard_normal((200, 2)), Y=np.array(names)[np.arange(200) % 10])
    assert train() == 0
    assert predict() == 0
    text = (folder / "predictions.csv").read_text()
    assert '"p(a;=2)"' in text.splitlines()[0]
    rows = list(csv.reader(text.splitlines()))
    # the names as they are, in the order of the columns
    classes = mc.MLP.load_with("t.safetensors")[2]["classes"]
    assert rows[0] == ["prediction", *(f"p({name})" for name in classes)]
    assert sorted(classes) == sorted(names)
    marked = {name: f"'{name}" for name in ("=1+1", "-x", "@sum(a1)", "＝1")}
    cells = [marked.get(name, name) for name in names]
    assert {row[0] for row in rows[1:]} <= set(cells)
    assert {row[0] for row in rows[1:]} & set(marked.values())
    assert [cell(name) for name in ("\ttab", "-1", "+3.5e2", "a;=2", "-inf")] == [
        '"\'\ttab"',
        "-1",
        "+3.5e2",
        '"a;=2"',
        "'-inf",
    ]


def test_a_formula_behind_marks_that_are_not_seen_is_none_either():
    assert [cell(text) for text in ("\0=1+1", "\ufeff@x", "\ufeffx")] == [
        "'\0=1+1",
        "'\ufeff@x",
        "\ufeffx",
    ]


def test_no_figure_is_hundreds_of_digits_long():
    assert figure("R2", -1.5e300) == "-1.5e+300"
    assert figure("R2", -99999.4) == "-99999.4000"
    assert [figure("RMSE", value) for value in (0.0, 0.01234, 2.5e6)] == [
        "0.0000",
        "0.01234",
        "2.5e+06",
    ]


def test_the_picture_notes_the_call_as_text(folder):
    assert train() == 0
    picture = (folder / "t.png").read_bytes()
    start = picture.index(b"tEXtmlpcore\0") + 12
    size = int.from_bytes(picture[start - 16 : start - 12], "big") - 8
    assert json.loads(picture[start : start + size])["--epochs"] == 2


def test_a_place_or_a_model_of_the_wrong_kind_is_said_to_be_so(folder, capsys):
    refused(capsys, train("--out", "-"), "--out must be a folder", "'-'")
    assert train("--every", "1 epoch") == 0
    capsys.readouterr()
    for name in ("p.parquet", "p.NPZ"):
        refused(capsys, predict("--out", name), f"--out {name}", "predictions are CSV")
    checkpoint = ["predict", "t.checkpoint.safetensors", "t.npz"]
    refused(
        capsys, main(checkpoint), "t.checkpoint.safetensors", "is a checkpoint of 'mlpcore train'"
    )
