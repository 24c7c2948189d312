"""The run folder: one process, valid lines, checkpoints that are sound or passed over."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decal.errors import OutputError, StorageError
from decal.store.run import RunFolder

STATE = {"epoch": 1, "loss": 0.1 + 0.2, "order": {"2": 0, "10": 1}}


def _checkpoint(run: RunFolder, step: int, **keep: int) -> Path:
    tensors = {
        "trainable": {"m.lora_A": torch.full((2, 3), float(step))},
        "optimizer": {"m.lora_A.exp_avg": torch.ones(2, 3) / 3, "step": torch.tensor(step)},
    }
    return run.write_checkpoint(step, tensors, {**STATE, "step": step}, **keep)


def _steps(run: RunFolder) -> list[int]:
    return run.steps()


def test_create_write_and_open(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "deep" / "run", "base: x\n") as run:
        run.write_info({"threads": 2, "nan": math.nan})
    with RunFolder.open(tmp_path / "deep" / "run") as run:
        assert run.settings == "base: x\n"
        assert run.info() == {"threads": 2, "nan": None}
        assert run.latest_checkpoint() is None
        assert run.metrics() == []
    with pytest.raises(OutputError, match="holds no run"):
        RunFolder.open(tmp_path)


def test_a_second_run_is_refused_or_replaces_what_is_a_runs(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFolder.create(path, "old") as run:
        run.append_metrics({"step": 1})
        _checkpoint(run, 1)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty") as caught:
        RunFolder.create(path, "new")
    assert "--resume" in str(caught.value.hint)
    assert "--force" in str(caught.value.hint)
    with RunFolder.create(path, "new", force=True) as run:
        assert run.settings == "new"
        assert run.metrics() == []
        assert run.latest_checkpoint() is None
    assert (path / "notes.txt").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """A second process is refused, and a killed one leaves no lock."""
    path = tmp_path / "run"
    script = (
        "import sys, time\n"
        "from decal.store.run import RunFolder\n"
        "run = RunFolder.create(sys.argv[1], 'x')\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for begin in (lambda: RunFolder.open(path), lambda: RunFolder.create(path, "y", force=True)):
        with pytest.raises(OutputError, match=f"id {other.pid}"):
            begin()
    other.kill()
    other.wait()
    other.stdout.close()
    with RunFolder.open(path) as run:
        assert run.settings == "x"


def test_metrics_are_valid_json_lines(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "") as run:
        run.append_metrics({"step": 1, "loss": 0.1 + 0.2, "x": [math.inf, {"y": -math.inf}]})
        run.append_metrics({"step": 2, "loss": math.nan})
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x, parse_constant=pytest.fail) for x in lines] == [
        {"step": 1, "loss": 0.30000000000000004, "x": [None, {"y": None}]},
        {"step": 2, "loss": None},
    ]


def test_truncation_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    """Fails if `<=` becomes `<`: the row of the step itself stays."""
    with RunFolder.create(tmp_path / "run", "") as run:
        for step in range(1, 6):
            run.append_metrics({"step": step, "loss": step / 3})
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "lo')
        assert len(run.metrics()) == 5
        run.truncate_metrics(3)
        run.append_metrics({"step": 4, "loss": 0.5})
        assert [(r["step"], r["loss"]) for r in run.metrics()] == [
            (1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 0.5),
        ]  # fmt: skip
        assert (run.path / "metrics.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize("line", ['{"step": 3, "lo', "5", "\0\0\0", "\xff"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    """Fails when damaged lines are passed over, or when a torn last line counts as damage."""
    with RunFolder.create(tmp_path / "run", "") as run:
        run.append_metrics({"step": 1})
        run.append_metrics({"step": 2})
        path = run.path / "metrics.jsonl"
        first, second = path.read_text().splitlines()
        path.write_bytes(f"{first}\n{line}\n{second}\n{line}".encode("latin-1"))
        with pytest.raises(StorageError, match="1 of 4 lines are damaged") as caught:
            run.metrics()
        assert caught.value.details[0].startswith("line 2: ")
        with pytest.raises(StorageError):
            run.truncate_metrics(1)
        path.write_bytes(f"{first}\n{second}\n{line}".encode("latin-1"))
        assert [row["step"] for row in run.metrics()] == [1, 2]


def test_checkpoints_come_back_to_the_bit(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "") as run:
        _checkpoint(run, 7)
        found = run.latest_checkpoint()
        assert found is not None
        assert (found.step, found.warning) == (7, None)
        assert found.path.name == "step-00000007"
        assert found.state == {**STATE, "step": 7}
        assert torch.equal(found.tensors("trainable")["m.lora_A"], torch.full((2, 3), 7.0))
        optimizer = found.tensors("optimizer")
        assert torch.equal(optimizer["m.lora_A.exp_avg"], torch.ones(2, 3) / 3)
        assert optimizer["step"].dtype == torch.int64


def test_keys_of_a_state_may_be_numbers(tmp_path: Path) -> None:
    """JSON turns 2 and 10 into "2" and "10", which sort the other way round."""
    with RunFolder.create(tmp_path / "run", "") as run:
        run.write_checkpoint(1, {}, {"groups": {2: "a", 10: (1, 2)}})
        found = run.checkpoint(1)
        assert found.state == {"groups": {"2": "a", "10": [1, 2]}}
        with pytest.raises(ValueError, match="JSON"):
            run.write_checkpoint(2, {}, {"loss": math.nan})
        assert _steps(run) == [1]


def test_rotation_keeps_the_newest_two_and_their_best(tmp_path: Path) -> None:
    """Fails when the best of the newest but one goes: it is needed if the newest is damaged."""
    with RunFolder.create(tmp_path / "run", "") as run:
        for step in (10, 20, 30, 40, 50):
            _checkpoint(run, step, best=20 if step >= 20 else 10)
        assert _steps(run) == [20, 40, 50]
        assert run.checkpoint(20).state["step"] == 20
        _checkpoint(run, 60, best=60)
        assert _steps(run) == [20, 50, 60]
        _checkpoint(run, 60, best=60)  # written again after a resume
        assert _steps(run) == [20, 50, 60]
        _checkpoint(run, 70, best=60)
        assert _steps(run) == [60, 70]


def test_a_rotation_that_was_cut_short_is_ended(tmp_path: Path) -> None:
    """Fails when a later checkpoint goes, which a resumed run has not replaced yet."""
    with RunFolder.create(tmp_path / "run", "") as run:
        for step in (1, 2, 3, 4):
            path = _checkpoint(run, step)
            shutil.copytree(path, tmp_path / path.name)
        for step in (1, 2):
            shutil.copytree(tmp_path / f"step-{step:08d}", path.with_name(f"step-{step:08d}"))
        (path.parent / ".step-00000002.decal-1234abcd").mkdir()
        assert _steps(run) == [1, 2, 3, 4]
        run.rotate(4)
        assert [f.name for f in sorted(path.parent.iterdir())] == [
            "step-00000003", "step-00000004",
        ]  # fmt: skip


@pytest.mark.parametrize("left", [".lock", ".run.yaml.decal-1234abcd", ".run.decal-1234abcd"])
def test_a_run_killed_before_it_began_is_no_run(tmp_path: Path, left: str) -> None:
    """Fails when its leftovers ask for --force, or stay."""
    path = tmp_path / "run"
    path.mkdir()
    (path / left).write_text("base: x")
    with pytest.raises(OutputError, match="holds no run"):
        RunFolder.open(path)
    with RunFolder.create(path, "base: y\n") as run:
        assert run.settings == "base: y\n"
        assert sorted(f.name for f in path.iterdir()) == [".lock", "run.yaml"]


def test_a_lock_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's id cannot be written on a full disk. Fails when that is an error of its own."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunFolder.create(tmp_path / "run", "x"):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        held = RunFolder.open(tmp_path / "run")
    with held, pytest.raises(OutputError, match=r"id unknown\) trains into"):
        RunFolder.open(tmp_path / "run")


DAMAGE = {
    "tensors cut off": lambda c: (c / "optimizer.safetensors").write_bytes(
        (c / "optimizer.safetensors").read_bytes()[:-1]
    ),
    "one bit flipped": lambda c: (c / "trainable.safetensors").write_bytes(
        (c / "trainable.safetensors").read_bytes()[:-1] + b"\x01"
    ),
    "a file gone": lambda c: (c / "trainable.safetensors").unlink(),
    "state gone": lambda c: (c / "state.json").unlink(),
    "state empty": lambda c: (c / "state.json").write_text(""),
    "state edited": lambda c: (c / "state.json").write_text(
        (c / "state.json").read_text().replace('"epoch": 1', '"epoch": 2')
    ),
    "state of another kind": lambda c: (c / "state.json").write_text('{"sha256": {}}'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, case: str) -> None:
    with RunFolder.create(tmp_path / "run", "") as run:
        first, second = _checkpoint(run, 1), _checkpoint(run, 2)
        DAMAGE[case](second)
        found = run.latest_checkpoint()
        assert found is not None
        assert found.step == 1
        assert found.warning is not None
        assert "step-00000002" in found.warning
        _checkpoint(run, 1)  # going on from step 1, the damaged one is of no use
        assert _steps(run) == [1]
        DAMAGE[case](first)
        with pytest.raises(StorageError, match="none of its 1 checkpoints is sound"):
            run.latest_checkpoint()
        with pytest.raises(StorageError, match="no checkpoint of step 9"):
            run.checkpoint(9)


def test_a_full_disk_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder.create(tmp_path / "run", "") as run:
        _checkpoint(run, 1)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageError, match="disk is full"):
                _checkpoint(run, 2)
        assert [f.name for f in (run.path / "checkpoints").iterdir()] == ["step-00000001"]
        found = run.latest_checkpoint()
        assert found is not None
        assert (found.step, found.warning) == (1, None)
        with monkeypatch.context() as patch:

            def refuse(*_: object, **__: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(Path, "open", refuse)
            with pytest.raises(StorageError, match="disk is full"):
                run.append_metrics({"step": 1})


def test_killed_while_writing_checkpoints(tmp_path: Path) -> None:
    """Killed at a random moment, the run always has a sound newest checkpoint."""
    path = tmp_path / "run"
    script = (
        "import sys, torch\n"
        "from decal.store.run import RunFolder\n"
        "run = RunFolder.create(sys.argv[1], 'x')\n"
        "for step in range(1, 10_000):\n"
        "    run.write_checkpoint(step, {'t': {'a': torch.full((99_999,), step)}}, {'s': step})\n"
        "    print(step, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for _ in range(5):
        done = int(writer.stdout.readline())
    writer.kill()
    done = max([done, *map(int, writer.stdout.read().split())])
    writer.wait()
    writer.stdout.close()
    with RunFolder.open(path) as run:
        found = run.latest_checkpoint()
        assert found is not None
        assert found.warning is None
        assert found.step >= done
        assert found.state == {"s": found.step}
        assert int(found.tensors("t")["a"][-1]) == found.step
        run.write_checkpoint(found.step + 9, {}, {})
        assert all(f.name.startswith("step-") for f in (path / "checkpoints").iterdir())
