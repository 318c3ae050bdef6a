"""Messages to the terminal.

A message that cannot be written does not stop the work, and no message can control the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TextIO


@dataclass
class Output:
    """The output state of one call of the command.

    Attributes:
        aside: True if standard output carries data, so that messages go to standard error.
        lost: the error that ended standard output; later messages are dropped.
    """

    aside: bool = False
    lost: OSError | ValueError | None = None


_ELSEWHERE = Output()  # for functions called outside the command
_output: ContextVar[Output] = ContextVar("output", default=_ELSEWHERE)


@contextlib.contextmanager
def opened() -> Iterator[Output]:
    """Handle the messages of one call, including the library's log."""
    output, log, handler = Output(), logging.getLogger("mlpcore"), _Log(logging.WARNING)
    token = _output.set(output)
    log.addHandler(handler)
    try:
        yield output
    finally:
        if output.lost is None:
            output.lost = _write(sys.stdout, "")  # output of argparse
        log.removeHandler(handler)
        _output.reset(token)


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # the library's notice of an interrupt: the command prints its own
        if record.funcName != "leave":
            complain(f"note: {record.getMessage()}")


def say(text: str) -> None:
    """Write a message to standard output; if nobody reads it any more, drop it."""
    output = _output.get()
    if output.aside:
        complain(text)
    elif output.lost is None:
        output.lost = _write(sys.stdout, text + "\n")


def complain(text: str) -> None:
    """Write a message to standard error, if there is one."""
    _write(sys.stderr, text + "\n")


def on_terminal() -> bool:
    """Return True if standard error is a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def carry_data() -> None:
    """Reserve standard output for data: messages go to standard error."""
    _output.get().aside = True


def reason(error: BaseException) -> str:
    """Return an error's text, without the system's error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def printable(text: str, most: int = 1000) -> str:
    """Return foreign text on one line, without control characters, cut to `most`."""
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(mark if mark.isprintable() else _escaped(mark) for mark in cut)


def _escaped(mark: str) -> str:
    return mark.encode("unicode_escape").decode()


def _write(stream: TextIO | None, text: str) -> OSError | ValueError | None:
    """Write a text to a stream and flush it; return the error if that fails."""
    if stream is None:  # a program without a console, or with the stream closed
        return None
    encoding = getattr(stream, "encoding", None) or "utf-8"
    lines = "\n".join(
        "".join(m if m.isprintable() else _escaped(m) for m in line) for line in text.split("\n")
    )
    try:
        stream.write(lines.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (
        OSError,
        ValueError,
    ) as error:  # OSError: a closed pipe, a full disk; ValueError: a closed stream
        empty(stream)
        return error
    return None


def empty(stream: TextIO) -> None:
    """Drop what a stream could not write, so that the interpreter does not retry at exit."""
    with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:
        number = stream.fileno()
        kept, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
        for handle in (kept, nowhere):
            stack.callback(os.close, handle)
        stack.callback(os.dup2, kept, number)
        os.dup2(nowhere, number)
        stream.flush()
