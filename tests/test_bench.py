"""The benches of speed run, at a tiny size and without their peers. No time is asserted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import performance_page, shapes, train_step
from bench.contenders import Task, decal_steps
from bench.step_parts import OTHER, PARTS, Parts, part_of
from decal.kernels import native, native_project, ops

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
VOCABULARY = shapes.KNOWN["tiny"]["vocab_size"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    shapes.write_base("tiny", folder)
    return folder


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    """Timers on all ops, for one test."""
    for op, backends in ops.BACKENDS.items():
        monkeypatch.setitem(ops.BACKENDS, op, dict(backends))
    monkeypatch.setattr(native, "kernel", native.kernel)
    monkeypatch.setattr(native_project, "send", native_project.send)
    found = Parts(VOCABULARY)
    found.wrap()
    return found


@pytest.mark.parametrize("task", [{}, {"quant": "none"}, {"chat": True}], ids=str)
def test_decal_takes_steps(task: dict[str, Any], base: str, parts: Parts) -> None:
    """Fails when the session's way to a loss changes and the bench does not follow."""
    steps = decal_steps(Task("tiny", base, **task), parts.timed)
    for _ in range(2):
        next(steps)
    found = parts.take()
    assert found["seconds_by_part"]["optimizer"] > 0
    assert found["seconds_by_part"]["attention"] > 0
    assert found["seconds_by_part"]["head and loss"] > 0
    assert set(found["backends"]) <= set(ops.BACKENDS)
    assert not any(parts.take()["seconds_by_part"].values())


def test_a_timer_leaves_out_what_is_timed_inside(parts: Parts) -> None:
    """Fails when inner calls are counted twice: then both parts have the time of the inner one."""
    inside = lambda: parts.timed("optimizer", lambda: sum(range(200_000)))  # noqa: E731
    parts.timed("attention", inside)
    found = parts.take()["seconds_by_part"]
    assert found["attention"] < found["optimizer"] / 2


def test_products_are_counted(parts: Parts) -> None:
    """Fails when a product's operations are halved, or the head's are counted among the linears."""
    weight = ops.Stored("dense", (48, 32), torch.ones(48, 32))
    ops.project(torch.ones(5, 32), weight)
    ops.project_back([(torch.ones(5, 48), weight)])
    head = ops.Stored("dense", (VOCABULARY, 32), torch.ones(VOCABULARY, 32))
    ops.project(torch.ones(5, 32), head)
    found = parts.take()
    assert found["linear_flops"] == 2 * (2 * 5 * 48 * 32)
    assert found["seconds_by_part"]["head and loss"] > 0


@pytest.mark.skipif(not native.available(), reason="the library is not built")
def test_products_of_one_call_count_where_they_belong(parts: Parts) -> None:
    """Fails when what is put off counts for the op that comes last, or for none."""
    x, z = torch.ones(64, 256).bfloat16(), torch.ones(64, 16).bfloat16()
    with ops.together():
        ops.project(x, ops.Stored("dense", (256, 256), torch.ones(256, 256).bfloat16()))
        head = torch.ones(VOCABULARY, 256).bfloat16()
        ops.project(x, ops.Stored("dense", (VOCABULARY, 256), head))
        ops.over_rows(z, x)
    found = parts.take()["seconds_by_part"]
    assert all(found[part] > 0 for part in ("linears", "head and loss", "adapters"))


def test_every_op_has_a_part() -> None:
    """Fails when an op is added and the breakdown puts it into `other` without anybody noticing."""
    known = {"dynamic_map"}
    assert {op for op in ops.BACKENDS if part_of(op) == OTHER} <= known


def test_rows_of_chats() -> None:
    """Fails when a first token is trained, or lengths leave their bounds."""
    for rows in shapes.chat_rows(VOCABULARY):
        assert len(rows) == shapes.CHAT_ROWS
        for ids, trained in rows:
            assert shapes.SHORTEST <= len(ids) <= shapes.LONGEST
            assert not trained[0]
            assert trained[-1]


def rounds() -> list[dict[str, Any]]:
    seconds = dict.fromkeys(PARTS, 0.1)
    one = {"seconds": 1.0, "memory": 10**9, "seconds_by_part": seconds, "linear_flops": 3e9}
    return [{**one, "isa": "avx2", "backends": {"project": "native"}}] * 3


def test_shares_of_the_peak() -> None:
    """Fails when shares are of the sum and not of the step: `other` would not be 0.4."""
    steps = [{"tokens": 10, "flops": 5e9}] * 3
    peaks = [{"rate": 1e11, "what": "loop"}] * 3
    found = train_step.limits(rounds(), peaks, steps)
    assert found["linears_share_of_peak"] == pytest.approx(0.3)
    assert found["step_share_of_peak"] == pytest.approx(0.05)
    assert found["breakdown"][OTHER]["share"] == pytest.approx(0.4)


def test_the_page_takes_a_table(tmp_path: Path) -> None:
    """Fails when writing twice leaves two tables, or touches text outside of the markers."""
    copy = tmp_path / "performance.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    for text in ("one table", "another | \\1"):
        performance_page.write(copy, "step smollm2-135m avx2", text)
    after = copy.read_text(encoding="utf-8")
    assert "one table" not in after
    assert "<!-- begin: step smollm2-135m avx2 -->\nanother | \\1\n<!-- end: step" in after

    def apart(page: str) -> str:
        return re.sub(r"(?s)(<!-- begin: step smollm2-135m avx2 -->).*?<!-- end", r"\1", page)

    assert apart(after) == apart(PAGE.read_text(encoding="utf-8"))


def test_the_page_has_the_parts_that_are_written() -> None:
    """Fails when a shape is added to the benches and the page has no place for it."""
    text = PAGE.read_text(encoding="utf-8")
    for shape in shapes.KNOWN.keys() - {"tiny"}:
        assert f"<!-- begin: step {shape} " in text
        assert f"<!-- begin: kernels {shape} " in text


@pytest.mark.interop
def test_a_script_runs_alone() -> None:
    """Fails when bench/ hides a package of the same name from other libraries (kernels.py)."""
    done = subprocess.run(
        [sys.executable, "bench/kernels.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--shape" in done.stdout


@pytest.mark.slow
def test_one_step_of_decal_alone() -> None:
    """Fails when the processes of the bench do not understand each other."""
    words = ["--shape", "tiny", "--steps", "1", "--peers", "", "--json"]
    done = subprocess.run(
        [sys.executable, "bench/train_step.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["comparisons"]["decal"]["decal"]["seconds"] > 0
    assert found["peak"] > 0
