"""Every kernel instance compiled into CuPy's cache: registers, local memory, failures."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from bench.gpu import kit
from tests.backends.cuda.instances import every_instance

FACTS = "num_regs", "local_size_bytes", "shared_size_bytes"
SMALL = 2  # number of instances in a tiny run


def compile_share(first: int, step: int) -> dict[str, dict[str, Any]]:
    """Compile and load the instances first, first + step, …; return the findings for each."""
    device, found = kit.opened(), {}
    with device.active():
        mine = itertools.islice(enumerate(every_instance()), first, None, step)
        for number, (source, name) in mine:
            try:
                kernel = device.kernel(source, name)
            except Exception as error:  # errors of CuPy and the driver; they fail the section
                found[f"{number} {name}"] = {"failed": str(error)[:2000]}
                continue
            # an emulated device has no such attributes
            found[f"{number} {name}"] = {fact: getattr(kernel, fact, None) for fact in FACTS}
    return found


def shares(processes: int) -> Iterable[dict[str, dict[str, Any]]]:
    """Yield the findings of each process."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_share, range(processes), itertools.repeat(processes))


def main(arguments: Sequence[str] | None = None) -> int:
    options = kit.options(__doc__, arguments)
    report, count = kit.Report(options.out, "warm"), sum(1 for _ in every_instance())
    kit.opened()
    found: dict[str, dict[str, Any]] = {}
    processes = max(1, (os.cpu_count() or 2) - 2)
    every = [compile_share(0, -(-count // SMALL))] if options.small else shares(processes)
    report.add("kernels", lambda: [found.update(share) for share in every] and found)
    failed = [name for name, facts in found.items() if "failed" in facts]
    spilled = [name for name, facts in found.items() if facts.get("local_size_bytes")]
    report.failed += failed
    words = f"{len(failed)} failed, {len(spilled)} with local memory"
    return report.finish(f"{len(found)} of {count} instances, {words}")


if __name__ == "__main__":
    sys.exit(main())
