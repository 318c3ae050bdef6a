"""A result on disk: one JSON file, written anew after every point, so that an interruption loses at
most the point at hand.

    {"schema": 1, "suite", "identity": {…}, "machine": {…}, "commit", "ceilings": {…}, "footprint":
    {…}, "points": {key: …}}

A run into a folder that has one skips the points that are there, if its identity (sources,
versions, machine, peers, rounds) is the same; otherwise the old file is kept under another name and
the run starts anew.
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
    """An empty result with what identifies it."""
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
    """A result. ValueError where the file is none of this schema."""
    result: Result = json.loads(file.read_text())
    if result.get("schema") != SCHEMA:
        raise ValueError(
            f"{file}: expected a result of schema {SCHEMA}; got {result.get('schema')!r}"
        )
    return result


def resume(new: Result, file: Path) -> Result:
    """The result in `file` where it goes on with the same code on the same machine, else `new`, the
    old one renamed.
    """
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
    print(f"{file} is of other {', '.join(differs)}: kept as {kept.name}, starting anew")
    return new
