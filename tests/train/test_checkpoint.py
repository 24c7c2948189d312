"""Stopped anywhere and resumed = never stopped, to the bit, in a real run folder."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import MemoryRun, TinyModel, TinySteps, flat, job

from decal.data.batch import Batch
from decal.errors import Interrupted, StorageError, TrainingError
from decal.store.run import RunFolder
from decal.train import train
from decal.train.events import Event, Note, StepDone

SCRIPT = Path(__file__).with_name("tiny_run.py")


class CrashError(Exception):
    """Stands for a crash."""


def halting(after: int) -> Any:
    def observe(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == after:
            raise CrashError

    return observe


def exact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without their times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same_end(one: RunFolder, other: RunFolder) -> None:
    """Metrics, every kept checkpoint's tensors, and its state, times apart."""
    assert exact(one.metrics()) == exact(other.metrics())
    assert one.steps() == other.steps()
    for step in one.steps():
        a, b = one.checkpoint(step), other.checkpoint(step)
        for stem in ("trainable", "optimizer"):
            left, right = a.tensors(stem), b.tensors(stem)
            assert set(left) == set(right)
            assert all(torch.equal(left[name], right[name]) for name in left)
        for key in a.state.keys() - {"seconds", "step_seconds"}:
            assert a.state[key] == b.state[key], key


@pytest.fixture
def straight(tmp_path: Path) -> Iterator[RunFolder]:
    """A run of 12 steps, never stopped; noise from torch's generator is part of its loss."""
    with RunFolder.create(tmp_path / "straight", "tiny\n") as run:
        train(job(run, TinyModel(noise=0.1), save_every=3))
        yield run


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8, 11])
def test_crashed_and_resumed_is_never_stopped(
    straight: RunFolder, tmp_path: Path, stop: int
) -> None:
    """F13: checkpoints every 3 steps, evaluations every 4, a crash after step `stop`.

    A crash before the first checkpoint starts over. The resumed process has another model object,
    other generators, and metrics that run past its checkpoint.
    Mutation: drop the moments, `step`, the generators, `best`, or the truncation of the metrics.
    """
    path = tmp_path / "stopped"
    with RunFolder.create(path, "tiny\n") as run, pytest.raises(CrashError):
        train(job(run, TinyModel(noise=0.1), save_every=3, observe=halting(stop)))
    torch.manual_seed(99)
    model = TinyModel(noise=0.1)
    with RunFolder.open(path) as run:
        result = train(job(run, model, save_every=3, resume=True))
        assert_same_end(straight, run)
        kept = run.checkpoint(result.kept_step).tensors("trainable")
    assert all(torch.equal(kept[name], p) for name, p in model.parameters.items())
    assert [step for step, _ in result.curve] == list(range(1, 13))
    assert [step for step, _ in result.eval_curve] == [4, 8, 12]
    assert result.tokens == sum(row.get("tokens", 0) for row in straight.metrics())


def test_resuming_full_fine_tuning_keeps_the_masters(tmp_path: Path) -> None:
    """bfloat16 weights with float32 masters, loss scaling on.

    Mutation: rebuild the masters from the 16-bit weights.
    """
    changes = {"lr": 3e-4, "scale_loss": True, "max_steps": 8}
    with RunFolder.create(tmp_path / "straight", "tiny\n") as whole:
        train(job(whole, TinyModel(torch.bfloat16), **changes))
        path = tmp_path / "stopped"
        with RunFolder.create(path, "tiny\n") as run, pytest.raises(CrashError):
            train(job(run, TinyModel(torch.bfloat16), observe=halting(6), **changes))
        with RunFolder.open(path) as run:
            train(job(run, TinyModel(torch.bfloat16), resume=True, **changes))
            assert_same_end(whole, run)


def test_the_best_weights_survive_a_resume(tmp_path: Path) -> None:
    """The best evaluation (step 2) lies before the crash (step 11), and is what is kept.

    Mutation: forget `best` on resume: step 12 is the best of the second sitting.
    """

    def losses(model: TinyModel, values: dict[int, float], done: list[int]) -> Any:
        def loss(batch: Batch, epoch: int | None) -> Any:
            if epoch is None:
                return torch.tensor(values[done[0]]), 1
            done[0] += 1
            return model.loss(batch, epoch)

        return loss

    values = {2: 1.0, 4: 5.0, 6: 4.0, 8: 3.0, 10: 2.5, 12: 2.0}
    changes: dict[str, Any] = {"eval_every": 2, "eval_batches": [flat([100])]}
    changes["steps"] = TinySteps(cuts=1)
    path = tmp_path / "run"
    first = TinyModel()
    with RunFolder.create(path, "tiny\n") as run, pytest.raises(CrashError):
        train(job(run, first, loss=losses(first, values, [0]), observe=halting(11), **changes))
    second = TinyModel()
    with RunFolder.open(path) as run:
        result = train(job(run, second, loss=losses(second, values, [10]), resume=True, **changes))
        assert (result.best_step, result.kept_step, result.best_eval_loss) == (2, 2, 1.0)
        assert run.steps() == [2, 10, 12]
        best = run.checkpoint(2).tensors("trainable")
    assert all(torch.equal(best[name], p) for name, p in second.parameters.items())


@pytest.mark.parametrize("stop", [5, 8])
def test_rates_and_inverse_sqrt_survive_a_resume(tmp_path: Path, stop: int) -> None:
    """LoRA+ and a pattern's factor: groups of their own, and state that finds its tensors.

    Mutation: load the state by place, or forget the factor of a loaded group.
    """
    changes: dict[str, Any] = {"schedule": "inverse-sqrt", "save_every": 3}
    changes["rates"] = {"head.lora_B": 16.0, "head.bias": 0.5}
    with RunFolder.create(tmp_path / "straight", "tiny\n") as whole:
        train(job(whole, TinyModel(noise=0.1), **changes))
        path = tmp_path / "stopped"
        with RunFolder.create(path, "tiny\n") as run, pytest.raises(CrashError):
            train(job(run, TinyModel(noise=0.1), observe=halting(stop), **changes))
        with RunFolder.open(path) as run:
            train(job(run, TinyModel(noise=0.1), resume=True, **changes))
            assert_same_end(whole, run)
    plain = MemoryRun()
    train(job(plain, TinyModel(noise=0.1), **{**changes, "rates": {}}))
    assert plain.column("loss") != [row["loss"] for row in whole.metrics() if "loss" in row]


@pytest.mark.parametrize("stop", [7, 9, 10])
def test_early_stopping_counts_across_a_resume(tmp_path: Path, stop: int) -> None:
    """Evaluations at 2, 4, …; the best at 4, patience 4: over at step 12 of 20, stopped or not.

    Mutation: count from zero after a resume (it then ends at step 16 or later).
    """
    values = {2: 5.0, 4: 1.0, 6: 4.0, 8: 3.0, 10: 2.5, 12: 2.0, 14: 3.0, 16: 3.0, 18: 3.0, 20: 3.0}
    changes: dict[str, Any] = {"eval_every": 2, "eval_batches": [flat([100])], "max_steps": 20}
    changes |= {"steps": TinySteps(cuts=1), "early_stopping": 4}

    def losses(model: TinyModel, done: int) -> Any:
        def loss(batch: Batch, epoch: int | None) -> Any:
            nonlocal done
            if epoch is None:
                return torch.tensor(values[done]), 1
            done += 1
            return model.loss(batch, epoch)

        return loss

    with RunFolder.create(tmp_path / "straight", "tiny\n") as whole:
        model = TinyModel()
        straight = train(job(whole, model, loss=losses(model, 0), **changes))
        path, model = tmp_path / "stopped", TinyModel()
        with RunFolder.create(path, "tiny\n") as run, pytest.raises(CrashError):
            train(job(run, model, loss=losses(model, 0), observe=halting(stop), **changes))
        with RunFolder.open(path) as run:
            model, start = TinyModel(), run.steps()[-1]
            result = train(job(run, model, loss=losses(model, start), resume=True, **changes))
            assert_same_end(whole, run)
            assert (result.steps, result.kept_step) == (straight.steps, 4) == (12, 4)
            assert result.stopped == straight.stopped
            notes: list[Event] = []
            model = TinyModel()
            again = train(job(run, model, loss=None, resume=True, observe=notes.append, **changes))
            assert again.stopped == straight.stopped
            assert [n.text for n in notes if isinstance(n, Note)] == [
                "the run is finished after 12 of 20 steps: nothing is trained",
                straight.stopped,
            ]


def test_which_tensors_were_heard_survives_a_resume() -> None:
    """All were heard before the crash; the second sitting has one step, in which B is silent.

    Mutation: begin to listen anew: the end of the run warns of a tensor that was trained.
    """
    run, events = MemoryRun(), []
    changes: dict[str, Any] = {"save_every": 11, "eval_every": 50, "eval_batches": []}
    with pytest.raises(CrashError):
        train(job(run, **changes, observe=halting(12)))
    model = TinyModel()

    def loss(batch: Batch, epoch: int | None) -> Any:
        total, count = model.loss(batch, None)
        return 0.0 * total + model.parameters["head.bias"].sum(), count

    train(job(run, model, loss=loss, resume=True, observe=events.append, **changes))
    assert not [e for e in events if isinstance(e, Note)]


@pytest.mark.parametrize(("left", "lost"), [(0, 12), (5, 8)])
def test_lost_metrics_are_said_and_do_not_stop_a_resume(
    tmp_path: Path, left: int, lost: int
) -> None:
    """A finished run whose metrics.jsonl has only the last rows (four steps, one evaluation).

    Mutation: take the last loss from the curve (IndexError), or say nothing.
    """
    path = tmp_path / "run"
    with RunFolder.create(path, "tiny\n") as run:
        first = train(job(run))
        rows = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (path / "metrics.jsonl").write_text("".join(rows[len(rows) - left :]))
        notes: list[Event] = []
        result = train(job(run, resume=True, observe=notes.append))
    assert len(result.curve) == 12 - lost
    assert (result.loss, result.eval_loss) == (first.loss, first.eval_loss)
    texts = [n.text for n in notes if isinstance(n, Note) and n.warning]
    assert texts == [f"metrics.jsonl lacks {lost} of the 12 steps: the curves have a gap"]


def test_resuming_a_finished_run_only_fetches_its_weights(tmp_path: Path) -> None:
    """Mutation: train a step more, return the starting values, or say nothing."""
    notes: list[Event] = []
    with RunFolder.create(tmp_path / "run", "tiny\n") as run:
        first = train(job(run))
        before = run.metrics()
        for _ in range(2):
            model = TinyModel()
            again = train(job(run, model, resume=True, observe=notes.append))
            assert run.metrics() == before
        kept = run.checkpoint(again.kept_step).tensors("trainable")
    text = "the run is finished after 12 of 12 steps: nothing is trained"
    assert [(n.text, n.warning) for n in notes if isinstance(n, Note)] == [(text, False)] * 2
    assert again.curve == first.curve
    assert (again.loss, again.eval_loss) == (first.loss, first.eval_loss)
    assert all(torch.equal(kept[name], p) for name, p in model.parameters.items())


def test_changed_circumstances_and_settings_are_warned_of(tmp_path: Path) -> None:
    """Another thread count and another rate: both are named with old and new value.

    Mutation: compare nothing; or warn of a run that is the same.
    """
    notes: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note) and event.warning:
            notes.append(event.text)

    with RunFolder.create(tmp_path / "run", "tiny\n") as run:
        train(job(run, observe=observe))
        train(job(run, resume=True, observe=observe))
        assert notes == []
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            train(job(run, resume=True, observe=observe, lr=0.01))
        finally:
            torch.set_num_threads(threads)
    assert notes == [
        "the run goes on, but not to the bit as it would have: "
        f"threads was {threads}, is {threads + 1}",
        "the run goes on with other settings: lr was 0.02, is 0.01",
    ]


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """Count first, then a name with both values; nothing is changed. Mutation: copy what fits."""
    with RunFolder.create(tmp_path / "run", "tiny\n") as run:
        train(job(run))
        model = TinyModel()
        model.parameters["head.lora_C"] = model.parameters.pop("head.lora_A")
        with pytest.raises(TrainingError, match=r"weights does not fit.*2 tensors differ"):
            train(job(run, model, resume=True))
        double = TinyModel(torch.float64)
        wrong = r"head.lora_A: the checkpoint has \[3, 7\] float32, the model has \[3, 7\] float64"
        with pytest.raises(TrainingError, match=wrong):
            train(job(run, double, resume=True))
        assert not double.parameters["head.lora_B"].any()


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    """The run goes back to the one before and ends the same. Mutation: drop the warning."""
    notes: list[str] = []
    path = tmp_path / "run"
    with RunFolder.create(tmp_path / "straight", "tiny\n") as whole:
        train(job(whole))
        with RunFolder.create(path, "tiny\n") as run, pytest.raises(CrashError):
            train(job(run, observe=halting(10)))
        damaged = path / "checkpoints" / "step-00000008" / "optimizer.safetensors"
        raw = bytearray(damaged.read_bytes())
        raw[-3] ^= 1
        damaged.write_bytes(raw)

        def observe(event: Event) -> None:
            if isinstance(event, Note):
                notes.append(event.text)

        with RunFolder.open(path) as run:
            train(job(run, resume=True, observe=observe))
            assert_same_end(whole, run)
    assert len(notes) == 1
    assert "going back to step 4" in notes[0]


def test_lost_best_weights_are_said_and_forgotten() -> None:
    """Mutation: keep comparing with a loss whose weights are gone, and fail at the end."""
    run = MemoryRun()
    with pytest.raises(CrashError):
        train(job(run, observe=halting(10)))
    newest = run.kept[8]
    newest.state["best"] = {"step": 4, "loss": 0.0}
    checkpoint = run.checkpoint

    def gone(step: int) -> Any:
        if step == 4:
            raise StorageError("no checkpoint of step 4")
        return checkpoint(step)

    run.checkpoint = gone  # type: ignore[method-assign]
    notes: list[Event] = []
    result = train(job(run, resume=True, observe=notes.append))
    assert result.best_step == 12
    assert any(isinstance(n, Note) and "(step 4) are lost" in n.text for n in notes)


def run_script(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(folder), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        if text.strip() == line:
            return
    raise AssertionError(f"no `{line}`: {process.communicate()[1]}")


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_never_stopped(tmp_path: Path, kills: int) -> None:
    """F13 with SIGKILL at a random moment of a random step, in processes of their own.

    Mutation: write checkpoints in place, or leave the generators out.
    """
    stops = sorted(random.Random().sample(range(2, 38), kills))
    print("killed after steps", stops)
    path = tmp_path / "killed"
    for number, stop in enumerate(stops):
        process = run_script(path, *["resume"][: number > 0])
        wait_for(process, f"step {stop}")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
    torch.manual_seed(99)
    assert tiny_run.script(str(path), resume=True) == 0
    assert tiny_run.script(str(tmp_path / "straight"), resume=False) == 0
    with RunFolder.open(path) as killed, RunFolder.open(tmp_path / "straight") as whole:
        assert len(killed.metrics()) == 48
        assert_same_end(whole, killed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_has_its_exit_code(
    tmp_path: Path, number: int, code: int
) -> None:
    """After step 7 (no step of a checkpoint): the step is finished and kept.

    Mutation: raise at once, or forget the checkpoint.
    """
    process = run_script(tmp_path / "run")
    wait_for(process, "step 7")
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == code
    with RunFolder.open(tmp_path / "run") as run:
        last = run.metrics()[-1]["step"]
        assert 7 <= last < 40
        assert run.steps()[-1] == last
    assert f"stopped after step {last} of 40; a checkpoint was written" in error
    assert "Traceback" not in error


def test_a_second_ctrl_c_stops_at_once_and_the_handler_goes_back() -> None:
    """Both within one step. Mutation: only set the flag; or do not restore the handler."""
    before = signal.getsignal(signal.SIGINT)
    model, run = TinyModel(), MemoryRun()
    calls = [0]

    def loss(batch: Batch, epoch: int | None) -> Any:
        calls[0] += 1
        if calls[0] in (3, 4):
            os.kill(os.getpid(), signal.SIGINT)
        return model.loss(batch, epoch)

    with pytest.raises(KeyboardInterrupt):
        train(job(run, model, loss=loss))
    assert run.column("step") == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_changes_nothing_and_ctrl_c_still_does() -> None:
    """Schedulers ask more than once. Fails when the second asking costs the checkpoint."""
    before = signal.getsignal(signal.SIGTERM)
    for last, error in ((signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)):
        model, run, calls = TinyModel(), MemoryRun(), [0]

        def loss(batch: Batch, epoch: int | None, model=model, calls=calls, last=last) -> Any:
            calls[0] += 1
            if calls[0] in (3, 4):
                os.kill(os.getpid(), signal.SIGTERM if calls[0] == 3 else last)
            return model.loss(batch, epoch)

        with pytest.raises(error):
            train(job(run, model, loss=loss))
        assert sorted(run.kept) == ([2] if last == signal.SIGTERM else [])
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_ctrl_c_is_announced_once(tmp_path: Path) -> None:
    """In process: the note comes during the step, the error after it, and a resume goes on.

    Mutation: announce at every micro-batch.
    """
    model, run, events = TinyModel(), MemoryRun(), []
    calls = [0]

    def loss(batch: Batch, epoch: int | None) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return model.loss(batch, epoch)

    with pytest.raises(Interrupted, match="after step 2 of 12"):
        train(job(run, model, loss=loss, observe=events.append))
    assert [e.warning for e in events if isinstance(e, Note)] == [False]
    assert sorted(run.kept) == [2]
    whole = MemoryRun()
    train(job(whole))
    train(job(run, resume=True))
    assert exact(run.lines) == exact(whole.lines)


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space at the checkpoint of step 8: exit 1, step 4 intact, and with space the same end.

    Mutation: remove old checkpoints before writing the new one.
    """
    path = tmp_path / "run"
    sync = os.fsync

    def full(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 8:

            def refuse(handle: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(os, "fsync", refuse)

    with RunFolder.create(path, "tiny\n") as run:
        with pytest.raises(StorageError) as caught:
            train(job(run, observe=full))
        assert caught.value.exit_code == 1
        monkeypatch.setattr(os, "fsync", sync)
        assert run.steps() == [4]
    with RunFolder.open(path) as run, RunFolder.create(tmp_path / "straight", "tiny\n") as whole:
        train(job(run, resume=True))
        train(job(whole))
        assert_same_end(whole, run)
