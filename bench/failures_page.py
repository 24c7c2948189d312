"""The document of the failures: an overview of all rows, and one section for each.

Knows no situation and no tool, and runs nothing.
"""

from __future__ import annotations

import re
import textwrap
from importlib.metadata import PackageNotFoundError, version

from bench.failures_row import Row
from decal.verbs.env import env

PACKAGES = ("decal", "torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate")

WORDS = {
    "right": "right result",
    "error": "refuses",
    "found": "finds it",
    "warning": "wrong, warns",
    "told": "measures and says so",
    "silent": "**silently wrong**",
}

HEAD = """# What goes wrong silently, and what decal does

Written by `python -m bench.failures`. Every line below was seen in the run that wrote it: each
situation was built on small models, of a few thousand to 3.7 million parameters, with the real
tools, and the result compared with the right one. Words in quotation marks are the tools' own.

{versions}

"Silently wrong" means: the result is wrong and neither an error nor a warning says so. "Measures
and says so" means: rounding or the like takes its share, and the tool prints how much.

{table}
"""


def page(rows: dict[str, Row]) -> str:
    """The document."""
    run = wrapped(f"Versions: {versions()}. Machine: {machine()}.")
    texts = [HEAD.format(versions=run, table=overview(rows))]
    return "\n".join([*texts, *(section(name, row) for name, row in rows.items())])


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def machine() -> str:
    """The kind of machine, without its name."""
    cpu = env()["cpu"]
    return f"{cpu['model']}, {cpu['usable']} cores, no GPU used"


def overview(rows: dict[str, Row]) -> str:
    lines = ["| | situation | today's tools | decal |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        for i, case in enumerate(row.cases):
            texts = [f"{s.who}: {WORDS[s.verdict]}" for s in case.seen]
            peers = "; ".join(text for text in texts if not text.startswith("decal"))
            ours = "; ".join(
                re.sub("^decal(: |, | )", "", t) for t in texts if t.startswith("decal")
            )
            lines.append(f"| {name if i == 0 else ''} | {case.what} | {peers} | {ours} |")
    return "\n".join(lines)


def section(name: str, row: Row) -> str:
    parts = [f"## {name}. {row.title}", wrapped(row.failure)]
    for case in row.cases:
        lines = [wrapped(f"**{case.what}**")]
        lines += [wrapped(f"{s.who} ({WORDS[s.verdict]}): {s.text}", "- ") for s in case.seen]
        parts.append("\n".join([lines[0], "", *lines[1:]]))
    if row.threads:
        parts.append(wrapped(f"Reported in {', '.join(row.threads)}."))
    return "\n\n".join(parts) + "\n"


def wrapped(text: str, bullet: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        width=100,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )
