"""The parts that sections share: command line, device, and a result saved after each entry."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import machine
from mlpcore.backends import devices
from mlpcore.backends.cuda.device import CudaDevice
from mlpcore.checks.errors import DeviceUnavailable


def options(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command-line options of a section that writes a result."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to check that it runs")
    return parser.parse_args(arguments)


def opened() -> CudaDevice:
    """Return the first GPU; exit with a message if there is none."""
    try:
        device = devices.open_device("cuda:0")
    except DeviceUnavailable as reason:
        sys.exit(f"no GPU: {reason}")
    if not device.captures:
        sys.exit(f"the GPU cannot be used with cuBLASLt: {device.library}")
    return device


class Report:
    """A result on disk: OUT/name.json, rewritten after every entry.

        {"machine": {…}, "packages": {…}, "commit", name: {entry: {…}}, "seconds": {entry: …}}

    Attributes:
        failed: the entries that raised; each holds its traceback.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.entries = folder / f"{name}.json", {}
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.content = {
            "machine": machine.describe("cuda"), "packages": machine.versions(),
            "commit": machine.commit(), name: self.entries, "seconds": self.seconds,
        }  # fmt: skip

    def add(self, entry: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Save the result of `measure`, or its error; later entries run in any case."""
        begin = time.perf_counter()
        try:
            self.entries[entry] = measure()
        except Exception as error:  # `finish` reports it and fails the section
            self.failed.append(entry)
            self.entries[entry] = {"failed": repr(error), "traceback": traceback.format_exc()}
            traceback.print_exc()
        self.seconds[entry] = round(time.perf_counter() - begin, 2)
        machine.write(self.content, self.file)
        text = json.dumps(self.entries[entry])
        print(f"{entry} ({self.seconds[entry]} s): {text[:600]}", flush=True)

    def finish(self, words: str) -> int:
        """Print the section's last line; return its exit status."""
        print(f"{words}; FAILED: {', '.join(self.failed)}" if self.failed else words)
        return int(bool(self.failed))
