"""The command `mlpcore`: parse the arguments, run the command, return an exit status."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

import mlpcore as mc
from mlpcore.cli import messages
from mlpcore.cli.messages import complain, printable, reason
from mlpcore.cli.options import parse

TERMINATED = 128 + signal.SIGTERM
ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    MemoryError,
    mc.NonFiniteLoss,
    mc.DeviceUnavailable,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    - 0: success; all files are written completely. Messages that could not be delivered do not
      matter.
    - 2: wrong arguments, input or output; one line on standard error explains.
    - 130: interrupted (SIGINT, Ctrl-C).
    - 141: standard output or a pipe for the results is closed.
    - 143: terminated (SIGTERM), as SystemExit.
    """
    with messages.opened() as output, _ended_by_exception():
        try:
            options = parse(arguments)
            options.run(options)
        except BrokenPipeError:
            return 141
        except ERRORS as error:
            complain(f"mlpcore: {printable(reason(error), 2000)}")
            return 2
        except KeyboardInterrupt as stop:
            complain(_ending("interrupted", stop))
            return 130
        except SystemExit as stop:
            if stop.code == TERMINATED:
                complain(_ending("terminated", stop))
            raise
    if output.lost is None or (options.writes and isinstance(output.lost, BrokenPipeError)):
        return 0
    if isinstance(output.lost, BrokenPipeError):
        return 141
    complain(f"mlpcore: cannot write to standard output: {reason(output.lost)}")
    return 0 if options.writes else 2


def _ending(how: str, stop: BaseException) -> str:
    """Return a line on how the command ended and what was saved."""
    return "; ".join(
        [f"mlpcore: {how}", *(printable(note) for note in getattr(stop, "__notes__", ()))]
    )


@contextlib.contextmanager
def _ended_by_exception() -> Iterator[None]:
    """Turn SIGTERM into an exception, as Ctrl-C is one; keep any other handler."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(TERMINATED)

    mine = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if mine:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
