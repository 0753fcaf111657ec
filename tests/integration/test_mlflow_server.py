"""The MLflow server that infra/mlflow ships, real: accounts, PostgreSQL, deliveries.

Only the bucket is missing: artifacts go to a folder instead.
"""

import base64
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import psycopg
import pytest
from ruamel.yaml import YAML

from orchestrator.tracking.delivery import Delivery
from tests.integration.conftest import free_port
from tests.integration.test_tracking_delivery import (
    client_of,
    make_job,
    steps_in,
    wait_until,
    write_run,
)

SECONDS = 60
INFRA = Path(__file__).resolve().parents[2] / "infra"
HEALTH = "health"
EXPERIMENTS = "api/2.0/mlflow/experiments/search?max_results=5"


def end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """End a process and what it started: the process group that it leads."""
    try:
        os.killpg(process.pid, how)
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
    except ProcessLookupError:
        process.wait(20)


@pytest.fixture(scope="module")
def postgres() -> Iterator[dict[str, str]]:
    """A PostgreSQL on loopback; what libpq's variables have to say to reach it."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        pytest.skip("there is no PostgreSQL here; on Debian: apt-get install postgresql")
    programs = folders[-1]
    # PostgreSQL's own user must get there, and a socket's path is short.
    folder = Path(mkdtemp(prefix="pg", dir="/tmp"))
    password, port = secrets.token_hex(16), free_port()
    (folder / "password").write_text(password)
    as_user: list[str] = []
    if os.getuid() == 0:
        # It refuses to run as root.
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        for path in (folder, folder / "password"):
            os.chown(path, user.pw_uid, user.pw_gid)
    data = folder / "data"
    command = [*as_user, str(programs / "initdb"), f"--pgdata={data}", "--username=mlflow"]
    command += ["--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"]
    made = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=SECONDS)
    assert made.returncode == 0, made.stdout + made.stderr
    command = [*as_user, str(programs / "postgres"), "-D", str(data), "-p", str(port)]
    for setting in ("listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off"):
        command += ["-c", setting]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, start_new_session=True)
    variables = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow"}
    variables["PGPASSWORD"] = password
    try:
        wait_until(lambda: answers(variables), f"PostgreSQL answers; see {folder / 'log'}")
        with connected(variables, "postgres") as connection:
            connection.execute("create database mlflow")
        yield variables
    finally:
        end(process, signal.SIGINT)
        shutil.rmtree(folder, ignore_errors=True)


def connected(variables: dict[str, str], database: str) -> psycopg.Connection:
    return psycopg.connect(
        host=variables["PGHOST"],
        port=int(variables["PGPORT"]),
        user=variables["PGUSER"],
        password=variables["PGPASSWORD"],
        dbname=database,
        connect_timeout=5,
        autocommit=True,
    )


def answers(variables: dict[str, str]) -> bool:
    try:
        connected(variables, "postgres").close()
    except psycopg.OperationalError:
        return False
    return True


@dataclass(frozen=True)
class Server:
    port: int
    admin: str
    folder: Path
    process: subprocess.Popen[bytes]

    def ask(
        self,
        path: str,
        account: tuple[str, str] | None = None,
        body: dict[str, str] | None = None,
        host: str | None = None,
    ) -> int:
        """The status of an answer; 0 where there is none."""
        headers = {"Content-Type": "application/json"}
        if account:
            headers["Authorization"] = (
                "Basic " + base64.b64encode(":".join(account).encode()).decode()
            )
        if host:
            headers["Host"] = host
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


def shipped_command(port: int) -> list[str]:
    """The image's entry point with compose.yaml's arguments, on loopback."""
    lines = (INFRA / "mlflow" / "Dockerfile").read_text().splitlines()
    (entry,) = [line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT")]
    compose = YAML(typ="safe").load(INFRA / "mlflow" / "compose.yaml")
    command = [*json.loads(entry), *compose["services"]["mlflow"]["command"]]
    for number, word in enumerate(command):
        before = command[number - 1]
        if word.startswith("--artifacts-destination="):
            command[number] = "--artifacts-destination=artifacts"
        elif word.startswith("--allowed-hosts="):
            command[number] = f"--allowed-hosts=127.0.0.1:{port}"
        elif before == "--host":
            command[number] = "127.0.0.1"
        elif before == "--port":
            command[number] = str(port)
    assert command[0] == "mlflow"
    return [sys.executable, "-m", *command]


@pytest.fixture(scope="module")
def server(postgres: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("mlflow-server")
    port, admin = free_port(), secrets.token_hex(16)
    environment = {
        **os.environ,
        **postgres,
        "MLFLOW_AUTH_CONFIG_PATH": str(INFRA / "mlflow" / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": admin,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            shipped_command(port),
            cwd=folder,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    made = Server(port, admin, folder, process)
    try:
        wait_until(lambda: made.ask(HEALTH) == 200, f"MLflow answers; see {folder / 'log'}")
        yield made
    finally:
        end(process, signal.SIGTERM)


def test_only_accounts_get_in(server: Server, postgres: dict[str, str]) -> None:
    assert server.ask(EXPERIMENTS) == 401
    assert server.ask(EXPERIMENTS, ("admin", "not the password")) == 401
    # What MLflow once shipped as default.
    assert server.ask(EXPERIMENTS, ("admin", "password1234")) == 401
    assert server.ask(EXPERIMENTS, ("admin", server.admin)) == 200
    assert server.ask(EXPERIMENTS, ("admin", server.admin), host="elsewhere.example.com") == 403
    # Whoever lists this machine's processes reads no password.
    words = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    assert server.admin.encode() not in words and postgres["PGPASSWORD"].encode() not in words


@pytest.mark.parametrize("by", ["uri", "environment"])
def test_a_run_is_delivered_under_an_account(
    server: Server,
    postgres: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
) -> None:
    name, password = f"trainer-{by}", secrets.token_hex(16)
    account = {"username": name, "password": password}
    assert server.ask("api/2.0/mlflow/users/create", ("admin", server.admin), account) == 200
    place = f"127.0.0.1:{server.port}"
    said: list[str] = []

    def deliver(secret: str) -> tuple[int, str | None]:
        """How many events are left, and the run's id, after a delivery with this password."""
        if by == "uri":
            uri = f"http://{name}:{secret}@{place}"
        else:
            uri = f"http://{place}"
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
        again = make_job(tmp_path, uri=uri, experiment=f"of {name}", registered_model=name)
        delivery = Delivery(again, again.run_dir, said.append, patient=secret == password)
        delivery.start()
        report = delivery.close(SECONDS)
        if report.pending == 0:
            client = client_of(again)
            assert sorted(steps_in(client, report.run_id)) == [1, 2, 3, 4, 5]
            assert client.get_run(report.run_id).info.status == "FINISHED"
            assert {"adapter", "plots"} <= {a.path for a in client.list_artifacts(report.run_id)}
            champion = client.get_model_version_by_alias(name, "champion")
            assert champion.tags["eval_loss"] == "2.0"
        return report.pending, report.run_id

    write_run(make_job(tmp_path, uri=f"http://{place}"))
    pending, run_id = deliver("not-the-password")
    assert pending > 0 and run_id is None
    assert any("401" in line or "refuses" in line for line in said), said
    pending, run_id = deliver(password)
    assert pending == 0
    with connected(postgres, "mlflow") as connection:
        rows = connection.execute(
            "select step from metrics where run_uuid = %s and key = 'loss' order by step", [run_id]
        ).fetchall()
        assert [step for (step,) in rows] == [1, 2, 3, 4, 5]
        kept = connection.execute("select password_hash from users where username = %s", [name])
        assert password not in str(kept.fetchone())

    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 5
    written += [p for p in server.folder.rglob("*") if p.is_file()]
    for secret in (password, server.admin, postgres["PGPASSWORD"]):
        assert [p for p in written if secret.encode() in p.read_bytes()] == []
        assert not any(secret in line for line in said)
