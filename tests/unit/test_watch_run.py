"""What a run shows while it goes on, from a journal that grows."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.tracking.journal import Journal, journal_path
from orchestrator.watch import watching
from tests.unit.sweeps import start, take_step


def _train(folder: Path, first: int, last: int, total: int) -> None:
    with Journal(journal_path(folder)) as journal:
        start(journal, total, resumed_from=first - 1)
        for step in range(first, last + 1):
            take_step(journal, step, 4.0 - step)


def test_plain_lines_tell_the_beginning_the_losses_and_the_last_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    with watching(tmp_path, Console(file=stream, width=120)):
        _train(tmp_path, 1, 3, 3)
        with Journal(journal_path(tmp_path)) as journal:
            journal.append("evaluation", step=3, eval_loss=2.5, perplexity=12.18)
            journal.append("warning", message="no layer is named [bold]x[/bold]")
    assert stream.getvalue().splitlines() == [
        "1,000 trainable parameters on cpu, 1 worker(s), 3 steps",
        "step 0: eval loss 5.0000, perplexity 148.40",
        "step 1/3  loss 3.0000  eval 5.0000  200 tokens/s  1.0 GiB  0.0 min left",
        "step 3/3  loss 1.0000  eval 5.0000  200 tokens/s  1.0 GiB  0.0 min left",
        "step 3: eval loss 2.5000, perplexity 12.18",
        "no layer is named [bold]x[/bold]",
    ]


def test_what_an_earlier_command_wrote_is_not_told_again(tmp_path: Path) -> None:
    _train(tmp_path, 1, 2, 4)
    stream = io.StringIO()
    with watching(tmp_path, Console(file=stream, width=120)):
        _train(tmp_path, 3, 4, 4)
    first, *steps = stream.getvalue().splitlines()
    assert first.endswith("4 steps, going on after step 2")
    assert len(steps) == 2 and steps[-1].startswith("step 4/4  loss 0.0000")


def test_a_terminal_has_one_line_that_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system=None, width=120)
    with watching(tmp_path, console):
        _train(tmp_path, 1, 3, 3)
    shown = stream.getvalue()
    assert "step 3/3" in shown and "loss 1.0000  eval 5.0000  200 tokens/s  1.0 GiB" in shown
    assert "min left" not in shown
    # At the end it is wiped away.
    assert shown.rstrip().endswith("\x1b[2K")
