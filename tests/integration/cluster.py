"""A Ray cluster of several nodes on this machine, each a `ray start --block` of its own."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
from tenacity import Retrying, retry_if_exception_type
from tenacity.stop import stop_after_attempt

from tests.integration.conftest import free_port, wait_until

SECONDS = 240
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]


@dataclass
class Node:
    """One `ray start --block`; `mark` is a resource of its own, by which Ray knows it."""

    process: subprocess.Popen[bytes]
    mark: str
    cache: Path
    temporary: Path

    @property
    def session(self) -> Path:
        """Where Ray keeps this node's logs and what jobs have sent."""
        return (self.temporary / "session_latest").resolve()

    def kill(self) -> None:
        """As a machine that loses power: all its processes at once, by their ids."""
        family = psutil.Process(self.process.pid)
        for process in [family, *family.children(recursive=True)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def workers(self) -> list[psutil.Process]:
        """The training workers that run on this node."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in found if "RayTrainWorker" in _command(p)]


class NodeEnded(Exception):
    """A node ended before it had joined."""


@dataclass
class RayCluster:
    """Head without resources; nodes join and are killed. Token authentication is on."""

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)
    _added: int = 0

    def __post_init__(self) -> None:
        options = ["--head", f"--port={self.port}"]
        options += ["--include-dashboard=true", f"--dashboard-port={self.dashboard}"]
        options += ["--dashboard-host=127.0.0.1", "--num-cpus=0", "--num-gpus=0"]
        self.head = self._start("head", options)
        try:
            wait_until(lambda: bool(self.alive()), "Ray's head is up", SECONDS, 0.2)
        except BaseException:
            # Nobody else knows of it yet.
            self.close()
            raise

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def jobs_address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to be let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def add(self, cpus: int = 2, gpus: int = 0) -> Node:
        """Join a node and wait until Ray counts it."""
        # On a machine with much to do one may miss the 30 seconds that Ray gives it.
        for attempt in Retrying(
            retry=retry_if_exception_type(NodeEnded), stop=stop_after_attempt(3), reraise=True
        ):
            with attempt:
                node = self._join(cpus, gpus)
        return node

    def _join(self, cpus: int, gpus: int) -> Node:
        self._added += 1
        mark = f"node{self._added}"
        options = [f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
        options += [f"--resources={json.dumps({mark: 1})}"]
        node = self._start(mark, options)
        self.nodes.append(node)

        def joined() -> bool:
            if node.process.poll() is not None:
                self.nodes.remove(node)
                raise NodeEnded((self.folder / f"{mark}.log").read_text())
            return bool(self._find(mark))

        wait_until(joined, f"{mark} joined", SECONDS, 0.2)
        return node

    def drain(self, node: Node, seconds: int) -> None:
        """Tell Ray, as a cloud does, that the node goes away in so many seconds."""
        (found,) = self._find(node.mark)
        options = ["drain-node", f"--address={self.address}", f"--node-id={found['nodeId']}"]
        options += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        options += [f"--deadline-remaining-seconds={seconds}"]
        self.ray(*options)

    def ray(self, *arguments: str) -> str:
        """Run a command of Ray's own."""
        done = subprocess.run(
            [*RAY, *arguments],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def alive(self) -> list[dict[str, Any]]:
        """What Ray knows of its living nodes, from the dashboard; nothing while that starts."""
        try:
            nodes = self._ask("nodes?view=summary")["summary"]
        except OSError:
            return []
        return [node["raylet"] for node in nodes if node["raylet"].get("state") == "ALIVE"]

    def state(self, kind: str, state: str) -> list[dict[str, Any]]:
        """Ray's actors or placement_groups that are in a state."""
        chosen = f"filter_keys=state&filter_predicates=%3D&filter_values={state}"
        found: list[dict[str, Any]] = self._ask(f"api/v0/{kind}?{chosen}")["result"]["result"]
        return found

    def _ask(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.jobs_address}/{path}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            data: dict[str, Any] = json.load(answer)["data"]
        return data

    def kill(self, node: Node) -> None:
        """The node dies."""
        node.kill()
        self.nodes.remove(node)

    def close(self) -> None:
        for node in reversed([self.head, *self.nodes]):
            if node.process.poll() is None:
                node.kill()
            shutil.rmtree(node.temporary, ignore_errors=True)

    def _find(self, mark: str) -> list[dict[str, Any]]:
        return [node for node in self.alive() if mark in node["resourcesTotal"]]

    def _start(self, mark: str, options: list[str]) -> Node:
        cache = self.folder / f"cache-{mark}"
        cache.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **self.environment, "ORCHESTRATOR_CACHE": str(cache)}
        # A job says `python`, as on a node whose Python has the packages.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # A node is lost when it has been silent for a few seconds, not for half a minute.
        environment["RAY_health_check_period_ms"] = "1000"
        environment["RAY_health_check_failure_threshold"] = "5"
        # Ray's own is the lowest: whatever else this machine does would stop the workers.
        environment["RAY_worker_niceness"] = "0"
        # Metrics are to be had every second, not every ten.
        environment["RAY_metrics_report_interval_ms"] = "1000"
        # As on a machine of its own: nodes that share a folder overwrite what a job sends. The path
        # of a socket in it is short.
        temporary = Path(mkdtemp(prefix="ray", dir="/tmp"))
        # The agent takes jobs; without a port of its own the first node's has it.
        own = [f"--temp-dir={temporary}", f"--dashboard-agent-listen-port={free_port()}"]
        with (self.folder / f"{mark}.log").open("wb") as log:
            process = subprocess.Popen(
                [*RAY, "start", "--block", "--disable-usage-stats", *own, *options],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return Node(process, mark, cache, temporary)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def stop(process: psutil.Process) -> None:
    """A process that hangs."""
    process.send_signal(signal.SIGSTOP)
