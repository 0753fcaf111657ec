"""A fine-tune as one call: the command line and notebooks stand on it."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError, RefusedError, status_word
from orchestrator.jobfile import dump_job, job_from_mapping, load_job
from orchestrator.kept import check_run, check_sweep, finished_run, finished_sweep
from orchestrator.places import cache_dir, is_uri, write_whole
from orchestrator.quiet import quiet_libraries
from orchestrator.storage.place import Place, command_place
from orchestrator.tracking.delivery import Delivery, deliver_pending
from orchestrator.tracking.journal import journal_path, read_events
from orchestrator.tracking.observer import JournalObserver, stop_path
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.system import SystemSampler
from orchestrator.tracking.trials import TrialDeliveries

Say = Callable[[str], None]
# How long the command waits at its end for MLflow to take what is left.
_DELIVERY_SECONDS = 60.0
_PENDING_SECONDS = 20.0
# What a sweep's command imports while Ray starts: for the plan of its memory, and MLflow.
_OF_A_SWEEP = ("transformers.modeling_utils", "orchestrator.tracking.replay")


def finetune(
    job: JobConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    local: bool = False,
    say: Say = print,
    watch: Callable[[Path], Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune, or go on with a run of the same name, and return its results.

    Args:
        job: a job file's path, its content as a mapping, or a resolved job.
        overrides: `key=value` settings, for a job file.
        local: run in this process instead of on Ray.
        say: is told what happens, a line at a time.
        watch: a context manager made with the run's folder, open while the run goes on.

    Returns:
        status, name, run_id, steps, tokens, initial_eval_loss, eval_loss, train_loss,
        tokens_per_second, peak_memory_bytes, workers, restarts, adapter, model_version. A loss
        that is no number is None.

    Raises:
        OrchestratorError: the job was refused, failed or was interrupted; see its exit_status.
    """
    resolved = _resolve(job, overrides)
    run_dir = resolved.run_dir.absolute()
    place = command_place(resolved, run_dir, trains=local)
    with _own(run_dir):
        place.open()
        deliver_pending(resolved, run_dir, say, _PENDING_SECONDS)
        check_run(resolved, place)
        finished = finished_run(resolved, place)
        if finished is None:
            # Results of a shorter run of this name are not this one's, however it ends.
            write_whole(run_dir / "result.json", json.dumps({"status": "running"}))
            write_whole(run_dir / "job.yaml", redact(dump_job(resolved)))
        place.publish()
        if finished is not None:
            steps = finished["steps"]
            say(f"{resolved.name} is finished ({steps} steps); nothing to do. {place.name}")
            return finished
        with place.concluding(say):
            return _run(resolved, place, local, say, watch)


def sweep(
    job: JobConfig | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    say: Say = print,
    watch: Callable[[Path], Any] | None = None,
) -> dict[str, Any]:
    """Search as the job's `sweep` section says, or go on with a sweep of the same name.

    Args:
        job: a job file's path, its content as a mapping, or a resolved job.
        overrides: `key=value` settings, for a job file.
        say: is told what happens, a line at a time.
        watch: a context manager made with the sweep's folder, open while it goes on.

    Returns:
        status, name, run_id, seconds, trials, best, adapter, report, model_version.

    Raises:
        OrchestratorError: the sweep was refused, failed or was interrupted; see its exit_status.
    """
    from orchestrator.sweep import space

    resolved = _resolve(job, overrides)
    space.check(resolved)
    if is_uri(resolved.output_dir):
        raise RefusedError(
            "output_dir: a sweep runs in a folder that all nodes share; URIs are for finetune"
        )
    run_dir = resolved.run_dir.absolute()
    with _own(run_dir):
        check_sweep(resolved, run_dir)
        deliver_pending(resolved, run_dir, say, _PENDING_SECONDS)
        finished = finished_sweep(run_dir)
        if finished is not None:
            say(f"{resolved.name} is finished ({len(finished['trials'])} trials). {run_dir}")
            return finished
        write_whole(run_dir / "result.json", json.dumps({"status": "running"}))
        write_whole(run_dir / "job.yaml", redact(dump_job(resolved)))
        return _sweep(resolved, run_dir, say, watch)


def _sweep(
    job: JobConfig, run_dir: Path, say: Say, watch: Callable[[Path], Any] | None
) -> dict[str, Any]:
    _start_ray_once()
    quiet_libraries()
    from orchestrator.sweep.finish import conclude, results, settle
    from orchestrator.sweep.outcome import spent_seconds

    began = time.monotonic() - spent_seconds(run_dir)
    with JournalObserver(run_dir) as observer:
        # The pause before it is none of the sweep's time.
        observer.emit("command")
    from orchestrator.cluster.session import session

    delivery, trials = Delivery(job, run_dir, say), TrialDeliveries(job, run_dir, say)
    status, error, engine = "failed", None, {}
    try:
        with (
            watch(run_dir) if watch else _nothing(),
            _stop_on_interrupt(run_dir),
            session(job.cluster.address, say, _OF_A_SWEEP) as here,
        ):
            from orchestrator.sweep.driver import run

            delivery.start()
            trials.start()
            engine = run(job, run_dir, here, say)
        with JournalObserver(run_dir) as observer:
            conclude(job, run_dir, engine, observer, lambda: _registered(job, delivery))
        status = "finished"
    except OrchestratorError as raised:
        status = status_word(raised.exit_status)
        error = str(raised)
        raise
    except KeyboardInterrupt:
        status, error = "interrupted", "interrupted twice"
        raise
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        seconds = time.monotonic() - began
        settle(run_dir, "interrupted")
        with JournalObserver(run_dir) as observer:
            measured = {name: value for name, value in engine.items() if name != "proof"}
            observer.emit("finish", status=status, error=error, seconds=seconds, **measured)
        left = _DELIVERY_SECONDS if status == "finished" else _PENDING_SECONDS
        end = time.monotonic() + left
        report = delivery.close(left)
        # After the run that they are nested in.
        trials.close(max(1.0, end - time.monotonic()))
        if error is not None:
            _keep_failure(run_dir, job, status, report.run_id, error)
    complete = results(job, run_dir, status, seconds, report.run_id, report.model_version)
    write_whole(run_dir / "result.json", json.dumps(complete, indent=1))
    return complete


def _registered(job: JobConfig, delivery: Delivery) -> str | None:
    """The version of the sweep's adapter, as soon as MLflow has registered it."""
    if job.tracking.registered_model is None:
        return None
    return delivery.catch_up(_DELIVERY_SECONDS).model_version


def _run(
    job: JobConfig, place: Place, local: bool, say: Say, watch: Callable[[Path], Any] | None
) -> dict[str, Any]:
    run_dir = place.folder
    starts = _count_starts(run_dir)
    delivery = Delivery(job, run_dir, say)
    delivery.start()
    status, results, error = "failed", {}, None
    try:
        with watch(run_dir) if watch else _nothing():
            results = _train_here(job, place) if local else _train_on_ray(job, place, say)
        results["adapter"] = place.adapter
        status = "finished"
    except OrchestratorError as raised:
        status = status_word(raised.exit_status)
        error = str(raised)
        raise
    except KeyboardInterrupt:
        status, error = "interrupted", "interrupted twice"
        raise
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        results = {**results, "restarts": max(0, _count_starts(run_dir) - starts - 1)}
        _write_samples(run_dir)
        with JournalObserver(run_dir) as observer:
            observer.emit("finish", status=status, error=error, **results)
        report = delivery.close(_DELIVERY_SECONDS if status == "finished" else _PENDING_SECONDS)
        if error is not None:
            _keep_failure(run_dir, job, status, report.run_id, error)
    complete = {
        "status": status,
        "name": job.name,
        "run_id": report.run_id,
        **_plain(results),
        "model_version": report.model_version,
    }
    write_whole(run_dir / "result.json", json.dumps(complete, indent=1))
    return complete


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    """The results without losses that are no numbers: JSON has no word for them but null."""
    from orchestrator.sweep.report.table import finite

    return {name: finite(v) if isinstance(v, float) else v for name, v in results.items()}


def _keep_failure(
    run_dir: Path, job: JobConfig, status: str, run_id: str | None, error: str
) -> None:
    """Keep how the command ended. The error itself is what must reach the user."""
    kept = {"status": status, "name": job.name, "run_id": run_id, "error": redact(error)}
    with suppress(OSError):
        write_whole(run_dir / "result.json", json.dumps(kept, indent=1))


def _train_here(job: JobConfig, place: Place) -> dict[str, Any]:
    quiet_libraries()
    from orchestrator.training.collective import World
    from orchestrator.training.run import run

    with (
        JournalObserver(place.folder) as observer,
        _stop_on_interrupt(place.folder),
        SystemSampler(observer.emit),
        place.writing(lambda message: observer.emit("warning", message=message)),
    ):
        return run(job, place.folder, cache_dir(), None, World(), observer)


def _start_ray_once() -> None:
    """A thread that outlives its Ray for a moment must not start another.

    Tune's and Ray Train's call Ray on; Ray reads this when it is imported.
    """
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def _train_on_ray(job: JobConfig, place: Place, say: Say) -> dict[str, Any]:
    _start_ray_once()
    from orchestrator.cluster.session import session

    with (
        _stop_on_interrupt(place.folder),
        place.following(say),
        session(job.cluster.address, say) as here,
    ):
        from orchestrator.cluster.driver import run

        return run(job, place.folder, here, say)


def _resolve(
    job: JobConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str]
) -> JobConfig:
    if isinstance(job, JobConfig):
        return job
    return job_from_mapping(job) if isinstance(job, Mapping) else load_job(job, overrides)


@contextmanager
def _own(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder: two commands over one run would write one journal."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"output_dir: {run_dir} cannot be made: {error}") from error
    lock = FileLock(run_dir / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise RefusedError(f"{run_dir} is in use: another command is running this job") from None
    except OSError as error:
        raise RefusedError(f"output_dir: {run_dir} cannot be written to: {error}") from error
    try:
        stop_path(run_dir).unlink(missing_ok=True)
        yield
    finally:
        lock.release()


@contextmanager
def _stop_on_interrupt(run_dir: Path) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to save and end; the second ends it at once."""

    def ask(number: int, frame: Any) -> None:
        if stop_path(run_dir).exists():
            raise KeyboardInterrupt
        stop_path(run_dir).touch()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _count_starts(run_dir: Path) -> int:
    path = journal_path(run_dir)
    if not path.exists():
        return 0
    return sum(event["event"] == "start" for event, _ in read_events(path))


def _write_samples(run_dir: Path) -> None:
    path = journal_path(run_dir)
    if not path.exists():
        return
    samples = [event for event, _ in read_events(path) if event["event"] == "sample"]
    lines = [json.dumps({k: v for k, v in s.items() if k != "event"}) for s in samples]
    write_whole(run_dir / "samples.jsonl", "".join(f"{line}\n" for line in lines))
