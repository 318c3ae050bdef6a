"""Runs that are killed while they write: whatever the moment, what lies there is whole and goes on
to the same parameters.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.io import atomic
from tests.reliability import kills

KILLS = 2


def lay_out(folder):
    """The memmap's files; the runs' folders lie beside them."""
    rng = np.random.default_rng(0)
    for name, columns in (("X", 6), ("Y", 2)):
        rng.standard_normal((kills.BATCHES * 10, columns)).astype(np.float32).tofile(folder / name)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("rows"))


def compare(rows, kind, times):
    """Kill a run so many times; an untouched one must end with the same parameters."""
    folders = [rows / f"{kind} {which}" for which in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    whole, errors = kills.start(folders[0], kind, times).communicate(timeout=600)
    digest, landed = kills.killed(folders[1], kind, times, seed=1)
    assert digest == whole.split()[-1], errors
    assert landed >= times // 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", kills.KINDS)
def test_killed_while_it_saves_a_run_ends_with_the_same_parameters(kind, rows):
    compare(rows, kind, KILLS)


def test_what_a_killed_writer_left_is_taken_away_and_what_others_do_is_not(tmp_path):
    path = tmp_path / "run.safetensors"
    half = "import sys, os, signal; from mlpcore.io import atomic\n"
    half += "with atomic.replacing(sys.argv[1]) as file:\n    "
    for end in ("os.kill(os.getpid(), signal.SIGKILL)", "print(flush=True); sys.stdin.read()"):
        environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
        process = subprocess.Popen(
            [sys.executable, "-c", f"{half}file.write(b'half'); {end}", str(path)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        process.stdout.readline()
        if "kill" in end:
            process.communicate(timeout=60)
    dead_and_alive = [name for name in os.listdir(tmp_path) if name.endswith(".part")]
    assert len(dead_and_alive) == 1, "the second writer has taken the first one's file away"
    others = {
        ".run.safetensors.settings",
        ".other.safetensors.abcdefgh.part",
        ".run.safetensors.part",
    }
    for name in others:
        (tmp_path / name).touch()
    mc.MLP([2, 1]).save(path)
    assert {*os.listdir(tmp_path)} == {path.name, *dead_and_alive, *others}, (
        "a file that is being written is left alone"
    )
    process.communicate("", timeout=60)
    assert process.returncode == 0
    assert path.read_bytes() == b"half"


def test_many_writers_of_one_file_end_with_a_whole_one_and_no_litter(tmp_path):
    path, errors = tmp_path / "file", []

    def write(number):
        try:
            for _ in range(40):
                with atomic.replacing(path) as file:
                    file.write(b"%d" % number * 1000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["file"]
    assert len({*path.read_bytes()}) == 1
