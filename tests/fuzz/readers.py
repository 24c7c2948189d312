"""What reads files from strangers, and for each a way to make one bad input after the other.

A `Reader` makes an input in an empty folder and reads it. Reading may succeed or raise a
DecalError; anything else is a bug. Where it succeeds, what was read is used a little: a value that
no later step can take should have been refused.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from decal.config import DataConfig, LoraConfig
from decal.data.source import read_rows
from decal.errors import BaseModelError, DecalError
from decal.model.adapter import Adapter
from decal.quant import FORMATS
from decal.quant.base import Recipe
from decal.quant.bnb import describe_quantization, from_bnb, stored_shape, to_bnb
from decal.runfile import dump_run, load_run, parse_run
from decal.store.base import open_base, side_files
from decal.store.peft import LoraTensors, PeftAdapter, peek_adapter, read_adapter, write_adapter
from decal.store.peft_config import to_json
from decal.store.run import RunFolder, _state_hash
from decal.store.tensorfile import (
    TORCH_DTYPES,
    hash_entry,
    load_tensors,
    read_header,
    save_tensors,
)
from decal.verbs.facts import adapter_facts
from decal.verbs.inspect import inspect
from decal.verbs.load import labels_of, recorded_quant
from decal.verbs.prompts import read_prompts
from decal.verbs.target import BASE, LABELS, QUANTIZER, Target, base_of, metadata_json
from tests.fuzz.mutate import altered, damaged, text_of


@dataclass(frozen=True)
class Reader:
    """`attempt(folder, random)` makes one bad input in `folder` and reads it."""

    attempt: Callable[[Path, Random], None]
    share: int
    """Its part of all inputs, in hundredths."""


def _each(*uses: Callable[[], object]) -> None:
    """Tries all; raises the last DecalError that one of them raised."""
    refused: DecalError | None = None
    for use in uses:
        try:
            use()
        except DecalError as error:
            refused = error
    if refused is not None:
        raise refused


def _put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# --- tensor files -----------------------------------------------------------------------------


def _file_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file in memory, by decal's own writer."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "x"
        save_tensors(file, tensors, metadata)
        return file.read_bytes()


@cache
def _headers() -> tuple[bytes, ...]:
    torch.manual_seed(0)
    some = {
        "a.weight": torch.randn(2, 3),
        "größe": torch.ones(3).bfloat16(),
        "e": torch.zeros(0, 4),
    }
    more = {"ids": torch.arange(3), "s": torch.tensor(2.5), "b": torch.tensor([True, False])}
    return (
        _file_bytes(some, {"format": "pt"}),
        _file_bytes({**some, **more}, {}),
        _file_bytes(more, {"format": "pt", "decal.x": '{"a": [1]}'}),
    )


def _split(file: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(file[:8], "little")
    return file[8:end], file[end:]


def _headed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def bad_tensor_file(seeds: tuple[bytes, ...], random: Random) -> bytes:
    """The file's bytes, its header's bytes or its header's values changed."""
    seed = random.choice(seeds)
    kind = random.randrange(4)
    if kind == 0:
        return damaged(seed, seeds, random)
    header, data = _split(seed)
    if kind == 1:
        return _headed(damaged(header, [_split(s)[0] for s in seeds], random), data)
    return _headed(text_of(altered(json.loads(header), random)), data)


def header(folder: Path, random: Random) -> None:
    """What is accepted here, safetensors accepts too, and finds the same in it."""
    path = _put(folder / "x.safetensors", bad_tensor_file(_headers(), random))
    found = read_header(path, BaseModelError)
    with safe_open(path, framework="pt") as theirs:
        assert set(theirs.keys()) == set(found.entries)
        for key, entry in found.entries.items():
            assert tuple(theirs.get_slice(key).get_shape()) == entry.spec.shape
    if all(entry.spec.dtype in TORCH_DTYPES for entry in found.entries.values()):
        load_tensors(found)
    for entry in found.entries.values():
        hash_entry(entry)


# --- adapters ---------------------------------------------------------------------------------


@cache
def _adapter() -> tuple[dict[str, Any], dict[str, Tensor], bytes]:
    """Settings, tensors and tensor file of an adapter with everything that decal reads."""
    import tempfile

    torch.manual_seed(1)
    names = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qv"]
    tensors = {n: LoraTensors(torch.randn(3, 5), torch.randn(7, 3)) for n in names}
    tensors["model.embed_tokens"] = LoraTensors(torch.randn(3, 11), torch.randn(5, 3))
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "v_proj", "embed_tokens"],
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 5},
        modules_to_save=["lm_head"],
    )
    adapter = PeftAdapter(
        config=config,
        tensors=tensors,
        embeddings=frozenset({"model.embed_tokens"}),
        full={"lm_head.weight": torch.randn(11, 5)},
        base_model_name_or_path="org/name",
        metadata={"decal.version": "1", BASE: '{"path": "org/name"}'},
    )
    with tempfile.TemporaryDirectory() as place:
        write_adapter(Path(place) / "a", adapter)
        raw = json.loads((Path(place) / "a" / "adapter_config.json").read_bytes())
        file = (Path(place) / "a" / "adapter_model.safetensors").read_bytes()
    raw |= {"layers_to_transform": None, "layers_pattern": None, "rank_pattern": {"x": 3}}
    data = load_tensors_of(file)
    return raw, data, file


def load_tensors_of(file: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(file)


def adapter_settings(folder: Path, random: Random) -> None:
    raw, _, file = _adapter()
    text = text_of(altered(raw, random)) if random.random() < 0.8 else None
    if text is None:
        whole = json.dumps(raw).encode()
        text = damaged(whole, [whole], random)
    _put(folder / "adapter_config.json", text)
    _put(folder / "adapter_model.safetensors", file)
    _use_adapter(folder)


def adapter_tensors(folder: Path, random: Random) -> None:
    raw, _, file = _adapter()
    _put(folder / "adapter_config.json", json.dumps(raw).encode())
    _put(folder / "adapter_model.safetensors", bad_tensor_file((file,), random))
    _use_adapter(folder)


def _use_adapter(folder: Path) -> None:
    peek_adapter(folder)
    found = read_adapter(folder)
    for module in found.tensors:
        found.config.rank_of(module)
        found.config.scaling_of(module)
    others = {**found.other_settings, "auto_mapping": found.auto_mapping}
    others |= {"base_model_name_or_path": found.base_model_name_or_path}
    others |= {"revision": found.revision, "task_type": found.task_type}
    raw = to_json(found.config, sorted(found.tensors), sorted(found.full), others)
    json.dumps(raw, allow_nan=False, ensure_ascii=False).encode("utf-8")
    inspect(folder)


@cache
def _pickled() -> bytes:
    torch.manual_seed(2)
    file = io.BytesIO()
    torch.save(dict(_adapter()[1]), file)
    return file.getvalue()


def pickled(folder: Path, random: Random) -> None:
    _put(folder / "adapter_config.json", json.dumps(_adapter()[0]).encode())
    _put(folder / "adapter_model.bin", damaged(_pickled(), [_pickled()], random))
    read_adapter(folder)


_METADATA: dict[str, Any] = {
    BASE: {
        "path": "org/name", "revision": None, "commit": "ab", "dtype": "float32",
        "fingerprint": "a",
    },
    QUANTIZER: {
        "format": "nf4", "block_size": 64, "double": True, "skip_modules": ["lm_head"],
        "dtype": "bfloat16", "identity": "ab",
    },
    LABELS: ["yes", "no"],
}  # fmt: skip


def metadata(folder: Path, random: Random) -> None:
    """decal's own facts in an adapter that somebody else wrote."""
    texts = {key: json.dumps(value) for key, value in _METADATA.items()}
    key = random.choice(list(texts))
    if random.random() < 0.8:
        texts[key] = text_of(altered(_METADATA[key], random)).decode()
    else:
        texts[key] = damaged(texts[key].encode(), [b"{}"], random).decode("utf-8", "ignore")
    adapter = Adapter(
        config=LoraConfig(r=2, target_modules=["a"]),
        tensors={"a": (torch.ones(2, 3), torch.ones(3, 2), None)},
        base="org/name",
        metadata=texts,
    )
    _each(
        lambda: base_of(adapter),
        lambda: labels_of(adapter),
        lambda: recorded_quant(metadata_json(adapter, QUANTIZER)),
        lambda: adapter_facts(Target(kind="adapter", path=str(folder)), adapter),
    )


# --- settings ---------------------------------------------------------------------------------


@cache
def _settings() -> tuple[bytes, ...]:
    short = (
        b"base: {path: org/name, dtype: bfloat16}\nquant: nf4\n"
        b"adapter: {r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj], rank_pattern: {a: 3}}\n"
        b"data:\n  path: train.jsonl  # rows\n  columns: {text: '{a}'}\n  eval: 0.1\n"
        b"train: {lr: 1e-4, epochs: 3, report_to: [tensorboard]}\noutput: run\n"
    )
    other = b"base: a\ndata: b\noutput: |\n  text\nadapter: &x {r: 1}\nquant: {double: no}\n"
    return short, other


def settings(folder: Path, random: Random) -> None:
    text = damaged(random.choice(_settings()), _settings(), random)
    dump_run(load_run(_put(folder / "run.yaml", text)))


def overrides(folder: Path, random: Random) -> None:
    known = (b"train.lr=1e-4", b"base=x", b"adapter={r: 3}", b"data.columns.a='{b}'", b"quant=none")
    given = [damaged(random.choice(known), known, random) for _ in range(random.choice((1, 3)))]
    parse_run(_settings()[0].decode(), overrides=[g.decode("utf-8", "replace") for g in given])


# --- rows -------------------------------------------------------------------------------------

_CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "x", "name": "f"},
        {"role": "assistant", "content": "done", "weight": 1},
    ], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"conversations": [
        {"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}'},
        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"},
    ], "system": "s", "tools": "[]"},
    {"prompt": "p", "completion": "c"},
    {
        "prompt": [{"role": "user", "content": "p"}],
        "completion": [{"role": "assistant", "content": "c"}],
    },
    {"instruction": "i", "input": "x", "output": "o"},
    {"text": "t", "label": 1}, {"text": "t", "n": 2.5},
)  # fmt: skip
_FLAT = ({"text": "Grüße,\nAnn", "label": "a"}, {"text": 'He said "yes"', "label": "b"})


@cache
def _tables() -> dict[str, bytes]:
    """A small file of each kind."""
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in _FLAT)
    parquet = io.BytesIO()
    columns = {"text": ["a", "b"], "label": [0, 1], "messages": [[{"role": "user"}], None]}
    info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, parquet)
    return {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.json": json.dumps({"data": _FLAT}).encode(),
        "a.csv": b'text,label\r\n"a, b",x\r\n"say ""yes""\nnow",y\r\n',
        "a.tsv": b"text\tlabel\na\tb\n",
        "a.txt": b"one\ntwo\n\nthree\n",
        "a.parquet": parquet.getvalue(),
    }


def rows(folder: Path, random: Random) -> None:
    """One layout as JSON lines, the values or the bytes changed."""
    seed = random.choice(_ROWS)
    line = text_of(altered(seed, random) if random.random() < 0.8 else seed)
    if random.random() < 0.25:
        line = damaged(line, [text_of(row) for row in _ROWS], random)
    _use_rows(_put(folder / "a.jsonl", text_of(seed) + b"\n" + line + b"\n"))


def tables(folder: Path, random: Random) -> None:
    """A file of any kind, its bytes changed."""
    kinds = _tables()
    name = random.choice(list(kinds))
    _use_rows(_put(folder / name, damaged(kinds[name], list(kinds.values()), random)))


def _use_rows(path: Path) -> None:
    with suppress(DecalError):
        read_prompts(path)
    found = read_rows(DataConfig(path=str(path)))
    for example in found.examples:
        for message in example.messages or ():
            json.dumps(message.as_dict(), ensure_ascii=False).encode("utf-8")
        parts = [example.prompt, example.completion, example.text, example.label, example.tools]
        json.dumps(parts, ensure_ascii=False, default=str).encode("utf-8")


# --- models -----------------------------------------------------------------------------------


@cache
def _base() -> dict[str, bytes]:
    """Two shards, an index and a config."""
    torch.manual_seed(3)
    shards = {
        "model-00001-of-00002.safetensors": {"a.weight": torch.randn(2, 3).bfloat16()},
        "model-00002-of-00002.safetensors": {"b.weight": torch.randn(3), "c": torch.arange(3)},
    }
    listed = {key: name for name, tensors in shards.items() for key in tensors}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2,
        "hidden_size": 4, "vocab_size": 9, "id2label": {"0": "a"}, "text_config": {"n_layer": 2},
        "quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
        "tie_word_embeddings": True,
    }  # fmt: skip
    index = {"metadata": {"total_size": 48}, "weight_map": listed}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "tokenizer_config.json": b'{"chat_template": "x"}',
        **{name: _file_bytes(tensors, {"format": "pt"}) for name, tensors in shards.items()},
    }


def base(folder: Path, random: Random) -> None:
    files = dict(_base())
    name = random.choice(list(files))
    if name.endswith(".safetensors"):
        files[name] = bad_tensor_file((files[name],), random)
    elif random.random() < 0.6:
        files[name] = text_of(altered(json.loads(files[name]), random))
    else:
        files[name] = damaged(files[name], list(files.values()), random)
    for file, data in files.items():
        _put(folder / file, data)
    found = open_base(folder)
    for key in found.tensors:
        found.read(key)
    side_files(folder)
    describe_quantization(found.config)
    inspect(folder)


@cache
def _packed() -> tuple[dict[str, Tensor], ...]:
    torch.manual_seed(4)
    found: list[dict[str, Tensor]] = []
    for name, double in (("nf4", False), ("nf4", True), ("fp4", True), ("int8", False)):
        weight = torch.randn(5, 7).to(torch.float16)
        recipe = Recipe(format=name, block_size=64, double=double)
        found.append(to_bnb("l", FORMATS[name].quantize(weight, recipe)))
    return tuple(found)


def packed(folder: Path, random: Random) -> None:
    """A bitsandbytes weight: its state's bytes, a part's shape, dtype or values changed."""
    tensors = dict(random.choice(_packed()))
    key = random.choice(list(tensors))
    state = next((k for k in tensors if ".quant_state." in k), key)
    kind = random.randrange(7)
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[key] = tensors[key].reshape(-1)[: random.randrange(tensors[key].numel() + 1)]
    elif kind == 2:
        tensors[key] = tensors[key].to(random.choice(list(TORCH_DTYPES.values())))
    elif kind == 3 and tensors[key].is_floating_point():
        tensors[key] = torch.full_like(tensors[key], random.choice((float("nan"), -1e38)))
    elif kind == 4:
        tensors[random.choice(("l.SCB", "l.weight", state + "x", "l.weight.x"))] = tensors[key]
    elif state != key or ".quant_state." in key:
        text = bytes(tensors[state].tolist())
        text = (
            text_of(altered(json.loads(text), random))
            if kind == 5
            else damaged(text, [text], random)
        )
        tensors[state] = torch.tensor(list(text), dtype=torch.uint8)
    if ".quant_state." in state and state in tensors:
        with suppress(DecalError):
            stored_shape("l", tensors[state])
    found = from_bnb("l", tensors)
    FORMATS[found.recipe.format].dequantize(found, torch.float32)


# --- runs -------------------------------------------------------------------------------------


@cache
def _run() -> dict[str, bytes]:
    torch.manual_seed(5)
    row = b'{"step": %d, "loss": 1.5, "eval_loss": null, "lr": 0.1}\n'
    info = {"decal": "1", "steps": 3, "rows": 4, "threads": 1, "result": {"loss": 1.0}}
    return {
        "run.yaml": _settings()[0],
        "info.json": json.dumps(info).encode(),
        "metrics.jsonl": b"".join(row % step for step in (1, 2, 3)),
        "trainable.safetensors": _file_bytes({"a": torch.randn(2, 2)}, {"format": "pt"}),
    }


def run(folder: Path, random: Random) -> None:
    """A run folder: its records, and a checkpoint whose hashes are right or wrong."""
    import hashlib

    files = dict(_run())
    place = folder / "checkpoints" / "step-00000003"
    place.mkdir(parents=True, exist_ok=True)
    state: Any = {"step": 3, "best": {"step": 2, "loss": 1.0}, "rng": {"cpu": "AAAA"}}
    tensors = files.pop("trainable.safetensors")
    if random.random() < 0.3:
        tensors = bad_tensor_file((tensors,), random)
    if random.random() < 0.3:
        state = altered(state, random)
    digest = hashlib.sha256(tensors).hexdigest()
    document: Any = {"step": 3, "sha256": {"trainable.safetensors": digest}, "state": state}
    if isinstance(state, dict):
        document["state_sha256"] = _state_hash(state)
    if random.random() < 0.4:
        document = altered(document, random)
    name = random.choice(list(files))
    if random.random() < 0.5:
        files[name] = damaged(files[name], list(files.values()), random)
    for file, data in files.items():
        _put(folder / file, data)
    _put(place / "state.json", text_of(document))
    _put(place / "trainable.safetensors", tensors)
    found = RunFolder.look(folder)
    _each(
        found.info,
        found.metrics,
        lambda: parse_run(found.settings),
        lambda: inspect(folder),
        lambda: _use_checkpoint(found),
    )


def _use_checkpoint(found: RunFolder) -> None:
    checkpoint = found.latest_checkpoint()
    if checkpoint is not None:
        checkpoint.tensors("trainable")


def prepare() -> None:
    """Makes all seeds; they are written to files, which no reader may do."""
    for make in (_headers, _adapter, _pickled, _settings, _tables, _base, _packed, _run):
        make()


READERS: dict[str, Reader] = {
    "header": Reader(header, 25),
    "adapter settings": Reader(adapter_settings, 12),
    "adapter tensors": Reader(adapter_tensors, 8),
    "pickled": Reader(pickled, 4),
    "metadata": Reader(metadata, 6),
    "settings": Reader(settings, 5),
    "overrides": Reader(overrides, 3),
    "rows": Reader(rows, 14),
    "tables": Reader(tables, 7),
    "base": Reader(base, 6),
    "packed": Reader(packed, 7),
    "run": Reader(run, 3),
}
