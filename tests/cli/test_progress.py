"""What a training shows: a bar on a terminal, lines elsewhere, every number in its place."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from decal.cli.progress import PLAIN_SECONDS, SweepProgress, TrainingProgress, duration, numbers
from decal.errors import TrainingError
from decal.train.events import EvalDone, Evaluating, Note, Over, Saved, StepDone


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


def lines_of(file: io.StringIO) -> list[str]:
    return [line.rstrip() for line in file.getvalue().splitlines()]


def evaluated(number: int, loss: float) -> EvalDone:
    return EvalDone(step=number, eval_loss=loss, best=False)


def test_candidates_share_a_line() -> None:
    """Fails when every candidate prints a line, or the speed is that of one of them."""
    file, console = plain()
    with SweepProgress(console, clock=lambda: 0.0) as progress:
        for number in (1, 2):
            for name in ("r4", "r8"):
                progress.observe(name, step(number))
    assert lines_of(file) == ["step 1/100  r4 1.2346  r8 1.2346  1,234 tokens/s  2:05 left"]


def test_evaluations_share_a_line() -> None:
    """Fails when the line comes before all have evaluated, or never after one is over."""
    file, console = plain()
    progress = SweepProgress(console, clock=lambda: 0.0)
    for number in (1, 2):
        for name in ("r4", "r8", "r16"):
            progress.observe(name, step(number))
    start = len(lines_of(file))
    progress.observe("r4", evaluated(2, 1.5))
    progress.observe("r8", evaluated(2, 1.25))
    assert len(lines_of(file)) == start
    progress.observe("r16", evaluated(2, 1.125))
    assert lines_of(file)[start:] == ["step 2: eval loss  r4 1.5000  r8 1.2500  r16 1.1250"]
    progress.observe("r4", Over(error=None))
    progress.observe("r16", evaluated(4, 1.0))
    progress.observe("r8", evaluated(4, 1.25))
    assert lines_of(file)[-1] == "step 4: eval loss  r16 1.0000  r8 1.2500"
    progress.observe("r8", evaluated(6, 1.0))
    progress.observe("r16", Over(error=None))
    assert lines_of(file)[-1] == "step 6: eval loss  r8 1.0000"


def test_evaluations_at_different_steps_are_not_mixed_up() -> None:
    """Fails when one that evaluates more often fills the others' line."""
    file, console = plain()
    progress = SweepProgress(console, clock=lambda: 0.0)
    for name in ("a", "b"):
        progress.observe(name, step(1))
    progress.observe("a", evaluated(1, 1.5))
    progress.observe("a", evaluated(2, 1.25))
    progress.observe("b", evaluated(4, 1.0))
    assert lines_of(file)[-2:] == ["step 1: eval loss  a 1.5000", "eval loss  a 1.2500  b 1.0000"]


def test_a_failed_candidate_is_named_once_and_leaves_the_line() -> None:
    """Fails when its last loss is shown to the end, or the bar waits for it."""
    file, console = plain()
    now = [0.0]
    progress = SweepProgress(console, clock=lambda: now[0])
    for number in (1, 2):
        for name in ("good", "bad"):
            progress.observe(name, step(number))
    error = TrainingError("the loss of step 3 is nan", hint="lower train.lr")
    progress.observe("bad", Over(error=error))
    assert lines_of(file)[-1] == "warning: bad failed: the loss of step 3 is nan"
    now[0] += 2 * PLAIN_SECONDS
    progress.observe("good", step(3))
    assert lines_of(file)[-1].startswith("step 3/100  good 1.2346  1,234")
    progress.observe("good", step(100))
    assert "left" not in lines_of(file)[-1]
    assert "bad" not in lines_of(file)[-1]


def test_the_next_wave_begins_anew() -> None:
    """Fails when candidates that are over count among those that train."""
    file, console = plain()
    progress = SweepProgress(console, clock=lambda: 0.0)
    progress.observe("first", step(2, 2))
    progress.observe("first", Over(error=None))
    progress.observe("second", step(1, 2))
    progress.observe("second", step(2, 2))
    assert [line.split("  1,234")[0] for line in lines_of(file)] == [
        "step 2/2  first 1.2346",
        "step 1/2  second 1.2346",
        "step 2/2  second 1.2346",
    ]


def test_many_candidates_fit_into_a_line() -> None:
    """Fails when sixty losses are listed."""
    file, console = plain()
    progress = SweepProgress(console, clock=lambda: 0.0)
    names = [f"c{i}" for i in range(10)]
    for name in names:
        progress.observe(name, step(1))
    for i, name in enumerate(names):
        progress.observe(name, evaluated(1, 2.0 - i / 8))
    assert lines_of(file)[-1] == (
        "step 1: eval loss  c4 1.5000  c5 1.3750  c6 1.2500  c7 1.1250  c8 1.0000  c9 0.8750"
        "  (4 more, none lower)"
    )


def test_notes_say_whose_they_are() -> None:
    """Fails when a candidate's warning cannot be told from the sweep's."""
    file, console = plain()
    progress = SweepProgress(console)
    progress.observe("r4", Note(text="silent [x]"))
    progress.observe(None, Note(text="stopping", warning=False))
    assert lines_of(file) == ["warning: r4: silent [x]", "stopping"]
