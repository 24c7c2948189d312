"""The tables of docs/performance.md: what the benches of speed print, as Markdown.

Each table stands in the document between two markers, and is replaced there by the run that was
told to `--write` it. Measures nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench.failures_page import machine, versions

NAMES = {
    "peft": "peft + bitsandbytes, tutorials' settings",
    "peft-best": "peft + bitsandbytes, best settings, dropout 0",
    "peft-autocast": "peft + bitsandbytes under autocast, dropout 0",
    "trl": "trl SFTTrainer, defaults",
    "peft-bf16": "peft on a bf16 base",
    "peft-chat": "peft + bitsandbytes, lengths of chats, padded",
}


def write(page: Path, name: str, text: str) -> None:
    """Puts a generated part between its markers.

    Raises:
        SystemExit: the document has no such part.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before = page.read_text(encoding="utf-8")
    part = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not part.search(before):
        raise SystemExit(f"{page} has no line `{begin}`")
    after = part.sub(lambda _: f"{begin}\n{text.strip()}\n{end}", before)
    page.write_text(after, encoding="utf-8")


def run_on(threads: int, isa: str | None) -> str:
    return f"{machine()}; {threads} threads; decal's kernels: {isa or 'none'}. {versions()}."


def table(head: list[str], rows: list[list[str]]) -> str:
    """Text columns on the left, numbers on the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def step(found: dict[str, Any]) -> str:
    """The report of a run of bench/train_step.py."""
    parts = [run_on(found["threads"], found["isa"]), comparisons(found), breakdown(found)]
    return "\n\n".join(part for part in parts if part)


def comparisons(found: dict[str, Any]) -> str:
    head = ["decal beside", "decal s/step", "tokens/s", "GB"]
    head += ["peer s/step", "tokens/s", "GB", "times faster", "times leaner"]
    rows = []
    for name, row in found["comparisons"].items():
        line = [NAMES.get(name, name), *_figures(row["decal"])]
        if "peer" in row:
            line += [*_figures(row["peer"]), f"{row['ratio']:.2f}", f"{row['memory_ratio']:.2f}"]
        rows.append(line + [""] * (len(head) - len(line)))
    return table(head, rows)


def _figures(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['seconds']:.3f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['memory'] / 1e9:.2f}",
    ]


def breakdown(found: dict[str, Any]) -> str:
    """Where decal's step goes, by comparison, and its share of the peak."""
    runs = found["comparisons"]
    parts = next(iter(runs.values()))["breakdown"]
    head = ["decal's step, ms", *runs]
    rows = []
    for part in parts:
        cells = [row["breakdown"][part] for row in runs.values()]
        rows.append([part, *(f"{1e3 * c['seconds']:.0f} ({c['share']:.0%})" for c in cells)])
    for key in ("linears_share_of_peak", "step_share_of_peak"):
        values = [row[key] for row in runs.values()]
        texts = ["-" if value is None else f"{value:.0%}" for value in values]
        rows.append([key.replace("_", " "), *texts])
    rows.append(["peak, GFLOP/s", *(f"{row['peak'] / 1e9:.0f}" for row in runs.values())])
    by = next(iter(runs.values()))["peak_measured_by"]
    return f"{table(head, rows)}\n\nPeak by {by}. Backends: {backends(found['backends'])}."


def backends(chosen: dict[str, str]) -> str:
    """Ops by the backend that ran them."""
    by: dict[str, list[str]] = {}
    for op, backend in chosen.items():
        by.setdefault(backend, []).append(op)
    return "; ".join(f"{backend}: {', '.join(sorted(of))}" for backend, of in sorted(by.items()))


def kernels(found: dict[str, Any]) -> str:
    """The report of a run of bench/kernels.py."""
    head = ["kernel", "shape", "decal ms", "peer", "peer ms", "times faster", "limit ms"]
    head += ["share of limit", "limit by"]
    rows = []
    for row in found["rows"]:
        peer = "" if row["peer_ms"] is None else f"{row['peer_ms']:.3f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        limit = [f"{row['limit_ms']:.3f}", f"{row['share']:.0%}", row["limit_by"]]
        ours = [row["kernel"], row["shape"], f"{row['decal_ms']:.3f}"]
        rows.append([*ours, row["peer"], peer, ratio, *limit])
    limits = (
        f"Peak {found['peak'] / 1e9:.0f} GFLOP/s by {found['peak_measured_by']};"
        f" memory {found['read'] / 1e9:.1f} GB/s read, {found['write'] / 1e9:.1f} GB/s written."
    )
    where = run_on(found["threads"], found["isa"])
    return f"{where}\n{limits}\n\n{table(head, rows)}"
