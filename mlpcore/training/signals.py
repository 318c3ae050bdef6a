"""SIGINT and SIGTERM during a run that can be saved: noted, and obeyed when all is saved."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger("mlpcore")


class Signals:
    """A record of the signals that ask the process to stop, kept while it is entered.

    SIGINT and SIGTERM are noted instead of obeyed, so that the step can be finished and saved; a
    second SIGINT is obeyed at once. Only the main thread can do that; in others signals do what
    they always do. So does a signal that is ignored, as SIGINT is in a shell's background jobs, or
    whose handler Python does not know.

    Attributes:
        asked: the first signal that came, to stop.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler not in (None, signal.SIG_IGN):
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Give the signals back, and obey one that came after the last save, or before an error.

        A user's handler is called, and the error goes on; else what the signal raises has the error
        for its context.
        """
        asked = self._give_back()
        if asked is None:
            return
        if error is not None:
            shown = (
                None if asked == signal.SIGINT else error
            )  # of SystemExit Python shows no context
            log.warning("%s: not saved: %r came first", asked.name, error, exc_info=shown)
        if not self._handled(asked) or error is None:
            self._raise(asked, f"{asked.name}: stopped at the end of the training")

    def _give_back(self) -> signal.Signals | None:
        """Put the handlers back, unless they have been replaced; return the signal to be obeyed."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._before.clear()
        asked, self.asked = self.asked, None
        return asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)

    def leave(self, message: str) -> None:
        """Obey the signal: by a user's handler, KeyboardInterrupt, or exit status 143 (SIGTERM)."""
        asked = self._give_back()
        assert asked is not None
        message = f"{asked.name}: {message}"
        log.warning(message)
        self._handled(asked)
        self._raise(asked, message)

    def _handled(self, asked: signal.Signals) -> bool:
        """Call the user's handler of the signal; False if there is none."""
        handler = signal.getsignal(asked)
        users = callable(handler) and handler is not signal.default_int_handler
        if users:
            signal.raise_signal(asked)
        return users

    def _raise(self, asked: signal.Signals, message: str) -> None:
        """Raise what the signal is in Python."""
        if asked == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + asked)
