"""Seconds and memory of one optimizer step: decal beside peft + bitsandbytes and trl, in one run.

    python bench/train_step.py --shape smollm2-135m
    python bench/train_step.py --shape qwen2.5-0.5b --peers peft,peft-best --json
    python bench/train_step.py --shape smollm2-135m --write docs/performance.md

Each comparison is a group of processes that load the same base (random weights in the shape of a
known model), attach LoRA (r 16, alpha 32, all linear layers) and then take a step whenever they are
told to: decal, its peer in the same settings, and a loop that measures what the processor can do.
Their steps alternate, so that a change of the machine's speed meets all of them. Groups run one
after the other, so that memory suffices. Printed are medians; a ratio is the median over the rounds
of the peer's time by decal's.

    peft        4 x 256 tokens, NF4 + double quantization, dropout 0.05, the tutorials' loop
    peft-best   dropout 0 on both sides; peft in the best settings that we know (contenders.py)
    peft-autocast   another way to leave upcasts out, as fast as `peft-best` where we measured;
                only where it is asked for
    trl         as `peft`, SFTTrainer with its defaults
    peft-bf16   as `peft` on a base that is not quantized
    peft-chat   8 rows with the lengths of chats, 20 to 600 tokens, prompts not trained; peft pads,
                and tokens per second count real tokens

`--isa` holds decal to an instruction set, and oneDNN and torch under the peers to the like. Asserts
nothing: a bench is read by people.
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
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: in bench/ lies a file named like a package, kernels.py
    sys.path[0] = str(ROOT)

from bench import performance_page  # noqa: E402
from bench.shapes import KNOWN, chat_rows, even_rows, operations, write_base  # noqa: E402
from bench.step_parts import OTHER, PARTS  # noqa: E402

PEERS = {
    "peft": ("peft", "tutorial"),
    "peft-best": ("peft-best", "best"),
    "peft-autocast": ("peft-autocast", "best"),
    "trl": ("trl", "tutorial"),
    "peft-bf16": ("peft", "bf16"),
    "peft-chat": ("peft", "chat"),
}
"""Comparison -> the peer's contender and the settings of both sides."""
USUAL = [name for name in PEERS if name != "peft-autocast"]
"""What is compared where `--peers` names nothing else."""
HELD = {
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "portable": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "off": {},
}
"""Instruction set of decal's -> what holds the peers' libraries to the like; off: no library."""


class Worker:
    """A contender's process."""

    def __init__(self, words: list[str], environment: dict[str, str], log: IO[str]):
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def step(self) -> dict[str, Any]:
        """The figures of one more step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self._log.seek(0)
        raise SystemExit(f"{self._log.read()}\n{self._process.args} ended without an answer")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def workers(
    names: list[str], setting: str, given: argparse.Namespace, folder: str
) -> Iterator[dict[str, Worker]]:
    """The contenders of a group, loaded and ready for a step."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(given.threads), "TOKENIZERS_PARALLELISM": "false"}
    if given.isa:
        environment |= {"DECAL_ISA": given.isa, **HELD[given.isa]}
    started: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as logs:
        try:
            for name in names:
                words = [name, setting, given.shape, folder, str(given.threads)]
                log = (Path(logs) / name).open("w+")
                started[name] = Worker(words, environment, log)
            for worker in started.values():
                worker.answer()
            yield started
        finally:
            for worker in started.values():
                worker.end()


def race(peer: str | None, setting: str, given: argparse.Namespace, folder: str) -> dict[str, Any]:
    """One comparison; the first step of each contender is not counted."""
    names = ["decal", *([peer] if peer else []), "peak"]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with workers(names, setting, given, folder) as started:
        for round_ in range(given.steps + 1):
            for name, worker in started.items():
                figures = worker.step()
                if round_:
                    rounds[name].append(figures)
    steps = [work_of(given.shape, setting, i) for i in range(1, given.steps + 1)]
    found = {"setting": setting, "decal": contender(rounds["decal"], steps)}
    found |= limits(rounds["decal"], rounds["peak"], steps)
    if peer:
        pairs = list(zip(rounds[peer], rounds["decal"], strict=True))
        found["peer"] = contender(rounds[peer], steps)
        found["ratio"] = statistics.median(p["seconds"] / d["seconds"] for p, d in pairs)
        found["memory_ratio"] = found["peer"]["memory"] / found["decal"]["memory"]
    return found


def work_of(shape: str, setting: str, step: int) -> dict[str, Any]:
    """Tokens and operations of a step, counted from 0."""
    vocabulary = KNOWN[shape]["vocab_size"]
    batches = chat_rows(vocabulary) if setting == "chat" else [even_rows(vocabulary)]
    rows = batches[step % len(batches)]
    lengths = [len(ids) for ids, _ in rows]
    parts = operations(shape, lengths, sum(int(trained.sum()) for _, trained in rows))
    return {"tokens": sum(lengths), "flops": sum(parts.values())}


def contender(rounds: list[dict[str, Any]], steps: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [s["tokens"] / r["seconds"] for s, r in zip(steps, rounds, strict=True)]
    return {
        "seconds": statistics.median(r["seconds"] for r in rounds),
        "tokens_per_second": statistics.median(speeds),
        "memory": rounds[-1]["memory"],
    }


def limits(
    rounds: list[dict[str, Any]], peaks: list[dict[str, Any]], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """Where decal's step goes, and how much of the processor's peak it uses."""
    breakdown = {
        part: statistics.median(r["seconds_by_part"][part] for r in rounds) for part in PARTS
    }
    whole = statistics.median(r["seconds"] for r in rounds)
    breakdown[OTHER] = max(0.0, whole - sum(breakdown.values()))
    shares = [
        r["linear_flops"] / r["seconds_by_part"]["linears"] / p["rate"]
        for r, p in zip(rounds, peaks, strict=True)
        if r["linear_flops"]
    ]
    used = zip(steps, rounds, peaks, strict=True)
    return {
        "isa": rounds[-1]["isa"],
        "backends": rounds[-1]["backends"],
        "peak": statistics.median(p["rate"] for p in peaks),
        "peak_measured_by": peaks[-1]["what"],
        "breakdown": {
            part: {"seconds": seconds, "share": seconds / whole}
            for part, seconds in breakdown.items()
        },
        "linears_share_of_peak": statistics.median(shares) if shares else None,
        "step_share_of_peak": statistics.median(
            s["flops"] / r["seconds"] / p["rate"] for s, r, p in used
        ),
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All comparisons that were asked for."""
    found: dict[str, Any] = {"shape": given.shape, "threads": given.threads, "isa": given.isa}
    found["comparisons"] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_base(given.shape, folder)
        if not given.peers:
            found["comparisons"]["decal"] = race(None, "tutorial", given, folder)
        for name in given.peers:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found["comparisons"][name] = race(*PEERS[name], given, folder)
    for name, row in found["comparisons"].items():
        if "ratio" in row:
            key = name.replace("-", "_")
            found[f"ratio_{key}"] = row["ratio"]
            found[f"memory_ratio_{key}"] = row["memory_ratio"]
    first = next(iter(found["comparisons"].values()))
    for key in ("breakdown", "linears_share_of_peak", "step_share_of_peak", "peak", "backends"):
        found[key] = first[key]
    found["isa"] = first["isa"] or "none"
    return found


def named_peers(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: one of {', '.join(PEERS)}")
    return names


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=KNOWN, default="smollm2-135m")
    parser.add_argument("--peers", type=named_peers, default=USUAL, help=", ".join(PEERS))
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--isa", choices=HELD, help="hold both sides to an instruction set")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into a document")
    return parser.parse_args(words)


def main() -> None:
    given = parsed()
    found = measure(given)
    print(json.dumps(found) if given.json else performance_page.step(found))
    if given.write:
        name = f"step {given.shape} {found['isa']}"
        performance_page.write(given.write, name, performance_page.step(found))


if __name__ == "__main__":
    main()
