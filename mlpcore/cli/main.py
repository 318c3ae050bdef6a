"""The command `mlpcore`: it runs what its options ask for, and returns an exit status."""

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

    - 0: done; the files that the command writes are whole. Messages that nobody reads any more do
      not count.
    - 2: a wrong call, input or output; one line on standard error says which.
    - 130: interrupted (SIGINT, Ctrl-C).
    - 141: nobody reads standard output, or the pipe, that the results go to.
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
    complain(f"mlpcore: standard output takes no more: {reason(output.lost)}")
    return 0 if options.writes else 2


def _ending(how: str, stop: BaseException) -> str:
    """Return the line that says how the command ended, and what was saved."""
    return "; ".join(
        [f"mlpcore: {how}", *(printable(note) for note in getattr(stop, "__notes__", ()))]
    )


@contextlib.contextmanager
def _ended_by_exception() -> Iterator[None]:
    """Have SIGTERM end the command by an exception, as Ctrl-C does; another handler stays."""

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
