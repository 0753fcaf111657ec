"""Objects under one URI, by names relative to it. Every method raises OSError while it is away."""

import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow.fs import FileSelector, FileSystem, FileType

from orchestrator.errors import RefusedError, first_line
from orchestrator.tracking.secrets import redact

_CHUNK = 8 << 20
# Google's client would try for a quarter of an hour, each time.
_GOOGLE_RETRIES = "retry_limit_seconds"
_GOOGLE_SECONDS = 60


class Store:
    """A folder of an object store."""

    def __init__(self, filesystem: Any, root: str) -> None:
        """Of an Arrow file system.

        Args:
            filesystem: a `pyarrow.fs.FileSystem`.
            root: path in it.
        """
        self._files, self._root = filesystem, root.rstrip("/")

    def read(self, name: str, start: int = 0) -> bytes | None:
        """An object's content from a byte offset on; None where there is no such object."""
        try:
            with self._files.open_input_file(self._path(name)) as stream:
                stream.seek(start)
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        """An object's size in bytes; None where there is no such object."""
        info = self._files.get_file_info(self._path(name))
        return int(info.size) if info.type == FileType.File else None

    def write(self, name: str, content: bytes) -> None:
        """Write an object, which is there whole or not at all."""
        with self._open(name) as stream:
            stream.write(content)

    def delete(self, name: str) -> None:
        """Delete an object if it is there."""
        with suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def folders(self, name: str) -> list[str]:
        """Names of the folders in a folder."""
        return [i.base_name for i in self._list(name) if i.type == FileType.Directory]

    def files(self, name: str) -> list[str]:
        """Names of the objects in a folder."""
        return [info.base_name for info in self._list(name) if info.type == FileType.File]

    def upload(self, folder: Path, name: str, last: str) -> None:
        """Upload a flat folder's files, with the file `last` after all others.

        Raises:
            FileNotFoundError: the folder went away before it could be opened.
        """
        files_only = (path for path in folder.iterdir() if path.is_file())
        paths = sorted(files_only, key=lambda path: (path.name == last, path.name))
        with ExitStack() as opened:
            # All are opened first: a folder that is deleted meanwhile is still uploaded whole.
            files = [(path.name, opened.enter_context(path.open("rb"))) for path in paths]
            for file_name, file in files:
                self._copy(file, f"{name}/{file_name}")

    def download(self, name: str, folder: Path, last: str) -> bool:
        """Download a folder's objects, beside and renamed; False where `last` is not there."""
        names = self.files(name)
        if last not in names:
            return False
        beside = folder.with_name(f".{folder.name}.fetched")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for file_name in names:
            with (
                self._files.open_input_stream(self._path(f"{name}/{file_name}")) as stream,
                (beside / file_name).open("wb") as file,
            ):
                shutil.copyfileobj(stream, file, _CHUNK)
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
        return True

    def delete_folder(self, name: str, first: str) -> None:
        """Delete a folder if it is there, with the object `first` before all others."""
        self.delete(f"{name}/{first}")
        with suppress(FileNotFoundError):
            self._files.delete_dir(self._path(name))

    def _copy(self, file: BinaryIO, name: str) -> None:
        with self._open(name) as stream:
            shutil.copyfileobj(file, stream, _CHUNK)

    def _open(self, name: str) -> Any:
        path = self._path(name)
        try:
            return self._files.open_output_stream(path)
        except FileNotFoundError:
            # Object stores have no folders, file systems do.
            self._files.create_dir(path.rpartition("/")[0], recursive=True)
            return self._files.open_output_stream(path)

    def _list(self, name: str) -> Iterable[Any]:
        found: Iterable[Any] = self._files.get_file_info(
            FileSelector(self._path(name), allow_not_found=True)
        )
        return found

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def open_store(uri: str, name: str) -> Store:
    """The store of the folder `name` under a URI.

    Raises:
        RefusedError: the URI is not one of Arrow's, or its store cannot be asked.
    """
    if uri.startswith(("gs://", "gcs://")) and _GOOGLE_RETRIES not in uri:
        uri += f"{'&' if '?' in uri else '?'}{_GOOGLE_RETRIES}={_GOOGLE_SECONDS}"
    try:
        filesystem, path = FileSystem.from_uri(uri)
    except (OSError, ValueError, NotImplementedError) as error:
        # Arrow may repeat the URI, and with it a password.
        said = redact(first_line(error).replace(uri, "its URI"))
        raise RefusedError(f"output_dir: the store cannot be asked: {said}") from None
    return Store(filesystem, f"{path.rstrip('/')}/{name}")
