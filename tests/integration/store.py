"""An S3 server on loopback, as a process of its own that can be stopped and killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from pyarrow.fs import FileSelector, S3FileSystem

from orchestrator.places import CACHE_VARIABLE, mirror_dir
from tests.integration.conftest import Commands, free_port, wait_until

BUCKET = "tests"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "swordfish-0123456789",
    # The chain of credentials ends at the environment: there is no cloud here to ask.
    "AWS_EC2_METADATA_DISABLED": "true",
}
SECONDS = 60


class ObjectStore:
    """moto's S3, with one bucket."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **CREDENTIALS},
        )
        wait_until(self._answers, "the object store answers", SECONDS, 0.1)
        self.files = S3FileSystem(
            access_key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            secret_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            endpoint_override=self.endpoint,
            region="us-east-1",
            allow_bucket_creation=True,
        )
        self.files.create_dir(BUCKET)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, folder: str, bucket: str = BUCKET, user: str = "") -> str:
        query = f"region=us-east-1&endpoint_override={quote(self.endpoint, safe='')}"
        return f"s3://{user}{bucket}/{folder}?{query}"

    def read(self, path: str) -> bytes:
        with self.files.open_input_stream(f"{BUCKET}/{path}") as stream:
            return bytes(stream.read())

    def events(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.read(f"{run}/journal.jsonl").splitlines()]

    def curve(self, run: str) -> list[tuple[int, float, float]]:
        steps = [e for e in self.events(run) if e["event"] == "step"]
        return [(e["step"], e["loss"], e["gradient_norm"]) for e in steps]

    def checkpoints(self, run: str) -> set[str]:
        """Those that are whole."""
        folder = FileSelector(f"{BUCKET}/{run}/checkpoints", recursive=True, allow_not_found=True)
        files = [info.path.split("/") for info in self.files.get_file_info(folder)]
        return {path[-2] for path in files if path[-1] == "state.json"}

    def away(self) -> None:
        """As a network that takes packets and gives none."""
        self.process.send_signal(signal.SIGSTOP)

    def back(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.endpoint}/moto-api/data.json", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def mirror_of(machine: Commands, uri: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a machine keeps its copy of what lies under the URI."""
    monkeypatch.setenv(CACHE_VARIABLE, machine.environment[CACHE_VARIABLE])
    return mirror_dir(uri)
