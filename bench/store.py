"""A result on disk: one JSON file, rewritten after every point.

    {"schema": 1, "suite", "identity": {…}, "machine": {…}, "commit", "ceilings": {…}, "footprint":
    {…}, "points": {key: …}}

An interruption loses at most the current point. A run into a folder with a result skips the points
that are there, if the identity (sources, versions, machine, peers, rounds) is the same; otherwise
the old file is renamed and the run starts over.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from bench import machine
from bench.cases import Suite

SCHEMA = 1
Result = dict[str, Any]


def fresh(name: str, suite: Suite, described: dict[str, Any]) -> Result:
    """Return an empty result with its identity."""
    identity = {
        "sources": machine.sources(),
        "versions": machine.versions(),
        "python": platform.python_version(),
    }
    identity |= {"cpu": described["cpu"], "cpus": described["cpus"], "gpu": described.get("gpu")}
    identity |= {"peers": list(suite.peers), "rounds": suite.rounds}
    return {
        "schema": SCHEMA, "suite": name, "identity": identity, "commit": machine.commit(),
        "machine": described,
        "ceilings": {}, "footprint": {}, "points": {},
    }  # fmt: skip


def load(file: Path) -> Result:
    """Return a result; raise a ValueError if the file does not have this schema."""
    result: Result = json.loads(file.read_text())
    if result.get("schema") != SCHEMA:
        raise ValueError(
            f"{file}: expected a result of schema {SCHEMA}; got {result.get('schema')!r}"
        )
    return result


def resume(new: Result, file: Path) -> Result:
    """Return the result in `file` if its identity is the same; else rename it and return `new`."""
    if not file.exists():
        return new
    old = load(file)
    differs = [key for key in new["identity"] if new["identity"][key] != old["identity"].get(key)]
    if not differs:
        return old
    kept = file.with_name(
        f"{file.stem}-{old['identity']['sources']}-{int(file.stat().st_mtime)}.json"
    )
    os.replace(file, kept)
    print(f"{file} has different {', '.join(differs)}: renamed to {kept.name}, starting over")
    return new
