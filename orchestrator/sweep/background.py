"""A call in a thread of its own, so that the main thread can hear signals."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from orchestrator.errors import OrchestratorError, first_line

_WAIT_SECONDS = 0.5


class Background:
    """Begins at once and ends with the process at the latest."""

    def __init__(self, work: Callable[[], Any], after: Callable[[], Any] = lambda: None) -> None:
        """Of a call.

        Args:
            work: the call.
            after: what is called when it has ended, however that was.
        """
        self._work, self._after = work, after
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the call is over."""
        return not self._thread.is_alive()

    def wait(self, seconds: float = float("inf")) -> bool:
        """Until the call is over, at most so long; signals are handled in between."""
        left = seconds
        while not self.ended and left > 0:
            self._thread.join(min(_WAIT_SECONDS, left))
            left -= _WAIT_SECONDS
        return self.ended

    def abandon(self, seconds: float) -> None:
        """End the call where it stands, for who takes away what it works with.

        Args:
            seconds: how long it may take to come to its next line.
        """
        thread = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(SystemExit))
        self._thread.join(seconds)

    def result(self) -> Any:
        """What the call returned.

        Raises:
            OrchestratorError: what it raised.
        """
        if isinstance(self._error, OrchestratorError):
            raise self._error
        if self._error is not None:
            raise OrchestratorError(
                f"{first_line(self._error)}. Run the same command again to go on"
            ) from self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:
            self._error = error
        finally:
            try:
                self._after()
            except Exception as error:
                self._error = self._error or error
