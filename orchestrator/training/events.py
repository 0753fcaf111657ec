"""How the loop tells what happens, and how it is told to stop."""

from typing import Any, Protocol


class Observer(Protocol):
    """Stands between the loop and whoever watches it: a journal, or a list in a test."""

    def emit(self, event: str, **fields: Any) -> None:
        """Something happened; see the README for the events and their fields."""

    def sync(self) -> None:
        """What was told until now must not be lost, for a checkpoint of it follows."""

    def stop_requested(self) -> bool:
        """Whether the loop shall save a checkpoint and end after the present step."""

    def save_requested(self) -> bool:
        """Whether this process is about to be taken away, so that a checkpoint should be saved.

        True once for each such notice.
        """
