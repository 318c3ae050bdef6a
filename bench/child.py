"""One implementation at one point, in its own process: one line of JSON in, one out.

    python -m bench.child '{"job": "serve", "peer": "torch", "point": {…}, "folder": "…"}'

The job "serve" first answers {"losses": of the first ten steps, …} or {"missing": reason}, then
the requests

    {"do": "calibrate", "what": "step", "seconds": 0.1}
        with {"count": steps per block; null: not available}
    {"do": "time", "what": "step", "count": 40}
        with {"seconds": per step, "device_seconds": …}

The jobs "memory", "ceiling" and "describe" give one answer; "host_path" is described in
bench/host_path.py. Errors are not caught: the process ends with a traceback on standard error,
which the parent reads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import bounds, machine, memory
from bench.cases import STEPS, TIMED_RATE, Point
from bench.peers import Runner, Unsupported, build
from bench.work import Work

Answer = dict[str, Any]
# most bytes of arrays for running the GEMMs alone
GEMM_BYTES = {"cpu": 1 << 30, "cuda": 16 << 30}


def serve(peer: str, work: Work) -> Iterator[Answer]:
    """Answer the requests on standard input, in order."""
    runner = build(peer, work)
    first: Answer = {"losses": runner.losses(STEPS), "note": runner.note, "blas": machine.blas()}
    if (most := runner.peak()) is not None:  # before the GEMMs alone allocate arrays
        rows = sum(array.nbytes for array in work.XY)
        first["memory"] = {
            "peak_bytes": max(0, most - rows),
            "how": "allocator",
            "nvml_bytes": memory.nvml(),
        }
    yield first | {
        key: getattr(runner, key) for key in ("plan_bytes", "chunk_rows") if hasattr(runner, key)
    }
    runner.set_rate(TIMED_RATE)
    runs: dict[str, Callable[[int], float | None] | None] = {"step": runner.run}
    for line in sys.stdin:
        yield _answer(json.loads(line), runner, work, runs)


def _answer(request: Answer, runner: Runner, work: Work, runs: dict[str, Any]) -> Answer:
    if request["what"] == "gemms" and "gemms" not in runs:
        fits = 12 * work.batch * sum(work.case.sizes) <= GEMM_BYTES[work.device]
        runs["gemms"] = runner.gemms if fits else None
    run = runs[request["what"]]
    if run is None:
        return {"count": None}
    return (
        {"count": calibrate(run, request["seconds"])}
        if request["do"] == "calibrate"
        else block(run, request["count"])
    )


def calibrate(run: Callable[[int], Any], seconds: float) -> int:
    """Return the number of runs that takes about this long; run them once, to compile."""
    run(1)
    count = 1
    while True:
        run(count)  # may compile
        begin = time.perf_counter()
        run(count)
        taken = time.perf_counter() - begin
        if taken >= seconds / 2 or count >= 1 << 20:
            break
        count = max(2 * count, min(100 * count, int(0.8 * seconds / taken * count)))
    return count


def block(run: Callable[[int], float | None], count: int) -> Answer:
    """Time one block after an untimed run, which wakes sleeping threads."""
    run(1)
    begin = time.perf_counter()
    device = run(count)
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds / count,
        "device_seconds": None if device is None else device / count,
    }


def peak(peer: str, point: Point, folder: Path, chunk_rows: int) -> Answer:
    """Return the growth of this process's memory by making the network and three steps."""
    small = Work(dataclasses.replace(point, batch=min(2, point.batch)), folder)
    build(peer, small).run(1)
    work = Work(point, folder, chunk_rows)
    assert len(work.XY[0]) == work.pool  # makes the rows beforehand

    def train() -> Runner:
        runner = build(peer, work)
        for _ in range(3):
            runner.run(1)
        return runner

    return memory.growth(train)


def answers(job: str, request: Answer) -> Iterator[Answer]:
    """Yield the answers of the process."""
    if job == "describe":
        yield machine.describe(request["device"])
    elif job == "ceiling":
        yield bounds.measure(request["device"], request["precision"])
    elif job == "host_path":
        from bench import host_path

        yield from host_path.serve(request)
    else:
        point, folder, rows = (
            Point(**request["point"]),
            Path(request["folder"]),
            request.get("chunk_rows", 0),
        )
        try:
            if job == "memory":
                yield peak(request["peer"], point, folder, rows)
            else:
                yield from serve(request["peer"], Work(point, folder, rows))
        except (ImportError, Unsupported) as reason:
            yield {"missing": str(reason)}


def main() -> None:
    request = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)  # keep the libraries' output out of the answers
        for answer in answers(request.pop("job"), request):
            print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    main()
