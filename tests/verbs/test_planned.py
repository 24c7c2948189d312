"""Planned against measured, in real runs; and several adapters over one base."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decal import demo
from decal.config import LoraConfig
from decal.plan.setup import Load
from decal.runfile import dump_run
from decal.verbs.planned import planned, planned_info, planned_together, setup_of, verdict
from decal.verbs.train import RunResult
from tests.verbs.conftest import settings

NEAR = 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "base": {"path": str(demo.base_path()), "dtype": "float32"},
            "quant": "none",
            "adapter": {"method": "full"},
            "train": {"max_steps": 2, "batch_size": 4},
        },
    ],
    ids=["qlora", "full"],
)
def test_a_run_takes_what_was_planned(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A process of its own, to 20 %; the bench has the rest. Mutations: forget the process, or
    the moments; plan in kilobytes; say nothing at the end."""
    config = settings(tmp_path, **changes)
    run = tmp_path / "run.yaml"
    run.write_text(dump_run(config))
    words = [sys.executable, "-m", "decal.cli", "train", str(run), "--no-check"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    info = json.loads((Path(config.output) / "info.json").read_text())
    expected, took = info["planned"]["peak_bytes"], info["result"]["peak_memory_bytes"]
    assert took == pytest.approx(expected, rel=NEAR)
    assert sum(info["planned"]["parts"].values()) == expected
    assert f"memory: planned {expected / 1e9:.2f} GB, measured {took / 1e9:.2f} GB" in done.stderr


def test_far_over_the_plan_is_said(finished: RunResult) -> None:
    """Mutations: warn at any difference; never warn; compare the wrong way round."""
    found = planned(finished.session)
    assert verdict(found, int(1.1 * found.reported))[1] is None
    assert verdict(found, int(0.5 * found.reported))[1] is None
    line, warning = verdict(found, int(1.5 * found.reported))
    assert line.endswith("(+50.0 %)")
    assert warning == "the run took 50 % more memory than planned"
    assert verdict(found, None)[1] is None


def test_the_parts_add_up(finished: RunResult) -> None:
    """Mutation: leave what is mapped in the sum, which the run does not report."""
    found = planned_info(planned(finished.session))
    assert sum(found["parts"].values()) == found["peak_bytes"]


def test_several_adapters_share_the_base(finished: RunResult) -> None:
    """Base and process once, the rest by candidate. Mutations: count the base for each; take the
    first candidate's rank for all; forget the others' moments."""
    setup, model = setup_of(finished.session), finished.session.model
    ranks = (4, 8, 16)
    loras = [LoraConfig(r=r) for r in ranks]
    load = replace(setup.load, tokens=64, trained=32)
    alone = [planned_together(setup, model, [lora], [load]) for lora in loras]
    together = planned_together(setup, model, loras, [load] * 3)
    assert together.weights == alone[0].weights
    assert together.process == alone[0].process
    for part in ("adapter", "gradients", "optimizer", "activations"):
        assert getattr(together, part) == sum(getattr(one, part) for one in alone)
    assert together.adapter == sum(r / 4 for r in ranks) * alone[0].adapter
    assert together.bytes < sum(one.bytes for one in alone)


def test_more_rows_need_more(finished: RunResult) -> None:
    """Mutation: leave activations of candidates out of their rows."""
    setup, model = setup_of(finished.session), finished.session.model
    few, many = (
        planned_together(setup, model, [LoraConfig(r=4)], [Load(tokens=n, trained=n, several=True)])
        for n in (64, 256)
    )
    assert many.activations > 3 * few.activations
