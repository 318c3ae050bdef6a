"""The host's share of a training step: microseconds of Python per call, on a null device.

On a device that computes nothing (bench/null_device.py) only the host takes time, none of it in
CuPy.

    python bench/host_path.py [--against REV] [--rounds 9] [--out FILE]

    step(data)          `trainer.step` with the result of `trainer.prepare`
    step(X, Y)          `trainer.step` with arrays on the device
    fit, step_end       a step of `trainer.fit` with a callback that is called after each step
    fit                 a step of `trainer.fit` with rows on the device, their order shuffled
    fit, in order       the same without shuffling
    fit, from the host  like "fit", with rows on the host, which gathers them

`fit` is timed over one epoch, by the seconds in its history, which include shuffling the rows (a
cost per row, not per step). The calls take turns, in their own process, with the garbage collector
as usual. `--against REV` checks REV out into a temporary git worktree and runs the same calls, on
the same device, with that mlpcore in another process; a third process runs this mlpcore again and
shows how much difference is noise (the A/A band).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

from bench import machine, stats
from bench.cases import CASES, Case
from bench.machine import ROOT
from bench.parent import Child

if TYPE_CHECKING:
    from bench.null_device import NullDevice

Answer = dict[str, Any]
NETS = {"latency": 128, "784-512-512-10": 1024}  # cases, with their batch sizes
PRECISIONS = ("float32", "bfloat16")
GOALS: dict[str, float | None] = {
    "step(data)": 12, "step(X, Y)": 18, "fit, step_end": 10, "fit": 3, "fit, in order": 3,
    "fit, from the host": None,
}  # microseconds per call  # fmt: skip
STEPS = 2048  # steps averaged in a time: those of an epoch of `fit`


# -- in a child, which imports mlpcore after the path is set ---------------------------------------


def serve(request: Answer) -> Iterator[Answer]:
    """Answer requests on standard input with seconds per call, for request["tree"]."""
    sys.path.insert(0, request["tree"])
    import mlpcore
    from bench import null_device

    if not Path(mlpcore.__file__).is_relative_to(request["tree"]):
        raise ImportError(f"expected the mlpcore of {request['tree']}; got {mlpcore.__file__}")
    made: dict[tuple[str, str], dict[str, Callable[[], float]]] = {}
    with null_device.installed() as device:
        yield {"mlpcore": mlpcore.__version__}
        for line in sys.stdin:
            asked = json.loads(line)
            key = asked["net"], asked["precision"]
            if key not in made:
                made[key] = calls(device, CASES[key[0]], NETS[key[0]], key[1], request["steps"])
            yield {"seconds": made[key][asked["call"]]()}


def rows(case: Case, count: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return X of zeros, and Y of zeros or one-hot rows (NumPy class labels would be scanned)."""
    X, Y = np.zeros((count, case.sizes[0]), dtype), np.zeros((count, case.sizes[-1]), dtype)
    if case.loss == "cross_entropy":
        Y[:, 0] = 1
    return X, Y


def calls(
    device: NullDevice,
    case: Case,
    batch: int,
    precision: str,
    steps: int,
) -> dict[str, Callable[[], float]]:
    """Return, for each name in GOALS, a function that times `steps` calls and returns the mean."""
    import mlpcore as mc

    class AfterEachStep(mc.Callback):
        def step_end(self, trainer: mc.Trainer, J: Any) -> None:
            pass

    epoch = rows(case, steps * batch, "uint8")  # of float32 it would take 6 GB

    def trainer() -> mc.Trainer:
        net = mc.MLP(case.sizes, case.activation, case.output, init="zeros", device="cuda")
        low = None if precision == "float32" else precision
        return mc.Trainer(net, case.loss, mc.AdamW(1e-3), precision=low)

    def stepping(prepared: bool) -> Callable[[], float]:
        device.host_inputs = False
        one, given = trainer(), rows(case, batch, "float32")
        arguments: tuple[Any, ...] = (one.prepare(*given),) if prepared else given

        def run() -> float:
            device.host_inputs = False
            one.step(*arguments)  # untimed: refill the caches
            begin = time.perf_counter()
            for _ in range(steps):
                one.step(*arguments)
            return (time.perf_counter() - begin) / steps

        return run

    def fitting(host: bool, **settings: Any) -> Callable[[], float]:
        device.host_inputs = host
        one = trainer()
        data = one.prepare(*epoch)

        def run() -> float:
            device.host_inputs = host
            history = one.fit(data, epochs=1, batch_size=batch, progress=False, **settings)
            return history["seconds"][0] / steps

        run()
        return run

    return {
        "step(data)": stepping(prepared=True),
        "step(X, Y)": stepping(prepared=False),
        "fit, step_end": fitting(host=False, callbacks=[AfterEachStep()]),
        "fit": fitting(host=False),
        "fit, in order": fitting(host=False, shuffle=False),
        "fit, from the host": fitting(host=True),
    }


# -- in the parent ---------------------------------------------------------------------------------


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Check a revision out into a temporary worktree, removed at the end, also after SIGTERM."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"--against {revision}: git {words[0]} says: {done.stderr.strip()}")
        return done.stdout.strip()

    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder).resolve() / "tree"
            try:
                git("worktree", "add", "--detach", str(tree), revision)
                yield tree
            finally:
                if tree.exists():
                    git("worktree", "remove", "--force", str(tree))
                git("worktree", "prune")
    finally:
        signal.signal(signal.SIGTERM, before)


def measure(before: Path | None, rounds: int, steps: int, nets: Sequence[str]) -> list[Answer]:
    """Return one row per net, precision and call; `before` is the tree of the other mlpcore."""
    trees = {"now": ROOT} | ({} if before is None else {"before": before, "now again": ROOT})
    found: list[Answer] = [
        {"net": net, "batch": NETS[net], "precision": precision, "call": call, "goal_us": goal,
         "series_us": {name: [] for name in trees}}
        for net in nets for precision in PRECISIONS for call, goal in GOALS.items()
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        children = {}
        for name, tree in trees.items():
            child = Child("host_path", device="cpu", tree=str(tree), steps=steps)
            children[name] = stack.enter_context(child)
            child.answer()
        for i in range(-1, rounds):  # the first round makes the nets and is discarded
            for row in found:
                request = {key: row[key] for key in ("net", "precision", "call")}
                for name in list(children)[:: 1 if i % 2 else -1]:
                    seconds = children[name].ask("time", **request)["seconds"]
                    if i >= 0:
                        row["series_us"][name].append(1e6 * seconds)
    for row in found:
        series = row["series_us"]
        row["us"] = stats.bounded(series["now"])
        if before is not None:
            row["before_us"] = stats.bounded(series["before"])
            row["before_over_now"] = stats.paired(series["before"], series["now"])
            row["band"] = stats.band(stats.paired(series["now again"], series["now"]))
    return found


def table(found: Sequence[Answer]) -> str:
    """Return the rows as text: medians with 95% bounds, or with ranges if rounds are few."""
    enough = len(found[0]["series_us"]["now"]) >= stats.FEWEST
    bound = "95% bound" if enough else "range"
    lines = [f"{'us per call':<34}{'':<20}{'now':>8}  {bound:<16}{'goal':>5}"]
    if "before_us" in found[0]:
        lines[0] += f"{'before':>10}{'before / now':>14}  {bound:<14}{'A/A band':<10}now is"
    for row in found:
        net = f"{'-'.join(map(str, CASES[row['net']].sizes))} x {row['batch']:,}"
        now, goal = row["us"], "-" if row["goal_us"] is None else f"{row['goal_us']:g}"
        line = f"{net:<24}{row['precision']:<10}{row['call']:<20}"
        line += f"{now.median:>8.1f}  {f'{now.low:.1f} … {now.high:.1f}':<16}{goal:>5}"
        if "before_us" in row:
            ratio, band = row["before_over_now"], row["band"]
            bound = f"{ratio.low:.2f} … {ratio.high:.2f}"
            line += f"{row['before_us'].median:>10.1f}{ratio.median:>14.2f}  {bound:<14}"
            line += f"{np.expm1(band):<10.1%}{stats.verdict(ratio, band) if enough else '-'}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--against", metavar="REV", help="a revision to compare with")
    parser.add_argument("--rounds", type=int, default=9, help="at least 6 for a 95%% bound")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps averaged in a time")
    parser.add_argument("--net", choices=NETS, help="only this one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON file to write")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    nets = [options.net] if options.net else list(NETS)
    try:
        with contextlib.ExitStack() as stack:
            tree = stack.enter_context(checkout(options.against)) if options.against else None
            found = measure(tree, options.rounds, options.steps, nets)
    except ValueError as error:
        parser.error(str(error))
    print(table(found))
    if options.out:
        result = {
            "machine": machine.describe("cpu"), "commit": machine.commit(),
            "against": options.against, "steps": options.steps, "host_path": found,
        }  # fmt: skip
        machine.write(result, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
