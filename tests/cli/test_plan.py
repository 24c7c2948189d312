"""`decal plan` on the command line: exit codes, wrong use, and widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from decal import demo
from decal.cli import main

SMALL = ["--seq", "64", "--batch", "2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds of measuring for every test would be a minute."""
    monkeypatch.setattr("decal.verbs.plan.SECONDS", 0.02)


def run_yaml(folder: Path) -> Path:
    demo.write_jsonl(folder / "train.jsonl", "train", limit=40)
    path = folder / "run.yaml"
    path.write_text(
        f"base: {demo.base_path()}\nquant: nf4\ndata: {{path: {folder / 'train.jsonl'}}}\n"
        f"output: {folder / 'run'}\n"
    )
    return path


def test_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Mutations: print to stderr; exit with 1 where something fits; lines beyond 80 characters."""
    assert main(["plan", "smollm2-135m", "--memory", "8GB", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("smollm2-135m: 134,515,008 parameters in 30 layers")
    assert any(line.startswith("fits 8GB") and line.endswith("yes") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("room", [["--memory", "100MB"], ["--device", "t4"]])
def test_exit_code_1_where_nothing_fits(
    room: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: exit with 0 whatever fits."""
    assert main(["plan", "llama-2-70b", "--json", *room, *SMALL]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutations: ignore --set; take the run for a model; leave its way unmarked."""
    words = ["plan", str(run_yaml(tmp_path)), "--set", "adapter.r=3", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wanted"] == "nf4 double"
    assert found["adapter"].startswith("r 3 on all-linear")
    assert main([*words, "--memory", "1MB"]) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["smollm2-135m", "--set", "adapter.r=3"], "--set replaces a setting of a run.yaml"),
        (["smollm2-135m", "--memory", "8GB", "--device", "t4"], "both say what there is"),
        (["smollm2-135m", "--device", "rtx-4091"], "did you mean `RTX-4090`?"),
        (["smollm2-135m", "--memory", "eight"], "is no amount of memory"),
        (["smolm2-135m"], "did you mean `smollm2-135m`?"),
        (["smollm2-135m", "--targets", "q_prj,v_proj"], "q_prj"),
        (["none.yaml"], "none.yaml"),
    ],
)
def test_wrong_use(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and a sentence. Mutations: exit with 1; a traceback; a hint at nothing."""
    assert main(["plan", *words]) == 2
    assert says in capsys.readouterr().err


def test_options_of_a_model_are_refused_for_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation: ignore --r silently, whose value the run.yaml has."""
    assert main(["plan", str(run_yaml(tmp_path)), "--r", "8"]) == 2
    assert "use --set" in capsys.readouterr().err
