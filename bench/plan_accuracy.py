"""Planned against measured memory: real runs in processes of their own, over what decides memory.

    python bench/plan_accuracy.py                       all configurations, about ten minutes
    python bench/plan_accuracy.py --slice 2/4           every fourth, beginning with the second
    python bench/plan_accuracy.py --write docs/plan.md  and put the table into the document

Every configuration is planned from config.json and the rows, as `decal plan` does, in a process
that loads no weights. Then a run trains two steps, and what it measured (anonymous memory at its
highest, of the whole process) is held against that plan, and against the same with what the run's
own process held before its first step. A Python process with torch takes 0.3 GB before it does
anything, so that small runs agree whatever is planned for them: the last column leaves it out.

Bases have random weights; memory does not depend on their values. Slices add up in `--results`, so
that a shared machine can be left alone between them. Asserts nothing: a bench is read by people.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: in bench/ lies a file named like a package, kernels.py
    sys.path[0] = str(ROOT)

from bench.failures_page import machine, versions  # noqa: E402
from bench.performance_page import table, write  # noqa: E402
from bench.shapes import KNOWN  # noqa: E402

_SMALL = {"max_position_embeddings": 2048, "tie_word_embeddings": True}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tiny": ("llama", KNOWN["tiny"]),
    "llama-135m": ("llama", KNOWN["smollm2-135m"]),
    "llama-40m": (
        "llama",
        {
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 16000,
        },
    ),
    "qwen2-30m": (
        "qwen2",
        {
            "hidden_size": 448,
            "intermediate_size": 1216,
            "num_hidden_layers": 8,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "vocab_size": 32000,
        },
    ),
    "qwen3-50m": (
        "qwen3",
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 10,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 32000,
        },
    ),
    "gpt2-20m": (
        "gpt2",
        {"n_embd": 384, "n_layer": 8, "n_head": 6, "vocab_size": 16000, "n_positions": 1024},
    ),
    "gemma-30m": (
        "gemma",
        {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 24000,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    shape: str
    quant: str = "nf4"
    r: int = 16
    """0 trains every weight."""
    length: int = 256
    batch: int = 4
    once: int = 4096
    """train.micro_batch_tokens"""
    checkpointing: bool = False
    dtype: str = "bfloat16"
    targets: str = "all-linear"

    @property
    def name(self) -> str:
        adapter = f"r {self.r}" if self.r else "full"
        if self.r and self.targets != "all-linear":
            adapter += f" {self.targets}"
        parts = [self.shape, self.quant, adapter, f"{self.batch} x {self.length}"]
        parts += ["checkpointing"] * self.checkpointing
        parts += [self.dtype] * (self.dtype != "bfloat16")
        parts += [f"{self.once} at once"] * (self.once < self.batch * self.length)
        return ", ".join(parts)

    def settings(self, folder: Path) -> dict[str, Any]:
        quant: Any = (
            {"format": "nf4", "double": False} if self.quant == "nf4 single" else self.quant
        )
        adapter: dict[str, Any] = {"method": "full"}
        if self.r:
            adapter = {"r": self.r, "target_modules": self.targets}
        return {
            "base": {"path": str(folder / self.shape), "dtype": self.dtype},
            "quant": quant,
            "adapter": adapter,
            "data": {
                "path": str(folder / f"{self.length}.jsonl"),
                "max_length": self.length,
                "eval": None,
            },
            "train": {
                "max_steps": 2,
                "batch_size": self.batch,
                "micro_batch_tokens": self.once,
                "gradient_checkpointing": self.checkpointing,
            },
            "output": str(folder / "runs" / self.name.replace(", ", "-").replace(" ", "_")),
        }


CASES = [
    Case(shape="llama-tiny"),
    Case(shape="llama-tiny", quant="none", length=1024, batch=4),
    Case(shape="llama-40m", quant="none", r=8),
    Case(shape="llama-40m", quant="nf4", r=64, length=512, batch=4),
    Case(shape="llama-40m", quant="nf4 single", r=16, length=1024, batch=2),
    Case(shape="llama-40m", quant="int8", r=16, length=512, batch=2),
    Case(shape="llama-40m", quant="fp4", r=4, length=64, batch=32),
    Case(shape="llama-40m", quant="nf4", r=16, length=512, batch=8, checkpointing=True),
    Case(shape="llama-40m", quant="none", r=0, length=64, batch=2),
    Case(shape="llama-40m", quant="none", r=16, length=256, batch=4, dtype="float32"),
    Case(shape="llama-40m", quant="none", r=0, length=512, dtype="float32", checkpointing=True),
    Case(shape="llama-40m", quant="nf4", r=32, length=256, batch=8, once=1024),
    Case(shape="llama-40m", quant="nf4", r=16, length=256, batch=8, targets="attention"),
    Case(shape="qwen2-30m", quant="nf4", r=16, length=512, batch=8),
    Case(shape="qwen2-30m", quant="none", r=32, length=256, batch=8),
    Case(shape="qwen2-30m", quant="int8", r=8, length=1024, batch=2, checkpointing=True),
    Case(shape="qwen2-30m", quant="none", r=0, length=256, dtype="float32"),
    Case(shape="qwen3-50m", quant="nf4", r=16, length=512, batch=4),
    Case(shape="qwen3-50m", quant="none", r=64, length=128, batch=16),
    Case(shape="qwen3-50m", quant="fp4", r=16, length=1024, batch=1),
    Case(shape="qwen3-50m", quant="nf4", r=8, length=256, batch=2, dtype="float32"),
    Case(shape="gpt2-20m", quant="nf4", r=16, length=512, batch=4),
    Case(shape="gpt2-20m", quant="none", r=8, length=256, batch=4),
    Case(shape="gpt2-20m", quant="none", r=0, length=256, dtype="float32"),
    Case(shape="gemma-30m", quant="nf4", r=16, length=256, batch=4),
    Case(shape="gemma-30m", quant="none", r=16, length=256, batch=4, checkpointing=True),
    Case(shape="llama-135m", quant="nf4", r=16, length=256, batch=4),
    Case(shape="llama-135m", quant="nf4", r=64, length=64, batch=4),
    Case(shape="llama-135m", quant="int8", r=16, length=256, batch=2),
    Case(shape="llama-135m", quant="none", r=16, length=512, batch=1),
    Case(shape="llama-135m", quant="nf4 single", r=32, length=512, batch=2, checkpointing=True),
    Case(shape="llama-135m", quant="nf4", r=16, length=256, batch=4, once=512),
    Case(shape="llama-135m", quant="none", r=0, length=64, batch=2, dtype="float32"),
    Case(shape="llama-135m", quant="none", r=16, length=128, batch=2, dtype="float32"),
]


def write_base(shape: str, folder: Path) -> None:
    """A model of the shape in bf16 with random weights, and a tokenizer: a token for each word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    kind, facts = SHAPES[shape]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **({} if kind == "gpt2" else _SMALL), **facts)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "[UNK]": 3, "a": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def write_rows(length: int, file: Path) -> None:
    """Sixty-four rows that are `length` tokens long with their end."""
    row = json.dumps({"text": " ".join(["a"] * (length - 1))})
    file.write_text("\n".join([row] * 64) + "\n")


def run_all(file: Path) -> None:
    """In a process of its own: trains every case of the file in a child, and prints what the run
    planned and measured, a line each. Children begin with everything imported and nothing run."""
    from decal.cli import main as decal
    from decal.cli import progress  # noqa: F401 (imported before the children are made)
    from decal.verbs import train  # noqa: F401

    for name, settings in json.loads(file.read_text()).items():
        run, log = file.with_name("run.yaml"), file.with_name("log.txt")
        run.write_text(json.dumps(settings))
        sys.stdout.flush()
        child = os.fork()
        if not child:
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                os._exit(decal(["train", str(run), "--force", "--no-check"]))
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{name}: {log.read_text()}")
        info = json.loads(Path(settings["output"], "info.json").read_text())
        found = {
            "name": name,
            "measured": info["result"]["peak_memory_bytes"],
            "process": info["planned"]["parts"]["process"],
            "own": info["planned"]["peak_bytes"],
        }
        print(json.dumps(found), flush=True)


def answers(what: str, file: Path) -> Iterator[Any]:
    """The lines that a process of its own answers with, `--plan` or `--run`, as they come."""
    words = [sys.executable, "-m", "bench.plan_accuracy", what, str(file)]
    log = file.with_suffix(".err")
    with log.open("w") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(), cwd=ROOT
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            raise SystemExit(log.read_text())


def plan_all(file: Path) -> None:
    """In a process of its own: plans every case of the file and prints them as JSON."""
    from decal.config import RunConfig
    from decal.verbs.plan import plan

    for name, settings in json.loads(file.read_text()).items():
        made = plan(RunConfig(**settings), calibrate=False)
        peak = made.method(made.wanted or "").peak
        print(json.dumps({"name": name, "cold": peak.reported, "cold_parts": peak.parts}))


def asked(cases: list[Case], folder: Path, name: str) -> Path:
    """The settings of the cases in a file."""
    file = folder / name
    file.write_text(json.dumps({case.name: case.settings(folder) for case in cases}))
    return file


def environment() -> dict[str, str]:
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def report(rows: list[dict[str, Any]]) -> str:
    """The table and its summary, as Markdown."""
    lines = []
    errors: dict[str, list[float]] = {"cold": [], "warm": [], "rest": []}
    for row in rows:
        rest = row["cold"] - row["cold_parts"]["process"]
        off = {
            "cold": row["measured"] / row["cold"] - 1,
            "warm": row["measured"] / (rest + row["process"]) - 1,
            "rest": (row["measured"] - row["process"]) / rest - 1,
        }
        for key, value in off.items():
            errors[key].append(abs(value))
        sizes = [f"{row[key] / 1e6:,.0f}" for key in ("measured", "cold")]
        shown = [f"{100 * off[key]:+.1f}" for key in errors]
        lines.append([row["name"], *sizes, *shown])
    head = ["run", "measured MB", "planned MB", "off %", "off %, own process"]
    head += ["off %, without process"]
    names = {
        "cold": "`decal plan`",
        "warm": "with the process as the run found it",
        "rest": "without the process",
    }
    said = []
    for key, name in names.items():
        values = errors[key]
        near = sum(value <= 0.1 for value in values)
        median, most = 100 * statistics.median(values), 100 * max(values)
        text = f"{name}: {near} of {len(values)} runs within 10 %, median {median:.1f} %"
        said.append(f"- {text}, at most {most:.1f} %")
    return "\n".join([f"{machine()}. {versions()}.", "", *said, "", table(head, lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slice", default="1/1", metavar="I/N")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--results", type=Path, help="a JSON file that slices add up in")
    parser.add_argument("--go-on", action="store_true", help="leave out what the results have")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a document")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plan or given.run:
        (plan_all if given.plan else run_all)(given.plan or given.run)
        return
    at, of = map(int, given.slice.split("/"))
    cases = [c for c in CASES if not given.only or given.only in c.name][at - 1 :: of]
    earlier = given.results and given.results.exists()
    rows: dict[str, dict[str, Any]] = json.loads(given.results.read_text()) if earlier else {}
    todo = [c for c in cases if not (given.go_on and c.name in rows)]
    known = [c for c in CASES if c in todo or c.name in rows]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for shape in {case.shape for case in known}:
            write_base(shape, folder / shape)
        for length in {case.length for case in known}:
            write_rows(length, folder / f"{length}.jsonl")
        for found in answers("--run", asked(todo, folder, "runs.json")):
            rows[found["name"]] = found
            print(found["name"], file=sys.stderr, flush=True)
            if given.results:
                given.results.write_text(json.dumps(rows, indent=1))
        for found in answers("--plan", asked(known, folder, "plans.json")):
            rows[found["name"]] |= found
    ordered = [rows[case.name] for case in CASES if case.name in rows]
    text = report(ordered)
    if given.write:
        write(given.write, "accuracy", text)
    print(json.dumps(ordered) if given.json else text)


if __name__ == "__main__":
    main()
