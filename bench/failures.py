"""What today's tools get silently wrong, and what decal does; writes docs/failures.md.

    python -m bench.failures            every row
    python -m bench.failures F3 F7      these only, printed instead of written

Each row is a function in `failures_*.py` that builds its situation on tiny models and puts the real
peers and decal into it. The document says what was seen in the run that wrote it, and nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from bench import failures_data, failures_merging, failures_models, failures_training
from bench.failures_page import page
from bench.failures_row import MakeRow, Row

OUT = Path(__file__).resolve().parents[1] / "docs" / "failures.md"

ROWS: dict[str, MakeRow] = {
    **failures_merging.ROWS,
    **failures_models.ROWS,
    **failures_data.ROWS,
    **failures_training.ROWS,
}
"""Id -> what runs it."""


def run(names: list[str]) -> dict[str, Row]:
    """The rows named, or all of them, in the order of their numbers."""
    rows = {}
    for name in sorted(names or ROWS, key=lambda name: int(name[1:])):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = ROWS[name](Path(folder))
        print(f"{name}: {rows[name].title}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="F3 and the like; default: all")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = page(run(options.rows))
    if options.rows:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
