"""The commands: parse, call, print. Nothing heavy is imported before a command runs."""

import gc
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

import click

_JOB = click.argument("job", metavar="JOB.yaml", type=click.Path(dir_okay=False))
_SET = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the job file."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
# What `ui` needs of a command's overrides to find the same store.
_OF_THE_STORE = ("name", "output_dir", "tracking", "tracking.uri")


def command(arguments: list[str] | None = None, program: str | None = None) -> None:
    """The program `orchestrator`, which may start itself again with other settings."""
    if "--local" in sys.argv:
        from orchestrator.allocator import restart_with_settings

        restart_with_settings()
    try:
        main(arguments, prog_name=program)
    finally:
        # Else Python looks through all that torch and the others have made before it ends: two
        # seconds.
        gc.freeze()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="orchestrator")
def main() -> None:
    """Fine-tune language models with QLoRA, from one CPU to a cluster of GPUs."""


@main.command()
@_JOB
@_SET
@click.option("--local", is_flag=True, help="Run in this process, without Ray.")
@_JSON
def finetune(job: str, overrides: tuple[str, ...], local: bool, as_json: bool) -> None:
    """Fine-tune as JOB.yaml says, or go on where it stopped."""
    console = _console()
    with _ending(job, as_json):
        from orchestrator.jobfile import load_job

        resolved = load_job(job, overrides)
        from orchestrator.api import finetune as run
        from orchestrator.watch import watching

        # Libraries print there too; stdout carries the JSON object and nothing else.
        with redirect_stdout(sys.stderr):
            results = run(
                resolved,
                local=local,
                say=lambda line: console.print(line, markup=False),
                watch=lambda run_dir: watching(run_dir, console),
            )
    if as_json:
        click.echo(json.dumps(results))
    from orchestrator.summary import show

    show(resolved, _ui_command(job, overrides), results, console)


@main.command()
@_JOB
@_SET
@_JSON
def sweep(job: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Search as JOB.yaml's sweep says, or go on where it stopped."""
    console = _console()
    with _ending(job, as_json):
        from orchestrator.jobfile import load_job

        resolved = load_job(job, overrides)
        from orchestrator.api import sweep as run
        from orchestrator.watch import watching_sweep

        # Libraries print there too; stdout carries the JSON object and nothing else.
        with redirect_stdout(sys.stderr):
            results = run(
                resolved,
                say=lambda line: console.print(line, markup=False),
                watch=lambda run_dir: watching_sweep(resolved, run_dir, console),
            )
    if as_json:
        click.echo(json.dumps(results))
    from orchestrator.summary import show_sweep

    show_sweep(resolved, _ui_command(job, overrides), results, console)


@main.command()
@_JOB
@_SET
@click.option("--gpu-memory", metavar="SIZE", help="Plan for GPUs of this memory, such as 48GiB.")
@click.option("--gpus", type=click.IntRange(min=1), help="Plan for so many GPUs.")
@_JSON
def plan(
    job: str, overrides: tuple[str, ...], gpu_memory: str | None, gpus: int | None, as_json: bool
) -> None:
    """Say what JOB.yaml takes of a GPU, and whether it fits, without loading weights.

    The exit status is 0 whether it fits or not; `fits` of the JSON object says which.
    """
    with _ending(job, as_json):
        from orchestrator.jobfile import load_job
        from orchestrator.plan import describe, parse_bytes, plan_job
        from orchestrator.quiet import quiet_libraries

        quiet_libraries()
        size = None if gpu_memory is None else parse_bytes(gpu_memory)
        resolved = load_job(job, overrides)
        if resolved.sweep is not None and resolved.sweep.search_space:
            from orchestrator.sweep.space import check

            check(resolved)
        with redirect_stdout(sys.stderr):
            made = plan_job(resolved, size, gpus)
    click.echo(describe(made), err=True)
    if resolved.sweep is not None:
        click.echo("this is of the sweep; --set sweep=null plans the fine-tune alone", err=True)
    if as_json:
        click.echo(json.dumps(made.to_json()))


@main.command()
@_JOB
@_SET
@click.option("--port", default=5000, show_default=True, help="Port on 127.0.0.1.")
def ui(job: str, overrides: tuple[str, ...], port: int) -> None:
    """Open the MLflow UI over the job's store."""
    import os

    from orchestrator.jobfile import load_job
    from orchestrator.tracking.secrets import redact
    from orchestrator.tracking.store import tracking_uri
    from orchestrator.tracking.ui import ui_command, ui_environment

    with _ending(job, as_json=False):
        resolved = load_job(job, overrides)
    command = ui_command(resolved, port)
    if command is None:
        click.echo(f"The UI is at {redact(tracking_uri(resolved))}", err=True)
        return
    click.echo(f"MLflow UI: http://127.0.0.1:{port} (Ctrl-C ends it)", err=True)
    os.execve(command[0], command, {**os.environ, **ui_environment(resolved)})


def _ui_command(job: str, overrides: tuple[str, ...]) -> str:
    """The command that opens the MLflow UI over the job's store, without secrets."""
    import shlex

    from orchestrator.tracking.secrets import redact

    # `make` puts the program in no folder of PATH; a submitted script has no `ui`.
    program = sys.argv[0] if sys.argv[0].endswith("orchestrator") else "orchestrator"
    kept = [text for text in overrides if text.partition("=")[0] in _OF_THE_STORE]
    return shlex.join(map(redact, [program, "ui", job, *(f"--set={text}" for text in kept)]))


def _console() -> Any:
    """Where people read: stderr. In a file, such as a submitted job's log, no line is folded."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


@contextmanager
def _ending(job: str, as_json: bool) -> Iterator[None]:
    """Where the command cannot go on, say why and leave with the status that says so too."""
    from orchestrator.errors import OrchestratorError

    try:
        yield
    except OrchestratorError as error:
        _end(error.exit_status, str(error), as_json, job)
    except KeyboardInterrupt:
        _end(130, "Interrupted; run the same command again to go on", as_json, job)
    except Exception as error:
        from orchestrator.tracking.secrets import redact

        # Not foreseen: where it happened is for whoever mends it.
        click.echo(redact(traceback.format_exc()), err=True)
        _end(1, redact(f"{type(error).__name__}: {error}"), as_json, job)


def _end(status: int, message: str, as_json: bool, job: str) -> NoReturn:
    """Say why on stderr, and with `--json` in one object too; leave with the status."""
    click.echo(f"orchestrator: {message}", err=True)
    if as_json:
        from orchestrator.errors import status_word

        results = {"status": status_word(status), "job": job, "error": message}
        click.echo(json.dumps(results))
    sys.exit(status)
