"""Waiting for storage that is full or away for a while."""

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type
from tenacity.stop import stop_after_delay
from tenacity.wait import wait_exponential

from orchestrator.errors import CheckpointError

_PATIENCE_SECONDS = 120.0

T = TypeVar("T")


def patiently(write: Callable[[], T], say: Callable[[str], None]) -> T:
    """Call `write` until the storage takes it, for two minutes.

    Args:
        write: what is to be done; it may be called several times.
        say: is told of the first refusal.

    Raises:
        CheckpointError, OSError: the storage still refuses it.
    """

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            say(f"{state.outcome.exception()}. Trying again for {_PATIENCE_SECONDS:.0f} s")

    retrying = Retrying(
        retry=retry_if_exception_type((CheckpointError, OSError)),
        wait=wait_exponential(multiplier=0.5, max=10),
        stop=stop_after_delay(_PATIENCE_SECONDS),
        before_sleep=tell,
        reraise=True,
    )
    return retrying(write)
