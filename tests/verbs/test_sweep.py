"""A sweep: each candidate is the run that it would be alone, however the sweep went."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decal.config import RunConfig
from decal.errors import ConfigError, Interrupted, OutputError
from decal.store.run import RunFolder
from decal.train.events import EvalDone, Event, Over, Saved, StepDone
from decal.verbs import session as sessions
from decal.verbs import sweep as sweeping
from decal.verbs.grid import candidates
from decal.verbs.inspect import inspect
from decal.verbs.load import load
from decal.verbs.merge import merge
from decal.verbs.sweep import SweepResult, Ways, sweep
from decal.verbs.train import train
from tests import zoo
from tests.chaos.same import assert_same_training
from tests.chaos.server import write_inputs

STEPS = 6
SLOW = pytest.mark.slow
MIXED = {"adapter.r": [2, 5], "train.lr": [1e-2, 3e-2]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    write_inputs(root)
    return root


def settings(root: Path, output: Path, **changes: Any) -> RunConfig:
    """A run of 6 steps in float32; `changes` replace keys of sections, or whole sections."""
    sections: dict[str, Any] = {
        "base": {"path": str(root / "base"), "device": "cpu", "dtype": "float32"},
        "quant": "nf4",
        "adapter": {"r": 3, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
        "data": {"path": str(root / "rows.jsonl"), "max_length": 64, "eval": 0.2},
        "train": {"max_steps": STEPS, "batch_size": 4, "lr": 1e-2, "eval_every": 2},
        "output": str(output),
    }
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(sections.get(name), dict)
        sections[name] = {**sections[name], **value} if both else value
    return RunConfig(**sections)


def states(out: Path) -> dict[str, str]:
    listed = json.loads((out / "sweep.json").read_text())["candidates"]
    return {each["name"]: each["status"] for each in listed}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def numbers(run: Path, name: str) -> list[Any]:
    return [row[name] for row in RunFolder.look(run).metrics() if name in row]


def assert_close_runs(ours: Path, theirs: Path) -> None:
    """In float32: one product over other rows may be summed in another order, 1e-7 each time, and
    Adam turns a gradient near zero into a step of any size below the rate."""
    for name in ("loss", "eval_loss", "grad_norm"):
        assert numbers(ours, name) == pytest.approx(numbers(theirs, name), rel=1e-4), name
    for name in ("step", "lr", "epoch", "tokens", "trained_tokens"):
        assert numbers(ours, name) == numbers(theirs, name), name
    for key, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[key], tensor, rtol=1e-3, atol=1e-4)
    a, b = (RunFolder.look(run).info() for run in (ours, theirs))
    own = ("result", "planned")
    assert {k: v for k, v in a.items() if k not in own} == {
        k: v for k, v in b.items() if k not in own
    }
    for key in ("steps", "best_step", "kept_step", "trained_tokens", "stopped"):
        assert a["result"][key] == b["result"][key], key


def assert_same_sweeps(one: Path, other: Path) -> None:
    """To the bit: training, adapter, and what is said of each candidate."""
    assert (one / "sweep.json").read_text() == (other / "sweep.json").read_text()
    for name in states(one):
        assert_same_training(one / name, other / name)
        if (one / name / "adapter").exists():
            left, right = weights(one / name), weights(other / name)
            assert all(torch.equal(left[key], right[key]) for key in left)


def alone(config: RunConfig, grid: Mapping[str, Sequence[Any]], output: Path) -> dict[str, Path]:
    """Solo runs of all candidates."""
    found = {}
    for each in candidates(config, grid):
        own = each.config.model_copy(update={"output": str(output / each.name)})
        train(own)
        found[each.name] = output / each.name
    return found


@pytest.fixture(scope="module")
def mixed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return sweep(settings(inputs, tmp_path_factory.mktemp("mixed") / "out"), MIXED)


def test_a_candidate_is_its_solo_run(inputs: Path, mixed: SweepResult, tmp_path: Path) -> None:
    """Ranks and rates mixed, with dropout. Fails when a candidate's dropout, starting values, order
    of rows, schedule or optimizer are another's, or losses are divided by all candidates' tokens.
    """
    solo = alone(settings(inputs, tmp_path), MIXED, tmp_path)
    assert list(solo) == ["r2-lr0_01", "r2-lr0_03", "r5-lr0_01", "r5-lr0_03"]
    assert {each.name: each.status for each in mixed.tried} == dict.fromkeys(solo, "done")
    for name, run in solo.items():
        assert_close_runs(mixed.sweep / name, run)


def test_seeds_hold_out_their_own_rows(inputs: Path, tmp_path: Path) -> None:
    """A share is held out by the seed, so candidates of other seeds have other rows.

    Fails when all candidates get the rows of the first.
    """
    grid = {"train.seed": [0, 1]}
    lines: list[str] = []
    config = settings(inputs, tmp_path / "out")
    done = sweep(config, grid, say=lines.append)
    for name, run in alone(config, grid, tmp_path).items():
        assert_close_runs(done.sweep / name, run)
    assert any("every seed holds out other rows" in line for line in lines)
    digests = {RunFolder.look(each.run).info()["data"] for each in done.tried}
    assert len(digests) == 2


def test_a_head_of_one_candidate_reaches_its_rows_alone(inputs: Path, tmp_path: Path) -> None:
    """Fails when the loss goes around an adapter on the head that the first candidate lacks."""
    targets = [["q_proj"], ["q_proj", "lm_head"]]
    config = settings(inputs, tmp_path / "out")
    done = sweep(config, {"adapter.target_modules": targets})
    assert not done.failed
    for name, run in alone(config, {"adapter.target_modules": targets}, tmp_path).items():
        assert_close_runs(done.sweep / name, run)


class Stopper:
    """Does something at an event of a candidate."""

    def __init__(self, name: str, step: int, kind: type, act: Callable[[], None]):
        self.wanted, self.act = (name, step, kind), act

    def __call__(self, name: str | None, event: Event) -> None:
        if (name, getattr(event, "step", None), type(event)) == self.wanted:
            self.act()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class KilledError(BaseException):
    """Nothing is written after it, as after SIGKILL."""


def kill() -> None:
    raise KilledError


@pytest.mark.parametrize("halving", [pytest.param(False, marks=SLOW), True])
def test_stopped_and_resumed_is_never_stopped(inputs: Path, tmp_path: Path, halving: bool) -> None:
    """Ctrl-C in the middle, to the bit. Fails when a candidate is stopped without its checkpoint,
    when the resumed sweep judges again by other curves, or a candidate waits for one that is over.
    """
    ways = {"halving": halving}
    grid = {"train.lr": [1e-2, 3e-2, 1e-4, 1e-6]}
    whole = sweep(settings(inputs, tmp_path / "whole"), grid, **ways)
    assert [e.status for e in whole.tried].count("stopped") == (2 if halving else 0)
    config = settings(inputs, tmp_path / "cut")
    stopper = Stopper("lr0_03", 3, StepDone, interrupt)
    with pytest.raises(Interrupted) as caught:
        sweep(config, grid, **ways, observe=stopper)
    assert caught.value.exit_code == 130
    assert "sweep" in str(caught.value.hint)
    assert set(states(tmp_path / "cut").values()) == {"training"}
    sweep(config, grid, **ways, resume=True)
    assert_same_sweeps(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("dtype", "kind", "steps"),
    [
        pytest.param("float32", EvalDone, {2}, marks=SLOW),
        pytest.param("float32", Saved, {2, 4}, marks=SLOW),
        ("bfloat16", Saved, {2, 4}),
    ],
)
def test_killed_between_checkpoints(
    inputs: Path, tmp_path: Path, dtype: str, kind: type, steps: set[int]
) -> None:
    """Some candidates have the checkpoint of step 4, the others that of step 2.

    To the bit, where a row's products do not depend on the rows beside it: not those of torch in
    float32. Fails when candidates must be at one step, or a step is left out or done twice.
    """
    whole = settings(inputs, tmp_path / "whole", base={"dtype": dtype})
    sweep(whole, MIXED)
    config = whole.model_copy(update={"output": str(tmp_path / "out")})
    with pytest.raises(KilledError):
        sweep(config, MIXED, observe=Stopper("r2-lr0_03", 4, kind, kill))
    names = states(tmp_path / "whole")
    assert {RunFolder.look(tmp_path / "out" / name).steps()[-1] for name in names} == steps
    sweep(config, MIXED, resume=True)
    if dtype == "float32" and len(steps) > 1:
        for name in names:
            assert_close_runs(tmp_path / "out" / name, tmp_path / "whole" / name)
    else:
        assert_same_sweeps(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("after", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_killed_while_results_are_written(
    inputs: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of a halved sweep's candidates are over, the others not yet.

    Fails when those that were ended before do not count when the rest is judged again.
    """
    grid = {"train.lr": [1e-6, 1e-2, 1e-4, 3e-2]}
    whole = sweep(settings(inputs, tmp_path / "whole"), grid, halving=True)
    real, done = sweeping.finish, []

    def finish(*args: Any) -> Any:
        if len(done) == after:
            raise KilledError
        done.append(args)
        return real(*args)

    config = settings(inputs, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "finish", finish)
        with pytest.raises(KilledError):
            sweep(config, grid, halving=True)
    sweep(config, grid, halving=True, resume=True)
    assert_same_sweeps(whole.sweep, tmp_path / "cut")


def test_one_that_diverges_fails_alone(inputs: Path, tmp_path: Path) -> None:
    """The others end as without it, and the failure is said when it happens.

    Fails when NaN spreads, or the sweep ends with the first error.
    """
    grid = {"train.lr": [1e-2, 3e-2]}
    without = sweep(settings(inputs, tmp_path / "without"), grid)
    events: list[tuple[str | None, Event]] = []
    config = settings(inputs, tmp_path / "out")
    with_it = sweep(
        config, {"train.lr": [1e-2, 3e-2, 1e38]}, observe=lambda n, e: events.append((n, e))
    )
    [failed] = with_it.failed
    assert failed.status == "failed"
    assert "not finite" in str(failed.why) or "is nan" in str(failed.why)
    assert not (failed.run / "adapter").exists()
    said = next(i for i, (n, e) in enumerate(events) if n == failed.name and isinstance(e, Over))
    assert any(isinstance(e, StepDone) for _, e in events[said:])
    for name in states(without.sweep):
        assert_close_runs(with_it.sweep / name, without.sweep / name)
    again = sweep(config, {"train.lr": [1e-2, 3e-2, 1e38]}, resume=True)
    assert [each.status for each in again.tried] == ["done", "done", "failed"]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to all bases that are loaded."""
    loaded: list[Any] = []
    real = sessions.load_base

    def load_base(*args: Any, **named: Any) -> Any:
        gc.collect()
        assert not any(ref() for ref in loaded), "a second base beside the first"
        found = real(*args, **named)
        loaded.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(sessions, "load_base", load_base)
    return loaded


def test_modules_to_save_run_alone_on_the_same_base(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One base is loaded; adapters of a wave that is over are gone from memory.

    Fails when a head that is trained whole meets rows of others, or the base is loaded anew.
    """
    loaded = counted(monkeypatch)
    alive: list[Any] = []
    real = sweeping.train_together

    def together(jobs: Any, *args: Any, **named: Any) -> Any:
        gc.collect()
        assert not any(ref() for ref in alive)
        alive.extend(weakref.ref(p) for job in jobs.values() for p in job.parameters.values())
        return real(jobs, *args, **named)

    monkeypatch.setattr(sweeping, "train_together", together)
    grid = {"adapter.modules_to_save": [[], ["lm_head"]]}
    config = settings(inputs, tmp_path / "out", data={"eval": None}, train={"eval_every": None})
    done = sweep(config, grid)
    assert len(loaded) == 1
    assert not done.failed
    monkeypatch.undo()
    for name, run in alone(config, grid, tmp_path).items():
        assert_close_runs(done.sweep / name, run)


def test_other_data_and_other_bases_are_groups(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four combinations of base and rows, one base in memory at a time.

    Fails when candidates of different rows or quantization are joined.
    """
    loaded = counted(monkeypatch)
    grid = {"data.max_length": [64, 40], "quant.format": ["nf4", "none"]}
    config = settings(inputs, tmp_path / "out", quant={"format": "nf4"})
    done = sweep(config, grid)
    assert len(loaded) == 4
    assert not done.failed
    monkeypatch.undo()
    wanted = ("max_length40-format_none", "max_length64-format_nf4")
    assert set(wanted) <= {each.name for each in done.tried}
    solo = alone(config, {key: values[-1:] for key, values in grid.items()}, tmp_path)
    for name, run in solo.items():
        assert_close_runs(done.sweep / name, run)


def test_going_on_with_several_adapters(inputs: Path, mixed: SweepResult, tmp_path: Path) -> None:
    """adapter.from varies. Fails when every candidate goes on with the first one's adapter."""
    runs = [str(each.run) for each in mixed.tried[1:3]]
    first = settings(inputs, tmp_path / "out").model_dump(by_alias=True)
    config = RunConfig(**{**first, "adapter": {"from": runs[0]}})
    done = sweep(config, {"adapter.from": runs})
    assert [each.status for each in done.tried] == ["done", "done"]
    shapes = [{t.shape[0] for k, t in weights(e.run).items() if "lora_A" in k} for e in done.tried]
    assert shapes == [{2}, {5}]
    for name, run in alone(config, {"adapter.from": runs}, tmp_path).items():
        assert_close_runs(done.sweep / name, run)


def test_a_candidate_is_an_ordinary_run(inputs: Path, mixed: SweepResult, tmp_path: Path) -> None:
    """Half trained in a sweep and resumed as a run of its own; inspected, loaded, merged.

    Fails when its run.yaml, checkpoints or names of tensors are a sweep's.
    """
    out = tmp_path / "out"
    config = settings(inputs, out)
    with pytest.raises(Interrupted):
        sweep(config, MIXED, observe=Stopper("r5-lr0_03", 3, StepDone, interrupt))
    [own] = [each.config for each in candidates(config, MIXED) if each.name == "r5-lr0_03"]
    resumed = train(own, resume=True)
    assert resumed is not None
    assert_close_runs(resumed.run, mixed.sweep / "r5-lr0_03")
    assert inspect(mixed.sweep / "r5-lr0_03/adapter")["r"] == 5
    load(mixed.sweep / "r5-lr0_03")
    merge(None, mixed.sweep / "r5-lr0_03", tmp_path / "merged")
    sweep(config, MIXED, resume=True)
    assert set(states(out).values()) == {"done"}


def test_resuming_with_something_else_is_refused(inputs: Path, mixed: SweepResult) -> None:
    """Fails when candidates of another grid are mixed in, or other settings taken for the same."""
    config = settings(inputs, mixed.sweep)
    with pytest.raises(ConfigError, match="began with other candidates"):
        sweep(config, {"adapter.r": [2, 5]}, resume=True)
    with pytest.raises(ConfigError, match="began with other candidates"):
        sweep(config, MIXED, halving=True, resume=True)
    other = settings(inputs, mixed.sweep, train={"weight_decay": 0.1})
    with pytest.raises(ConfigError, match="began with other settings"):
        sweep(other, MIXED, resume=True)
    with pytest.raises(OutputError, match="not empty"):
        sweep(config, MIXED)


def test_a_finished_sweep_is_not_trained_again(
    inputs: Path, mixed: SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the base is loaded for nothing, or the result is not that of the first time."""
    loaded = counted(monkeypatch)
    again = sweep(settings(inputs, mixed.sweep), MIXED, resume=True)
    assert loaded == []
    assert again == mixed


def test_force_removes_what_is_the_sweeps(inputs: Path, tmp_path: Path) -> None:
    """Fails when candidates of an earlier grid stay, or a file of the user's goes."""
    config = settings(inputs, tmp_path / "out", train={"max_steps": 1})
    sweep(config, {"adapter.r": [2, 3]})
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "photo.png").write_bytes(b"mine")
    sweep(config, {"adapter.r": [3, 4]}, force=True)
    assert states(tmp_path / "out") == {"r3": "done", "r4": "done"}
    assert not (tmp_path / "out" / "r2").exists()
    assert (tmp_path / "out" / "notes.txt").exists()
    assert (tmp_path / "out" / "photo.png").exists()


@SLOW
def test_early_stopping_and_halving(inputs: Path, tmp_path: Path) -> None:
    """Candidates that stop by themselves do not hold up those that wait for a verdict."""
    config = settings(inputs, tmp_path / "out", train={"eval_every": 1, "max_steps": 12})
    grid = {"train.lr": [1e-2, 3e-2, 1e-9, 3e-9], "train.early_stopping": [1, None]}
    done = sweep(config, grid, halving=True)
    assert not done.failed
    went_on = [each for each in done.tried if each.status == "done"]
    assert len(went_on) >= 2
    assert [each for each in done.tried if each.status == "stopped"]


def test_settings_that_contradict_each_other_are_found_before_the_base(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any candidate. Fails when only the first one's settings are looked at."""
    loaded = counted(monkeypatch)
    config = settings(inputs, tmp_path / "out", data={"eval": None}, train={"eval_every": None})
    with pytest.raises(ConfigError, match="early_stopping"):
        sweep(config, {"train.early_stopping": [None, 2]})
    assert loaded == []
    assert not (tmp_path / "out").exists()


@SLOW
def test_until_plateau(inputs: Path, tmp_path: Path) -> None:
    """Two seeds a rank; the ranks that were tried double, and the last doubling did not pay.

    Fails when doubling goes on for ever, or ends without a reason.
    """
    config = settings(inputs, tmp_path / "out", train={"max_steps": 2})
    done = sweep(config, {}, until_plateau=True)
    ranks = [each.settings["adapter.r"] for each in done.tried]
    assert ranks[:4] == [4, 4, 8, 8]
    assert done.verdict is not None
    assert done.verdict.startswith("r = ")
    again = sweep(config, {}, until_plateau=True, resume=True)
    assert again == done


def test_doubling_ends_where_a_rank_fails(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when the failed rank is tried again and again."""
    real = sweeping._of_rank

    def of_rank(config: RunConfig, r: int, ways: Ways) -> Any:
        lr = {2: 1e-9, 4: 3e-2}.get(r, 1e38)
        changed = config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})
        return real(changed, r, ways)

    monkeypatch.setattr(sweeping, "_of_rank", of_rank)
    ways = {"until_plateau": True, "threshold": 1e-6}
    done = sweep(settings(inputs, tmp_path / "out"), {"adapter.r": [2]}, **ways)
    assert [each.status for each in done.tried] == ["done", "done", "failed"]
    assert str(done.verdict).startswith("r = 4: ")
    assert str(done.verdict).endswith("; r = 8 failed")


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=SLOW)])
def test_narrow_types_and_recomputation(inputs: Path, tmp_path: Path, dtype: str) -> None:
    """Scaled losses of float16, and gradient checkpointing: the first step's loss to the rounding
    of the type. Fails when one candidate's scale is another's."""
    base = {"dtype": dtype}
    config = settings(inputs, tmp_path / "out", base=base, train={"gradient_checkpointing": True})
    done = sweep(config, {"adapter.r": [2, 3]})
    for name, run in alone(config, {"adapter.r": [2, 3]}, tmp_path).items():
        assert numbers(done.sweep / name, "loss") == pytest.approx(numbers(run, "loss"), rel=1e-2)


@SLOW
def test_classifiers_run_alone(tmp_path: Path) -> None:
    """Each with a head of its own and its scores. Fails when heads are joined or carried over."""
    from tests.verbs.test_classify import settings as classifier

    config = classifier(tmp_path, zoo.save("llama_classify", tmp_path / "base"))
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"max_steps": 4}),
            "output": str(tmp_path / "s"),
        }
    )
    grid = {"train.seed": [0, 1]}
    done = sweep(config, grid)
    assert not done.failed
    for name, run in alone(config, grid, tmp_path / "solo").items():
        assert_close_runs(done.sweep / name, run)
        assert "eval_accuracy" in RunFolder.look(done.sweep / name).info()["result"]


def test_report_to_is_honoured(inputs: Path, tmp_path: Path) -> None:
    """Fails when a sweep passes over train.report_to in silence."""
    pytest.importorskip("tensorboard")
    config = settings(
        inputs, tmp_path / "out", train={"report_to": ["tensorboard"], "max_steps": 1}
    )
    sweep(config, {"adapter.r": [2, 3]})
    assert list((tmp_path / "out" / "r2" / "tensorboard").iterdir())


@SLOW
def test_an_interrupted_first_minute_leaves_something_to_resume(
    inputs: Path, tmp_path: Path
) -> None:
    """Killed before the first checkpoint of the second candidate. Fails when --resume refuses."""
    config = settings(inputs, tmp_path / "out")
    with pytest.raises(KilledError):
        sweep(config, {"adapter.r": [2, 3]}, observe=Stopper("r2", 1, StepDone, kill))
    shutil.rmtree(tmp_path / "out" / "r3" / "checkpoints", ignore_errors=True)
    done = sweep(config, {"adapter.r": [2, 3]}, resume=True)
    assert not done.failed
