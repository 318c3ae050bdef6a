"""One point: start its processes, compare losses, time the implementations that agree."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import bounds, machine, stats
from bench.cases import CASES, Point, Suite
from bench.parent import Child, ChildFailed, once
from bench.work import prepare

Answer = dict[str, Any]
# |J - J of mlpcore| <= a |J| + b |J - J of the first step|: rounding of the value, and a share of
# the change by training
TOLERANCE = {
    "float32": (3e-5, 0.01),
    "tf32": (3e-3, 0.05),
    "bfloat16": (2e-2, 0.2),
    "float16": (5e-3, 0.1),
}


def agree(losses: Sequence[float], reference: Sequence[float], precision: str) -> str:
    """Return where the losses first disagree by more than the tolerance; "" if they never do."""
    rounding, share = TOLERANCE[precision]
    for i, (J, ours) in enumerate(zip(losses, reference, strict=True)):
        allowed = rounding * abs(ours) + share * abs(ours - reference[0])
        if not abs(J - ours) <= allowed:
            found = f"the loss of step {i + 1} is {J:.7g}, mlpcore's {ours:.7g}"
            return f"{found}, tolerance {allowed:.2g}"
    return ""


def measure(point: Point, suite: Suite, ceiling: Answer, folder: Path) -> Answer:
    """Return a result's entry for one point; raise ChildFailed if mlpcore itself fails."""
    case = CASES[point.case]
    result: Answer = {
        **dataclasses.asdict(point), "sizes": case.sizes, "activation": case.activation,
        "loss": case.loss,
        "data": prepare(case, folder),
        "bound": bounds.bound(case, point.batch, point.optimizer, ceiling), "peers": {},
    }  # fmt: skip
    found: dict[str, Answer] = result["peers"]
    with contextlib.ExitStack() as stack:
        children = {
            "mlpcore": stack.enter_context(
                _child("serve", "mlpcore", point, folder, 0, suite.patience)
            )
        }
        found["mlpcore"] = _first(children["mlpcore"], point)
        if found["mlpcore"]["status"] != "ok":
            raise ChildFailed(found["mlpcore"]["reason"])
        room, needed, rows = (
            machine.available_bytes(),
            _bytes(point),
            found["mlpcore"]["chunk_rows"],
        )
        losses = found["mlpcore"]["losses"]
        for name in ("mlpcore again", *suite.peers_of(point)):
            if point.device == "cpu" and needed * len(children) > 0.8 * room:
                found[name] = {
                    "status": "missing",
                    "reason": f"not enough memory for another process of {needed >> 20:,} MiB",
                }
            else:  # they import and compile in parallel
                children[name] = stack.enter_context(
                    _child("serve", name, point, folder, rows, suite.patience)
                )
            if name == "mlpcore again" and point.device != "cpu":
                # it chooses algorithms by timing them: no peer may use the GPU meanwhile
                found[name] = _first(children[name], point, losses)
        deadline = time.monotonic() + suite.patience
        for name in list(children)[1:]:
            if name not in found:
                found[name] = _first(children[name], point, losses, deadline)
            if found[name]["status"] != "ok":
                children.pop(name).close()
        result["rounds"] = _time(children, found, suite)
    _compare(found)
    if suite.memory and point.device == "cpu":
        for name in children:
            if name != "mlpcore again":
                found[name]["memory"] = _memory(name, point, folder, rows)
    return result


def _child(
    job: str, name: str, point: Point, folder: Path, rows: int, patience: float = 300.0
) -> Child:
    peer = name.removesuffix(" again")
    return Child(
        job,
        patience=patience,
        peer=peer,
        point=dataclasses.asdict(point),
        folder=str(folder),
        chunk_rows=rows,
    )


def _bytes(point: Point) -> int:
    """Return the rough memory of a process that keeps every layer's output."""
    case = CASES[point.case]
    return (300 << 20) + 4 * (
        point.batch * (case.sizes[0] + 3 * sum(case.sizes[1:])) + 6 * case.parameters
    )


def _first(
    child: Child,
    point: Point,
    reference: Sequence[float] | None = None,
    deadline: float | None = None,
) -> Answer:
    """Return whether an implementation is available and agrees with mlpcore."""
    try:
        answer = child.answer(deadline)
    except ChildFailed as error:
        return {"status": "failed", "reason": str(error)}
    if "missing" in answer:
        return {"status": "missing", "reason": answer["missing"]}
    why = agree(answer["losses"], reference or answer["losses"], point.precision)
    return {"status": "disagrees" if why else "ok", "reason": why, **answer}


def _time(children: dict[str, Child], found: dict[str, Answer], suite: Suite) -> int:
    """Time blocks in turn, reversing the order every round; return the number of rounds.

    Times go to `found[name]["series"]`.
    """
    counts: dict[tuple[str, str], int] = {}

    def ask(name: str, do: str, **request: Any) -> Answer:
        """Return an answer; {} from a peer that just failed, which is not asked again."""
        # idle BLAS threads spin for a while: let those of the previous process fall asleep
        time.sleep(suite.pause)
        try:
            return children[name].ask(do, **request)
        except ChildFailed as error:
            if name == "mlpcore":
                raise
            found[name] = {"status": "failed", "reason": str(error)}
            children.pop(name).close()
            return {}

    for name in list(children):
        found[name] |= {"series": {}, "device_series": []}
        for what in ("step", "gemms") if name != "mlpcore again" else ("step",):
            if name in children and (
                count := ask(name, "calibrate", what=what, seconds=suite.seconds).get("count")
            ):
                counts[name, what], found[name]["series"][what] = count, []
    begin, done = time.perf_counter(), 0
    while done < suite.rounds and (
        done < stats.FEWEST or time.perf_counter() - begin < suite.limit
    ):
        for name, what in list(counts)[:: 1 if done % 2 else -1]:
            if name in children and (
                answer := ask(name, "time", what=what, count=counts[name, what])
            ):
                found[name]["series"][what].append(answer["seconds"])
                if what == "step" and answer["device_seconds"] is not None:
                    found[name]["device_series"].append(answer["device_seconds"])
        done += 1
    return done


def _compare(found: dict[str, Answer]) -> None:
    """Compute medians, ratios and verdicts from the series."""
    ours = found["mlpcore"]["series"]["step"]
    again = found.get("mlpcore again", {}).get("series", {}).get("step")
    width = stats.band(stats.paired(again, ours)) if again else 0.0
    for name, entry in found.items():
        if "series" not in entry:
            continue
        series = entry["series"]
        entry["seconds"] = stats.bounded(series["step"])
        if entry["device_series"]:
            entry["device_seconds"] = stats.bounded(entry["device_series"])
        if "gemms" in series:
            entry["gemms_seconds"] = stats.bounded(series["gemms"])
            entry["over_gemms"] = stats.paired(series["step"], series["gemms"])
        if name != "mlpcore":
            entry["over_mlpcore"] = stats.paired(series["step"], ours)
            entry["verdict"] = (
                "A/A" if name == "mlpcore again" else stats.verdict(entry["over_mlpcore"], width)
            )
            if len(ours) < stats.FEWEST:
                entry["verdict"] = "too few"  # enough rounds for a bound
    found["mlpcore"]["band"] = math.expm1(width)


def _memory(name: str, point: Point, folder: Path, rows: int) -> Answer:
    try:
        with _child("memory", name, point, folder, rows) as child:
            return child.answer()
    except ChildFailed as error:
        return {"failed": str(error)}


def ceiling(point: Point) -> Answer:
    """Return the rates measured for a point's device and precision; may raise ChildFailed."""
    return once(
        "ceiling", tf32=point.precision == "tf32", precision=point.precision, device=point.device
    )
