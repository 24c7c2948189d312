"""Candidates and reports that were never run, ordinary ones and hostile ones."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from decal.report.advice import recommend, scores
from decal.report.candidate import Candidate
from decal.report.hints import hints
from decal.report.page import Report, Sample

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def learned(r: int = 8, layers: int = 4, *, relative: bool = True) -> dict[str, Any]:
    """A spectrum in the form of `decal.verbs.spectrum`, larger in later layers."""
    modules = [
        {
            "module": f"model.layers.{layer}.{kind}",
            "kind": kind,
            "layer": layer,
            "r": r,
            "shape": [64, 64],
            "scaling": 2.0,
            "norm": 0.5 + layer,
            "relative": (0.5 + layer) / 100 if relative else None,
            "effective_rank": 1.0 + (r - 1) * (i + 1) / len(KINDS),
            "stable_rank": 1.5,
            "directions": [1, max(1, r - 1)],
            "values": [2.0**-i for i in range(r)],
        }
        for layer in range(layers)
        for i, kind in enumerate(KINDS)
    ]
    return {
        "path": "runs/x",
        "r": r,
        "lora_alpha": 2.0 * r,
        "parameters": 1000 * r,
        "rank": max(1, r - 1),
        "rank_everywhere": r,
        "kept": [1 - 4.0 ** -(i + 1) if i + 1 < r else 1.0 for i in range(r)],
        "modules": modules,
        "beside": [],
        "base": None if relative else "base `x` is not on this disk",
    }


def candidate(r: int, *, name: str | None = None, steps: int = 60, **changes: Any) -> Candidate:
    """A run at rank r, the better the larger."""
    chance = random.Random(r)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        fall = 4 * math.exp(-step / 12) + 0.5 / r
        rows.append({"step": step, "loss": 1 + fall + chance.gauss(0, 0.05)})
        if step % 10 == 0:
            rows.append({"step": step, "eval_loss": 1 + fall})
    fields: dict[str, Any] = {
        "name": name or f"r{r}",
        "rows": rows,
        "settings": {
            "base.path": "owner/model",
            "quant.format": "nf4",
            "adapter.method": "lora",
            "adapter.r": r,
            "adapter.lora_alpha": 2.0 * r,
            "adapter.target_modules": "all-linear",
            "data.path": "/home/somebody/rows.jsonl",
            "train.lr": 2e-4,
        },
        "steps": steps,
        "result": {
            "steps": steps,
            "loss": rows[-2]["loss"],
            "eval_loss": rows[-1]["eval_loss"],
            "seconds": 61.0 + r,
            "tokens_per_second": 3000.5,
            "peak_memory_bytes": 420_000_000 + r * 1_000_000,
        },
        "planned": {"peak_bytes": 400_000_000, "parts": {"weights": 7_000_000}},
        "trainable": 20_000 * r,
        "total": 4_000_000,
        "nbytes": 80_000 * r,
        "learned": learned(r),
        "about": {"decal": "0.1.0", "device": "cpu"},
    }
    return Candidate(**{**fields, **changes})


def report(candidates: Sequence[Candidate], **more: Any) -> Report:
    fields: dict[str, Any] = {
        "title": "sweep",
        "candidates": candidates,
        "advice": recommend(scores(candidates)),
        "hints": {one.name: hints(one) for one in candidates},
    }
    return Report(**{**fields, **more})


def sample(prompt: str, *names: str, output: str = "billing") -> Sample:
    return Sample(prompt=prompt, expected="billing", outputs=dict.fromkeys(names, output))


LONG = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 6
"""A word that is wider than a phone."""
HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">&amp; "\'`$x^2$ \u202e\x1b[31m'


def wide() -> Report:
    """Everything that could make a page too wide at once."""
    ranks = (2, 4, 8, 16, 32, 64, 128, 256, 512)
    candidates = [candidate(r, name=f"r{r}-{LONG}"[: 60 + r // 8]) for r in ranks]
    names = [one.name for one in candidates]
    return report(
        [*candidates[:-1], candidate(512, name=names[-1], learned=learned(16, 80))],
        title=LONG,
        samples=[sample(LONG, "base", *names, output=LONG), sample("Hi", "base", *names)],
        notes=[LONG],
    )
