"""run.yaml: YAML 1.2, lines in every error, overrides, and a dump that is read back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decal.config import RunConfig
from decal.errors import ConfigError
from decal.runfile import MAX_BYTES, dump_run, load_run, parse_run

GOOD = "base: b\ndata: d.jsonl\noutput: o\n"


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run(text, overrides=overrides)
    return str(caught.value)


def test_yaml_is_version_1_2() -> None:
    """Fails under YAML 1.1, where 1e-5 is text, and no and 2026-11-21 are not."""
    config = parse_run("base: no\ndata: 2026-11-21\noutput: off\ntrain: {lr: 1e-5}\n")
    assert config.train.lr == 1e-5
    assert (config.base.path, config.data.path, config.output) == ("no", "2026-11-21", "off")


def test_load_reads_a_file_and_names_it(tmp_path: Path) -> None:
    """Fails when the file's name or the line is missing from the error."""
    path = tmp_path / "run.yaml"
    path.write_text("\ufeff" + GOOD, encoding="utf-8")
    assert load_run(path).base.path == "b"
    path.write_text(GOOD + "train:\n  lr: fast\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml:5: train\.lr: expected a number above 0"):
        load_run(path)


def test_problems_are_collected_in_the_order_of_the_lines() -> None:
    """Fails when only the first is raised, or sections come in the order of the fields."""
    text = "train:\n  lr: 0\n  lr: 2\n  epochz: 3\nadapter:\n  rank: 4\ndata: d\noutput: o\n"
    assert refused(text).splitlines() == [
        "run.yaml has 5 problems",
        "  run.yaml:2: train.lr: expected a number above 0, got 0",
        "  run.yaml:3: train.lr: given twice, first in run.yaml:2",
        "  run.yaml:4: train.epochz: unknown key, did you mean `epochs`?",
        "  run.yaml:6: adapter.rank: unknown key, did you mean `r`?",
        "  run.yaml: base: missing, expected text or a mapping: The base model: a hub id or "
        "folder, or {path, revision, trust_remote_code, dtype, device}.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml has no settings: it is empty"),
        ("# only a comment\n", "run.yaml has no settings: it is empty"),
        ("- a\n", 'run.yaml has no settings: it holds the list ["a"] instead of keys'),
        ("hello", 'run.yaml has no settings: it holds "hello" instead of keys'),
        ("base:\n\tpath: x\n", "run.yaml:2 is not YAML: a tab\nhint: YAML indents with spaces"),
        ("base: a: b\n", "run.yaml:1 is not YAML: a second `:`\nhint: put text that contains"),
        ("base: [a\n", "run.yaml:2 is not YAML: expected ',' or ']'"),
        ("base: b\n---\nbase: c\n", "run.yaml:2 is not YAML: a second document"),
        ("base: a\x00\n", "run.yaml is not YAML: unacceptable character"),
        ("[" * 3000, "run.yaml is not YAML: it is nested too deeply"),
        ("a: " + "[" * 30 + "]" * 30, "run.yaml holds more than settings can mean"),
        ("a: &x [*x]\n", "run.yaml holds more than settings can mean"),
        (GOOD + "? [a]\n: 1\n", "run.yaml:4: a key must be text"),
        (GOOD + "train: {lr: !!int fast}\n", 'run.yaml:4: !!int "fast" means nothing here'),
    ],
)
def test_what_is_no_settings_file(text: str, message: str) -> None:
    """Fails when ruamel's own exception, or a traceback, reaches the user."""
    assert message in refused(text)


def test_aliases_of_aliases_are_stopped() -> None:
    """Fails when aliases are expanded without a bound: these ten lines mean 10**9 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert refused("\n".join(lines)) == "run.yaml holds more than settings can mean"


def test_tags_name_no_python_types() -> None:
    """Fails when a tag is constructed, or ignored."""
    text = "base: !!python/object/apply:os.getcwd []\ndata: !secret d\noutput: o\n"
    assert "run.yaml:2: !secret means nothing here" in refused(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist\nhint: `decal init` writes one"),
        (b"a" * (MAX_BYTES + 1), f"is larger than {MAX_BYTES:,} bytes"),
        (b"base: \xff\n", "is not UTF-8 text: byte 6 is not"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    """Fails when an OSError or UnicodeDecodeError reaches the user."""
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert message in str(caught.value)


def test_a_folder_points_to_the_file_inside(tmp_path: Path) -> None:
    """Fails when a run folder is answered with `is a directory` alone."""
    with pytest.raises(ConfigError, match=r"is a folder, not a run\.yaml$"):
        load_run(tmp_path)
    (tmp_path / "run.yaml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"hint: it holds .*run\.yaml"):
        load_run(tmp_path)


def test_overrides() -> None:
    """Fails when values stay text, sections are replaced, or a shorthand is not written out."""
    config = parse_run(
        GOOD + "quant: {format: nf4, block_size: 128}\n",
        overrides=[
            "train.lr=1e-4",
            "adapter.r=6",
            "base.dtype=float32",
            "base=c",
            "quant=none",
            "data={path: e.jsonl, eval: null}",
            "adapter.target_modules=[q_proj, v_proj]",
        ],
    )
    assert (config.train.lr, config.adapter.r, config.adapter.lora_alpha) == (1e-4, 6, 12)
    assert (config.base.path, config.base.dtype) == ("c", "float32")
    assert (config.quant.format, config.quant.block_size) == ("none", 128)
    assert (config.data.path, config.data.eval) == ("e.jsonl", None)
    assert config.adapter.target_modules == ("q_proj", "v_proj")


def test_an_override_mends_the_file() -> None:
    """Fails when the file is checked before the overrides are applied."""
    assert parse_run("base: b\ndata: d\ntrain: {lr: 0}\n", overrides=["output=o", "train.lr=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "--set train.lr: expected key=value"),
        ("=1", "--set =1: expected key=value"),
        ("train..lr=1", "--set train..lr=1: expected key=value"),
        ("train.lr=[1", "--set train.lr=[1 is not YAML: expected"),
        ("train.lr=fast", "--set train.lr=fast: train.lr: expected a number above 0"),
        ("lr=3", "--set lr=3: lr: unknown key, did you mean `train.lr`?"),
        ("trian.lr=3", "--set trian.lr=3: trian: unknown key, did you mean `train`?"),
        ("output.x=3", "--set output.x=3: output is a value and has no keys"),
        ("quant={formt: nf4}", "quant.formt: unknown key, did you mean `format`?"),
    ],
)
def test_override_errors_name_the_override(override: str, message: str) -> None:
    """Fails when a bad override is blamed on a line of the file."""
    text = refused(GOOD, override)
    assert message in text
    assert "run.yaml:" not in text


def test_dump_is_complete_and_commented() -> None:
    """Fails when a field or its documentation is left out."""
    config = parse_run(GOOD)
    text = dump_run(config)
    for section in (config, config.base, config.quant, config.adapter, config.data, config.train):
        for name, field in type(section).model_fields.items():
            assert f"{name}:" in text
            assert str(field.description).split()[-1] in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert parse_run(text) == config


texts = st.text(min_size=1)
tricky = st.sampled_from(["null", "true", "1", "1e5", "~", "no", "0x1", ".nan", "a: b", "- a", "#"])


@settings(max_examples=60, deadline=None)
@given(
    path=texts | tricky,
    modules=st.lists(texts | tricky, min_size=1).map(tuple) | texts | tricky,
    lr=st.floats(min_value=1e-12, max_value=1e12),
    columns=st.dictionaries(texts | tricky, texts | tricky, max_size=3),
    kind=st.sampled_from(["full", "lora", "continue"]),
    limit=st.none() | st.integers(min_value=1),
)
def test_dump_round_trips(
    path: str,
    modules: str | tuple[str, ...],
    lr: float,
    columns: dict[str, str],
    kind: str,
    limit: int | None,
) -> None:
    """Fails when text is written without quotes although YAML reads it as something else."""
    lora = {"r": 3, "lora_alpha": 5, "target_modules": modules, "rank_pattern": {"q.*_proj": 2}}
    adapter = {"full": {"method": "full"}, "lora": lora, "continue": {"from": path}}[kind]
    config = RunConfig(
        base=path,
        data={"path": path, "limit": limit, "columns": columns},
        output=path,
        adapter=adapter,
        train={"lr": lr},
    )
    assert parse_run(dump_run(config)) == config
