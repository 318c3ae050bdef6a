"""The kinds of files: each is told from the others, so that none is written over another by
mistake.
"""

import io
import os
import sqlite3
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

import mlpcore as mc
from mlpcore.io import kinds, model_file

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((30, 2)), RNG.standard_normal((30, 1))


def trainer(**settings):
    return mc.Trainer(mc.MLP([2, 3, 1], device="cpu", seed=1), "squared_error", **settings)


class Stop(mc.Callback):
    def step_end(self, trainer, J):
        if trainer.progress.step == 4:
            trainer.save("unfinished")
            raise KeyboardInterrupt


def files(folder):
    """Files of every kind that there is, by name, in the working directory."""
    mc.MLP([2, 1]).save("model")
    one = trainer()
    one.fit(X, Y, epochs=1, progress=False, checkpoint="checkpoint")
    with pytest.raises(KeyboardInterrupt):
        one.fit(X, Y, epochs=3, batch_size=10, progress=False, callbacks=[Stop()])
    model_file.write("newer", {}, {})
    newer = (folder / "newer").read_bytes().replace(b'\\"version\\": 1', b'\\"version\\": 9')
    (folder / "newer").write_bytes(newer)
    (folder / "cut").write_bytes((folder / "model").read_bytes()[:-1])
    (folder / "absurd").write_bytes(newer.replace(b'\\"version\\": 9', b'\\"version\\": x'))
    save_file({"a": np.zeros(3)}, "safetensors")
    mc.MLP([2, 1]).to_onnx("onnx", about={"a note": "x" * 300})
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    os.mkfifo("pipe")
    os.symlink("gone", "dangling")
    os.symlink("unfinished", "link")
    (folder / "table.csv").write_text("größe,y\n1,2\n" + "3,4é\n" * 3000)
    (folder / "notes.json").write_text("[\n  \n   {}]")
    np.save("array.npy", X)
    with zipfile.ZipFile("archive.zip", "w") as archive:
        archive.writestr("x", "y")
    picture = io.BytesIO()
    pytest.importorskip("matplotlib.figure").Figure().savefig(picture)
    (folder / "picture.png").write_bytes(picture.getvalue())
    base = sqlite3.connect("base")
    base.execute("create table t (a)")
    base.close()
    (folder / "noise").write_bytes(RNG.bytes(5000))
    (folder / "zeros").write_bytes(bytes(5000))


KINDS = {
    "model": ("model", "a model of mlpcore"),
    "checkpoint": ("checkpoint", "a checkpoint of mlpcore"),
    "unfinished": (
        "unfinished",
        "a checkpoint of mlpcore with an unfinished run (in epoch 1 of 3, after 3 of its batches)",
    ),
    "link": (
        "unfinished",
        "a checkpoint of mlpcore with an unfinished run (in epoch 1 of 3, after 3 of its batches)",
    ),
    "newer": ("newer", "a model of a newer mlpcore"),
    "cut": ("damaged", "a damaged safetensors file of mlpcore"),
    "absurd": ("damaged", "a damaged model of mlpcore"),
    "safetensors": ("safetensors", "a safetensors file of another library"),
    "onnx": ("onnx", "an ONNX file"),
    "empty": ("empty", "an empty file"),
    "folder": ("folder", "a folder"),
    "pipe": ("special", "a device, a pipe or a socket"),
    "dangling": ("nothing", "no file"),
    "nothing": ("nothing", "no file"),
    "model/below": ("nothing", "no file"),
    "table.csv": ("other", "text"),
    "notes.json": ("other", "text"),
    "array.npy": ("other", "an array of NumPy (.npy)"),
    "archive.zip": ("other", "a ZIP archive, such as .npz"),
    "picture.png": ("other", "a picture (PNG)"),
    "base": ("other", "an SQLite database"),
    "noise": ("other", "a file of a kind unknown to mlpcore"),
    "zeros": ("other", "a file of a kind unknown to mlpcore"),
}


def test_each_kind_is_told_and_none_is_written_over_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    assert {name: kinds.kind(name)[:2] for name in KINDS} == KINDS


OVER = {  # what may be written over which kind, apart from what loses nothing
    "network": {"model"},
    "trainer": {"model", "checkpoint"},
    "trainer that goes on": {"model", "checkpoint", "unfinished"},
    "onnx": {"onnx"},
    "fit": {"checkpoint"},
    "fit that goes on": {"checkpoint", "unfinished"},
}
NOTHING_LOST = {"nothing", "empty", "dangling"}


def write(what, path, going_on):
    if what == "network":
        mc.MLP([2, 1], device="cpu").save(path)
    elif what == "trainer":
        trainer().save(path)
    elif what == "trainer that goes on":
        mc.Trainer.load(going_on, "cpu").save(path)
    elif what == "onnx":
        mc.MLP([2, 1], device="cpu").to_onnx(path)
    else:
        one = mc.Trainer.load(going_on, "cpu") if what == "fit that goes on" else trainer()
        one.fit(X, Y, epochs=3, batch_size=10, progress=False, checkpoint=path)


@pytest.mark.parametrize("what", OVER)
def test_nothing_is_written_over_a_file_of_another_kind(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    (tmp_path / "going on").write_bytes((tmp_path / "unfinished").read_bytes())
    for name, (kind, text) in KINDS.items():
        if name in ("folder", "pipe", "model/below"):  # for test_atomic.py
            continue
        if kind in OVER[what] or name in NOTHING_LOST:
            write(what, name, "going on")
            continue
        before = (tmp_path / name).read_bytes()
        with pytest.raises(FileExistsError) as caught:
            write(what, name, "going on")
        assert repr(name) in str(caught.value)
        assert text in str(caught.value)
        assert "delete" in str(caught.value)
        assert (tmp_path / name).read_bytes() == before
    assert os.path.islink("link")


def test_versions_that_would_be_replaced_are_looked_at_as_well(tmp_path):
    path, other = tmp_path / "run.safetensors", tmp_path / "run.1.safetensors"
    other.write_text("mine")
    for attempt in (
        lambda: trainer().save(path, keep=2),
        lambda: trainer().fit(X, Y, progress=False, checkpoint=path, keep=3),
    ):
        with pytest.raises(
            FileExistsError, match=r"run\.safetensors' .*run\.1\.safetensors' is text; delete it"
        ):
            attempt()
    trainer().save(path)
    assert other.read_text() == "mine"


def test_a_fit_that_is_refused_has_changed_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    one = trainer()
    before = one.net.parameters.copy()
    message = r"in epoch 1 of 3, .*; mc\.Trainer\.load resumes it; delete it, or name another file"
    with pytest.raises(FileExistsError, match=message):
        one.fit(X, Y, epochs=2, progress=False, checkpoint="unfinished")
    assert (one.unfinished, one.progress.step, one.history) == (None, 0, {})
    np.testing.assert_array_equal(one.net.parameters, before)
    one.fit(X, Y, epochs=1, progress=False, checkpoint="another")
