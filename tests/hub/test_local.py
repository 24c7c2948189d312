"""On folders of this disk nobody is called: no hub, no telemetry, nothing.

The hub's client and datasets swallow what a network does wrong, so a blocked socket alone proves
nothing: every attempt is noted, and there must be none. HF_HUB_OFFLINE is not set in the worker.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

from decal import demo
from tests.hub.worker import Worker, decal

RUN = """base: {base}
quant: nf4
adapter: {{r: 4, lora_alpha: 10}}
data: {{path: {data}, max_length: 128, eval: 0.1}}
train: {{max_steps: 2, batch_size: 4, lr: 2e-3}}
output: {out}
"""


def every_verb(place: str) -> tuple[list[str], list[str]]:
    """The main verbs on local folders: (whom they tried to reach, what failed)."""
    tried: list[str] = []
    kept = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(*given: Any, **_: Any) -> Any:
        tried.append(str(given[-1] if isinstance(given[0], socket.socket) else given[0]))
        raise OSError("there is no network in this test")

    socket.socket.connect = socket.socket.connect_ex = refuse  # type: ignore[method-assign]
    socket.getaddrinfo = refuse
    try:
        return tried, _verbs(Path(place))
    finally:
        socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = kept  # type: ignore


def _verbs(place: Path) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import decal as api

    base, run, again, parts = (str(place / n) for n in ("base", "run", "run.yaml", "parts"))
    failed = []
    for line in (
        ("train", again, "--no-check"),
        ("train", again, "--no-check", "--set", f"data.path={parts}", "--set", f"output={run}2"),
        ("inspect", base),
        ("inspect", run),
        ("inspect", f"{run}/adapter"),
        ("generate", run, "hello", "--max-new-tokens", "2"),
        ("compare", base, f"a={run}", "--prompt", "hello", "--max-new-tokens", "2"),
        ("merge", run, "-o", f"{run}-merged"),
        ("quantize", base, "-o", f"{run}-nf4"),
        ("dequantize", f"{run}-nf4", "-o", f"{run}-plain"),
        ("diff", run, f"{run}2"),
        ("env",),
    ):
        done = decal(*line)
        if done.code not in ((0, 1) if line[0] == "diff" else (0,)):
            failed.append(f"{line}: {done.err}")
    model, _ = api.load(run)
    api.save_adapter(model, place / "saved")
    AutoModelForCausalLM.from_pretrained(f"{run}-merged")  # as the quickstart ends
    AutoTokenizer.from_pretrained(f"{run}-merged")
    return failed


def test_local_folders_need_no_network(online: Worker, tmp_path: Path) -> None:
    """Fails when anything on the way, in decal or in what it calls, asks anybody anything."""
    shutil.copytree(demo.base_path(), tmp_path / "base")
    lines = [json.dumps({"messages": row.messages}) + "\n" for row in demo.rows("train")[:24]]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "parts").mkdir()
    for part in range(2):  # not called train.jsonl: datasets reads this folder
        (tmp_path / "parts" / f"part-{part}.jsonl").write_text("".join(lines[part::2]))
    text = RUN.format(base=tmp_path / "base", data=tmp_path / "train.jsonl", out=tmp_path / "run")
    (tmp_path / "run.yaml").write_text(text)
    tried, failed = online(every_verb, str(tmp_path))
    assert not tried
    assert not failed
