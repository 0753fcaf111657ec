"""How the loop tells what happens, and how it is told to stop."""

from typing import Any, Protocol


class Observer(Protocol):
    """Stands between the loop and whoever watches it. A journal is one; a test's list is another."""

    def emit(self, event: str, **fields: Any) -> None:
        """Something happened; see the README for the events and their fields."""

    def stop_requested(self) -> bool:
        """Whether the loop shall save a checkpoint and end after the present step."""
