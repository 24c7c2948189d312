"""The bar of longer work: late, on terminals only, and gone at the end."""

from __future__ import annotations

import io

from rich.console import Console

from decal.cli.waiting import PATIENCE, Waiting


def shown(seconds: float, *, terminal: bool) -> str:
    """What is written by work of two steps that takes so long."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
    now = [0.0]
    with Waiting(console, clock=lambda: now[0]) as progress:
        progress.observe("r8 [b]", 1, 2)
        now[0] = seconds
        progress.observe("r8 [b]", 2, 2)
    return file.getvalue()


def test_short_work_has_no_bar() -> None:
    """Fails when a bar flickers over work of a moment."""
    assert shown(PATIENCE / 2, terminal=True) == ""


def test_long_work_has_one() -> None:
    """Fails when the bar is not drawn, takes names for markup, or stays on the screen."""
    text = shown(PATIENCE * 2, terminal=True)
    assert "r8 [b]" in text
    assert text.rstrip().endswith("\x1b[2K")


def test_a_log_gets_no_bar() -> None:
    """Fails when a file is filled with bars."""
    assert shown(PATIENCE * 2, terminal=False) == ""
