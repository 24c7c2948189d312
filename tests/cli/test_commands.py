"""Each command hands its verb what was asked, and prints what it gives back."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decal.cli import main
from decal.config import RunConfig
from decal.runfile import load_run
from decal.verbs.text import Completion


class Summary:
    """Stands for the result of a verb."""

    def summary(self) -> dict[str, Any]:
        return {"run": "runs/x", "steps": 1200}

    readable = summary


class Recorder:
    """Stands for a verb: keeps what it was called with."""

    def __init__(self, result: Any):
        self.result = result
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        return self.result


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces decal.verbs.NAME.NAME by a recorder that returns `result`."""

    def replace(name: str, result: Any) -> Recorder:
        recorder = Recorder(result)
        module = importlib.import_module(f"decal.verbs.{name}")
        assert callable(getattr(module, name))
        monkeypatch.setattr(module, name, recorder)
        return recorder

    return replace


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("base: b\ndata: d.jsonl\noutput: o\n", encoding="utf-8")
    return path


def test_train(verb: Any, run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a flag is dropped or two are swapped."""
    called = verb("train", Summary())
    args = ["train", str(run_yaml), "--set", "train.lr=1e-4", "--set", "adapter.r=6", "--resume"]
    assert main(args) == 0
    (config,) = called.args
    assert isinstance(config, RunConfig)
    assert (config.train.lr, config.adapter.r) == (1e-4, 6)
    known = ("resume", "force", "dry_run", "allow_other_base")
    flags = {k: v for k, v in called.kwargs.items() if k in known}
    wanted = {"resume": True, "force": False, "dry_run": False, "allow_other_base": False}
    assert flags == wanted
    assert callable(called.kwargs["observe"])
    assert callable(called.kwargs["say"])
    assert capsys.readouterr().out == "run    runs/x\nsteps  1,200\n"


def test_a_dry_run_prints_no_result(
    verb: Any, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when the missing result of a dry run is taken for one."""
    called = verb("train", None)
    assert main(["train", str(run_yaml), "--dry-run", "--force"]) == 0
    assert (called.kwargs["dry_run"], called.kwargs["force"]) == (True, True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("paths", "base"), [(["b", "a"], "b"), (["a"], None)])
def test_merge(verb: Any, paths: list[str], base: str | None) -> None:
    """Fails when base and adapter are swapped, or an option is dropped."""
    called = verb("merge", Summary())
    more = ["--quantize", "int8", "--verify", "rows.jsonl", "--allow-other-base"]
    args = ["merge", *paths, "-o", "m", "--dtype", "fp32", "--onto", "original", *more]
    assert main(args) == 0
    assert called.args == (base, "a", Path("m"))
    assert called.kwargs.pop("observe")
    assert called.kwargs == {
        "dtype": "fp32",
        "onto": "original",
        "quantize": "int8",
        "verify": "rows.jsonl",
        "force": False,
        "trust_remote_code": False,
        "allow_other_base": True,
    }


def test_quantize(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when an option is dropped, or --no-double turns double quantization on."""
    called = verb("quantize", Summary())
    args = ["quantize", "m", "-o", "q", "--format", "fp4", "--block-size", "128", "--no-double"]
    assert main([*args, "--skip", "mlp", "--skip", "h.0", "--dtype", "fp16", "--force"]) == 0
    model, out, quant = called.args
    assert (model, out) == ("m", Path("q"))
    assert quant.model_dump() == {
        "format": "fp4",
        "block_size": 128,
        "double": False,
        "skip_modules": ("mlp", "h.0"),
    }
    assert callable(called.kwargs.pop("observe"))
    assert called.kwargs == {"dtype": "fp16", "force": True}
    assert main(["quantize", "m", "-o", "q", "--block-size", "48"]) == 2
    assert "block_size" in capsys.readouterr().err


def test_dequantize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when an option is dropped, or quantize is called instead."""
    called = Recorder(Summary())
    monkeypatch.setattr("decal.verbs.quantize.dequantize", called)
    assert main(["dequantize", "q", "-o", "m", "--dtype", "fp32"]) == 0
    assert called.args == ("q", Path("m"))
    assert callable(called.kwargs.pop("observe"))
    assert called.kwargs == {"dtype": "fp32", "force": False}


def test_inspect(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when --json is not JSON, or the plain form loses a value."""
    called = verb("inspect", {"kind": "adapter", "r": 6, "modules": {"q_proj": 2}, "tied": False})
    assert main(["inspect", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules"] == {"q_proj": 2}
    assert main(["inspect", "x"]) == 0
    assert called.args == ("x",)
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["kind     adapter", "r        6", "modules", "  q_proj  2", "tied     no"]


def test_generate(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when the text is not streamed, or a sampling option is dropped."""
    called = verb("generate", Completion("ignored, it was streamed"))
    args = ["generate", "m", "hi", "--adapter", "a", "--temperature", "0.7", "--seed", "3"]
    more = ["--top-p", "0.9", "--top-k", "40", "--system", "Be brief.", "--trust-remote-code"]
    assert main([*args, *more, "--plain", "--max-new-tokens", "9"]) == 0
    stream = called.kwargs.pop("stream")
    assert called.args == ("m", "hi")
    assert called.kwargs == {
        "adapter": "a",
        "system": "Be brief.",
        "chat": False,
        "trust_remote_code": True,
        "allow_other_base": False,
        "max_new_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 3,
    }
    assert capsys.readouterr().out == "\n"
    stream("to")
    stream("ken")
    assert capsys.readouterr().out == "token"


def test_generate_for_programs(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when the text is streamed into the JSON, or a fact of the completion is lost."""
    made = Completion.of("yes", prompt_tokens=3, new_tokens=2, finished=False)
    called = verb("generate", made)
    assert main(["generate", "m", "hi", "--json"]) == 0
    assert called.kwargs["stream"] is None
    assert json.loads(capsys.readouterr().out) == {
        "target": "m",
        "prompt": "hi",
        "completion": "yes",
        "prompt_tokens": 3,
        "new_tokens": 2,
        "finished": False,
    }


def test_generate_shows_a_label(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when the probability of a classifier's answer is lost."""
    verb("generate", Completion.of("billing", probability=0.8125))
    assert main(["generate", "m", "hi"]) == 0
    assert capsys.readouterr().out == "billing  81.2%\n"
    assert main(["generate", "m", "hi", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["label"], found["probability"]) == ("billing", 0.8125)


def test_generate_reads_prompts_from_elsewhere(
    verb: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when `-` is taken for the prompt itself, or a file is not read."""
    called = verb("generate", Completion(""))
    monkeypatch.setattr("sys.stdin.read", lambda: "long prompt", raising=False)
    assert main(["generate", "m", "-"]) == 0
    assert called.args == ("m", "long prompt")
    file = tmp_path / "prompt.txt"
    file.write_text("grüße\n", encoding="utf-8")
    assert main(["generate", "m", "--file", str(file)]) == 0
    assert called.args == ("m", "grüße\n")
    assert main(["generate", "m", "--file", str(tmp_path / "no.txt")]) == 2
    assert main(["generate", "m"]) == 2
    assert main(["generate", "m", "hi", "--file", str(file)]) == 2
    err = capsys.readouterr().err
    assert "no.txt` cannot be read: no such file" in err
    assert "there is no prompt\nhint: give PROMPT" in err
    assert "there are two prompts" in err


def test_generate_stops_politely(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when Ctrl-C swallows the text so far, or writes into its last line."""

    def interrupted(*_: Any, stream: Any, **__: Any) -> None:
        stream("so far")
        raise KeyboardInterrupt

    module = importlib.import_module("decal.verbs.generate")
    monkeypatch.setattr(module, "generate", interrupted)
    assert main(["generate", "m", "hi"]) == 130
    out, err = capsys.readouterr()
    assert out == "so far\n"
    assert err.startswith("stopped: ")


COMPARED = {
    "base": "b",
    "prompts": ["hi"],
    "results": {
        "base": {"outputs": ["a\nb"], "loss": 2.5, "rows": 4},
        "r8": {"outputs": ["c"], "loss": 1.25, "rows": 4},
    },
}


def test_compare(verb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when names and paths are mixed up, or an answer is shown under the wrong name."""
    called = verb("compare", COMPARED)
    asked = tmp_path / "asked.txt"
    asked.write_text("ho\n", encoding="utf-8")
    args = ["compare", "r8=runs/a", "runs/b/adapter", "--prompt", "hi", "--data", "d.jsonl"]
    assert main([*args, "--limit", "4", "--prompts", str(asked), "--trust-remote-code"]) == 0
    assert called.args == (None, {"r8": "runs/a", "b": "runs/b/adapter"})
    assert called.kwargs.pop("observe")
    assert called.kwargs == {
        "prompts": ["hi", "ho"],
        "data": "d.jsonl",
        "limit": 4,
        "max_new_tokens": 64,
        "trust_remote_code": True,
        "allow_other_base": False,
    }
    assert capsys.readouterr().out.splitlines() == [
        "prompt: hi",
        "  base  a b",
        "  r8    c",
        "model  loss  rows",
        "base    2.5     4",
        "r8     1.25     4",
    ]
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == COMPARED


@pytest.mark.parametrize("more", [["x=runs/a"], ["--adapter", "x=runs/a"]])
def test_compare_knows_a_base_by_what_is_there(
    more: list[str], verb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when a base that stands first is taken for an adapter, or an adapter for a base."""
    called = verb("compare", COMPARED)
    monkeypatch.chdir(tmp_path)
    for folder, file in (("runs/a", "adapter_config.json"), ("base", "config.json")):
        Path(folder).mkdir(parents=True)
        (Path(folder) / file).write_text("{}")
    assert main(["compare", "base", *more, "--prompt", "hi"]) == 0
    assert called.args == ("base", {"x": "runs/a"})
    assert main(["compare", *more, "base", "--prompt", "hi"]) == 0
    assert called.args == ("base", {"x": "runs/a"})
    assert main(["compare", "runs/a", *more, "--prompt", "hi"]) == 0
    assert called.args == (None, {"a": "runs/a", "x": "runs/a"})
    assert main(["compare", *more, "--base", "base", "--prompt", "hi"]) == 0
    assert called.args == ("base", {"x": "runs/a"})


@pytest.mark.parametrize("width", [80, 40])
def test_compare_draws_on_a_terminal(
    width: int, verb: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when an answer is cut, or lines are longer than the terminal is wide."""
    long = "word " * 40 + "[end]"
    found = {"base": {"outputs": [long]}, "r8": {"outputs": ["[b]c"]}}
    verb("compare", {"base": "b", "prompts": ["hi"], "results": found})
    drawn = Console(force_terminal=True, width=width, color_system=None, highlight=False)
    monkeypatch.setattr("decal.cli.console.out", lambda: drawn)
    assert main(["compare", "r8=a", "--prompt", "hi"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert text.count("word") == 40
    assert "[end]" in text
    assert "[b]c" in text


FACTS = {"run": "q/run", "adapter": "q/run/adapter", "merged": "q/merged", "seconds": 41.5}


def test_quickstart(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when the folder or --force is not handed on, or a path is shown for another."""
    called = verb("quickstart", FACTS)
    assert main(["quickstart", "--out", "q", "--force"]) == 0
    assert called.args == (Path("q"),)
    assert called.kwargs["force"] is True
    out = capsys.readouterr().out
    assert "adapter   q/run/adapter " in out
    assert "merged    q/merged " in out
    assert main(["quickstart", "--json"]) == 0
    assert called.args == (Path("quickstart"),)
    assert called.kwargs["force"] is False
    assert json.loads(capsys.readouterr().out) == FACTS


def test_init_writes_what_train_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when an option is not written, or the file is not a valid run.yaml."""
    path = tmp_path / "run.yaml"
    args = ["init", str(path), "--base", "1e5", "--data", "it's.jsonl", "--set", "adapter.r=6"]
    assert main(args) == 0
    config = load_run(path)
    assert (config.base.path, config.data.path, config.adapter.r) == ("1e5", "it's.jsonl", 6)
    assert capsys.readouterr().err == f"wrote {path}; next: decal train {path}\n"


def test_init_shows_a_command_that_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when a space in the path ends it."""
    path = tmp_path / "a b.yaml"
    assert main(["init", str(path)]) == 0
    assert capsys.readouterr().err.endswith(f"next: decal train '{path}'\n")


def test_init_replaces_nothing_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when an existing file is overwritten without --force, or not with it."""
    path = tmp_path / "run.yaml"
    path.write_text("mine", encoding="utf-8")
    assert main(["init", str(path)]) == 2
    assert path.read_text(encoding="utf-8") == "mine"
    assert capsys.readouterr().err == f"error: `{path}` exists\nhint: --force replaces it\n"
    assert main(["init", str(path), "--force"]) == 0
    assert load_run(path).output == "runs/first"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_init_says_where_it_cannot_write(
    force: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails when a folder is to be replaced, or a missing one is called a lost race."""
    assert main(["init", str(tmp_path), *force]) == 2
    assert f"`{tmp_path}` is a folder, not a file" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "no" / "run.yaml"), *force]) == 2
    assert f"there is no folder `{tmp_path / 'no'}`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_init_refuses_wrong_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a file is written that train would refuse."""
    path = tmp_path / "run.yaml"
    assert main(["init", str(path), "--set", "adapter.rank=6"]) == 2
    assert not path.exists()
    assert "adapter.rank: unknown key, did you mean `r`?" in capsys.readouterr().err


def test_init_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when `-` becomes a file, or a log line lands in the data."""
    assert main(["init", "-"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("# A run of decal")
    assert err == ""
    assert not Path("-").exists()


DIFFERENCE = {
    "kind": "adapter",
    "a": "x",
    "b": "y",
    "identical": False,
    "config": [{"key": "r", "a": 4, "b": 6}],
    "only_in_a": ["l.v"],
    "only_in_b": [],
    "shapes": [],
    "compared": 30,
    "different": [{"name": f"l.{i}", "relative": 0.25} for i in range(12)],
    "relative": 0.25,
}


def test_diff(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a difference exits with 0, the list has no end, or --all is dropped."""
    called = verb("diff", DIFFERENCE)
    assert main(["diff", "x", "y"]) == 1
    assert called.args == ("x", "y")
    shown = capsys.readouterr().out.splitlines()
    assert shown[:6] == [
        "a: x",
        "b: y",
        "differing settings: 1",
        "  key  a  b",
        "  r    4  6",
        "modules only in a: 1",
    ]
    assert shown[8] == "differing modules: 12 of 30 in both"
    assert shown[-2] == "  (and 2 more; --all lists them)"
    assert shown[-1] == "together they differ by 0.25 of their norm"
    assert main(["diff", "x", "y", "--all"]) == 1
    assert "l.11 " in capsys.readouterr().out
    assert main(["diff", "x", "y", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == DIFFERENCE


def test_diff_of_equal_ones(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when equality exits with anything but 0."""
    verb("diff", {"kind": "model", "identical": True, "compared": 1234})
    assert main(["diff", "x", "y"]) == 0
    assert capsys.readouterr().out == "identical: 1,234 tensors, settings included\n"
