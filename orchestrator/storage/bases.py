"""Quantized bases in an object store, for the machines of one run that did not quantize."""

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import OrchestratorError
from orchestrator.storage.background import patiently, reason

if TYPE_CHECKING:
    from orchestrator.storage.store import Store

# Written last: an entry whose upload was cut off has none.
_ENTRY = "entry.json"


class BasesStore:
    """Entries of the base store by their names, as `model.store.SharedBases`."""

    def __init__(self, store: "Store") -> None:
        self._store = store

    def fetch(self, entry: Path) -> None:
        """Download an entry to its place, if it is in the store.

        Raises:
            OrchestratorError: the store stays away.
        """

        def download() -> None:
            self._store.download(entry.name, entry, last=_ENTRY)

        try:
            patiently(download)
        except OSError as error:
            raise OrchestratorError(
                f"The quantized base cannot be fetched from output_dir: {reason(error)}"
            ) from error

    def put(self, entry: Path) -> None:
        """Upload an entry, unless the store has it.

        Raises:
            OrchestratorError: the store does not take it.
        """

        def upload() -> None:
            if self._store.size(f"{entry.name}/{_ENTRY}") is None:
                self._store.upload(entry, entry.name, last=_ENTRY)

        try:
            patiently(upload)
        except OSError as error:
            raise OrchestratorError(
                f"The quantized base cannot be put into output_dir: {reason(error)}"
            ) from error
