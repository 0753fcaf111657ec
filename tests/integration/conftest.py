"""Commands run as a user runs them: as processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator.cli import main

SECONDS = 600
PROGRAM = (sys.executable, "-c", "from orchestrator.cli import command; command()")


@dataclass(frozen=True)
class Ended:
    """An ended command."""

    status: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        return json.loads(self.out)


class Commands:
    """Starts `orchestrator` commands and ends, by its process id, each that is left over."""

    def __init__(self, cache: Path) -> None:
        self.environment = {**os.environ, "ORCHESTRATOR_CACHE": str(cache)}
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self,
        *arguments: object,
        prefix: Sequence[str] = (),
        program: Sequence[str] = PROGRAM,
        **environment: str,
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*prefix, *program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def wait(self, process: subprocess.Popen[str]) -> Ended:
        out, err = process.communicate(timeout=SECONDS)
        return Ended(process.returncode, out, err)

    def run(self, *arguments: object, **environment: str) -> Ended:
        return self.wait(self.start(*arguments, **environment))

    def call(self, *arguments: object) -> Ended:
        """In this process: as `run`, without seconds of imports."""
        runner = CliRunner(env={"ORCHESTRATOR_CACHE": self.environment["ORCHESTRATOR_CACHE"]})
        result = runner.invoke(main, list(map(str, arguments)))
        return Ended(result.exit_code, result.stdout, result.stderr)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def commands(cache: Path) -> Iterator[Commands]:
    started = Commands(cache)
    yield started
    started.close()


def journal(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "journal.jsonl").read_text().splitlines(keepends=True)
    # The last line may be in writing.
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    return [
        (e["step"], e["loss"], e["gradient_norm"]) for e in journal(run_dir) if e["event"] == "step"
    ]


def wait_for(
    run_dir: Path, seen: Callable[[list[dict[str, Any]]], bool], process: subprocess.Popen[str]
) -> None:
    """Wait until the journal shows something; fail if the command ends before."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        path = run_dir / "journal.jsonl"
        if path.exists():
            lines = path.read_text().split("\n")[:-1]
            if seen([json.loads(line) for line in lines]):
                return
        if process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f"the command ended with {process.returncode}: {out}{err}")
        time.sleep(0.005)
    pytest.fail("it never came")


def wait_until(
    true: Callable[[], bool], what: str, seconds: float = SECONDS, pause: float = 0.002
) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s in vain until {what}"
        time.sleep(pause)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def reached(step: int) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda events: any(e["event"] == "step" and e["step"] >= step for e in events)
