"""Bases, adapters and data by hub id: what is loaded, recorded, asked for, and said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from decal import demo
from decal.errors import AdapterError, BaseModelError, DecalError
from tests.hub.conftest import READER, STRANGER, WRITER
from tests.hub.server import Hub
from tests.hub.worker import Worker, decal


def base_facts(path: str, revision: str | None = None) -> tuple[str, str | None, str, str]:
    """Path and commit of a loaded base, and what model and tokenizer are called."""
    import decal

    model, tokenizer = decal.load_base(path, revision=revision, device="cpu")
    info = model.decal_base
    return info.path, info.commit, model.name_or_path, tokenizer.name_or_path


def test_a_run_by_hub_ids(hub: Hub, online: Worker, trained: Path) -> None:
    """Fails when the cache's folder stands where the id belongs, or the commit is not recorded."""
    commit = hub.repositories["model", "tiny/base"].refs["main"]
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/base"
    assert config["revision"] is None
    _, recorded = online(metadata, str(trained / "adapter"))
    assert recorded["commit"] == commit
    assert recorded["path"] == "tiny/base"
    assert json.loads((trained / "info.json").read_text())["rows"] == 36


def metadata(path: str) -> tuple[dict, dict]:  # type: ignore[type-arg]
    from decal.model.adapter import Adapter
    from decal.verbs.target import BASE, metadata_json

    adapter = Adapter.from_pretrained(path)
    return dict(adapter.metadata), metadata_json(adapter, BASE) or {}


def test_what_is_in_the_cache_is_not_asked_for_again(
    hub: Hub, online: Worker, trained: Path, tmp_path: Path
) -> None:
    """The adapter names the commit, so nothing of the base is asked for.

    Fails when the fingerprint, the skeleton or the tokenizer takes a branch instead.
    """
    with hub.asked() as requests:
        done = online(decal, "merge", str(trained), "-o", str(tmp_path / "merged"))
    assert done.code == 0, done.err
    assert "Fetching" not in done.err
    assert not [r for r in requests if "tiny" in r.path]


def test_a_run_asks_once_which_commit_is_meant(
    hub: Hub, online: Worker, trained: Path, tmp_path: Path
) -> None:
    """Whatever a branch or the network does later, the run goes on, and saves, with that commit.

    Fails when the tokenizer, the fingerprint or saving asks for the branch again.
    """
    again = (trained.parent / "run.yaml").read_text().replace(str(trained), str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(again)
    with hub.asked() as requests:
        done = online(decal, "train", str(tmp_path / "run.yaml"))
    assert done.code == 0, done.err
    asked = [r.path for r in requests if "tiny/base" in r.path]
    assert asked == ["/api/models/tiny/base", "/api/models/tiny/base/revision/main"]


def test_an_adapter_by_its_id(hub: Hub, online: Worker, trained: Path, tmp_path: Path) -> None:
    """inspect, merge, compare and generate take the id of an adapter's repository.

    Fails when every hub id is taken for a model.
    """
    seen = online(decal, "inspect", "tiny/adapter", "--json")
    assert json.loads(seen.out)["kind"] == "adapter"
    assert json.loads(seen.out)["base"] == "tiny/base"
    merged = online(decal, "merge", "tiny/adapter", "-o", str(tmp_path / "by-id"))
    assert merged.code == 0, merged.err
    online(decal, "merge", str(trained), "-o", str(tmp_path / "by-folder"))
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("by-id", "by-folder")]
    assert weights[0] == weights[1]
    ran = online(decal, "generate", "tiny/adapter", "hello", "--max-new-tokens", "2")
    assert ran.code == 0, ran.err
    compared = online(
        decal, "compare", "a=tiny/adapter@main", "--prompt", "hello", "--max-new-tokens", "2"
    )
    assert compared.code == 0, compared.err


def test_a_model_by_its_id_is_inspected(online: Worker) -> None:
    seen = online(decal, "inspect", "tiny/base", "--json")
    assert json.loads(seen.out)["kind"] == "model"


def test_revisions(hub: Hub, online: Worker) -> None:
    """A branch that moved is followed, an old commit stays what it was.

    Fails when a revision is dropped on the way to the files.
    """
    repository = hub.repositories["model", "tiny/base"]
    first = repository.refs["main"]
    files = dict(repository.commits[first])
    config = json.loads(files["config.json"]) | {"rope_theta": 5000.0}
    second = repository.commit({**files, "config.json": json.dumps(config).encode()}, "next")
    assert online(base_facts, "tiny/base")[:2] == ("tiny/base", first)
    assert online(base_facts, "tiny/base", "next") == ("tiny/base", second, *["tiny/base"] * 2)
    assert online(base_facts, "tiny/base", first)[1] == first
    done = online(decal, "generate", "tiny/base@next", "hello", "--max-new-tokens", "1")
    assert done.code == 0, done.err


def test_without_a_network_the_cache_is_enough(
    hub: Hub, offline: Worker, trained: Path, tmp_path: Path
) -> None:
    """Training, merging and generating by id, offline: nothing is asked.

    Fails when anything insists on the hub's word.
    """
    again = (trained.parent / "run.yaml").read_text().replace(str(trained), str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(again)
    with hub.asked() as requests:
        for line in (
            ("train", str(tmp_path / "run.yaml")),
            ("merge", str(tmp_path / "run"), "-o", str(tmp_path / "merged")),
            ("generate", "tiny/base", "hello", "--max-new-tokens", "1"),
        ):
            done = offline(decal, *line)
            assert done.code == 0, done.err
    assert requests == []


def test_offline_and_not_in_the_cache(hub: Hub, offline: Worker) -> None:
    for path, kind in (("tiny/never", BaseModelError), ("tiny/gated", BaseModelError)):
        with pytest.raises(kind, match=f"`{path}` is neither a folder nor complete") as caught:
            offline(base_facts, path)
        assert "HF_HUB_OFFLINE is set" in str(caught.value.hint)


def test_a_hub_that_is_down(hub: Hub, online: Worker, trained: Path) -> None:
    """What is in the cache is used; the rest is one sentence, with what to do."""
    hub.down = True
    try:
        assert online(base_facts, "tiny/base")[1] is not None
        with pytest.raises(
            BaseModelError, match="cannot be reached \\(it answered 503\\)"
        ) as caught:
            online(base_facts, "tiny/second")
    finally:
        hub.down = False
    assert "network" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("path", "token", "message", "hint"),
    [
        ("tiny/missing", None, "neither a folder nor on the hub", "check the id"),
        ("tiny/missing", STRANGER, "neither a folder nor on the hub", "check the id"),
        ("ann/hidden", STRANGER, "neither a folder nor on the hub", "hf auth login"),
        ("tiny/gated", None, "`tiny/gated` is gated", "accept its terms at"),
        ("tiny/gated", STRANGER, "`tiny/gated` is gated", "accept its terms at"),
        ("tiny/second", "hf_wrong", "the hub refuses the token", "hf auth login"),
        ("tiny/pickled", None, "no safetensors weights", "save_pretrained"),
    ],
)
def test_what_the_hub_refuses(
    online: Worker, path: str, token: str | None, message: str, hint: str
) -> None:
    """Fails when a refusal is told as a missing network, or the other way round."""
    with pytest.raises(BaseModelError, match=message) as caught:
        online(base_facts, path, token=token)
    assert hint in str(caught.value.hint)
    assert "hf_" not in str(caught.value)


def test_who_may_read_reads(online: Worker) -> None:
    """HF_TOKEN is respected by the library itself."""
    assert online(base_facts, "tiny/gated", token=READER)[0] == "tiny/gated"
    assert online(base_facts, "ann/hidden", token=WRITER)[0] == "ann/hidden"


def test_a_wrong_revision_is_named(online: Worker, trained: Path) -> None:
    with pytest.raises(DecalError, match="`tiny/base` has no revision `v9`") as caught:
        online(base_facts, "tiny/base", "v9")
    assert "a branch, a tag or a commit" in str(caught.value.hint)
    done = online(decal, "inspect", "tiny/adapter@v9")
    assert done.code == 2
    assert "`tiny/adapter` has no revision `v9`" in done.err


def test_a_base_takes_its_revision_apart(online: Worker) -> None:
    with pytest.raises(BaseModelError, match="`tiny/base@next` is no hub id") as caught:
        online(base_facts, "tiny/base@next")
    assert "base.revision" in str(caught.value.hint)


def test_adapters_and_bases_are_not_mixed_up(online: Worker, trained: Path) -> None:
    with pytest.raises(BaseModelError, match="`tiny/adapter` is an adapter, not a base"):
        online(base_facts, "tiny/adapter")
    with pytest.raises(AdapterError, match="`tiny/base` is a model, not an adapter"):
        online(decal_read, "tiny/base")


def decal_read(path: str) -> None:
    from decal.verbs.target import read

    read(path)


def test_local_work_asks_nothing(hub: Hub, online: Worker, tmp_path: Path) -> None:
    """Train, save, merge, inspect and generate with a local base, the hub within reach.

    Fails when saving or loading calls the hub, as peft's saving does.
    """
    shutil.copytree(demo.base_path(), tmp_path / "base")
    demo.write_jsonl(tmp_path / "rows.jsonl", "train", limit=20)
    (tmp_path / "run.yaml").write_text(
        f"base: {tmp_path / 'base'}\nquant: nf4\nadapter: {{r: 4, lora_alpha: 10}}\n"
        f"data: {{path: {tmp_path / 'rows.jsonl'}, max_length: 128}}\n"
        f"train: {{max_steps: 1}}\noutput: {tmp_path / 'run'}\n"
    )
    with hub.asked() as requests:
        for line in (
            ("train", str(tmp_path / "run.yaml")),
            ("inspect", str(tmp_path / "run")),
            ("merge", str(tmp_path / "run"), "-o", str(tmp_path / "merged")),
            ("generate", str(tmp_path / "run"), "hello", "--max-new-tokens", "1"),
        ):
            done = online(decal, *line)
            assert done.code == 0, done.err
    assert requests == []


def test_training_goes_on_with_an_adapter_of_the_hub(
    online: Worker, trained: Path, tmp_path: Path
) -> None:
    """Fails when `adapter.from` takes folders only."""
    lines = (trained.parent / "run.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("adapter:", "output:"))]
    more = ["adapter: {from: tiny/adapter}", f"output: {tmp_path / 'run'}"]
    (tmp_path / "run.yaml").write_text("\n".join([*kept, *more]))
    done = online(decal, "train", str(tmp_path / "run.yaml"))
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "tiny/base")


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_code_of_the_hub_runs_only_when_asked(hub: Hub, online: Worker, offline: Worker) -> None:
    """Fails when the code is not fetched with the model, or run without a word."""
    files = hub.repositories["model", "tiny/base"]
    files = dict(files.commits[files.refs["main"]])
    config = json.loads(files["config.json"]) | {
        "model_type": "odd",
        "architectures": ["OddForCausalLM"],
        "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"},
    }
    code = {"config.json": json.dumps(config).encode(), "odd.py": CODE.encode()}
    hub.add("tiny/odd", {**files, **code})
    with pytest.raises(BaseModelError, match="cannot be loaded") as caught:
        online(class_of, "tiny/odd", False)
    assert "trust_remote_code" in str(caught.value.hint)
    assert online(class_of, "tiny/odd", True) == "OddForCausalLM"
    assert offline(class_of, "tiny/odd", True) == "OddForCausalLM"


def class_of(path: str, trusted: bool) -> str:
    import decal

    return type(decal.load_base(path, device="cpu", trust_remote_code=trusted)[0]).__name__
