"""Pushing: what goes up, what stays here, the card, and what the hub refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from decal import demo
from decal.errors import DecalError
from tests.hub.conftest import STRANGER, WRITER
from tests.hub.server import Hub
from tests.hub.worker import Worker, decal


def push(target: str, repo: str, settings: dict[str, Any]) -> Any:
    from decal.verbs.push import push as push_to_hub

    said: list[str] = []
    done = push_to_hub(target, repo, say=said.append, **settings)
    return done, said


def on_hub(hub: Hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    repository = hub.repositories["model", repo]
    return repository.commits[repository.refs[revision]]


@pytest.fixture(scope="session")
def local(trained: Path, offline: Worker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base and rows are files of this machine."""
    folder = tmp_path_factory.mktemp("secret-place")
    shutil.copytree(demo.base_path(), folder / "my-base")
    demo.write_jsonl(folder / "my-rows.jsonl", "train", limit=20)
    (folder / "run.yaml").write_text(
        f"base: {folder / 'my-base'}\nadapter: {{r: 4, lora_alpha: 10}}\n"
        f"data: {{path: {folder / 'my-rows.jsonl'}, max_length: 128}}\n"
        f"train: {{max_steps: 1}}\noutput: {folder / 'run'}\n"
    )
    done = offline(decal, "train", str(folder / "run.yaml"))
    assert done.code == 0, done.err
    return folder / "run"


def test_a_run_is_pushed_and_loaded_again(
    hub: Hub, online: Worker, trained: Path, tmp_path: Path
) -> None:
    """Files to the byte, one commit, and the id works everywhere at once.

    Fails when anything of the run but its adapter goes up, or the adapter's bytes change.
    """
    done = online(
        decal, "push", str(trained), "ann/tickets", "--message", "First", "--json", token=WRITER
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    repository = hub.repositories["model", "ann/tickets"]
    assert found["commit"] == repository.refs["main"]
    assert found["url"] == f"{hub.url}/ann/tickets"
    assert repository.messages == ["initial commit", "First"]
    files = on_hub(hub, "ann/tickets")
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert files[name] == (trained / "adapter" / name).read_bytes()
    merged = online(decal, "merge", "ann/tickets", "-o", str(tmp_path / "merged"))
    assert merged.code == 0, merged.err
    assert "hf_" not in done.out + done.err


def test_the_card_says_what_is_known(hub: Hub, online: Worker, trained: Path) -> None:
    """Fails when a section is lost, or the front matter is none."""
    online(push, str(trained), "ann/card", {}, token=WRITER)
    text = on_hub(hub, "ann/card")["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "tiny/base"
    assert data["library_name"] == "peft"
    assert data["datasets"] == ["tiny/tickets"]
    assert set(data["tags"]) == {"decal", "lora", "qlora"}
    assert "license" not in data
    commit = hub.repositories["model", "tiny/base"].refs["main"]
    for fact in (
        "nf4 in blocks of 64 with double quantization",
        commit,
        "| lora_alpha | 10 |",
        "| r | 4 |",
        "| rows | 36 |",
        "| lr | 0.002 |",
        "| max_steps | 2 |",
        "evaluation loss",
        "| decal |",
    ):
        assert fact in text, fact


@pytest.mark.interop
def test_the_snippets_run(hub: Hub, online: Worker, trained: Path) -> None:
    """Every block of Python in the card is run as it stands."""
    online(push, str(trained), "ann/snippets", {}, token=WRITER)
    text = on_hub(hub, "ann/snippets")["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert online(run_block, block, token=None) == "LlamaForCausalLM"


def run_block(block: str) -> str:
    names: dict[str, Any] = {}
    exec(block, names)
    model = names["model"]
    assert names["tokenizer"]("hello")["input_ids"]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__


def test_nothing_of_this_machine_goes_up(hub: Hub, online: Worker, local: Path) -> None:
    """Paths, rows, run.yaml, checkpoints and strangers' files stay, also where the base is local.

    Fails when the adapter is uploaded as it lies in the run, or the folder as a whole.
    """
    adapter = local / "adapter"
    (adapter / "hf_token.json").write_text("{}")
    (adapter / "training_args.bin").write_bytes(b"x")
    (adapter / "checkpoint-1").mkdir(exist_ok=True)
    (adapter / "checkpoint-1" / "optimizer.safetensors").write_bytes(b"x")
    shutil.copy(demo.base_path() / "tokenizer.json", adapter)
    _, said = online(push, str(local), "ann/local", {}, token=WRITER)
    assert "is left out" in said[0]
    files = on_hub(hub, "ann/local")
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    for name, data in files.items():
        assert b"secret-place" not in data, name
        assert str(Path.home()).encode() + b"/" not in data, name
    text = files["README.md"].decode()
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "`my-base`" in text
    assert "| data | my-rows.jsonl |" in text
    with pytest.raises(DecalError, match="does not say which base it belongs to"):
        online(load_id, "ann/local", None)
    assert online(load_id, "ann/local", str(local.parent / "my-base")) == "LlamaForCausalLM"


def load_id(path: str, base: str | None) -> str:
    import decal

    return type(decal.load(path, base=base, device="cpu")[0]).__name__


def test_a_model_is_pushed(hub: Hub, online: Worker, trained: Path, tmp_path: Path) -> None:
    """Weights, settings, tokenizer and templates; the hub's model loads."""
    merged = tmp_path / "merged"
    assert online(decal, "merge", str(trained), "-o", str(merged)).code == 0
    (merged / "notes.txt").write_text("mine")
    online(push, str(merged), "ann/merged", {}, token=WRITER)
    files = on_hub(hub, "ann/merged")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert "notes.txt" not in files
    assert ModelCard(files["README.md"].decode()).data.to_dict()["library_name"] == "transformers"
    assert online(load_id, "ann/merged", None) == "LlamaForCausalLM"


def test_cards_of_others_are_kept(hub: Hub, online: Worker, trained: Path, tmp_path: Path) -> None:
    """The hub's own card stays, the folder's goes up; decal's own is written anew.

    Fails when a hand-written card is overwritten.
    """
    done, _ = online(push, str(trained), "ann/kept", {}, token=WRITER)
    assert done.card == "written"
    assert online(push, str(trained), "ann/kept", {}, token=WRITER)[0].card == "written"
    files = on_hub(hub, "ann/kept")
    hub.add("ann/kept", {**files, "README.md": b"# by hand\n"})
    assert online(push, str(trained), "ann/kept", {}, token=WRITER)[0].card == "kept"
    assert on_hub(hub, "ann/kept")["README.md"] == b"# by hand\n"
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("# mine\n")
    assert online(push, str(tmp_path / "adapter"), "ann/kept", {}, token=WRITER)[0].card == "kept"
    assert on_hub(hub, "ann/kept")["README.md"] == b"# mine\n"


def test_private_and_branches(hub: Hub, online: Worker, trained: Path) -> None:
    """Fails when --private or --revision is dropped."""
    done, _ = online(
        push, str(trained), "ann/quiet", {"private": True, "revision": "v2"}, token=WRITER
    )
    assert hub.repositories["model", "ann/quiet"].private
    assert done.url.endswith("/ann/quiet/tree/v2")
    assert "adapter_config.json" in on_hub(hub, "ann/quiet", "v2")
    assert "adapter_config.json" not in on_hub(hub, "ann/quiet")
    hub.add("ann/open", {"x": b"x"})
    with pytest.raises(DecalError, match="`ann/open` is public, and --private was asked for"):
        online(push, str(trained), "ann/open", {"private": True}, token=WRITER)
    assert on_hub(hub, "ann/open") == {"x": b"x"}


def test_old_weights_do_not_stay(hub: Hub, online: Worker, trained: Path, tmp_path: Path) -> None:
    """Loaders take model.safetensors before shards, and an adapter before a model.

    Fails when a push leaves what would be loaded instead of it, or removes anything else.
    """
    assert online(decal, "merge", str(trained), "-o", str(tmp_path / "merged")).code == 0
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    hub.add("ann/sharded", {**old, "notes.txt": b"mine"})
    _, said = online(push, str(tmp_path / "merged"), "ann/sharded", {}, token=WRITER)
    assert "2 files of an earlier push are removed" in said[0]
    files = on_hub(hub, "ann/sharded")
    assert not set(old) & set(files)
    assert files["notes.txt"] == b"mine"
    with pytest.raises(DecalError, match="holds weights of the kind model"):
        online(push, str(trained), "ann/sharded", {}, token=WRITER)
    hub.add("ann/both", {"adapter_config.json": b"{}"})
    with pytest.raises(DecalError, match="holds weights of the kind adapter"):
        online(push, str(tmp_path / "merged"), "ann/both", {}, token=WRITER)


def test_a_model_trained_whole(hub: Hub, online: Worker, offline: Worker, local: Path) -> None:
    """Its card has the run's facts, and no path goes up with config or tokenizer."""
    text = (local / "run.yaml").read_text()
    changed = re.sub(r"(?m)^adapter:\n(  .*\n)+", "adapter: full\n", text)
    changed = changed.replace(f"output: {local}", f"output: {local}-full")
    (local.parent / "full.yaml").write_text(changed)
    done = offline(decal, "train", str(local.parent / "full.yaml"))
    assert done.code == 0, done.err
    online(push, f"{local}-full", "ann/whole", {}, token=WRITER)
    files = on_hub(hub, "ann/whole")
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= set(files)
    for name, data in files.items():
        assert b"secret-place" not in data, name
    assert "full fine-tuning" in files["README.md"].decode()
    assert "fine-tuned from `my-base`" in files["README.md"].decode()
    assert online(load_id, "ann/whole", None) == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("repo", "token", "message", "hint"),
    [
        ("ann/x", None, "you are not logged in", "hf auth login"),
        ("ann/x", STRANGER, "your token may not write to `ann/x`", "write access to `ann`"),
        ("ann/x", "hf_wrong", "your token may not write to `ann/x`", "hf auth login"),
        ("a/b/c", WRITER, "`a/b/c` cannot be the name of a repository", "owner/name"),
    ],
)
def test_refused_pushes(
    hub: Hub, online: Worker, trained: Path, repo: str, token: str | None, message: str, hint: str
) -> None:
    """Fails when a refusal is told as something else, or shows the token."""
    with pytest.raises(DecalError, match=message) as caught:
        online(push, str(trained), repo, {}, token=token)
    assert hint in str(caught.value.hint)
    assert ("model", repo) not in hub.repositories
    assert not re.search("hf_[a-z]", str(caught.value))


def test_a_hub_that_is_down(hub: Hub, online: Worker, trained: Path) -> None:
    hub.down = True
    try:
        with pytest.raises(DecalError, match="did not get through: it answered 503") as caught:
            online(push, str(trained), "ann/x", {}, token=WRITER)
    finally:
        hub.down = False
    assert "push again" in str(caught.value.hint)


def test_offline_and_nothing_there(online: Worker, offline: Worker, trained: Path) -> None:
    with pytest.raises(DecalError, match="HF_HUB_OFFLINE is set"):
        offline(push, str(trained), "ann/x", {}, token=WRITER)
    with pytest.raises(DecalError, match="there is nothing at `tiny/adapter` on this disk"):
        online(push, "tiny/adapter", "ann/x", {}, token=WRITER)
