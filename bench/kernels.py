"""Each kernel beside its peer and its limit, in one run.

    python bench/kernels.py --shape smollm2-135m
    python bench/kernels.py --shape tiny --families attention,losses --json
    python bench/kernels.py --shape qwen2.5-0.5b --write docs/performance.md

decal's op and its peer alternate, and the yardsticks are measured beside them: the processor's peak
(peak.py) for every row, the memory's speed once. The limit of a row is the longest of its
operations at the peak, and its bytes at the speed of reading and writing; the share is how much of
decal's time that would be. Medians. Asserts nothing: a bench is read by people.

On a machine with caches as large as the data of a row, a share may exceed 100 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: in bench/ lies a file named like a package, kernels.py
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from bench import performance_page  # noqa: E402
from bench.kernel_rows import FAMILIES, Call, Row  # noqa: E402
from bench.peak import Peak  # noqa: E402
from bench.shapes import KNOWN  # noqa: E402
from decal.kernels import native  # noqa: E402
from decal.model.heap import keeping_freed  # noqa: E402

SAMPLE = 0.005
"""Seconds that one reading of the clock covers, at least."""
YARDSTICK = 0.02
BYTES = 256 * 2**20


def seconds(call: Call, times: int) -> float:
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def repeats(call: Call) -> int:
    """How often a call must be made to fill a sample; warms it up, too."""
    call()
    return max(1, round(SAMPLE / seconds(call, 1)))


def bandwidth() -> dict[str, float]:
    """Bytes a second that all threads together read, and write, in memory that no cache holds."""
    data = torch.ones(BYTES // 4)
    return {
        "read": BYTES / statistics.median(seconds(data.sum, 1) for _ in range(5)),
        "write": BYTES / statistics.median(seconds(lambda: data.fill_(1), 1) for _ in range(5)),
    }


def measured(row: Row, rounds: int, peak: Peak, memory: dict[str, float]) -> dict[str, Any]:
    """One line of the table."""
    calls = (row.ours, row.theirs)
    times = [repeats(call) for call in calls]
    spent: list[tuple[float, float]] = []
    rates: list[float] = []
    for _ in range(rounds):
        spent.append((seconds(row.ours, times[0]), seconds(row.theirs, times[1])))
        rates.append(peak.rate())
    ours, theirs = zip(*spent, strict=True)
    moving = row.read / memory["read"] + row.written / memory["write"]
    limits = [max(row.flops / rate, moving) for rate in rates]
    limit = statistics.median(limits)
    return {
        "kernel": row.kernel,
        "shape": row.shape,
        "decal_ms": 1e3 * statistics.median(ours),
        "peer": row.peer,
        "peer_ms": 1e3 * statistics.median(theirs),
        "ratio": statistics.median(b / a for a, b in spent),
        "limit_ms": 1e3 * limit,
        "limit_by": "peak" if limit > moving else "memory",
        "share": statistics.median(a / b for a, b in zip(limits, ours, strict=True)),
        "rate": statistics.median(rates),
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    peak, memory = Peak(YARDSTICK), bandwidth()
    rows = []
    with keeping_freed():  # as in training: else every output's pages are cleared anew
        for family in given.families:
            print(f"{family} ...", file=sys.stderr, flush=True)
            rows += [
                measured(row, given.rounds, peak, memory) for row in FAMILIES[family](given.shape)
            ]
    return {
        "shape": given.shape,
        "threads": given.threads,
        "isa": native.isa() or "none",
        "peak": statistics.median(row["rate"] for row in rows),
        "peak_measured_by": peak.what,
        **memory,
        "rows": rows,
    }


def named_families(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: one of {', '.join(FAMILIES)}")
    return names


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Each kernel beside its peer and its limit.")
    parser.add_argument("--shape", choices=KNOWN, default="smollm2-135m")
    parser.add_argument(
        "--families", type=named_families, default=list(FAMILIES), help=", ".join(FAMILIES)
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a document")
    return parser.parse_args(words)


def main() -> None:
    given = parsed()
    found = measure(given)
    print(json.dumps(found) if given.json else performance_page.kernels(found))
    if given.write:
        name = f"kernels {given.shape} {found['isa']}"
        performance_page.write(given.write, name, performance_page.kernels(found))


if __name__ == "__main__":
    main()
