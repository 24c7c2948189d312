"""Progress in a notebook: one fragment, sent now and then, with what is worth seeing."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from decal.report.live import Live, notebook
from decal.train.events import EvalDone, Evaluating, Note, StepDone


def step(number: int, loss: float = 1.0, total: int = 100, eta: float = 7.0) -> StepDone:
    return StepDone(
        step=number, total=total, epoch=0, loss=loss, lr=1e-4, grad_norm=1.0, tokens=9,
        tokens_per_second=1234.5, eta=eta,
    )  # fmt: skip


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_at_most_one_message_a_second() -> None:
    """And one at once for evaluations, warnings and the last step. Mutation: one for each step."""
    sent: list[str] = []
    clock = Clock()
    live = Live(sent.append, clock)
    for number in range(1, 51):
        clock.now += 0.1
        live.observe(step(number))
    assert 4 <= len(sent) <= 6
    before = len(sent)
    live.observe(EvalDone(step=50, eval_loss=2.0, best=True))
    live.observe(Note(text="careful"))
    live.observe(step(100))
    assert len(sent) == before + 3
    live.observe(Evaluating(step=100, batch=1, batches=2))
    live.observe(Note(text="by the way", warning=False))
    assert len(sent) == before + 3


def test_what_is_shown() -> None:
    """Mutation: lose the evaluation, or let a warning act."""
    live = Live(lambda html: None)
    assert "training begins" in live.html()
    live.observe(step(1, 3.0))
    live.observe(step(2, 1.5))
    live.observe(EvalDone(step=2, eval_loss=1.75, best=True))
    live.observe(Note(text="<img src=x onerror=alert(1)>"))
    shown = live.html()
    assert "step 2 of 100 · loss 1.5000 · eval loss 1.7500 · 1,234 tokens/s · 7 s left" in shown
    assert "<img" not in shown
    assert shown.count("<circle") == 1
    (points,) = re.findall(r'<polyline points="([^"]*)"', shown)
    assert points == "3.0,2.0 6.0,54.0"
    live.observe(step(100, 1.0))
    assert "left" not in live.html()


def test_a_long_run_stays_small() -> None:
    """Mutation: every step's point in every message."""
    live = Live(lambda html: None, lambda: 0.0)
    for number in range(1, 20_001):
        live._train.append((number, 1.0))
    live.observe(step(20_001, total=20_001))
    assert len(live.html()) < 6_000


def test_only_a_notebook_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither no IPython nor IPython in a terminal. Mutation: import it to ask."""
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert notebook() is None
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert notebook() is None
    terminal = SimpleNamespace(get_ipython=lambda: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", terminal)
    assert notebook() is None


def test_a_notebook_gets_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: a new display for each update."""
    shown: list[Any] = []

    def display(html: str, display_id: bool) -> Any:
        assert display_id
        shown.append(html)
        return SimpleNamespace(update=lambda html: shown.append(("again", html)))

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    drawing = SimpleNamespace(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython.display", drawing)
    send = notebook()
    assert send is not None
    send("a")
    send("b")
    assert shown == ["a", ("again", "b")]
