"""The benchmark suite: throughput, step time and peak memory of mlpcore and its peers.

    python bench/run.py --suite quick|step|cpu|gpu|gpu-sweep --out DIR [--cases 784] [--batches
    32,128]
        [--peers torch,jax-scan] [--rounds 21] [--no-footprint]
    python bench/run.py compare A.json B.json
    python bench/run.py show RESULT.json [--out DIR]

Results go to DIR/result.json, point by point, and pictures to DIR; a second run with the same DIR
measures what is left. "step" is the training step over its GEMMs alone. docs/benchmarks.md explains
every column.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a clone, nothing installed

from bench import compare, footprint, machine, store, tables
from bench.cases import CASES, START, SUITES, Suite
from bench.measure import ceiling, measure
from bench.parent import ChildFailed, once
from bench.peers import PEERS

FOOTPRINT = 60.0  # most seconds for the footprint


def selected(options: argparse.Namespace) -> Suite:
    """Return the suite with the options applied; ValueError if empty or a peer is unknown."""
    suite = SUITES[options.suite]
    names = {case.name: f"{case.name} {'-'.join(map(str, case.sizes))}" for case in CASES.values()}
    points = [
        point
        for point in suite.points
        if any(part in names[point.case] for part in options.cases.split(","))
    ]
    if options.batches:
        sizes = [int(size) for size in options.batches.split(",")]
        points = list(
            dict.fromkeys(
                dataclasses.replace(point, batch=size) for point in points for size in sizes
            )
        )
        points = [point for point in points if point.batch == 1 or point.case != "online"]
    if not points:
        raise ValueError(f"--cases {options.cases!r} leaves no point in suite {options.suite!r}")
    changes: dict[str, object] = {"points": points}
    if options.peers is not None:
        peers = tuple(filter(None, options.peers.split(",")))
        if unknown := [name for name in peers if name not in PEERS]:
            raise ValueError(f"--peers: {', '.join(unknown)} unknown; there are {', '.join(PEERS)}")
        changes |= {"peers": peers, "light": peers}
    return dataclasses.replace(
        suite, **changes, **({"rounds": options.rounds} if options.rounds else {})
    )


def run(options: argparse.Namespace) -> None:
    """Measure the missing points that fit the budget, print every point, and draw."""
    begin, suite = time.monotonic(), selected(options)

    def fits(seconds: float) -> bool:
        return not suite.budget or time.monotonic() - begin + seconds <= suite.budget

    options.out.mkdir(parents=True, exist_ok=True)
    file, device = options.out / "result.json", suite.points[0].device
    result = store.resume(store.fresh(options.suite, suite, once("describe", device=device)), file)
    left = [point for point in suite.points if point.key not in result["points"]]
    print(
        f"suite {options.suite}: {len(left)} of {len(suite.points)} points to measure; the "
        f"whole suite takes {suite.expected}"
    )
    if device == "cuda" and result["machine"]["device"] == "cpu":
        sys.exit(f"nothing measured: no usable CUDA device: {result['machine']['cuda']}")
    print(tables.LEGEND)
    failed, late = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(left, unit="point", disable=None) as progress,
    ):
        for point in progress:
            kind = f"{point.device}/{point.precision}"
            if not fits(suite.reckoned(point) + START * (kind not in result["ceilings"])):
                late.append(point.key)
                continue
            progress.set_description(f"{point.case} x {point.batch:,}")
            try:
                if kind not in result["ceilings"]:
                    result["ceilings"][kind] = ceiling(point)
                found = measure(point, suite, result["ceilings"][kind], Path(folder))
            except ChildFailed as error:
                failed.append(point.key)
                tqdm.write(f"{point.key} failed: {error}", file=sys.stdout)
                continue
            result["points"][point.key] = found
            machine.write(result, file)
            tqdm.write(tables.block(found), file=sys.stdout)
    if options.footprint and not result["footprint"] and fits(FOOTPRINT):
        result["footprint"] = footprint.measure(device)
    machine.write(result, file)
    summary(result, options.out)
    if late:
        print(f"no time was left for {', '.join(late)}: repeat the command to continue")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def summary(result: store.Result, folder: Path | None) -> None:
    """Print the summary of the run, and draw the pictures."""
    print(tables.losses(result), tables.footprint(result["footprint"]), sep="\n")
    if folder is None:
        return
    try:
        from bench import pictures
    except ImportError as error:
        print(f"no pictures: {error}")
        return
    for picture in pictures.draw(result, folder):
        print(picture)


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["compare"]:
        parser = argparse.ArgumentParser(
            prog="run.py compare", description="Print two results side by side."
        )
        parser.add_argument("files", nargs=2, type=Path, metavar="RESULT.json")
        old, new = (store.load(file) for file in parser.parse_args(arguments[1:]).files)
        print(compare.compare(old, new))
        return
    if arguments[:1] == ["show"]:
        parser = argparse.ArgumentParser(
            prog="run.py show", description="Print a result and draw its pictures."
        )
        parser.add_argument("file", type=Path)
        parser.add_argument(
            "--out", type=Path, help="folder for the pictures; none are drawn without it"
        )
        options = parser.parse_args(arguments[1:])
        result = store.load(options.file)
        print(tables.LEGEND, *map(tables.block, result["points"].values()), sep="\n")
        summary(result, options.out)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=list(SUITES), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for result.json and the pictures"
    )
    parser.add_argument(
        "--cases",
        default="",
        help="only cases whose names or sizes contain one of these, separated by commas",
    )
    parser.add_argument(
        "--batches",
        default="",
        help="batch sizes to measure instead of the suite's, separated by commas",
    )
    parser.add_argument(
        "--peers",
        help=f"instead of the suite's, separated by commas: {', '.join(PEERS)}; '' for none",
    )
    parser.add_argument(
        "--no-footprint", dest="footprint", action="store_false", help="skip import times and sizes"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=0,
        help="number of interleaved repeats, at least 6 for a 95%% bound",
    )
    try:
        run(parser.parse_args(arguments))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
