"""A training in a notebook: one small picture that is drawn again, never a second one.

Jupyter shows what a cell prints line by line, and bars made for terminals become pages of them. So
the state is one HTML fragment under one display id: what is done, the numbers of the last step, and
the losses so far as a line. It is sent at most once a second, because each update is a message to a
browser that may be far away.

IPython is used only where it is running already, and is never imported by decal. An event is
anything that has a `step` and numbers under the names below, as for the trackers; the loop's
classes are not known here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from decal.markup import Child, Markup, join, tag
from decal.report.figures import LIGHT
from decal.report.plots import smoothed

SECONDS = 1.0
"""Between two updates."""
WIDE, TALL = 300, 56
"""Pixels of the curve."""
SHOWN = 200
"""Points of the curve; more are left out evenly."""
WARNINGS = 5
"""Warnings that are kept in sight."""

Send = Callable[[str], None]


def notebook() -> Send | None:
    """What shows HTML in the running notebook, at one place; None where there is no notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if ipython is None or not hasattr(shell, "kernel"):
        return None  # a terminal, or no IPython at all
    shown: list[Any] = []

    def send(html: str) -> None:
        from IPython.display import HTML, display  # loaded already, see above

        if shown:
            shown[0].update(HTML(html))
        else:
            shown.append(display(HTML(html), display_id=True))

    return send


class Live:
    """One observer of a training."""

    def __init__(self, send: Send, clock: Callable[[], float] = time.monotonic):
        self._send, self._clock = send, clock
        self._last = -float("inf")
        self._train: list[tuple[int, float]] = []
        self._evals: list[tuple[int, float]] = []
        self._step: Any = None
        self._warnings: list[str] = []

    def observe(self, event: object) -> None:
        """Takes one event of a training."""
        loss, total = getattr(event, "loss", None), getattr(event, "total", None)
        now = False
        if loss is not None and total is not None:
            self._step = event
            self._train.append((self._step.step, loss))
            now = self._step.step >= total
        elif getattr(event, "eval_loss", None) is not None:
            self._evals.append((event.step, event.eval_loss))  # type: ignore[attr-defined]
            now = True
        elif getattr(event, "warning", False):
            self._warnings.append(str(event.text))  # type: ignore[attr-defined]
            now = True
        if now or self._clock() - self._last >= SECONDS:
            self._last = self._clock()
            self._send(self.html())

    def html(self) -> Markup:
        """The state of the training."""
        lines: list[Child] = [tag("div", f"warning: {w}") for w in self._warnings[-WARNINGS:]]
        step = self._step
        if step is None:
            return join((tag("div", "training begins"), *lines))
        done = tag("progress", value=str(step.step), max=str(step.total), style="width:300px")
        numbers = f"step {step.step:,} of {step.total:,} · loss {step.loss:.4f}"
        if self._evals:
            numbers += f" · eval loss {self._evals[-1][1]:.4f}"
        numbers += f" · {step.tokens_per_second:,.0f} tokens/s"
        if step.step < step.total and step.eta < 1e7:
            numbers += f" · {step.eta:,.0f} s left"
        return join((tag("div", done), tag("div", numbers), self._curve(), *lines))

    def _curve(self) -> Markup:
        """Training, smoothed, as a line; evaluations as dots."""
        steps = [step for step, _ in self._train]
        values = smoothed([value for _, value in self._train])
        every = max(1, -(-len(values) // SHOWN))
        line = [*zip(steps, values, strict=True)][::every]
        known = [value for _, value in (*line, *self._evals)]
        low, high = min(known), max(known)
        right, span = max(1, self._step.total), (high - low) or 1.0

        def place(step: int, value: float) -> tuple[str, str]:
            return f"{WIDE * step / right:.1f}", f"{2 + (TALL - 4) * (high - value) / span:.1f}"

        path = " ".join(",".join(place(*point)) for point in line)
        train, evaluation = LIGHT.series[:2]
        dots = []
        for point in self._evals:
            x, y = place(*point)
            dots.append(tag("circle", cx=x, cy=y, r="2.5", fill=evaluation))
        curve = tag("polyline", points=path, fill="none", stroke=train, stroke_width="1.5")
        size = {"width": str(WIDE), "height": str(TALL)}
        return tag("svg", curve, *dots, role="img", **size,
                   aria_label=f"loss {high:.4g} to {low:.4g}")  # fmt: skip
