"""F20: saving asks the hub something, the network is away, and the run is lost.

Every attempt to reach anything is counted here, whether or not an error of it is swallowed.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from decal import demo
from decal.config import LoraConfig
from decal.errors import BaseModelError
from decal.model import hf
from decal.model.inject import attach
from decal.verbs import same_base
from decal.verbs.load import load, load_base, save_adapter
from decal.verbs.merge import merge
from decal.verbs.train import train
from tests.failures.situations import draw, logits
from tests.verbs.conftest import settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was tried to be reached: names that were looked up and addresses connected to."""
    tried: list[str] = []

    def refuse(*where: Any, **_: Any) -> Any:
        tried.append(repr(where[-1] if isinstance(where[0], socket.socket) else where[0]))
        raise OSError(101, "Network is unreachable")

    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tried


@pytest.fixture
def cached(tmp_path: Path) -> str:
    """The id of a base that lies in the hub's cache."""
    folder = tmp_path / "hub" / "models--tiny--base"
    shutil.copytree(demo.base_path(), folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return "tiny/base"


def test_the_guard_sees_who_asks(attempts: list[str]) -> None:
    """A base that has to come from the hub is looked for there, which is no secret."""
    with pytest.raises(BaseModelError, match="cannot be reached"):
        load_base("tiny/elsewhere")
    assert any("huggingface.co" in attempt for attempt in attempts)


def test_a_whole_life_with_local_files(attempts: list[str], tmp_path: Path) -> None:
    """Training with checkpoints, saving, merging, loading, saving again: nothing is asked.

    Fails when any of them wants the hub's word.
    """
    sections = {"max_steps": 2, "batch_size": 4, "eval_every": 1, "save_every": 1}
    done = train(settings(tmp_path, train=sections))
    assert done is not None
    merge(None, done.run, tmp_path / "merged", dtype="fp32")
    for place in (done.run, done.weights, tmp_path / "merged"):
        model, _ = load(place)
        logits(model)
    model.save_pretrained(tmp_path / "again")
    assert attempts == []


def test_saving_an_adapter_on_a_base_from_the_hub(
    attempts: list[str], cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base was found in the cache, and the network is gone: saving does not ask for anything.

    The guard away, the fingerprint asks again where the base's files are. Fails when saving does.
    """
    model, _ = load_base(cached, dtype="float32", device="cpu")
    assert model.decal_base.commit == COMMIT
    attach(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0))
    draw(model)
    attempts.clear()
    save_adapter(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert attempts == []
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()

    real = same_base.open_base
    monkeypatch.setattr(same_base, "open_base", lambda _: real(hf.local_folder(cached)))
    model.decal_base = replace(model.decal_base, fingerprint=None)
    save_adapter(model, tmp_path / "c")
    assert any("huggingface.co" in attempt for attempt in attempts)


def test_the_adapter_is_loaded_and_merged_from_the_cache(
    attempts: list[str], cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the base in the cache needs no network: the adapter names the commit.

    The cache is as other tools leave it, without the list of files that the hub's own client now
    keeps: the hub is asked for it, in vain, once for each use of the base, and never waited for.
    Fails when a commit that lies in the cache is downloaded again, or asked for with patience.
    """
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits for the network"))
    model, _ = load_base(cached, dtype="float32", device="cpu")
    attach(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0))
    draw(model)
    wanted = logits(model)
    save_adapter(model, tmp_path / "a")
    attempts.clear()
    again, _ = load(tmp_path / "a")
    merge(None, tmp_path / "a", tmp_path / "m", dtype="fp32")
    assert len(attempts) < 20
    assert float((logits(again) - wanted).abs().max()) == 0
    assert os.listdir(tmp_path / "m")
