"""The command line of a sweep: what it hands over, prints, and refuses in words."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from decal.cli import main
from decal.verbs.swept import SweepResult, Tried

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"base: b\ndata: d.jsonl\noutput: {tmp_path / 'out'}\n", encoding="utf-8")
    return path


def tried(name: str, status: str = "done", why: str | None = None, **result: Any) -> Tried:
    return Tried(
        name=name, settings={"adapter.r": 4}, status=status, why=why, run=Path(name), result=result
    )


class Recorder:
    """Stands for the verb."""

    def __init__(self, *candidates: Tried, verdict: str | None = None):
        self.result = SweepResult(
            sweep=Path("out"), tried=candidates, verdict=verdict, advice="Take r4."
        )
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> SweepResult:
        self.args, self.kwargs = args, kwargs
        return self.result


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    def replace(*candidates: Tried, verdict: str | None = None) -> Recorder:
        recorder = Recorder(*candidates, verdict=verdict)
        monkeypatch.setattr(importlib.import_module("decal.verbs.sweep"), "sweep", recorder)
        return recorder

    return replace


def test_what_is_handed_over(verb: Any, run_yaml: Path) -> None:
    """Fails when a flag is dropped, values stay text, or the second of two grids of a key wins."""
    called = verb(tried("r4"))
    args = ["sweep", str(run_yaml), "--grid", "adapter.r=4,8", "--grid", "train.lr=1e-4, 2e-4"]
    more = ["--grid", "adapter.r=16", "--grid", "adapter.target_modules=[q_proj, v_proj],attention"]
    flags = ["--halving", "--resume", "--set", "train.seed=3", "--memory", "15GB", "--samples", "2"]
    assert main([*args, *more, *flags]) == 0
    config, grid = called.args
    ways = called.kwargs
    assert config.train.seed == 3
    assert grid == {
        "adapter.r": [4, 8, 16],
        "train.lr": [1e-4, 2e-4],
        "adapter.target_modules": [["q_proj", "v_proj"], "attention"],
    }
    assert (ways["halving"], ways["until_plateau"], ways["threshold"]) == (True, False, None)
    assert (ways["memory"], ways["samples"]) == (15 * 10**9, 2)
    assert (called.kwargs["resume"], called.kwargs["force"]) == (True, False)
    until = ["--until-plateau", "--threshold", "0.02", "--force"]
    assert main(["sweep", str(run_yaml), *until]) == 0
    assert called.args[1] == {}
    assert (called.kwargs["until_plateau"], called.kwargs["threshold"]) == (True, 0.02)
    assert called.kwargs["force"] is True


def test_values_are_yaml(verb: Any, run_yaml: Path) -> None:
    """Fails when 1e-5 is text, or null and true are words."""
    called = verb(tried("x"))
    assert main(["sweep", str(run_yaml), "--grid", "x=1e-5,null,true,text,0.5,'4',{a: 1}"]) == 0
    assert called.args[1] == {"x": [1e-5, None, True, "text", 0.5, "4", {"a": 1}]}


def test_what_is_printed(verb: Any, run_yaml: Path, capsys: Capture) -> None:
    """Fails when a reason is not told, or a failed candidate leaves exit code 0."""
    verb(
        tried("r4", best_eval_loss=1.25, steps=8),
        tried("r8", "stopped", "halved out"),
        verdict="r = 4: enough",
    )
    assert main(["sweep", str(run_yaml), "--grid", "adapter.r=4,8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:2] == ["candidate", "status"]
    assert "1.25" in out[1]
    assert out[3:] == ["r8: halved out", "r = 4: enough", "Take r4."]
    verb(tried("r4"), tried("r8", "failed", "the loss is nan"))
    assert main(["sweep", str(run_yaml), "--grid", "adapter.r=4,8", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [each["status"] for each in printed["candidates"]] == ["done", "failed"]
    assert printed["candidates"][0]["run"] == "r4"
    assert printed["verdict"] is None


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "a sweep needs something to vary"),
        (["--grid", "adapter.r"], "--grid `adapter.r` is not KEY=VALUE,VALUE"),
        (["--grid", "adapter.r="], "--grid `adapter.r=` is not KEY=VALUE,VALUE"),
        (["--grid", "=4"], "--grid `=4` is not KEY=VALUE,VALUE"),
        (["--grid", "adapter.r=[4"], "--grid `adapter.r=[4` is not KEY=VALUE,VALUE"),
        (["--grid", "adapter.rank=4"], "adapter.rank: unknown key, did you mean `r`?"),
        (["--grid", "learning_rate=1e-4"], "learning_rate: unknown key, did you mean `train.lr`?"),
        (["--grid", "adapter.r=0"], "adapter.r: expected a whole number of at least 1, got 0"),
        (["--grid", "adapter.r=many"], 'adapter.r: expected a whole number of at least 1, got "ma'),
        (["--grid", "adapter.r=4,8,4"], "the grid has 2 candidates with the settings of another"),
        (["--grid", "output=a,b"], "`output` cannot be varied in a sweep"),
        (["--until-plateau", "--grid", "train.lr=1e-4"], "--until-plateau varies adapter.r by its"),
        (["--until-plateau", "--grid", "adapter.r=4,8"], "--until-plateau varies adapter.r by its"),
        (["--until-plateau", "--grid", "adapter.r=0"], "a whole number of at least 1, got 0"),
        (["--until-plateau", "--set", "data.eval=null"], "but `data.eval` is null"),
        (["--halving", "--grid", "adapter.r=4,8", "--set", "data.eval=null"], "halving compares"),
        (["--threshold", "0.1"], "a threshold of 0.1 means nothing here: it is a share"),
        (
            ["--until-plateau", "--threshold", "3"],
            "a threshold of 3 means nothing here: it is a share",
        ),
        (["--grid", "adapter.r=4,8", "--resume"], "d.jsonl"),
    ],
)
def test_what_is_refused(args: list[str], says: str, run_yaml: Path, capsys: Capture) -> None:
    """Exit code 2, one sentence, nothing on stdout and nothing written.

    Fails when a wrong grid is found after the base was loaded, or with a traceback.
    """
    assert main(["sweep", str(run_yaml), *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err
    assert not (run_yaml.parent / "out").exists()


def test_a_missing_file(tmp_path: Path, capsys: Capture) -> None:
    assert main(["sweep", str(tmp_path / "none.yaml"), "--grid", "adapter.r=4"]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_a_second_sweep_into_the_folder(tmp_path: Path, capsys: Capture) -> None:
    """Refused with the two ways out. Fails when it is overwritten, or resumed without a word."""
    from decal import demo

    demo.write_jsonl(tmp_path / "d.jsonl", "train", limit=20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{}")
    text = f"base: {demo.base_path()}\ndata: {tmp_path / 'd.jsonl'}\noutput: {tmp_path / 'out'}\n"
    (tmp_path / "run.yaml").write_text(text)
    assert main(["sweep", str(tmp_path / "run.yaml"), "--grid", "adapter.r=4,8"]) == 2
    err = capsys.readouterr().err
    assert "not empty" in err
    assert "--resume" in err
    assert "--force" in err
