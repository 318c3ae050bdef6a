"""Threads of a step: they wait for jobs and end with the step."""

from __future__ import annotations

import functools
import queue
import time
from _thread import start_new_thread
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from mlpcore.core.ops import make

T = TypeVar("T")


class Spread(Protocol):
    """A function that runs jobs in parallel."""

    def __call__(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of the jobs."""


class Threads:
    """Threads that run jobs, and end with this object.

    Jobs are handed over in queues written in C: in `concurrent.futures`, or in
    `threading.Thread.start`, an interrupt may leave a lock held, and a thread then waits for it
    forever.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        for _ in range(count):
            start_new_thread(_work, (self.jobs,))

    def __del__(self) -> None:
        for _ in range(self._count):
            self.jobs.put(None)

    def run(self, jobs: Sequence[Callable[[], T]], give_up: Callable[[], object]) -> list[T]:
        """Return the results of the jobs; this thread runs the first, and waits for all.

        Args:
            jobs: at least one.
            give_up: called on an interrupt, before the other threads are waited for; it releases
                the arrays that they may still write to.
        """
        here, *there = jobs
        ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        found, errors = dict[int, T](), list[BaseException]()
        sent, over, left = list[int](), list[int](), list[bool]()

        def do(number: int) -> None:
            try:
                if not left:
                    found[number] = there[number]()
            except BaseException as error:
                errors.append(error)
            finally:
                over.append(number)
                ended.put(None)

        numbers = range(len(there))
        calls: list[tuple[Any, ...]] = [
            (self.jobs.put, functools.partial(do, number)) for number in numbers
        ]
        try:
            make([*calls, (sent.extend, numbers)])
            first = here()
            for _ in numbers:
                ended.get()
        except BaseException:  # no thread may keep writing into the next step's arrays
            left.append(True)
            give_up()
            while len(over) < len(sent):
                time.sleep(0.0001)
            raise
        if errors:
            raise errors[0]
        return [first, *(found[number] for number in numbers)]


def _work(jobs: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    """Run jobs until None arrives."""
    while (job := jobs.get()) is not None:
        job()
        del job  # since it references arrays
