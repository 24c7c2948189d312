"""Inputs that once hurt, by name. Each ended in a traceback, a hang or a call before it was mended.

Every test's docstring says what it did then.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from decal import demo
from decal.config import DataConfig, LoraConfig
from decal.data import readers
from decal.data.source import Rows, read_rows
from decal.errors import (
    AdapterError,
    BaseModelError,
    ConfigError,
    DataError,
    DecalError,
    OutputError,
    QuantError,
    StorageError,
    nearest,
)
from decal.model.adapter import Adapter
from decal.model.hf import load_config
from decal.quant import FORMATS
from decal.quant.base import Recipe
from decal.quant.bnb import from_bnb, to_bnb
from decal.runfile import parse_run
from decal.store.base import copy_side_files, open_base, side_files
from decal.store.files import read_json, write_json
from decal.store.patterns import why_costly
from decal.store.peft import LoraTensors, PeftAdapter, read_adapter, write_adapter
from decal.store.run import RunFolder
from decal.store.tensorfile import read_header
from decal.train import train
from decal.verbs.inspect import inspect
from decal.verbs.load import labels_of
from decal.verbs.push import _contents as contents
from decal.verbs.target import BASE, LABELS, Target, base_of, resolve

SOON = 3.0
"""Seconds; each of these took minutes, or for ever."""


def _rows(path: Path, text: str | bytes, **settings: Any) -> Rows:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_rows(DataConfig(path=str(path), **settings))


# --- rows -------------------------------------------------------------------------------------

NUMBER = "9" * 5000


@pytest.mark.parametrize(
    "row",
    [
        f'{{"text": "a", "n": {NUMBER}}}',
        f'{{"instruction": "a", "output": "b", "tools": {NUMBER}}}',
        '{"text": "a", "\\ud800": 1}',
        '{"text": "a", "n": ' + "[" * 100 + "]" * 100 + "}",
    ],
    ids=["5000 digits", "5000 digits in tools", "half a surrogate pair", "100 lists deep"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_python_alone_takes_or_refuses_otherwise(
    tmp_path: Path, row: str, name: str
) -> None:
    """ValueError: Exceeds the limit for integer string conversion; UnicodeEncodeError later on."""
    with pytest.raises(DataError):
        _rows(tmp_path / name, row if name == "a.jsonl" else f"[{row}]")


@pytest.mark.parametrize("key", ["tools", "arguments", "call"])
def test_json_inside_of_json(tmp_path: Path, key: str) -> None:
    """RecursionError and ValueError from the second parser."""
    for text in ("[" * 100_000, NUMBER):
        call = {"function": {"name": "f", "arguments": text if key == "arguments" else "{}"}}
        row = {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "tool_calls": [call]},
            ],
            "tools": text if key == "tools" else [],
        }
        if key == "call":
            row = {"conversations": [{"from": "human", "value": "a"},
                                     {"from": "function_call", "value": text}]}  # fmt: skip
        try:
            found = _rows(tmp_path / "a.jsonl", json.dumps(row))
        except DataError:
            continue
        for message in found.examples[0].messages or ():
            message.as_dict()


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line was read whole, whatever its length. Fails when the limit is not asked."""
    monkeypatch.setattr(readers, "LINE_LIMIT", 100)
    assert len(_rows(tmp_path / "a.jsonl", '{"text": "a"}\n').examples) == 1
    with pytest.raises(DataError, match=r"line 2 of .* is longer than 100 bytes"):
        _rows(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "' + "b" * 200 + '"}\n')


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.txt"])
def test_a_file_that_memory_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(readers, "WHOLE_LIMIT", 100)
    with pytest.raises(DataError, match="holds more than 100 bytes"):
        _rows(tmp_path / name, "a" * 101)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.parquet"])
def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A megabyte became a gigabyte. Fails when what comes out is not counted."""
    monkeypatch.setattr(readers, "FREE", 1000)
    if name == "a.parquet":
        file = io.BytesIO()
        pq.write_table(pa.table({"text": ["a" * 1000] * 20_000}), file)
        content = file.getvalue()
    else:
        content = gzip.compress(b'"text"\n' * 1_000_000)
    with pytest.raises(DataError, match="becomes more than 100 times its"):
        _rows(tmp_path / name, content)


def test_parquet_that_names_no_classes(tmp_path: Path) -> None:
    """KeyError: 'names'."""
    info = {"info": {"features": {"label": {"_type": "ClassLabel"}}}}
    table = pa.table({"text": ["a"], "label": [1]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "a.parquet"
    )
    read_rows(DataConfig(path=str(tmp_path / "a.parquet")))


def test_parquet_with_text_that_is_none(tmp_path: Path) -> None:
    """UnicodeDecodeError: pyarrow checks text when it is asked for, not when it is read."""
    raw = pa.array([b"ab\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_rows(DataConfig(path=str(tmp_path / "a.parquet")))


def test_a_row_of_many_columns(tmp_path: Path) -> None:
    """Minutes of comparing names, and a message with all of them."""
    row = {f"column {i} " + "x" * 100: 1 for i in range(20_000)}
    start = time.process_time()
    with pytest.raises(DataError) as caught:
        _rows(tmp_path / "a.jsonl", json.dumps(row))
    assert time.process_time() - start < SOON
    assert len(str(caught.value)) < 5000


def test_names_without_end_are_not_compared() -> None:
    """The time to compare grows with the square of the length."""
    start = time.process_time()
    assert nearest("a" * 100_000, ["a" * 100_001, "b"]) is None
    assert time.process_time() - start < SOON


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """open() of a named pipe never came back."""
    pipe = tmp_path / "adapter_config.json"
    os.mkfifo(pipe)
    with pytest.raises(AdapterError, match="no regular file"):
        read_json(pipe, AdapterError)
    with pytest.raises(AdapterError, match="no regular file"):
        read_header(pipe, AdapterError)
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no regular file"):
        read_rows(DataConfig(path=str(tmp_path / "a.jsonl")))


FAR = ["https://example.org/x.jsonl", "hf://datasets/a/b/c.jsonl", "/etc/x.jsonl", "../x.jsonl"]


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml", "state.json"])
def test_a_data_folder_stays_in_its_folder(tmp_path: Path, far: str, name: str) -> None:
    """datasets fetched the address, and read the other file, because a README.md said so."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.jsonl").write_text('{"text": "secret"}\n')
    listed = (
        f"configs:\n- config_name: default\n  data_files:\n  - {{split: train, path: '{far}'}}\n"
    )
    texts = {
        "README.md": f"---\n{listed}---  \n# Data\n",
        ".huggingface.yaml": listed,
        "state.json": json.dumps({"_data_files": [{"filename": far}]}),
    }
    (folder / name).write_text(texts[name])
    with pytest.raises(DataError, match="names data outside of its folder"):
        read_rows(DataConfig(path=str(folder)))


def test_scripts_in_a_data_folder_are_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        read_rows(DataConfig(path=str(folder)))
    assert not (tmp_path / "ran").exists()


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["[" * 5000, "- " * 40_000, "{a: " * 3000, "? " * 3000], ids=["[", "-", "{", "?"]
)
def test_yaml_that_is_all_beginning(text: str) -> None:
    """Four seconds for five kilobytes, and sixteen for ten: the parser's time is quadratic."""
    start = time.process_time()
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse_run(text)
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse_run("base: a\ndata: b\noutput: c\n", overrides=[f"quant={text}"])
    assert time.process_time() - start < SOON


# --- adapters ---------------------------------------------------------------------------------


def _adapter(folder: Path, **changes: Any) -> Path:
    factors = LoraTensors(torch.ones(2, 3), torch.ones(3, 2))
    write_adapter(
        folder,
        PeftAdapter(
            config=LoraConfig(r=2, target_modules=["a"]), tensors={"model." + "a.a" * 20: factors}
        ),
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"task_type": ["CAUSAL_LM"]},
        {"base_model_name_or_path": ["x"]},
        {"base_model_name_or_path": "a" * 3000},
        {"base_model_name_or_path": "~nobody/x"},
        {"base_model_name_or_path": "a\0b"},
        {"revision": 3},
        {"auto_mapping": "x"},
        {"eva_config": {"rho": float("nan")}},
        {"megatron_core": "\ud800"},
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind(tmp_path: Path, changes: dict[str, Any]) -> None:
    """TypeError: unhashable type; OSError: File name too long; ValueError when saved again."""
    with pytest.raises(AdapterError):
        read_adapter(_adapter(tmp_path / "a", **changes))


COSTLY = ["(a+)+$", "(a|aa)*$", r"(\.?a?)+$", ".*" * 20 + "x", "(a?){50}" + "a" * 50 + "x"]


@pytest.mark.parametrize(
    "key", ["target_modules", "rank_pattern", "alpha_pattern", "exclude_modules"]
)
@pytest.mark.parametrize("pattern", COSTLY)
def test_patterns_that_take_for_ever(tmp_path: Path, key: str, pattern: str) -> None:
    """re.match did not come back."""
    value = {pattern: 2} if key.endswith("_pattern") else pattern
    start = time.process_time()
    with pytest.raises(AdapterError, match="is not plain LoRA") as caught:
        read_adapter(_adapter(tmp_path / "a", **{key: value}))
    assert any("to match" in line for line in caught.value.details)
    assert time.process_time() - start < SOON


def test_patterns_that_libraries_write_are_taken() -> None:
    """Fails when the check refuses what is harmless."""
    for pattern in (
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"(\w+\.)*q_proj",
        r"(?:[^.]+\.)*layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|up|down|gate)_proj",
        r"^(?!.*vision_tower).*(q_proj|v_proj)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj|v_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
    ):
        assert why_costly(pattern, []) is None, pattern


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (BASE, "[]"),
        (BASE, '{"path": ["x"]}'),
        (BASE, '{"path": "' + "a" * 3000 + '"}'),
        (LABELS, '{"a": 1}'),
        (LABELS, "[1, null]"),
        (LABELS, "[" * 5000),
    ],
)
def test_metadata_of_the_wrong_kind(key: str, text: str) -> None:
    """AttributeError: 'list' object has no attribute 'get'; TypeError; RecursionError."""
    adapter = Adapter(
        config=LoraConfig(r=2, target_modules=["a"]),
        tensors={"a": (torch.ones(2, 3), torch.ones(3, 2), None)},
        metadata={key: text},
    )
    with pytest.raises(AdapterError, match="metadata"):
        (base_of if key == BASE else labels_of)(adapter)


def test_a_pickle_that_is_compressed(tmp_path: Path) -> None:
    """torch unpacked a member of the archive into memory, whatever its size."""
    folder = _adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + b"\0" * 50_000_000)
    with pytest.raises(AdapterError, match="compressed archive"):
        read_adapter(folder)


# --- models -----------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The embedded base, its config free to be changed."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in demo.base_path().iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("value", ["owner/kernel", {"": "owner/kernel"}, "paged|owner/kernel"])
def test_attention_from_the_hub_is_code(base: Path, value: Any) -> None:
    """transformers fetched the kernel that config.json names, and ran it.

    Fails when only trust_remote_code is looked at by transformers itself: it does not ask it here.
    """
    _configure(base, attn_implementation=value)
    with pytest.raises(BaseModelError, match="asks for code from the hub"):
        load_config(str(base))


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "merges.txt"])
def test_links_out_of_a_model_are_not_copied(base: Path, tmp_path: Path, name: str) -> None:
    """A merge copied ~/.ssh/id_rsa as LICENSE into its output, ready to be pushed."""
    (tmp_path / "secret").write_text("secret")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(BaseModelError, match="is a link out of its folder"):
        copy_side_files(base, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (base / name).unlink()
    (base / "inside").write_text("x")
    (base / name).symlink_to("inside")
    assert Path(name) in side_files(base)


@pytest.mark.parametrize("name", ["LICENSE", "modeling_x.py", "README.md"])
def test_links_out_of_a_model_are_not_pushed(base: Path, tmp_path: Path, name: str) -> None:
    """The hub got what the link led to."""
    target = Target(kind="model", path=str(base))
    assert "config.json" in contents(target, print)[0]
    (tmp_path / "secret").write_text("secret")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "secret")
    with pytest.raises(BaseModelError, match="is a link out of its folder"):
        contents(target, print)


def test_links_of_the_hubs_cache_are_its_own(tmp_path: Path) -> None:
    """Fails when the cache's links to its blobs are taken for links out of the folder."""
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "1").write_text("x")
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    assert side_files(snapshot) == [Path("tokenizer.json")]
    (tmp_path / "secret").write_text("secret")
    (snapshot / "LICENSE").symlink_to("../../../secret")
    with pytest.raises(BaseModelError):
        side_files(snapshot)


@pytest.mark.parametrize("value", [{"a": 1}, True, 3, [], [[]]], ids=str)
def test_architectures_of_the_wrong_kind(base: Path, value: Any) -> None:
    """KeyError: 0; TypeError: 'bool' object is not subscriptable."""
    _configure(base, architectures=value)
    assert inspect(base)["kind"] == "model"


def test_a_config_with_infinity_can_be_written_again(base: Path) -> None:
    """ValueError when such a model was merged: Mamba's configs hold Infinity."""
    _configure(base, time_step_limit=[0.0, float("inf")])
    config = open_base(base).config
    write_json(base / "again.json", config, nan=True)
    assert json.loads((base / "again.json").read_text()) == config


def test_a_shard_of_a_name_that_is_too_long(base: Path) -> None:
    """OSError: File name too long."""
    (base / "model.safetensors").unlink()
    listed = {"weight_map": {"a": "x" * 300 + ".safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(listed))
    with pytest.raises(BaseModelError, match="no file of this folder"):
        open_base(base)


# --- quantized weights ------------------------------------------------------------------------


def _stored(**changes: Any) -> dict[str, torch.Tensor]:
    weight = torch.randn(5, 7)
    tensors = to_bnb("l", FORMATS["nf4"].quantize(weight, Recipe(format="nf4", double=True)))
    key = next(k for k in tensors if ".quant_state." in k)
    state = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": "ab"},
        {"shape": [5, "7"]},
        {"shape": [-5, -7]},
        {"shape": [1 << 70, 7]},
        {"blocksize": None},
        {"blocksize": float("inf")},
        {"dtype": "int8"},
        {"dtype": "load"},
        {"nested_offset": "x"},
        {"nested_offset": 1e300},
    ],
    ids=str,
)
def test_states_of_the_wrong_kind(changes: dict[str, Any]) -> None:
    """ValueError, TypeError, OverflowError."""
    with pytest.raises(QuantError):
        from_bnb("l", _stored(**changes))


def test_a_codebook_of_nan() -> None:
    """It was taken for the format's own: NaN is not larger than the tolerance."""
    tensors = _stored()
    tensors["l.weight.quant_map"] = torch.full((16,), float("nan"))
    with pytest.raises(QuantError, match="is not the codebook of its format"):
        from_bnb("l", tensors)


def test_a_state_of_gigabytes() -> None:
    """Each byte became a Python object. Fails when the length is not asked."""
    tensors = _stored()
    key = next(k for k in tensors if ".quant_state." in k)
    tensors[key] = torch.zeros(1, dtype=torch.uint8).expand(1 << 34)
    with pytest.raises(QuantError, match="not readable JSON"):
        from_bnb("l", tensors)


# --- runs -------------------------------------------------------------------------------------


def test_runs_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    """UnicodeDecodeError."""
    (tmp_path / "run.yaml").write_bytes(b"base: \xa1")
    with pytest.raises(OutputError, match="is damaged"):
        _ = RunFolder.look(tmp_path).settings


@pytest.mark.parametrize("step", [None, "x", {}, 1.5])
def test_checkpoints_of_no_step(tmp_path: Path, step: Any) -> None:
    """TypeError: int() argument must be a string."""
    from decal.store.run import _state_hash

    place = tmp_path / "checkpoints" / "step-00000001"
    place.mkdir(parents=True)
    state = {"step": step, "sha256": {}, "state": {}, "state_sha256": _state_hash({})}
    (place / "state.json").write_text(json.dumps(state))
    with pytest.raises(StorageError):
        RunFolder.look(tmp_path).latest_checkpoint()


def test_names_that_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a tensor could clear the screen, or write into the title."""
    from decal.cli import console

    console.show_error(DecalError("tensor `\x1b[2J\x9b`", details=["\x07"], hint="\x00"))
    console.facts({"base": "\x1b]0;x\x07"})
    shown = capsys.readouterr()
    assert "\\x1b[2J\\x9b" in shown.err
    assert not any(ord(char) < 32 and char != "\n" for char in shown.err + shown.out)


@pytest.mark.parametrize(
    "changes",
    [
        {"rng": {}}, {"rng": {"cpu": "AAAA"}}, {"rng": {"cpu": "%"}}, {"rng": []},
        {"best": {"step": "x", "loss": 1.0}}, {"heard": {"updates": 1}}, {"stale": None},
        {"seconds": "x"}, {"tokens": [1]}, {"circumstances": None}, {"settings": 3},
    ],
    ids=str,
)  # fmt: skip
def test_checkpoints_of_another_kind(tmp_path: Path, changes: dict[str, Any]) -> None:
    """KeyError, TypeError, RuntimeError of torch's generator, in the middle of resuming."""
    from decal.store.run import _state_hash
    from tests.train.tiny_run import job

    with RunFolder.create(tmp_path / "run", "tiny\n") as run:
        train(job(run, max_steps=2, eval_every=2))
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    document = json.loads(file.read_text())
    document["state"] |= changes
    document["state_sha256"] = _state_hash(document["state"])
    file.write_text(json.dumps(document))
    with (
        RunFolder.open(tmp_path / "run") as run,
        pytest.raises(StorageError, match="is not of this version of decal"),
    ):
        train(job(run, max_steps=4, resume=True))


@pytest.mark.parametrize("line", ['{"step": "x"}', '{"step": 1, "loss": "x"}', '{"step": null}'])
def test_metrics_of_another_kind(tmp_path: Path, line: str) -> None:
    """TypeError when a run was resumed or inspected."""
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 2, "loss": 1.0}}\n')
    with pytest.raises(StorageError, match="1 of 2 lines are damaged"):
        RunFolder.look(tmp_path).metrics()


def test_keys_without_end_are_not_repeated() -> None:
    """The message was as long as the key."""
    for text in (
        "a" * 50_000 + ": 1\nbase: a\n",
        "base: a\ndata: b\noutput: c\nx: 1\n" + "k" * 9000 + ": 1",
    ):
        with pytest.raises(ConfigError) as caught:
            parse_run(text)
        assert len(str(caught.value)) < 3000


def test_a_home_of_nobody() -> None:
    """RuntimeError: Could not determine home directory."""
    for use in (inspect, resolve, load_config):
        with pytest.raises(DecalError):
            use("~nobody-of-this-name/x")
