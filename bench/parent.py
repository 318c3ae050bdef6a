"""The parent of bench/child.py: one process per implementation, kept alive and asked in turn."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from types import TracebackType
from typing import Any

from bench.machine import PINS, ROOT

Answer = dict[str, Any]


class ChildFailed(Exception):
    """A child ended without an answer; the message is the end of its output."""


class Child:
    """A process of bench/child.py, to be used as a context manager.

    Attributes:
        patience: seconds to wait for an answer.
    """

    def __init__(
        self, job: str, *, tf32: bool = False, patience: float = 300.0, **request: Any
    ) -> None:
        self.patience = patience
        environment = {key: value for key, value in os.environ.items() if key not in PINS}
        paths = [str(ROOT), environment.get("PYTHONPATH", "")]
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        environment |= {"CUPY_TF32": "1"} if tf32 else {}
        if request.get("point", request)["device"] == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the child
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.child", json.dumps({"job": job, **request})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment,
        )  # fmt: skip

    def ask(self, do: str, **request: Any) -> Answer:
        """Send a request and wait for its answer; may raise ChildFailed."""
        assert self.process.stdin
        try:
            print(json.dumps({"do": do, **request}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise ChildFailed(self._last_words()) from None
        return self.answer()

    def answer(self, deadline: float | None = None) -> Answer:
        """Read the child's next line; stop it at `deadline` (time.monotonic) or after `patience`.

        Raises:
            ChildFailed: it ended, or was stopped.
        """
        assert self.process.stdout
        limit = self.patience if deadline is None else max(0.1, deadline - time.monotonic())
        timer = threading.Timer(limit, self.process.kill)
        begin = time.monotonic()
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            late = (
                f"stopped: no answer in {limit:.0f} s; "
                if time.monotonic() - begin >= limit
                else ""
            )
            raise ChildFailed(late + self._last_words())
        found: Answer = json.loads(line)
        return found

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip(" ^~")]
        return f"exit {code}: {' | '.join(lines[-2:])[-300:]}"

    def close(self, patience: float = 5.0) -> None:
        """End the process, by force after `patience` seconds; a second call does nothing."""
        if self.errors.closed:
            return
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(0.0 if error else 5.0)


def once(job: str, *, tf32: bool = False, **request: Any) -> Answer:
    """Return the answer of a job that gives only one."""
    with Child(job, tf32=tf32, **request) as child:
        return child.answer()
