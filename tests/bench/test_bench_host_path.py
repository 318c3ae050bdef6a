"""The host's share of a step: the command end to end, and the checkout of the other revision."""

import contextlib
import json
import subprocess
import sys

import pytest

from bench import host_path, machine

FEW = ["--rounds", "1", "--steps", "8", "--net", "latency"]
clone = pytest.mark.skipif(not (machine.ROOT / ".git").exists(), reason="needs a git clone")


def worktrees():
    command = ["git", "-C", str(machine.ROOT), "worktree", "list"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_command_times_every_call_and_keeps_the_series(tmp_path, capsys):
    host_path.main([*FEW, "--out", str(tmp_path / "host.json")])
    head, *lines = capsys.readouterr().out.strip().splitlines()
    assert "before" not in head
    assert len(lines) == len(host_path.GOALS) * len(host_path.PRECISIONS)
    result = json.loads((tmp_path / "host.json").read_text())
    assert set(result) == {"machine", "commit", "against", "steps", "host_path"}
    assert [row["call"] for row in result["host_path"]] == 2 * list(host_path.GOALS)
    for row, line in zip(result["host_path"], lines, strict=True):
        (us,) = row["series_us"]["now"]
        assert 0 < us == row["us"][0]
        assert row["call"] in line
        assert f"{us:.1f}" in line


@pytest.mark.slow
@clone
def test_another_revision_takes_its_turns_and_leaves_no_worktree(tmp_path, capsys):
    before = worktrees()
    host_path.main([*FEW, "--against", "HEAD", "--out", str(tmp_path / "host.json")])
    assert "before / now" in capsys.readouterr().out
    text = (tmp_path / "host.json").read_text()
    for row in json.loads(text)["host_path"]:
        (now,), (then,) = row["series_us"]["now"], row["series_us"]["before"]
        assert row["before_over_now"][0] == pytest.approx(then / now)
    assert "tree" not in text
    assert worktrees() == before


@clone
def test_a_worktree_is_removed_though_the_run_is_interrupted():
    before = worktrees()
    with contextlib.suppress(KeyboardInterrupt), host_path.checkout("HEAD") as tree:
        assert (tree / "mlpcore" / "trainer.py").exists()
        assert worktrees() != before
        raise KeyboardInterrupt
    assert not tree.exists()
    assert worktrees() == before


@clone
def test_a_revision_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        host_path.main([*FEW, "--against", "no-such-revision"])
    assert "--against no-such-revision: git worktree says: " in capsys.readouterr().err


def test_a_child_refuses_another_mlpcore_than_the_one_it_is_to_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(ImportError, match="expected the mlpcore of"):
        next(host_path.serve({"tree": str(tmp_path), "steps": 1}))
