"""Model files: whole or not there, older versions readable, and nothing that was changed is taken
for what was saved.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes
from safetensors.numpy import load_file

import mlpcore as mc
from mlpcore.io import atomic, model_file

DATA = Path(__file__).parents[1] / "stored"


def test_files_of_version_1_are_read():
    one, tensors, about = mc.MLP.load_with(DATA / "network-1.safetensors")
    np.testing.assert_allclose(one.predict(np.ones((1, 3))), [[0.27502388, 0.7249762]], rtol=1e-6)
    assert (one.activations[1].spec, about, list(tensors["mean"])) == (
        ("sigmoid", 2.0),
        {"classes": ["no", "yes"]},
        [0, 1, 2],
    )
    two = mc.MLP.load(DATA / "network-1-tied.safetensors")
    np.testing.assert_allclose(
        two.predict(np.ones((1, 3))), [[0.47729482, 0.49903145, 0.21469061]], rtol=1e-6
    )
    assert two.tied == {2: "1.T"}


TENSORS = {
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "strided": np.arange(20, dtype=np.float32)[::3],
    "big endian": np.arange(4, dtype=">i4"), "bytes": np.arange(5, dtype=np.uint8),
    "0-d": np.array(1.5),
    "none": np.zeros((0, 3)), "yes": np.array([True, False]),
    "half": np.arange(3, dtype=np.float16),
    "reversed": np.arange(6.0)[::-1],
}  # fmt: skip


def test_arrays_of_any_layout_come_back_equal_also_through_the_library(tmp_path):
    path = tmp_path / "file.safetensors"
    model_file.write(path, {"about": "é"}, TENSORS)
    header, tensors = model_file.read(path)
    library = load_file(path)
    assert header == {"version": model_file.VERSION, "about": "é"}
    assert sorted(tensors) == sorted(library) == sorted(TENSORS)
    for name, array in TENSORS.items():
        for found in (tensors[name], library[name]):
            assert (found.dtype.name, found.shape) == (array.dtype.name, array.shape)
            np.testing.assert_array_equal(found, array)
    with pytest.raises(TypeError, match=r"tensors\['text'\] of dtype <U2 cannot be stored"):
        model_file.write(path, {}, {"text": np.array(["no"])})
    assert model_file.read(path)[0]["about"] == "é", "the file that was there is intact"


def test_no_byte_can_be_changed_and_no_end_cut_off_unnoticed(tmp_path):
    path, net = tmp_path / "net.safetensors", mc.MLP([1, 2], seed=1)
    net.save(path, about={"x": 1})
    whole = path.read_bytes()
    before = model_file.read(path)
    silent = []
    for position in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(
                whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :]
            )
            silent += [(position, flip)] if readable(path, before) else []
        path.write_bytes(whole[:position])
        assert not readable(path, None), position
    assert not silent


def readable(path, before):
    """Return True if the file is read as a model; check that a refusal names it."""
    try:
        header, tensors = model_file.read(path)
    except ValueError as error:
        return path.name not in str(error)
    if before is None or header != before[0] or list(tensors) != list(before[1]):
        return True
    return any(array.tobytes() != before[1][name].tobytes() for name, array in tensors.items())


def test_absurd_headers_are_refused_by_size_before_anything_is_allocated(tmp_path):
    path = tmp_path / "file.safetensors"
    entry = {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 1 << 43]}
    for head in (
        b"{}",
        json.dumps({"parameters": entry, "__metadata__": {"mlpcore": "{}"}}).encode(),
    ):
        for length in (len(head), 1 << 62, 1 << 31):
            path.write_bytes(length.to_bytes(8, "little") + head)
            with pytest.raises(ValueError, match=r"file\.safetensors"):
                model_file.read(path)


# -- what is saved can be loaded --


def nested(levels):
    inner = []
    for _ in range(levels - 1):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    "about", [{1: 2}, {None: 1}, {True: 1}, {"a": {2: 3}}, {"a": {1}}, {"a": b"b"},
        {"a": "\ud83d\ude00"}, {"a": 10**5000},
              {"a": np.float32(1)}, nested(100), nested(100_000), {"a": np.zeros(2)}],
    ids=range(12),
)  # fmt: skip
def test_what_would_not_come_back_as_it_went_in_is_refused(about, tmp_path):
    with pytest.raises(
        TypeError, match="about, and all else in the header, must be what JSON can hold"
    ):
        mc.MLP([1, 1]).save(tmp_path / "file", about=about)
    with pytest.raises(TypeError, match="about"):
        mc.MLP([1, 1]).to_onnx(tmp_path / "file", about={"x": [about]})
    assert os.listdir(tmp_path) == []


def test_what_is_saved_comes_back_equal(tmp_path):
    path, nan = tmp_path / "file", float("nan")
    about = {
        "a": [nan, float("inf"), -0.0, 1e-320, 1 << 200, None, True],
        "": "\ud800",
        "t": (1, 2),
        "d": nested(98),
    }
    tensors = {
        "": np.zeros(3),
        "a\0b": np.zeros((0, 2)),
        "\U0001f600": np.float64(2),
        "x" * 10_000: np.ones((1,) * 40),
    }
    net = mc.MLP([1, 1])
    net.save(path, about=about, tensors=tensors)
    _, found, header = mc.MLP.load_with(path)
    assert repr(header) == repr({**about, "t": [1, 2]})
    assert {name: (x.shape, x.tolist()) for name, x in found.items()} == {
        name: (np.shape(x), np.asarray(x).tolist()) for name, x in tensors.items()
    }


@pytest.mark.parametrize("name", ["\ud800", "a\udfff", "__metadata__", "parameters", 1, None])
def test_a_tensors_name_that_cannot_be_read_again_is_refused(name, tmp_path):
    with pytest.raises(
        (TypeError, ValueError), match=r"tensors: .* (cannot be a name|is not text)"
    ):
        mc.MLP([1, 1]).save(tmp_path / "file", tensors={name: np.zeros(1), "b": np.zeros(1)})
    with pytest.raises(TypeError, match="masked entries"):
        mc.MLP([1, 1]).save(tmp_path / "file", tensors={"a": np.ma.masked_array([1.0], [True])})
    assert os.listdir(tmp_path) == []


def test_the_largest_header_that_is_written_is_the_largest_that_is_read(tmp_path, monkeypatch):
    path = tmp_path / "file"
    head = json.dumps({"__metadata__": {"mlpcore": '{"version": 1}'}}).encode()
    for more, fits in ((0, True), (8, False)):
        length = model_file.LARGEST + more
        path.write_bytes(length.to_bytes(8, "little") + head + b" " * (length - len(head)))
        if fits:
            with pytest.raises(ValueError, match="its digest does not match"):  # it is read
                model_file.read(path)
        else:
            with pytest.raises(ValueError, match="header too large"):
                model_file.read(path)
    path.unlink()
    model_file.write(path, {"x": ""}, {})
    shortest = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(model_file, "LARGEST", shortest)
    model_file.write(path, {"x": ""}, {})
    with pytest.raises(
        ValueError, match=rf"about, .* has {shortest + 8:,} bytes; .* at most {shortest:,}"
    ):
        model_file.write(path, {"x": "12345678"}, {})
    assert model_file.read(path)[0]["x"] == ""


TEXT = st.text(st.characters(exclude_categories=[]), max_size=4)  # surrogates, too
KEYS = st.one_of(TEXT, st.integers(), st.booleans(), st.none(), st.floats())
SIMPLE = st.one_of(
    TEXT, st.integers(), st.booleans(), st.none(), st.floats(), st.binary(max_size=2)
)
VALUES = st.recursive(
    SIMPLE,
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(KEYS, x, max_size=3)),
    max_leaves=8,
)
ARRAYS = arrays(
    st.one_of(scalar_dtypes(), st.sampled_from([">f8", "<f2", ">i2", "bool"]).map(np.dtype)),
    array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
)


@settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(VALUES, st.dictionaries(st.one_of(TEXT, st.just("__metadata__")), ARRAYS, max_size=3))
def test_any_header_and_tensors_come_back_equal_or_are_refused(about, tensors):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        try:
            model_file.write(path, {"about": about}, tensors)
        except (TypeError, ValueError):
            assert os.listdir(folder) == []
            return
        header, found = model_file.read(path)
    assert repr(header["about"]) == repr(about)
    assert sorted(found) == sorted(tensors)
    for name, array in tensors.items():
        assert (found[name].shape, found[name].dtype.name) == (array.shape, array.dtype.name)
        np.testing.assert_array_equal(found[name], array)


# -- whole or not there --


def test_what_was_there_stays_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def write_half():
        with atomic.replacing(path) as file:
            file.write(b"half of it")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_and_a_missing_folder_are_named(tmp_path):
    for place, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "gone" / "file", FileNotFoundError),
    ):
        with pytest.raises(error, match=r"cannot be written: .*folder"), atomic.replacing(place):
            raise AssertionError("never reached")


@pytest.mark.parametrize("links", [True, False])
def test_so_many_versions_are_kept_and_there_is_always_a_whole_one(links, tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError("no links here")

    path, replaced = tmp_path / "run.safetensors", os.replace

    def replace(source, target):
        assert path.exists() or not os.listdir(tmp_path)[1:]
        replaced(source, target)

    if not links:
        monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "replace", replace)
    for i in range(6):
        with atomic.replacing(path, keep=3) as file:
            file.write(b"%d" % i)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {
        "run.safetensors": b"5", "run.1.safetensors": b"4", "run.2.safetensors": b"3"
    }  # fmt: skip
