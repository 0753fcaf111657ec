"""What a sweep shows while it goes on, from journals that grow."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.config import JobConfig
from orchestrator.jobfile import dump_job
from orchestrator.sweep.space import trial_job
from orchestrator.tracking.journal import Journal, journal_path
from orchestrator.tracking.store import tracking_uri
from orchestrator.watch import trial as trial_module
from orchestrator.watch.sweep import SweepWatch, trials_at_most, watching_sweep
from tests.unit.sweeps import Trained, finish, start, sweep_job, take_step, write_trial

PARAMS = {"lora.rank": 8, "training.learning_rate": 1e-3}


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class _Screen:
    """A sweep, its watch, and what was printed."""

    def __init__(self, folder: Path, terminal: bool = False, height: int = 25) -> None:
        self.job = sweep_job(folder, trials=4)
        self.stream, self.clock = io.StringIO(), _Clock()
        self.console = Console(
            file=self.stream, force_terminal=terminal, width=120, height=height, highlight=False
        )
        self.job.run_dir.mkdir(parents=True, exist_ok=True)
        self.sweep = Journal(journal_path(self.job.run_dir))

    def watch(self) -> SweepWatch:
        return SweepWatch(self.job, self.job.run_dir, self.console, self.clock)

    def trial(self, number: int, params: dict | None = None) -> Journal:
        return Journal(journal_path(_propose(self.job, number, params or PARAMS)))

    def lines(self) -> list[str]:
        text = self.stream.getvalue()
        self.stream.seek(0)
        self.stream.truncate()
        return text.splitlines()

    def shown(self, watch: SweepWatch) -> str:
        with self.console.capture() as capture:
            self.console.print(watch.table())
        return capture.get()


def _propose(job: JobConfig, number: int, params: dict) -> Path:
    folder = job.run_dir / "trials" / f"abc_{number:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    own = trial_job(job, folder.name, folder.parent, params, tracking_uri(job))
    (folder / "job.yaml").write_text(dump_job(own))
    return folder


def _evaluate(journal: Journal, step: int, loss: float) -> None:
    take_step(journal, step, loss)
    journal.append("evaluation", step=step, eval_loss=loss, perplexity=1.0)


def test_plain_lines_tell_begin_loss_and_end(tmp_path: Path) -> None:
    screen = _Screen(tmp_path)
    watch = screen.watch()
    screen.sweep.append("places", places=2)
    first, second = screen.trial(0), screen.trial(1)
    start(first, 6)
    watch.poll()
    assert screen.lines() == ["trial abc_00000 begins: rank 8, learning_rate 0.001"]
    start(second, 6, resumed_from=2)
    _evaluate(first, 2, 3.25)
    screen.clock.now += 30
    watch.poll()
    assert screen.lines() == [
        "trial abc_00000 step 2/6: eval loss 3.2500",
        "trial abc_00001 goes on after step 2: rank 8, learning_rate 0.001",
    ]
    finish(first, "stopped", None, [4, 3.25])
    watch.poll()
    assert screen.lines() == [
        "trial abc_00000 stopped after 2 steps, eval loss 3.2500. 1 of 4 trials ended (1 stopped), "
        "1/2 places, 2 to come, 30 s spent, about 1:30 min left"
    ]


def test_evaluations_come_as_plain_lines_only_now_and_then(tmp_path: Path) -> None:
    screen = _Screen(tmp_path)
    watch, journal = screen.watch(), screen.trial(0)
    start(journal, 60)
    for step in range(1, 31):
        _evaluate(journal, step, 3.0)
        screen.clock.now += 1
        watch.poll()
    told = [line for line in screen.lines() if " step " in line]
    assert [line.split()[3] for line in told] == ["1/60:", "11/60:", "21/60:"]


def test_failures_and_warnings_are_told_everywhere(tmp_path: Path) -> None:
    for terminal in (False, True):
        screen = _Screen(tmp_path / str(terminal), terminal)
        watch, journal = screen.watch(), screen.trial(0)
        start(journal, 6)
        journal.append("warning", message="the disk is [red]full[/red]")
        finish(journal, "failed", "The loss of step 3 is nan", [])
        screen.sweep.append("data", summary="60 examples")
        watch.poll()
        text = "\n".join(screen.lines())
        assert "abc_00000: the disk is [red]full[/red]" in text and "60 examples" in text
        assert "abc_00000 failed: The loss of step 3 is nan. 1 of 4 trials ended (1 failed)" in text


def test_the_table_shows_states_and_progress(tmp_path: Path) -> None:
    screen = _Screen(tmp_path)
    watch = screen.watch()
    screen.sweep.append("places", places=3)
    journals = [screen.trial(number) for number in range(4)]
    for journal in journals[:3]:
        start(journal, 6)
    for step in range(1, 7):
        _evaluate(journals[0], step, 4 - step / 10)
    finish(journals[0], "finished", None, [3.4] * 6)
    _evaluate(journals[1], 1, 3.9)
    _evaluate(journals[2], 1, math.nan)
    finish(journals[2], "failed", "nan", [math.nan])
    screen.clock.now += 70
    watch.poll()
    first, headings, *rows = screen.shown(watch).splitlines()
    assert first.startswith("2 of 4 trials ended (1 finished, 1 failed), 1/3 places, 1 to come")
    assert " ".join(headings.split()) == "trial rank learning_rate step eval loss time state"
    cells = [row.split() for row in rows]
    assert cells[0] == ["abc_00001", "8", "0.001", "1/6", "3.9000", "0.5", "s", "running"]
    assert cells[1] == ["abc_00003", "8", "0.001", "0", "0.0", "s", "waiting"]
    assert cells[2] == ["best", "so", "far"]
    assert cells[3] == ["abc_00000", "8", "0.001", "6/6", "3.4000", "3.0", "s", "finished"]


def test_two_hundred_trials_fit_the_screen(tmp_path: Path) -> None:
    screen = _Screen(tmp_path, height=24)
    watch = screen.watch()
    for number in range(200):
        end = None if number >= 180 else "stopped" if number % 2 else "finished"
        trial = Trained(PARAMS, [4, 3 + number / 100], end)
        write_trial(screen.job, screen.job.run_dir / "trials" / f"abc_{number:05d}", trial)
    watch.poll()
    lines = screen.shown(watch).splitlines()
    assert len(lines) <= 24
    assert sum("running" in line for line in lines[1:]) >= 10 and "and 7 more" in lines[-1]
    best = [line.split()[0] for line in lines if line.endswith("finished")]
    assert best == ["abc_00000", "abc_00002", "abc_00004", "abc_00006", "abc_00008"]


def test_a_sweep_that_goes_on_knows_what_was_done_before(tmp_path: Path) -> None:
    screen = _Screen(tmp_path)
    folder = screen.job.run_dir / "trials"
    write_trial(screen.job, folder / "abc_00000", Trained(PARAMS, [3.0] * 6))
    write_trial(screen.job, folder / "abc_00001", Trained(PARAMS, [3.0] * 3, None))
    watch = screen.watch()
    watch.poll()
    assert screen.lines() == []
    assert watch.progress() == (
        "1 of 4 trials ended (1 finished), 0 running, 3 to come, 0.0 s spent"
    )
    with Journal(journal_path(folder / "abc_00001")) as journal:
        start(journal, 6, resumed_from=3)
        # Loading the model tells nothing of how fast trials are.
        screen.clock.now += 50
        watch.poll()
        take_step(journal, 4, 2.9)
        take_step(journal, 5, 2.9)
        take_step(journal, 6, 2.9)
    screen.clock.now += 10
    watch.poll()
    # Half a trial took 10 s; two are left.
    assert watch.progress().endswith("1:00 min spent, about 40 s left")


def test_journals_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: list[int] = []
    real = trial_module.read_events

    def reading(path: Path, offset: int = 0) -> Iterator:
        offsets.append(offset)
        return real(path, offset)

    monkeypatch.setattr(trial_module, "read_events", reading)
    screen = _Screen(tmp_path)
    watch, journal = screen.watch(), screen.trial(0)
    start(journal, 6)
    watch.poll()
    size = journal_path(screen.job.run_dir / "trials" / "abc_00000").stat().st_size
    watch.poll()
    watch.poll()
    take_step(journal, 1, 3.0)
    watch.poll()
    assert offsets == [0, size]


def test_a_torn_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    screen = _Screen(tmp_path)
    watch, journal = screen.watch(), screen.trial(0)
    path = journal_path(screen.job.run_dir / "trials" / "abc_00000")
    start(journal, 6)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    watch.poll()
    path.write_bytes(whole)
    watch.poll()
    assert len(screen.lines()) == 1 and "1 running" in watch.progress()


@pytest.mark.parametrize("terminal", [True, False])
def test_watching_shows_what_came_last(tmp_path: Path, terminal: bool) -> None:
    screen = _Screen(tmp_path, terminal)
    with watching_sweep(screen.job, screen.job.run_dir, screen.console):
        journal = screen.trial(0)
        start(journal, 6)
        finish(journal, "failed", "no such layer", [])
    assert "abc_00000 failed: no such layer" in screen.stream.getvalue()


def test_the_time_budget_limits_the_time_left(tmp_path: Path) -> None:
    screen = _Screen(tmp_path)
    screen.job = sweep_job(tmp_path, trials=100, time_budget=60.0)
    watch, journal = screen.watch(), screen.trial(0)
    start(journal, 6)
    watch.poll()
    finish(journal, "finished", None, [3.0] * 6)
    screen.clock.now += 20
    watch.poll()
    assert watch.progress().endswith("20 s spent, about 40 s left")


def test_a_grid_has_as_many_trials_as_points(tmp_path: Path) -> None:
    space = {"lora.rank": {"grid": [1, 2, 3]}, "lora.dropout": {"grid": [0, 0.1]}}
    grid = sweep_job(tmp_path, space)
    assert grid.sweep is not None
    assert trials_at_most(grid.sweep.model_copy(update={"searcher": "grid"})) == 6
    assert trials_at_most(grid.sweep.model_copy(update={"trials": 9})) == 9
