"""The same property by hypothesis, which builds whole documents of the right keys and wrong values.

Also the other way round: what the safetensors library writes is read, and is what it wrote.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from decal.config import DataConfig, RunConfig
from decal.data.source import read_rows
from decal.errors import BaseModelError, DecalError
from decal.runfile import dump_run, parse_run
from decal.store.peft import read_adapter
from decal.store.peft_config import DEFAULTS
from decal.store.tensorfile import TORCH_DTYPES, dtype_name, load_tensors, read_header
from decal.untrusted import parse_json
from tests.fuzz.mutate import EVIL_VALUES
from tests.fuzz.readers import _adapter, _use_rows

FEW = settings(max_examples=100, deadline=None, derandomize=True)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.one_of(
        st.sampled_from([v for v in EVIL_VALUES if v != "\ud800"]),
        TEXTS,
        st.integers(),
        st.floats(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


@FEW
@given(
    st.dictionaries(
        TEXTS,
        st.tuples(
            st.sampled_from(sorted(TORCH_DTYPES.values(), key=str)),
            st.lists(st.integers(0, 5), max_size=5),
        ),
        max_size=6,
    ),
    st.one_of(st.none(), st.dictionaries(TEXTS, TEXTS, max_size=3)),
)
def test_what_safetensors_writes_is_read(
    specs: dict[str, tuple[torch.dtype, list[int]]], facts: dict[str, str] | None
) -> None:
    """Fails when a check refuses what is valid: empty tensors, empty or strange names, scalars."""
    specs.pop("__metadata__", None)
    meant = {k: torch.ones(shape).mul(3).to(dtype) for k, (dtype, shape) in specs.items()}
    with TemporaryDirectory() as place:
        file = Path(place) / "x.safetensors"
        save_file(meant, file, facts or None)  # of no tensors and {} it makes no JSON
        found = read_header(file, BaseModelError)
        tensors = load_tensors(found)
    assert found.metadata == (facts or {})
    assert tensors.keys() == meant.keys()
    for key, tensor in meant.items():
        assert found.entries[key].spec == (dtype_name(tensor.dtype), tuple(tensor.shape))
        assert torch.equal(tensors[key], tensor)


@FEW
@given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), VALUES, min_size=1, max_size=5))
def test_adapter_settings(changes: dict[str, Any]) -> None:
    raw, _, file = _adapter()
    with TemporaryDirectory() as place:
        (Path(place) / "adapter_config.json").write_text(json.dumps(raw | changes))
        (Path(place) / "adapter_model.safetensors").write_bytes(file)
        with suppress(DecalError):
            read_adapter(place)


@FEW
@given(
    st.dictionaries(
        st.sampled_from(sorted(RunConfig.model_fields)),
        st.one_of(
            VALUES,
            st.dictionaries(st.sampled_from(["path", "r", "lr", "from", "columns"]), VALUES),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_settings(changes: dict[str, Any]) -> None:
    """JSON is YAML. What is accepted is written and read again as itself."""
    text = json.dumps({"base": "a", "data": "b", "output": "c", "adapter": {"r": 2}} | changes)
    try:
        config = parse_run(text)
    except DecalError:
        return
    assert parse_run(dump_run(config)) == config


@FEW
@given(
    st.sampled_from(["messages", "conversations", "prompt", "text", "instruction"]),
    st.one_of(
        VALUES,
        st.lists(
            st.dictionaries(
                st.sampled_from(
                    ["role", "content", "from", "value", "weight", "tool_calls", "name", "train"]
                ),
                st.one_of(
                    VALUES, st.sampled_from(["user", "assistant", "tool", "gpt", "function_call"])
                ),
                max_size=5,
            ),
            max_size=4,
        ),
    ),
    VALUES,
)
def test_rows(column: str, value: Any, other: Any) -> None:
    row = {column: value, "completion": other, "output": other, "label": other, "tools": other}
    with TemporaryDirectory() as place:
        file = Path(place) / "a.jsonl"
        file.write_text(json.dumps(row) + "\n" + json.dumps({column: other}))
        with suppress(DecalError):
            _use_rows(file)
        with suppress(DecalError):
            read_rows(DataConfig(path=str(file), columns={"text": "{" + column + "}: {label}"}))


@FEW
@given(st.one_of(st.text(max_size=40), st.text('[]{}",:0123456789-eE.\\ud8nula', max_size=40)))
def test_json(text: str) -> None:
    """Fails when parse_json takes what json refuses, or finds another value."""
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert json.loads(text) == value
