"""The tutorials' lab: which rank is enough? Five of them at once, over one base, on one page.

    python examples/rank_sweep/rank_sweep.py              r = 4, 8, 16, 32, 64; some minutes
    python examples/rank_sweep/rank_sweep.py --small      two ranks, a few steps, to see it work

Writes the training data and a run.yaml beside it, and does what this command does:

    decal sweep run.yaml --grid adapter.r=4,8,16,32,64

then prints parameters, memory, time, quality and spectra as a table. With --write the table goes
into README.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import decal
from decal import demo
from decal.cli.console import log
from decal.cli.progress import SweepProgress

HERE = Path(__file__).parent
RANKS = (4, 8, 16, 32, 64)
PAGE = HERE / "README.md"


def settings(folder: Path, small: bool) -> str:
    """run.yaml: QLoRA on the embedded base and its ticket task."""
    steps = 12 if small else 200
    return f"""\
base: {demo.base_path()}
quant: nf4
adapter: {{target_modules: all-linear, lora_dropout: 0.0}}    # lora_alpha left out: 2 r
data: {{path: {folder / "train.jsonl"}, max_length: 256, eval: 0.05}}
train: {{max_steps: {steps}, batch_size: 32, lr: 1.5e-3, warmup: 0.1}}
output: {folder / "sweep"}
"""


def table(found: dict[str, Any]) -> str:
    """A row for each rank, from the report's own facts."""
    head = ["r", "trainable parameters", "adapter", "memory alone, planned", "its part of the time"]
    head += ["best eval loss", "rows right", "99 % of the update in"]
    lines = [head, ["---:"] * len(head)]
    for one in found["candidates"]:
        result = one["result"]
        cells = [
            f"{one['r']}",
            f"{one['trainable_params']:,}",
            f"{one['adapter_bytes'] / 1e6:.2f} MB",
            f"{one['planned']['alone_bytes'] / 1e6:.0f} MB",
            f"{result['tokens'] / result['tokens_per_second']:.0f} s",
            f"{one['best_eval_loss']:.4f}",
            f"{result['eval_accuracy']:.1%}",
            f"r = {one['rank_for_99']}",
        ]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/rank_sweep"))
    parser.add_argument("--resume", action="store_true", help="go on after Ctrl-C or a crash")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    demo.write_jsonl(given.out / "train.jsonl", "train", limit=300 if given.small else None)
    run = given.out / "run.yaml"
    run.write_text(settings(given.out, given.small), encoding="utf-8")
    ranks = (4, 8) if given.small else RANKS
    with SweepProgress(log()) as progress:
        result = decal.sweep(
            decal.load_run(run),
            {"adapter.r": ranks},
            samples=0 if given.small else 3,
            resume=given.resume,
            force=not given.resume,
            observe=progress.observe,
            say=progress.say,
        )
    from decal.verbs.report import facts, gather

    text = table(facts(*gather(result.sweep)))
    print(text, "", result.advice, f"report: {result.sweep / 'report.html'}", sep="\n")
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        part = f"<!-- begin: table -->\n{text}\n\n{result.advice}\n<!-- end: table -->"
        old = re.compile(r"<!-- begin: table -->.*?<!-- end: table -->", re.DOTALL)
        PAGE.write_text(old.sub(lambda _: part, page), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
