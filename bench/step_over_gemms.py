"""The time of a training step over that of its GEMMs alone: the overhead.

    python bench/step_over_gemms.py [--cases 784-512-512-10] [--batches 128] [--rounds 21] [--json
    FILE]

Runs the suite "step" of bench/run.py in a temporary folder.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="only cases whose names or sizes contain this")
    parser.add_argument(
        "--batches", default="", help="batch sizes to measure instead of the suite's"
    )
    parser.add_argument("--rounds", default="21")
    parser.add_argument("--json", type=Path, help="keep the result here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--suite", "step", "--out", folder, "--cases", options.cases]
        run.main([*words, "--batches", options.batches, "--rounds", options.rounds])
        if options.json:
            shutil.copy(Path(folder) / "result.json", options.json)


if __name__ == "__main__":
    main()
