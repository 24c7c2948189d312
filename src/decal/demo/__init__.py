"""The embedded demo: a small base model, and the ticket routing task that quickstart trains on.

Importing this package imports neither torch nor transformers. It does not know how a model is
loaded or trained; it hands out a folder and rows.
"""

from __future__ import annotations

import json
from pathlib import Path

from decal.demo.language import QUEUES
from decal.demo.tickets import Split, TicketRow, task_rows

__all__ = ["QUEUES", "TicketRow", "base_path", "rows", "write_jsonl"]


def base_path() -> Path:
    """The folder of the embedded base model, in plain Hugging Face format."""
    return Path(__file__).resolve().parent / "base"


def rows(split: Split) -> list[TicketRow]:
    """The rows of the routing task: 6,400 for training or 2,400 for testing, always the same."""
    return list(task_rows(split))


def write_jsonl(path: str | Path, split: Split, limit: int | None = None) -> int:
    """Write rows as `{"messages": [...]}` lines; returns how many (the first `limit`, or all)."""
    chosen = rows(split)[:limit]
    lines = [json.dumps({"messages": row.messages}, ensure_ascii=False) for row in chosen]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(chosen)
