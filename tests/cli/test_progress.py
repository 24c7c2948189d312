"""What a training shows: a bar on a terminal, lines elsewhere, every number in its place."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from decal.cli.progress import PLAIN_SECONDS, TrainingProgress, duration, numbers
from decal.train.events import EvalDone, Evaluating, Note, Saved, StepDone


def step(number: int, total: int = 100) -> StepDone:
    return StepDone(
        step=number,
        total=total,
        epoch=0,
        loss=1.23456,
        lr=1.9e-4,
        grad_norm=0.5,
        tokens=64,
        tokens_per_second=1234.5,
        eta=125.0,
    )


def plain() -> tuple[io.StringIO, Console]:
    file = io.StringIO()
    return file, Console(file=file, force_terminal=False, width=200, highlight=False)


def test_lines_come_now_and_then() -> None:
    """Fails when every step prints a line, or the first or the last prints none."""
    file, console = plain()
    now = [0.0]
    with TrainingProgress(console, clock=lambda: now[0]) as progress:
        for number in range(1, 101):
            progress.observe(step(number))
            now[0] += PLAIN_SECONDS / 10
    shown = [int(line.split()[1].split("/")[0]) for line in file.getvalue().splitlines()]
    assert shown == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]


def test_a_line_holds_the_numbers() -> None:
    """Fails when a number is dropped, or the evaluation is not remembered."""
    file, console = plain()
    progress = TrainingProgress(console, clock=lambda: 0.0)
    progress.observe(Evaluating(step=1, batch=1, batches=2))
    progress.observe(EvalDone(step=1, eval_loss=1.5, best=True))
    progress.observe(Saved(step=1))
    progress.observe(step(1))
    assert file.getvalue().splitlines() == [
        "step 1: eval loss 1.5000 (best so far)",
        "step 1/100  loss 1.2346  eval 1.5000  lr 1.9e-04  1,234 tokens/s  2:05 left",
    ]


def test_the_last_step_has_no_time_left() -> None:
    """Fails when a finished run still announces an end."""
    assert "left" not in numbers(step(100), None)


def test_notes_and_markup() -> None:
    """Fails when a warning looks like any line, or brackets in text are taken for markup."""
    file, console = plain()
    progress = TrainingProgress(console)
    progress.observe(Note(text="threads were [bold]4"))
    progress.observe(Note(text="stopping", warning=False))
    progress.say("rows [3]")
    assert file.getvalue().splitlines() == ["warning: threads were [bold]4", "stopping", "rows [3]"]


def test_a_terminal_gets_a_bar_that_leaves_one_line() -> None:
    """Fails when the bar is left on the screen, or its last numbers are not kept."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    with TrainingProgress(console) as progress:
        progress.observe(step(1, 2))
        progress.observe(Evaluating(step=1, batch=1, batches=2))
        progress.observe(step(2, 2))
    last = file.getvalue().rstrip("\n").splitlines()[-1]
    assert last.endswith("step 2/2  loss 1.2346  lr 1.9e-04  1,234 tokens/s")
    assert "\x1b[2K" in file.getvalue()


def test_an_error_inside_takes_the_bar_away() -> None:
    """Fails when the live display outlives the training and eats the error message."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)

    def fails() -> None:
        with TrainingProgress(console) as progress:
            progress.observe(step(1))
            raise ValueError("nan")

    with pytest.raises(ValueError, match="nan"):
        fails()
    assert console._live_stack == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.6, "0:07"), (125, "2:05"), (3725, "1:02:05"), (float("inf"), "?"), (float("nan"), "?")],
)
def test_duration(seconds: float, text: str) -> None:
    """Fails when minutes carry wrongly, or an unknown time raises."""
    assert duration(seconds) == text
