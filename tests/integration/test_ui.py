"""`orchestrator ui` as a user starts it: MLflow's own UI over a job's store."""

import json
import os
import signal
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tests.integration.conftest import Commands, free_port, wait_until
from tests.integration.test_tracking_delivery import deliver, make_job, write_run


def test_the_ui_serves_the_jobs_store_until_it_is_interrupted(
    commands: Commands, tmp_path: Path
) -> None:
    job, port = make_job(tmp_path), free_port()
    write_run(job)
    run_id = deliver(job).run_id
    # The job runner of MLflow's server doubles the time it takes to start.
    process = commands.start(
        "ui", job.run_dir / "job.yaml", "--port", port, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"
    )
    address = f"http://127.0.0.1:{port}"

    def ask(path: str) -> Any:
        try:
            with urlopen(f"{address}/{path}", timeout=5) as answer:
                return answer.read()
        except URLError:
            return None

    wait_until(lambda: process.poll() is not None or ask("health") == b"OK", "the UI answers", 60)
    assert process.poll() is None
    assert b"<title>MLflow" in ask("")
    found = json.loads(ask(f"api/2.0/mlflow/runs/get?run_id={run_id}"))["run"]["info"]
    assert (found["run_name"], found["status"]) == ("bot", "FINISHED")
    # As a terminal sends Ctrl-C: to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    ended = commands.wait(process)
    assert f"MLflow UI: {address} (Ctrl-C ends it)" in ended.err
    assert ask("health") is None
