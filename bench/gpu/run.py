"""Run sections one after the other, each in its own process and within its own time limit.

    bash bench/gpu/run.sh probe warm tests steps
    bash bench/gpu/run.sh tests kernels peers memcheck ncu

The sections' output goes to OUT/log.txt, their results to files in that folder, and a summary ends
both the log and the output. docs/gpu.md explains each file and figure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
STOPPED, MISSING = 124, 127  # exit statuses, as for `timeout` and a shell
LOGGED = 1 << 20  # most bytes of a section in the log (its end is kept)
GRACE = 3.0  # seconds between the request to end and the end
HANG = 40  # seconds per test
NEEDED = ("numpy", "threadpoolctl", "safetensors", "tqdm", "pytest")  # "gpu" looks for CuPy
PEERS = "torch-graph,torch-compile-graph,jax-scan"
KERNELS = "bias_activation|activation_gradient|loss|cross_entropy|gather|update|gradient_norm"


class Section(NamedTuple):
    """A command and its time limit in seconds."""

    seconds: float
    command: Sequence[str]


class Outcome(NamedTuple):
    """A section's exit status, the seconds it took, and the last line that it printed."""

    name: str
    status: int
    seconds: float
    last: str

    def __str__(self) -> str:
        known = {0: "ok", STOPPED: "STOPPED at its time limit"}
        verdict = known.get(self.status, f"FAILED ({self.status})")
        return f"{self.name:<10} {verdict:<26} {self.seconds:>5.0f} s  {self.last}"


def sections(out: Path) -> dict[str, Section]:
    """All sections by name; "gpu" comes before any other and decides whether they run."""

    def module(name: str, *words: str) -> list[str]:
        return [sys.executable, "-m", f"bench.gpu.{name}", *words]

    def sanitizer(tool: str, what: str) -> list[str]:
        words = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        return ["compute-sanitizer", *words, *module("sanitized", what)]

    details = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis")
    ncu = ["ncu", "--clock-control", "none", "--graph-profiling", "node"]
    ncu += [word for name in details for word in ("--section", name)]
    ncu += ["--kernel-name-base", "demangled", "--kernel-name", f"regex:{KERNELS}"]
    ncu += ["--launch-count", "24"]
    ncu += ["--csv", "--page", "raw", "--log-file", str(out / "ncu.csv")]
    kernels = [sys.executable, "bench/kernels.py", "--gib", "2", "--rounds", "3", "--out", str(out)]
    peers = [sys.executable, "bench/run.py", "--suite", "gpu", "--no-footprint"]
    peers += ["--cases", "wide,latency,narrow", "--peers", PEERS, "--out", str(out / "peers")]
    return {
        "gpu": Section(60, module("check")),
        "probe": Section(75, module("probe", "--out", str(out))),
        "warm": Section(75, module("warm", "--out", str(out))),
        "tests": Section(140, tests(out)),
        "steps": Section(110, module("steps", "--out", str(out))),
        "kernels": Section(45, kernels),
        "peers": Section(210, peers),
        "memcheck": Section(60, sanitizer("memcheck", "steps")),
        "racecheck": Section(60, sanitizer("racecheck", "kernels")),
        "synccheck": Section(60, sanitizer("synccheck", "kernels")),
        "ncu": Section(70, [*ncu, *module("profiled")]),
    }


def tests(out: Path) -> list[str]:
    """Return the command for the GPU tests, with workers and time limits if plugins allow."""
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.guard", "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark", "-m", "gpu", "tests/gpu", "-q", "--tb=short"]
    command += [f"--junitxml={out / 'tests.xml'}"]
    if importlib.util.find_spec("xdist"):
        workers = max(1, min(8, (os.cpu_count() or 2) // 2))
        command += ["-n", str(workers), "--max-worker-restart=30"]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={HANG}", "--timeout-method=thread"]
    return command


def run(chosen: Mapping[str, Section], out: Path) -> list[Outcome]:
    """Run the sections, or none if "gpu" fails; print and log the summary."""
    outcomes: list[Outcome] = []
    with open(out / "log.txt", "w+b", buffering=0) as log:
        for name, section in chosen.items():
            log.write(f"=== {name}\n".encode())
            outcome, printed = _run_one(name, section, log)
            outcomes.append(outcome)
            if outcome.status:
                print(*printed.splitlines()[-30:], sep="\n")
            print(outcome, flush=True)
            if name == "gpu" and outcome.status:
                break
        left = [name for name in chosen if name not in {outcome.name for outcome in outcomes}]
        summary = ["=== summary", *map(str, outcomes), *(f"{name:<10} not run" for name in left)]
        log.write("\n".join([*summary, ""]).encode())
    print(*summary, sep="\n")
    return outcomes


def _run_one(name: str, section: Section, log: FileIO) -> tuple[Outcome, str]:
    """Run one section; return its outcome and its output, which is also logged."""
    begin, start = time.monotonic(), log.tell()
    if shutil.which(section.command[0]) is None:
        status = MISSING
        log.write(f"{section.command[0]} is not on PATH\n".encode())
    else:
        folders = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        process = subprocess.Popen(
            section.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            cwd=ROOT, env=environment, process_group=0,
        )  # fmt: skip
        try:
            status = process.wait(section.seconds)
        except subprocess.TimeoutExpired:
            status = STOPPED
        finally:
            _end(process)
    log.seek(start)
    text = log.read()
    if len(text) > LOGGED:
        log.seek(start)
        log.truncate()
        log.write(text[-LOGGED:])
    printed = text.decode(errors="replace")
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "it printed nothing"
    status = status if status >= 0 else 128 - status  # a signal's number
    return Outcome(name, status, time.monotonic() - begin, last), printed


def _end(process: subprocess.Popen) -> None:
    """End a section and all processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def lacking() -> Iterable[str]:
    """Yield a message for each missing pytest plugin."""
    if not importlib.util.find_spec("xdist"):
        yield "pytest-xdist is not installed: a broken CUDA context ends the section"
    if not importlib.util.find_spec("pytest_timeout"):
        yield "pytest-timeout is not installed: a test that hangs ends the section"


def main(arguments: Sequence[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__, formatter_class=layout)
    names = [name for name in sections(Path()) if name != "gpu"]
    words = {"metavar": "SECTION", "help": ", ".join(names)}
    parser.add_argument("sections", nargs="+", choices=names, **words)
    parser.add_argument("--patience", type=float, default=1.0, help="factor on all time limits")
    options = parser.parse_args(arguments)
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        parser.error(
            f"{sys.executable} lacks {', '.join(missing)}: install them, or name an "
            "interpreter that has them: PYTHON=.venv/bin/python bash bench/gpu/run.sh …"
        )
    out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="mlpcore-gpu-")).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").touch()
    except OSError as error:
        parser.error(f"OUT must be a folder that can be written; got {out}: {error.strerror}")
    print(f"results: {out}")
    for line in lacking() if "tests" in options.sections else ():
        print(line)
    every, chosen = sections(out), {}
    for name in ("gpu", *options.sections):
        seconds, command = every[name]
        chosen[name] = Section(seconds * options.patience, command)
    return max(outcome.status for outcome in run(chosen, out))


if __name__ == "__main__":
    sys.exit(main())
