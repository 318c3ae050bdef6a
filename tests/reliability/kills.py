"""A run that saves after every step, to be killed at any moment: `python -m tests.reliability.kills
FOLDER KIND EPOCHS`.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

import mlpcore as mc

KINDS = ("early stopping", "momentum", "memmap")
BATCHES = 60  # of an epoch


def main(folder: str, kind: str, epochs: str) -> None:
    """Begin the run, or go on with it; print how far it was, and at the end a digest of the
    parameters.
    """
    path = Path(folder) / "run.safetensors"
    rng = np.random.default_rng(0)
    X, Y = (
        rng.standard_normal((BATCHES * 10, 6)).astype(np.float32),
        rng.standard_normal((BATCHES * 10, 2)).astype(np.float32),
    )
    optimizer = (
        mc.SGD(mc.StepDecay(0.02, 100), momentum=0.9)
        if kind == "momentum"
        else mc.AdamW(mc.Cosine(1e-2, warmup=5))
    )
    more = {}
    if kind == "early stopping":
        more = {"early_stopping": mc.EarlyStopping(50), "validation": (X[:50], Y[:50])}
    rows = (X, Y)
    if kind == "memmap":
        rows = tuple(
            np.memmap(Path(folder).parent / name, np.float32, "r").reshape(len(X), -1)
            for name in "XY"
        )
    if path.exists():
        trainer = mc.Trainer.load(path, "cpu")
    else:
        net = mc.MLP([6, 24, 2], "gelu", device="cpu", seed=1)
        trainer = mc.Trainer(
            net, "squared_error", optimizer, l2=1e-3, clip_norm=1.0, dropout=0.2, seed=2
        )
    print(trainer.progress.step, flush=True)
    if trainer.unfinished or not trainer.progress.step:
        trainer.fit(
            *rows,
            epochs=int(epochs),
            batch_size=10,
            progress=False,
            checkpoint=path,
            every="1 step",
            keep=3,
            **more,
        )
    print(hashlib.sha256(trainer.net.parameters.tobytes()).hexdigest(), flush=True)


def start(folder: Path, kind: str, times: int) -> subprocess.Popen[str]:
    """The run in a process of its own, long enough to be killed so many times."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{Path(mc.__file__).parents[1]}{os.pathsep}{root}"}
    command = [sys.executable, "-m", "tests.reliability.kills", str(folder), kind, str(4 * times)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def killed(folder: Path, kind: str, times: int, seed: int) -> tuple[str, int]:
    """The digest of a run that was to be killed so many times, and how often it was before it had
    ended.

    Whatever lies in its folder is whole, or a temporary file; what a kill left behind is gone after
    the next save.
    """
    rng, reached = np.random.default_rng(seed), -1
    for kills in range(times):
        process = start(folder, kind, times)
        assert process.stdout is not None
        steps = int(process.stdout.readline())
        assert steps >= reached, "a step that had been saved was lost"
        timer = threading.Timer(rng.uniform(0, 0.1), process.kill)
        timer.start()
        rest, errors = process.communicate(timeout=120)
        timer.cancel()
        assert process.returncode in (0, -signal.SIGKILL), errors
        if process.returncode == 0:
            return rest.split()[-1], kills
        reached = inspect(folder, reached)
    process = start(folder, kind, times)
    rest, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    left = sorted(os.listdir(folder))
    assert left == ["run.1.safetensors", "run.2.safetensors", "run.safetensors"], left
    return rest.split()[-1], times


def inspect(folder: Path, least: int) -> int:
    """Read every file of the run; the step of the newest, which none may be ahead of."""
    found = {}
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            found[name] = mc.Trainer.load(folder / name, "cpu").progress.step
        else:
            assert name.endswith(".part"), name
    newest = found.pop("run.safetensors", -1)
    assert newest >= least
    assert all(step <= newest for step in found.values())
    return newest


if __name__ == "__main__":
    main(*sys.argv[1:])
