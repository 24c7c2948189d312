"""One hub, one process that reaches it, and one that is offline with the same cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from decal import demo
from tests.hub.server import Hub
from tests.hub.worker import Worker, decal

WRITER, READER, STRANGER = "hf_writer_of_ann", "hf_reader_bob", "hf_stranger_eve"


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """tiny/base and tiny/tickets, the former gated and hidden too."""
    found = Hub()
    found.users = {WRITER: "ann", READER: "bob", STRANGER: "eve"}
    found.readers = {READER}
    found.add("tiny/base", demo.base_path())
    found.add("tiny/gated", demo.base_path(), gated=True)
    found.add("ann/hidden", demo.base_path(), private=True)
    found.add("tiny/second", demo.base_path())
    found.add("tiny/pickled", {"config.json": b'{"model_type": "gpt2"}', "model.bin": b"x"})
    lines = [json.dumps({"messages": row.messages}) for row in demo.rows("train")[:40]]
    rows = {"train.jsonl": "\n".join(lines).encode(), "README.md": b"---\nlicense: mit\n---\n"}
    found.add("tiny/tickets", rows, kind="dataset")
    with found.serving():
        yield found


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache, shared by both processes."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def workers(hub: Hub, home: Path) -> Iterator[tuple[Worker, Worker]]:
    """Both processes, importing at the same time."""
    both = Worker(hub.url, home), Worker(hub.url, home, offline=True)
    yield both
    for worker in both:
        worker.close()


@pytest.fixture(scope="session")
def online(workers: tuple[Worker, Worker]) -> Worker:
    """The process that reaches the hub."""
    return workers[0]


@pytest.fixture(scope="session")
def offline(workers: tuple[Worker, Worker]) -> Worker:
    """The process with HF_HUB_OFFLINE=1."""
    return workers[1]


@pytest.fixture(scope="session")
def trained(hub: Hub, online: Worker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base and data are hub ids; its adapter is on the hub as tiny/adapter."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "run.yaml").write_text(
        "base: tiny/base\nquant: nf4\nadapter: {r: 4, lora_alpha: 10}\n"
        "data: {path: tiny/tickets, max_length: 128, eval: 0.1}\n"
        f"train: {{max_steps: 2, lr: 2e-3}}\noutput: {folder / 'run'}\n",
        encoding="utf-8",
    )
    done = online(decal, "train", str(folder / "run.yaml"))
    assert done.code == 0, done.err
    hub.add("tiny/adapter", folder / "run" / "adapter")
    return folder / "run"
