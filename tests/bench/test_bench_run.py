"""The suite end to end on a tiny point, its result on disk, resumption and comparison."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from bench import machine, store
from bench.cases import SUITES
from bench.compare import compare
from bench.memory import growth
from bench.parent import Child, ChildFailed
from bench.peers import PEERS
from bench.run import main
from bench.tables import block, losses

WORDS = [
    "--suite",
    "quick",
    "--cases",
    "64-64",
    "--batches",
    "16,32",
    "--peers",
    "torch-graph",
    "--rounds",
    "6",
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, root):
    """A run as a user starts it: from a clone, with pins of OpenBLAS in the environment."""
    out = tmp_path_factory.mktemp("bench")
    environment = {**os.environ, "PYTHONPATH": str(root), "OPENBLAS_L2_SIZE": "1048576"}
    command = [sys.executable, str(root / "bench" / "run.py"), *WORDS, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_a_run_leaves_a_result_that_says_all(ran):
    out, text = ran
    result = store.load(out / "result.json")
    assert set(result) == {
        "schema",
        "suite",
        "identity",
        "machine",
        "commit",
        "ceilings",
        "footprint",
        "points",
    }
    assert list(result["points"]) == [
        "64-64-64-64-1/16/SGD/float32/cpu",
        "64-64-64-64-1/32/SGD/float32/cpu",
    ]
    for point in result["points"].values():
        ours, again = point["peers"]["mlpcore"], point["peers"]["mlpcore again"]
        assert len(ours["losses"]) == 10
        assert ours["losses"] == again["losses"]
        assert [len(series) for series in ours["series"].values()] == [6, 6]
        assert 0 < ours["seconds"][1] <= ours["seconds"][0] <= ours["seconds"][2]
        assert ours["memory"]["peak_bytes"] >= 0
        assert ours["plan_bytes"] > 0
        assert any("openblas" in pool["internal_api"] for pool in ours["blas"])
        assert point["peers"]["torch-graph"]["status"] == "missing"
        assert block(point).count("\n") == 5
    assert result["machine"]["blas pinned by the environment"] is None
    assert result["footprint"]["seconds"]["import mlpcore"][0] > 0
    assert "torch-graph missing" in text
    assert str(machine.ROOT) not in (out / "result.json").read_text()


@pytest.mark.slow
def test_a_run_draws_what_has_two_batch_sizes(ran):
    pytest.importorskip("matplotlib")
    assert (ran[0] / "64-64-64-64-1_SGD_float32_cpu.png").stat().st_size > 10_000


def test_results_are_written_without_loss_and_not_a_number_a_line(tmp_path):
    value = {
        "long": [1 / 3**i for i in range(60)], "short": (1, 2.5, None), "empty": [[], {}],
        7: float("inf"),
        "points": {"a, b": [{"seconds": [0.1, 0.2], "why": "one, two"}] * 9},
        "words": ["x y", "z"] * 40,
    }  # fmt: skip
    machine.write(value, tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text()
    assert json.dumps(json.loads(text)) == json.dumps(value)
    assert max(map(len, text.splitlines())) <= 100
    assert ' "short": [1, 2.5, null],' in text.splitlines()
    assert len(machine.layout(value["long"]).splitlines()) < 20


@pytest.mark.slow
def test_a_second_run_measures_only_what_is_left(ran, monkeypatch, capsys):
    out, _ = ran
    file = out / "result.json"
    before = store.load(file)
    assert store.resume({"identity": before["identity"]}, file) == before
    monkeypatch.setattr(
        "bench.run.measure", lambda *_: pytest.fail("a finished point was measured again")
    )
    main([*WORDS, "--out", str(out)])
    assert "0 of 2 points to measure" in capsys.readouterr().out


@pytest.mark.slow
def test_other_sources_start_anew_and_keep_the_old_result(ran, tmp_path, capsys):
    result = store.load(ran[0] / "result.json")
    machine.write(result, tmp_path / "result.json")
    other = {**result, "identity": {**result["identity"], "sources": "changed"}, "points": {}}
    assert store.resume(other, tmp_path / "result.json") is other
    assert "different sources" in capsys.readouterr().out
    (kept,) = tmp_path.glob("result-*.json")
    assert store.load(kept) == result


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "old.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 1; got 0"):
        store.load(tmp_path / "old.json")


def test_an_interrupted_write_leaves_the_old_result(tmp_path):
    file = tmp_path / "result.json"
    machine.write({"schema": 1, "points": {}}, file)
    with pytest.raises(TypeError):
        machine.write({"schema": 1, "points": {1, 2}}, file)
    assert store.load(file) == {"schema": 1, "points": {}}


@pytest.mark.slow
def test_compare_finds_what_changed_and_nothing_else(ran):
    old = store.load(ran[0] / "result.json")
    assert " slower" not in compare(old, old)
    new = json.loads(json.dumps(old))
    for point in (*old["points"].values(), *new["points"].values()):
        point["peers"]["mlpcore"]["band"] = 0.05
        point["peers"]["mlpcore"]["seconds"] = [1.0, 0.99, 1.01]
    key = next(iter(new["points"]))
    new["points"][key]["peers"]["mlpcore"]["seconds"] = [2.0, 1.9, 2.1]
    text = compare(old, new)
    (line,) = [line for line in text.splitlines() if line.endswith("slower")]
    assert line.startswith(key)
    assert "2.00" in line


@pytest.mark.slow
def test_where_mlpcore_loses_the_summary_says_so(ran):
    result = store.load(ran[0] / "result.json")
    point = next(iter(result["points"].values()))
    point["peers"]["rival"] = {"status": "ok", "verdict": "slower", "over_mlpcore": [0.5, 0.4, 0.6]}
    assert "rival takes 0.50 of mlpcore's time" in losses(result)


def test_a_failing_child_is_reported_with_its_words():
    point = {"case": "online", "batch": 1, "device": "cpu"}
    with (
        Child("serve", peer="mlpcore", point=point, folder="nowhere") as child,
        pytest.raises(ChildFailed) as raised,
    ):
        child.answer()
    assert "exit 1" in str(raised.value)
    assert "FileNotFoundError" in str(raised.value)


def test_a_child_that_does_not_answer_is_stopped_and_reported_as_late(tmp_path):
    point = {"case": "online", "batch": 1, "device": "cpu"}
    late = pytest.raises(ChildFailed, match=r"stopped: no answer in 0 s; exit -9")
    with (
        Child("serve", patience=0.001, peer="mlpcore", point=point, folder=str(tmp_path)) as child,
        late,
    ):
        child.answer()


@pytest.mark.slow
def test_a_point_that_fails_leaves_the_ones_before_it_on_disk(ran, tmp_path, monkeypatch):
    done = iter(store.load(ran[0] / "result.json")["points"].values())
    left = iter([lambda: next(done), lambda: 1 / 0])  # a fault of the suite's own, which ends it
    monkeypatch.setattr("bench.run.measure", lambda *_: next(left)())
    with pytest.raises(ZeroDivisionError):
        main([*WORDS, "--out", str(tmp_path)])
    assert list(store.load(tmp_path / "result.json")["points"]) == [
        "64-64-64-64-1/16/SGD/float32/cpu"
    ]


@pytest.mark.slow
def test_mlpcore_failing_at_one_point_costs_that_point(ran, tmp_path, monkeypatch):
    done = list(store.load(ran[0] / "result.json")["points"].values())

    def measure(point, *_):
        if point.batch == 16:
            raise ChildFailed("out of memory")
        return done[1]

    monkeypatch.setattr("bench.run.measure", measure)
    with pytest.raises(SystemExit, match=r"failed: 64-64-64-64-1/16/SGD/float32/cpu$"):
        main([*WORDS, "--no-footprint", "--out", str(tmp_path)])
    result = store.load(tmp_path / "result.json")
    assert list(result["points"]) == ["64-64-64-64-1/32/SGD/float32/cpu"]
    assert result["footprint"] == {}


def test_points_for_which_no_time_is_left_wait_for_another_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "quick", dataclasses.replace(SUITES["quick"], budget=5.0))
    monkeypatch.setattr(
        "bench.run.measure",
        lambda *_: pytest.fail("a point began that is reckoned to end too late"),
    )
    main([*WORDS, "--out", str(tmp_path)])
    late = "64-64-64-64-1/16/SGD/float32/cpu, 64-64-64-64-1/32/SGD/float32/cpu"
    assert f"no time was left for {late}: repeat the command to continue" in capsys.readouterr().out
    assert store.load(tmp_path / "result.json")["points"] == {}


def test_the_commit_is_that_of_the_checkout_unless_the_environment_names_one(root, monkeypatch):
    monkeypatch.delenv("MLPCORE_COMMIT", raising=False)
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert machine.commit().rstrip("+") == head
    monkeypatch.setenv("MLPCORE_COMMIT", "abc123")
    assert machine.commit() == "abc123"


@pytest.mark.parametrize("missing", ["git", "checkout", "history"])
def test_the_commit_is_unknown_without_git_or_a_checkout(missing, tmp_path, monkeypatch):
    monkeypatch.delenv("MLPCORE_COMMIT", raising=False)
    if missing == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(machine, "ROOT", tmp_path)
    if missing == "history":
        (tmp_path / ".git").mkdir()  # which git does not take for a repository
    assert machine.commit() == "unknown"


def test_unknown_peers_and_empty_selections_are_refused(capsys):
    for words, said in (
        (["--peers", "tensorflow"], "tensorflow unknown"),
        (["--cases", "nothing"], "leaves no point"),
    ):
        with pytest.raises(SystemExit):
            main(["--suite", "quick", "--out", "unused", *words])
        assert said in capsys.readouterr().err


def test_growth_sees_an_array_that_is_gone_at_the_end():
    import numpy as np

    found = growth(lambda: np.ones(64 << 20, np.uint8).sum())
    assert 60 << 20 < found["peak_bytes"] < 80 << 20


def test_every_peer_has_a_module(root):
    for module, _ in PEERS.values():
        assert (root / "bench" / "peers" / f"{module}.py").exists()
