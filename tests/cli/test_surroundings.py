"""The command in surroundings that it does not choose: streams, encodings, signals, libraries,
names.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.cli import main
from mlpcore.cli.messages import printable


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with t.npz in it: two classes."""
    monkeypatch.chdir(tmp_path)
    X = np.random.default_rng(0).standard_normal((60, 3))
    np.savez("t.npz", X=X, Y=np.where(X[:, 0] > 0, "up", "down"))
    return tmp_path


CALL = ["train", "t.npz", "--quiet", "--epochs", "2", "--hidden", "4", "--batch", "8", "--force"]


def child(*arguments, **settings):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    settings = {"stdout": subprocess.PIPE, "env": buffered, **settings}
    return subprocess.Popen(
        [sys.executable, "-m", "mlpcore", *arguments], stderr=subprocess.PIPE, **settings
    )


# -- streams


@pytest.mark.slow
def test_a_training_whose_messages_nobody_reads_is_saved_and_ends_quietly(folder):
    read, write = os.pipe()
    os.close(read)
    run = child(*CALL, stdout=write)
    os.close(write)
    assert run.communicate(timeout=60)[1] == b""
    assert run.returncode == 0
    assert sorted(os.listdir()) == ["t.npz", "t.png", "t.safetensors"]


def test_a_full_disk_behind_standard_output_is_said_and_what_is_saved_is_saved(
    folder, monkeypatch, capsys
):
    with open("/dev/full", "w") as device:
        monkeypatch.setattr(sys, "stdout", device)
        for arguments, status in ((CALL, 0), (["info"], 2)):
            assert main(arguments) == status
            assert (
                capsys.readouterr().err
                == "mlpcore: cannot write to standard output: No space left on device\n"
            )
    assert sorted(os.listdir()) == ["t.npz", "t.png", "t.safetensors"]


def test_predictions_that_nobody_reads_stop_quietly(folder):
    assert main(CALL) == 0
    np.savez("big.npz", X=np.zeros((20_000, 3)))
    with child("predict", "t.safetensors", "big.npz", "--out", "-") as run:
        assert run.stdout.readline() == b"prediction,p(down),p(up)\r\n"
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 141


@pytest.mark.parametrize("error", [None, "closed"])
def test_there_may_be_no_streams_at_all(error, folder, monkeypatch):
    for name in ("stdout", "stderr"):
        stream = None
        if error:
            stream = io.StringIO()
            stream.close()
        monkeypatch.setattr(sys, name, stream)
    assert main(CALL) == 0
    assert main(["predict", "t.safetensors", "t.npz"]) == 0
    assert main(["predict", "t.safetensors", "t.npz", "--out", "-"]) == 2
    assert main(["train", "absent.npz"]) == 2
    with contextlib.suppress(SystemExit):
        assert main(["train", "--nonsense"]) == 2
    if error is None:
        X = np.zeros((10, 2))
        mc.Trainer(mc.MLP([2, 1]), "squared_error").fit(X, X[:, :1], epochs=2)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
def test_names_that_an_encoding_lacks_are_escaped(encoding, folder, monkeypatch):
    np.savez("σ².npz", X=np.load("t.npz")["X"], Y=np.array(["½", "σ", "û"])[np.arange(60) % 3])
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    call = [*CALL[:1], "σ².npz", *CALL[2:]]
    assert main(call) == 0
    assert main(["predict", "σ².safetensors", "σ².npz"]) == 0
    assert main(["plan", "3,2"]) == 0
    assert main(["train", "σ³"]) == 2
    said = {name: stream.buffer.getvalue().decode(encoding) for name, stream in streams.items()}
    if encoding == "ascii":
        assert r"3 classes (\xbd, \xfb, \u03c3)" in said["stdout"]
        assert r"saved \u03c3\xb2.safetensors" in said["stdout"]
        assert r"'\u03c3\xb3'" in said["stderr"]
    assert (folder / "predictions.csv").read_text("utf-8").startswith("prediction,p(½),p(û),p(σ)\n")


def test_no_name_commands_the_terminal(folder, capsys):
    names = ["a\x1b[31m", "b\nsaved all", "\u202ec\x9b"]
    np.savez("t.npz", X=np.load("t.npz")["X"], Y=np.array(names)[np.arange(60) % 3])
    lines = ['x\x1b]0;hi\x07,"y\nsaved all"']
    lines += [f"{i % 7}.5,{i % 2}" for i in range(60)]
    (folder / "t.csv").write_text("\n".join(lines))
    assert main(CALL) == 0
    assert main(["predict", "t.safetensors", "t.npz"]) == 0
    assert (
        main(["train", "t.csv", "--target", "y\nsaved all", "--epochs", "1", "--out", "table"]) == 0
    )
    assert main(["predict", "table/t.safetensors", "t.csv", "--out", "table.csv"]) == 0
    assert main(["train", "t.csv", "--target", "\x1b[31mno"]) == 2
    said = "".join(capsys.readouterr())
    assert all(mark.isprintable() or mark == "\n" for mark in said)
    assert "\nsaved all" not in said
    assert r"3 classes (a\x1b[31m, b\nsaved all, \u202ec\x9b)" in said
    assert printable("x" * 2000, 10) == "x" * 9 + "…"


def test_help_fits_any_terminal_and_any_encoding(monkeypatch, capsys):
    for command in ([], ["train"], ["predict"], ["export"], ["check"], ["plan"], ["info"]):
        for columns in ("1", "20", "200"):
            monkeypatch.setenv("COLUMNS", columns)
            with pytest.raises(SystemExit, match="0"):
                main([*command, "--help"])
    assert capsys.readouterr().out.isascii()


# -- names


@pytest.mark.slow
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode there")
@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_files_whose_names_are_not_utf_8_are_read_and_written(suffix, folder, capsys):
    pd = pytest.importorskip("pandas")
    name = os.fsdecode(b"\xff$x^{\\")
    data = f"{name}.{suffix}"
    more = ["--target", "y"]
    with np.load("t.npz") as old:
        frame = pd.DataFrame({"a": old["X"][:, 0], "y": old["Y"]})
    if suffix == "npz":
        os.rename("t.npz", data)
        more = []
    else:
        with open(data, "wb") as file:
            frame.to_csv(file, index=False) if suffix == "csv" else frame.to_parquet(file)
    model = f"{name}.safetensors"
    assert main([*CALL[:1], data, *CALL[2:], *more, "--every", "1 epoch"]) == 0
    assert main([*CALL[:1], data, *CALL[2:], *more, "--resume"]) == 0
    assert os.path.getsize(f"{name}.png")
    assert main(["predict", model, data, "--out", f"{name}.txt"]) == 0
    assert main(["check", model, data]) == 0
    assert main(["export", model, f"{name}.onnx"]) == 0
    assert main(["predict", model, f"absent{data}"]) == 2
    said = "".join(capsys.readouterr())
    assert "note:" not in said
    assert r"saved \udcff$x^{\.safetensors" in said


# -- libraries and systems

SURROUNDED = """
import os, sys
os.environ["MPLBACKEND"] = "no such backend"
with open("matplotlibrc", "w") as file:
    file.write("text.usetex: True\\n")
sys.modules["resource"] = None
from mlpcore.cli import main
from mlpcore.cli.messages import printable
assert main(["train", "$x^{$.npz", *sys.argv[1:]]) == 0
assert main(["train", "数.npz", *sys.argv[1:]]) == 0
assert os.environ["MPLBACKEND"] == "no such backend"
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    sys.modules[name] = None
sys.modules["sklearn.metrics"] = None
assert main(["train", "t.npz", *sys.argv[1:]]) == 0
"""


@pytest.mark.slow
def test_a_finished_training_fails_for_no_library_backend_font_or_name(folder):
    for name in ("$x^{$", "数"):
        os.link("t.npz", f"{name}.npz")
    call = [sys.executable, "-c", SURROUNDED, *CALL[2:]]
    done = subprocess.run(
        call,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    both = [
        f"{name}.{suffix}" for name in ("$x^{$", "数") for suffix in ("npz", "png", "safetensors")
    ]
    assert sorted(os.listdir()) == sorted([*both, "matplotlibrc", "t.npz", "t.safetensors"])
    assert "at its peak" not in done.stdout
    last = done.stdout[done.stdout.index("saved t.safetensors") :]
    assert re.search(r"^note: no figures: .*sklearn", last, re.M)
    assert re.search(r"^note: no picture of the learning curve: .*pip install", last, re.M)


def test_a_disk_that_is_full_at_the_picture_leaves_the_model_and_says_so(folder, capsys):
    os.symlink("/dev/full", "t.png")
    assert main(CALL) == 0
    said = capsys.readouterr().out
    assert said.index("saved t.safetensors") < said.index(
        "note: no picture of the learning curve: "
    )
    assert "No space left on device" in said
    assert main(["predict", "t.safetensors", "t.npz"]) == 0


# -- signals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_a_training_with_one_line_that_says_what_was_saved(
    number, status, word, folder
):
    run = child(*CALL, "--epochs", "1000000", "--patience", "1000000")
    while not run.stdout.readline().startswith(b"MLP("):
        assert run.poll() is None
    time.sleep(0.05)
    run.send_signal(number)
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == status
    assert errors.decode() == f"mlpcore: {word}; nothing was saved\n"
    assert os.listdir() == ["t.npz"]


def test_what_was_saved_before_a_signal_is_said(folder, capsys, monkeypatch):
    from mlpcore.cli import train

    def interrupted(*rest):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "draw", interrupted)
    with pytest.raises(SystemExit, match="143"):
        main(CALL)
    assert capsys.readouterr().err == "mlpcore: terminated; t.safetensors already saved\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_IGN))
        main([*CALL, "--splits", "1"])  # goes on: what is ignored stays so


# -- numbers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "9223372036854775808,10"], ["sizes", "9,223,372,036,854,775,807"]),
        (["plan", "4," * 2000 + "4"], ["sizes", "1,000", "2,001"]),
        (["plan", "4,3", "--batch", str(10**30)], ["--batch", "2^63"]),
        (["plan", "4,3", "--workers", "0"], ["--workers", "at least 1"]),
        (["plan", "4,3", "--chunk-rows", "-1"], ["--chunk-rows", "at least 1"]),
        (["plan", "4,3", "--memory-limit", "1e400"], ["memory_limit", "1e400"]),
        ([*CALL, "--batch", str(10**30)], ["--batch", "2^63"]),
        ([*CALL, "--epochs", str(10**30)], ["--epochs", "2^63"]),
        ([*CALL, "--seed", str(10**30)], ["--seed", "2^63"]),
        ([*CALL, "--splits", str(10**30)], ["--splits", "2^63"]),
        ([*CALL, "--patience", "0"], ["--patience", "at least 1"]),
        ([*CALL, "--learning-rate", "nan"], ["--learning-rate", "nan"]),
        ([*CALL, "--weight-decay", "1e400"], ["--weight-decay", "inf"]),
        ([*CALL, "--weight-decay=-1"], ["--weight-decay", "-1"]),
        ([*CALL, "--hidden", ",".join(["1"] * 10**6)], ["--hidden", "1,000,000"]),
        ([*CALL, "--hidden", "9" * 5000], ["--hidden"]),
        ([*CALL, "--hidden", "0"], ["--hidden", "0"]),
        ([*CALL, "--memory-limit", "1e400"], ["--memory-limit", "1e400"]),
        ([*CALL, "--out", "a\0b"], ["--out"]),
        ([*CALL, "--out", "x" * 300], ["File name too long"]),
        (["check", "absent.safetensors", "--rows", str(10**30)], ["--rows", "2^63"]),
        (["train", "/dev/full"], ["/dev/full", "not a regular file"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else value,
)
def test_a_number_that_cannot_be_is_named_before_any_work(arguments, words, folder, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mlpcore: ")
    assert said.err.count("\n") == 1
    assert len(said.err) < 1000
    assert all(word in said.err for word in words), said.err
    assert os.listdir() == ["t.npz"]


@pytest.mark.parametrize(
    "call",
    [["no\33[31m" + "x" * 3000], ["info", "\33[31m" + "x" * 3000], [*CALL, "--task", "\33[2J"]],
)
def test_what_the_parser_says_is_short_and_does_not_command_the_terminal(call, capsys):
    with pytest.raises(SystemExit):
        main(call)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "\33" not in error
    assert len(error) < 600


def test_a_text_in_place_of_a_number_is_said_in_short(capsys):
    for option in ("--epochs", "--learning-rate", "--memory-limit"):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "t.npz", option, "x" * 5000])
        error = capsys.readouterr().err
        assert f"argument {option}: expected " in error
        assert len(error) < 3000


# -- what an error names


def columns(name, number, encoding="utf-8"):
    """Write a table whose column x holds these numbers."""
    rows = [f"{number(i)},{i * i % 7},{i / 7}" for i in range(60)]
    with open(name, "w", encoding=encoding) as file:
        file.write("\n".join(["x,b,y", *rows]))


def test_an_error_of_the_data_names_file_and_column(folder, capsys):
    columns("far.csv", lambda i: 1.7e308 * (-1) ** i)
    columns("huge.csv", lambda i: 1.7e308)
    columns("utf-16.csv", lambda i: i * i, "utf-16")
    columns("t.csv", lambda i: i * i)
    call = [*CALL[2:], "--target", "y"]
    assert main(["train", "t.csv", *call]) == 0
    for arguments, words in (
        (["train", "far.csv", *call], ["far.csv: ", "column 'x'", "1.8e308"]),
        (
            ["train", "far.csv", *CALL[2:], "--target", "x", "--task", "regression"],
            ["far.csv: ", "column 'x'"],
        ),
        (["predict", "t.safetensors", "huge.csv"], ["huge.csv: ", "row 1: 'x' is too far"]),
        (["train", "utf-16.csv", *call], ["utf-16.csv: is UTF-16 text; save it as UTF-8"]),
        (
            ["predict", "t.safetensors", "utf-16.csv"],
            ["utf-16.csv: is UTF-16 text; save it as UTF-8"],
        ),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words), error


def test_a_file_that_may_not_be_read_is_said_to_be_there(folder, capsys):
    assert main(CALL) == 0
    folder.chmod(0o777)
    (folder / "t.safetensors").chmod(0)
    user = os.geteuid()
    if user == 0:  # whom no permission binds
        os.seteuid(65534)
    try:
        capsys.readouterr()
        assert main(["predict", "t.safetensors", "t.npz"]) == 2
        assert capsys.readouterr().err == "mlpcore: t.safetensors: Permission denied\n"
    finally:
        os.seteuid(user)
        (folder / "t.safetensors").chmod(0o644)


def test_a_dash_is_no_checkpoint(folder, capsys):
    assert main([*CALL, "--checkpoint", "-"]) == 2
    assert "'-' is not a file name" in capsys.readouterr().err
