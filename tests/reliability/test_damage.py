"""Checkpoints that were damaged, cut, or made up with a right digest: refused with a reason, before
much is allocated.
"""

import copy
import json
import os
import tracemalloc

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.io import model_file

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((8, 2)), RNG.standard_normal((8, 1))
FIT = {
    "epochs": 3,
    "batch_size": 3,
    "progress": False,
    "early_stopping": mc.EarlyStopping(9, "loss"),
}


class Stop(mc.Callback):
    """Saves in the middle of the second epoch, and ends the run there."""

    def __init__(self, path):
        self.path = path

    def step_end(self, trainer, J):
        if trainer.progress.step == 4:
            trainer.save(self.path)
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint of a run that goes on, with momentum, best parameters, history."""
    path = tmp_path_factory.mktemp("damage") / "run.safetensors"
    trainer = mc.Trainer(mc.MLP([2, 1], device="cpu"), "squared_error", mc.SGD(0.1, momentum=0.9))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(X, Y, callbacks=[Stop(path)], **FIT)
    return path


def refusal(path):
    """Why a file is refused; None if it is taken."""
    try:
        mc.Trainer.load(path, "cpu")
    except ValueError as error:
        reason = str(error)
    else:
        return None
    assert path.name in reason
    return reason


def test_no_byte_of_a_checkpoint_can_be_changed_and_no_end_cut_off(saved, tmp_path):
    whole, path = saved.read_bytes(), tmp_path / "damaged"
    path.write_bytes(whole)
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(whole):
            for value in (byte ^ 1 << position % 8, byte):
                os.pwrite(file.fileno(), bytes([value]), position)
                if value != byte:
                    assert refusal(path) or same(path, saved), position
        assert refusal(path) is None
        for length in reversed(range(len(whole))):
            os.truncate(path, length)
            assert refusal(path), length
    path.write_bytes(whole + b"\0")
    assert refusal(path)


def same(one, other):
    """Return True if two files have the same contents, apart from padding."""
    (head, tensors), (other_head, others) = model_file.read(one), model_file.read(other)
    return head == other_head and {k: v.tobytes() for k, v in tensors.items()} == {
        k: v.tobytes() for k, v in others.items()
    }


HUGE, DEEP = 10**9, "(" * 5000 + "s" + ")" * 5000
NESTED = []
for _ in range(200):
    NESTED = [NESTED]
# where in the header, what is put there
ABSURD = [
    *[(["sizes"], value) for value in ([HUGE, HUGE], [2, HUGE, 1], [2, -1], [2, 0, 1], [2.0, 1], [],
            "21", {}, None, [[2], 1])],
    *[(["bias"], value) for value in (1, None, "yes")],
    *[(["activations"], value) for value in ([], [{}], "relu",
            [{"name": "a", "value": DEEP, "slope": "1"}], None, NESTED)],
    *[(["activations", 0, "value"], value) for value in ("s" * 10**6, "__import__('os')", "s ** s",
            3, None, "1 / 0", DEEP)],
    *[(["activations", 0, "parameter"], value) for value in (float("nan"), 10**400, "1", [1])],
    *[(["tied"], value) for value in ({"1": 1}, {"x": 1}, {str(HUGE): 1}, [1], "1")],
    *[(["version"], value) for value in (0, -1, 5, HUGE, "3", 3.0, float("nan"), None, True, [3])],
    *[(["trainer"], value) for value in (None, [], {}, 3, "trainer", NESTED)],
    *[(["trainer", "loss", "value"], value) for value in ("z" * 10**6, "open('x')", "", DEEP,
            None)],
    *[(["trainer", "loss", "parameter"], value) for value in (float("inf"), "x")],
    *[(["trainer", "optimizer"], value) for value in (None, "SGD", {"name": "Trainer"},
            {"name": "SGD"}, {"name": ["SGD"]})],
    *[(["trainer", "optimizer", "momentum"], value) for value in (float("nan"), 1.5, -1, "x", None,
            10**400)],
    *[(["trainer", "optimizer", "learning_rate"], value) for value in (float("nan"), -1, "x", None,
            {"name": "SGD"}, NESTED)],
    *[(["trainer", "settings", name], value) for name in ("l1", "l2",
            "clip_norm") for value in (float("nan"), -1, "x", [])],
    *[(["trainer", "settings", name], value) for name in ("chunk_rows", "workers") for value in (0,
            -1, 1.5, "x", [], True)],
    *[(["trainer", "settings", "memory_limit"], value) for value in (0, -1, "x", [], True,
            float("nan"), float("inf"))],
    *[(["trainer", "settings", "dropout"], value) for value in (1, -1, "x", [0.1, 0.2],
            [float("nan")])],
    *[(["trainer", "settings", "tolerant"], value) for value in (1, "x", None, [])],
    *[(["trainer", "settings", "seed"], value) for value in (-1, 1.5, "x", None)],
    *[(["trainer", "precision"], value) for value in ("x", 3, [])],
    *[(["trainer", "deterministic"], value) for value in (1, "x", None)],
    *[(["trainer", "progress", name], value) for name in ("step", "begun", "skipped", "epochs",
            "reductions")
      for value in (-1, 1.5, "x", None, True, [], 10**400)],
    *[(["trainer", "progress", "total"], value) for value in (-1, 1.5, "x", [])],
    *[(["trainer", "progress"], value) for value in ({"steps": 3}, [], "x", None)],
    *[(["trainer", "history"], value) for value in ([], "x", {"loss": 3}, {"loss": ["x"]},
            {"loss": [None]}, None)],
    *[(["trainer", "run"], value) for value in ({}, [], 3, "x", {"epoch": 1})],
    *[(["trainer", "run", name], value) for value in (-1, 1.5, "x", [], True)
      for name in ("epoch", "batch", "epochs", "batch_size", "rows", "waited", "idle", "widest")],
    *[(["trainer", "run", "epoch"], value) for value in (4, HUGE)],
    *[(["trainer", "run", "batch"], value) for value in (9, HUGE)],
    *[(["trainer", "run", "batch_size"], value) for value in (0, None)],
    *[(["trainer", "run", name], value) for name in ("loss", "weight", "seconds") for value in ("x",
            None, [])],
    *[(["trainer", "run", "weight"], value) for value in (float("nan"), -1.0)],
    *[(["trainer", "run", name], value) for name in ("shuffle", "validated") for value in (1, "x",
            None)],
    *[(["trainer", "run", "history"], value) for value in (
        [], {"loss": 3}, {"loss": [1], "seconds": [1, 2]}, {"loss": "x"}, {"loss": -1, "x": 4},
        {"loss": 10**400},
        {"loss": True}, {"loss": [1]})],
    *[(["trainer", "run", name], value) for name in ("data", "held_out") for value in (
        {}, [], 3, "x", {"rows": 8},
        {"rows": 8, "places": [[0, 8]], "X": 1, "Y": "", "sample_weight": None})],
    *[(["trainer", "run", "data", "places"], value) for value in ([[0]], [[0, 9]], [[-1, 3]],
            [[3, 3]], [["x", 2]], "x", [3])],
    *[(["trainer", "run", name], value) for name,
        value in (("ended", 1), ("told", -1), ("told", True))],
    *[(["trainer", "run", "best"], value) for value in ("x", [])],
    *[(["trainer", "run", "monitor"], value) for value in ("x", [], 3)],
    *[(["trainer", "run", "given"], value) for value in (
        "x", [], [1, 2], ["<f8", "zzz"], ["<f8", "O"], ["<f8"], [""] * 3, None,
        ["<f8", "<f8", "", 1, False],
        ["<f8", "<f8", "", False, False, 1])],
    *[(["trainer", "step"], value) for value in (None, [], {}, "x", {"rule": "momentum"})],
    *[(["trainer", "step", "plans"], value) for value in (
        "x", [1], [[3, ["<f8", "<f8"], HUGE, 1]], [[3, ["<f8", "<f8"], 1, HUGE]],
        [[3, ["<f8", "<f8"], 0, 1]], [[3, [], 1, 1]],
        [["x", ["<f8", "<f8"], 1, 1]], [[3, ["<f8", "O"], 1, 1]], NESTED)],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place", sorted({" ".join(map(str, place)) for place, _ in ABSURD}))
def test_an_absurd_header_with_a_right_digest_is_refused_and_nothing_big_is_allocated(
    place, saved, tmp_path
):
    header, tensors = model_file.read(saved)
    path = tmp_path / "absurd.safetensors"
    for where, value in ABSURD:
        if " ".join(map(str, where)) != place:
            continue
        changed = copy.deepcopy(header)
        inner = changed
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = value
        path.write_bytes(file_of(changed, tensors))
        tracemalloc.start()
        try:
            reason = refusal(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert reason, f"{place} = {value!r:.100} was taken"
        assert len(reason) < 2000
        assert peak < 32 << 20, f"{place} = {value!r:.100} took {peak:,} bytes"


def file_of(header, tensors):
    """A file with a right digest, whatever the header says (`write` sets the version by itself)."""
    text = json.dumps(header)
    metadata = {"mlpcore": text, "digest": model_file._digest(text, tensors)}
    entries, data = {}, b""
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        place = [len(data), len(data) + array.nbytes]
        entries[name] = {
            "dtype": model_file.TYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": place,
        }
        data += array.tobytes()
    head = json.dumps({"__metadata__": metadata, **entries}).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + data


def test_the_header_as_it_is_is_taken(saved, tmp_path):
    header, tensors = model_file.read(saved)
    (tmp_path / "same").write_bytes(file_of(header, tensors))
    assert refusal(tmp_path / "same") is None


TENSORS = {
    "state of no rule": lambda t: {**t, "state q": t["state v"]},
    "no state": lambda t: {k: v for k, v in t.items() if not k.startswith("state")},
    "state too short": lambda t: {**t, "state v": t["state v"][1:]},
    "state of one": lambda t: {**t, "state v": t["state v"][:1]},
    "parameters too short": lambda t: {**t, "parameters": t["parameters"][1:]},
    "parameters 2-D": lambda t: {**t, "parameters": t["parameters"][None]},
    "parameters in int32": lambda t: {**t, "parameters": t["parameters"].astype(np.int32)},
    "parameters in float16": lambda t: {**t, "parameters": t["parameters"].astype(np.float16)},
    "no parameters": lambda t: {k: v for k, v in t.items() if k != "parameters"},
    "best of one": lambda t: {**t, "best": t["best"][:1]},
    "best in float64": lambda t: {**t, "best": t["best"].astype(np.float64)},
    "something else": lambda t: {**t, "more": t["parameters"]},
}


@pytest.mark.parametrize("name", TENSORS)
def test_arrays_that_are_not_those_of_the_run_are_refused(name, saved, tmp_path):
    header, tensors = model_file.read(saved)
    changed = TENSORS[name](tensors)
    (tmp_path / "absurd").write_bytes(file_of(header, changed))
    assert refusal(tmp_path / "absurd")


HEADS = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"__metadata__":{"mlpcore":"' + b"[" * 100_000 + b'"}}',
    b"\xff" * 99,
]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_nested_or_no_text_is_refused(head, tmp_path):
    path = tmp_path / "absurd"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    assert refusal(path)
