"""Work on a store, again and again in a thread of its own, however long the store is away."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tenacity import Retrying, retry_if_exception_type
from tenacity.stop import stop_after_delay
from tenacity.wait import wait_exponential

from orchestrator.errors import OrchestratorError, first_line
from orchestrator.tracking.secrets import redact

Say = Callable[[str], None]
_PAUSE_SECONDS = 2.0
# A journal that takes long to push is pushed less often.
_SHARE = 0.1
_LONGEST_PAUSE = 30.0
_PATIENCE_SECONDS = 120.0


@contextmanager
def repeated(work: Callable[[], None], end: Callable[[], None], say: Say) -> Iterator[None]:
    """Do `work` every few seconds while the block runs, and `end` after it.

    A block that failed by other than an OrchestratorError does `work` a last time instead, and
    does not wait for the store: other processes may be at its task by now.

    Args:
        work: raises OSError while the store is away.
        end: raises OrchestratorError where the store stays away.
        say: is told when the store goes away, and when it is back.
    """
    thread = _Repeated(work, say)
    thread.start()
    try:
        yield
    except Exception as error:
        thread.end()
        try:
            (end if isinstance(error, OrchestratorError) else work)()
        except (OSError, OrchestratorError) as lost:
            # Beside the first error, and not in its place.
            say(reason(lost))
        raise
    finally:
        thread.end()
    end()


def patiently(work: Callable[[], None]) -> None:
    """Do `work`, again and again for two minutes while it raises OSError.

    Raises:
        OSError: of the last attempt.
    """
    Retrying(
        retry=retry_if_exception_type(OSError),
        wait=wait_exponential(multiplier=0.5, max=10),
        stop=stop_after_delay(_PATIENCE_SECONDS),
        reraise=True,
    )(work)


def reason(error: BaseException) -> str:
    """Why a store refuses, for the user."""
    return redact(first_line(error))[:300]


class _Repeated(threading.Thread):
    def __init__(self, work: Callable[[], None], say: Say) -> None:
        super().__init__(daemon=True, name="object-store")
        self._work, self._say = work, say
        self._ending = threading.Event()
        self._away = False

    def end(self) -> None:
        """Wait for the work under way; a store's own time-outs bound it."""
        self._ending.set()
        self.join()

    def run(self) -> None:
        """The thread."""
        pause = _PAUSE_SECONDS
        while not self._ending.wait(pause):
            began = time.monotonic()
            try:
                self._work()
            except OSError as error:
                self._tell_away(error)
            else:
                self._tell_back()
            taken = time.monotonic() - began
            pause = min(max(_PAUSE_SECONDS, taken / _SHARE), _LONGEST_PAUSE)

    def _tell_away(self, error: OSError) -> None:
        if not self._away:
            self._away = True
            self._say(
                f"The store of output_dir does not take or give files ({reason(error)}); training "
                "goes on, and they follow when it does"
            )

    def _tell_back(self) -> None:
        if self._away:
            self._away = False
            self._say("The store of output_dir answers again")
