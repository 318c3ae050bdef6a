"""SIGINT and SIGTERM during a run with checkpoints: noted, and obeyed after saving."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger("mlpcore")


class Signals:
    """A context manager that notes SIGINT and SIGTERM instead of obeying them.

    This lets the current step finish and be saved. A second SIGINT is obeyed at once. It works only
    in the main thread; in other threads signals act as usual. So does a signal that is ignored, as
    SIGINT is in a shell's background jobs, or whose handler was not set from Python.

    Attributes:
        asked: the first signal received, or None.
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
        """Restore the handlers, and obey a signal received after the last save or before an error.

        If the user has a handler, call it and let the error propagate; otherwise, raise the
        signal's own exception with the error as its context.
        """
        asked = self._give_back()
        if asked is None:
            return
        if error is not None:
            # Python does not show the context of a SystemExit
            shown = None if asked == signal.SIGINT else error
            log.warning("%s: not saved: %r came first", asked.name, error, exc_info=shown)
        if not self._handled(asked) or error is None:
            self._raise(asked, f"{asked.name}: stopped at the end of the training")

    def _give_back(self) -> signal.Signals | None:
        """Restore the handlers, unless they were replaced; return the signal to obey."""
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
        """Obey the signal: call a user's handler, then raise KeyboardInterrupt or exit with 143."""
        asked = self._give_back()
        assert asked is not None
        message = f"{asked.name}: {message}"
        log.warning(message)
        self._handled(asked)
        self._raise(asked, message)

    def _handled(self, asked: signal.Signals) -> bool:
        """Call the user's handler of the signal; return False if there is none."""
        handler = signal.getsignal(asked)
        users = callable(handler) and handler is not signal.default_int_handler
        if users:
            signal.raise_signal(asked)
        return users

    def _raise(self, asked: signal.Signals, message: str) -> None:
        """Raise the exception of the signal: KeyboardInterrupt for SIGINT, else SystemExit."""
        if asked == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + asked)
