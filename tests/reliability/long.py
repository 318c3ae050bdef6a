"""The tests of this folder at full length: `python -m tests.reliability.long [NAME …]`; an hour or
less, most of it the soak.

It prints a line for each part, and ends with status 1 if one has failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from hypothesis import given, settings

from tests.reliability import kills, test_fuzz, test_kills, test_reference, test_soak

KILLS, CALLS, SEEDS, EXAMPLES, STEPS = 50, 10_000, 5, 5_000, 200_000


def killed(folder: Path) -> str:
    """kill -9 at random moments, once for each kind of run."""
    test_kills.lay_out(folder)
    for kind in kills.KINDS:
        test_kills.compare(folder, kind, KILLS)
    return f"{KILLS} kills of each of {len(kills.KINDS)} runs: the same parameters"


def fuzz(folder: Path) -> str:
    """Random calls of the public door."""
    for seed in range(SEEDS):
        place = folder / str(seed)
        place.mkdir()
        os.chdir(place)
        faults = test_fuzz.run(place, 100 + seed, CALLS)
        assert not faults, faults
    return f"{SEEDS} x {CALLS:,} calls: no fault"


def reference(folder: Path) -> str:
    """Steps against plain NumPy."""
    settings(max_examples=EXAMPLES, deadline=None, database=None)(
        given(test_reference.CASES)(test_reference.check)
    )()
    return f"{EXAMPLES:,} examples equal"


def soak(folder: Path) -> str:
    """Many steps."""
    for kind in ("step", "fit"):
        test_soak.check(kind, STEPS)
    return f"2 x {STEPS:,} steps: memory, time and threads as at the beginning"


FULL = """
import numpy as np, mlpcore as mc, os, sys
X, Y = np.ones((64, 100), np.float32), np.ones((64, 1), np.float32)
trainer = mc.Trainer(mc.MLP([100, 300, 1], device="cpu"), "squared_error")  # 0.4 MB a file
try:
    trainer.fit(X, Y, epochs=9, batch_size=64, progress=False, checkpoint="run", keep=9)
except OSError as error:
    there = mc.Trainer.load("run", "cpu").progress.step
    print(error.errno, there, trainer.progress.step, sorted(os.listdir()))
trainer.save(sys.argv[1])
"""


def disk(folder: Path) -> str:
    """A file system of 1 MB that is full after two checkpoints."""
    code, place = folder / "full.py", folder / "disk"
    code.write_text(FULL)
    place.mkdir()
    command = f'mount -t tmpfs -o size=1m none "{place}" && cd "{place}" && '
    command += f'exec "{sys.executable}" "{code}" "{folder}/saved"'
    root = Path(__file__).parents[2]
    run = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", command],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    if (
        "unshare failed" in run.stderr
        or "permission denied" in run.stderr
        or "must be superuser" in run.stderr
    ):
        return f"NOT RUN: nothing may be mounted here ({run.stderr.strip()})"
    assert run.returncode == 0, run.stderr
    assert run.stdout == "28 2 3 ['run', 'run.1']\n", run.stdout
    return "a full tmpfs: two checkpoints intact, no litter, saved elsewhere"


PARTS: tuple[Callable[[Path], str], ...] = (disk, killed, fuzz, reference, soak)


def main(names: list[str]) -> int:
    """Run the parts of these names, or all."""
    failed = 0
    for part in PARTS:
        if names and part.__name__ not in names:
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = part(Path(folder))
            except AssertionError:
                failed, said = failed + 1, f"FAILED\n{traceback.format_exc()}"
            finally:
                os.chdir("/")
        print(f"{part.__name__}: {said} ({time.perf_counter() - begin:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
