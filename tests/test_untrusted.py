"""Bytes and JSON from outside are bounded; and the source calls nothing that would run them."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest

from decal.untrusted import MAX_DEPTH, may_be_path, parse_json, read_bounded

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(f for part in ("src", "examples", "bench") for f in (ROOT / part).rglob("*.py"))

FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads",
    "shelve.open", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "os.popen",
    "torch.hub.load", "pd.read_pickle", "pandas.read_pickle", "torch.jit.load",
}  # fmt: skip
"""Calls that run what is in a file or a text."""
UNBOUNDED = {"json.load", "json.loads"}
OWN_JSON = {
    "src/decal/store/run.py": "what was dumped a line before",
    "src/decal/store/fingerprint.py": "decal's own cache, which is checked and may be damaged",
}
"""Files of src that may call json.loads: what they read is decal's own."""


def _calls(file: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def _keyword(call: ast.Call, name: str) -> Any:
    given = next((k.value for k in call.keywords if k.arg == name), None)
    return given.value if isinstance(given, ast.Constant) else given


def _runs_code(name: str, call: ast.Call) -> bool:
    if name in FORBIDDEN or _keyword(call, "allow_pickle") not in (None, False):
        return True
    if name == "torch.load":
        return _keyword(call, "weights_only") is not True
    if name.startswith("subprocess.") and _keyword(call, "shell") not in (None, False):
        return True
    return _keyword(call, "trust_remote_code") is True


def test_nothing_is_unpickled_or_run() -> None:
    """Fails when somebody adds torch.load without weights_only=True, pickle, eval, …"""
    found = [
        f"{file.relative_to(ROOT)}:{call.lineno}: {name}"
        for file in SOURCES
        for name, call in _calls(file)
        if _runs_code(name, call)
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=x)",
        "pickle.loads(b)", "np.load(f, allow_pickle=True)", "eval(t)", "yaml.load(t)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)", "subprocess.run(c, shell=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_must(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(line)
    assert any(_runs_code(name, call) for name, call in _calls(tmp_path / "a.py"))


def test_nothing_dangerous_goes_by_another_name() -> None:
    """`from torch import load` would hide a call from the search above."""
    hidden = {name.rpartition(".")[2] for name in FORBIDDEN} | {"load"}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle", "yaml"):
                assert not hidden & {alias.name for alias in node.names}, file
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name not in ("torch", "pickle") or alias.asname is None, file


def test_code_of_others_runs_only_if_asked_for() -> None:
    """Fails when a parameter trust_remote_code has another default than False."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            given = node.args
            pairs = list(zip(given.args[::-1], given.defaults[::-1], strict=False))
            pairs += [(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d]
            for argument, default in pairs:
                if argument.arg == "trust_remote_code":
                    assert ast.unparse(default) == "False", file


def test_json_is_read_within_bounds() -> None:
    """Fails when a file of somebody else's is read by json.loads instead of parse_json."""
    found = {
        file.relative_to(ROOT).as_posix()
        for file in SOURCES
        if file.is_relative_to(ROOT / "src") and file.name != "untrusted.py"
        for name, _ in _calls(file)
        if name in UNBOUNDED
    }
    assert found == set(OWN_JSON)


def test_bytes_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        read_bounded(file, 4)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_bounded(tmp_path / "pipe", 4)
    with pytest.raises(ValueError, match="no regular file"):
        read_bounded("/dev/zero", 4)
    with pytest.raises(OSError, match="directory"):
        read_bounded(tmp_path, 4)


def test_json_in_bounds() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    for text in ('{"a": [1, 2.5, null, "ü"]}', "3", '"\\ud83d\\ude00"', deep, "[]" + " " * 9):
        assert parse_json(text) == json.loads(text)
        assert parse_json(text.encode()) == json.loads(text)
    assert parse_json("[NaN, -Infinity]", nan=True)[1] == float("-inf")
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"[{'[' * MAX_DEPTH}{']' * MAX_DEPTH}]", "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "digits"),
        ("NaN", "NaN is no JSON"),
        ('"\\uD800"', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("\ufeff{}", "byte order mark"),
        (b"\xff", "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        ("{}x", "Extra data"),
        ("", "Expecting value"),
    ],
)
def test_json_out_of_bounds(text: str | bytes, why: str) -> None:
    """Fails when a RecursionError passes, or what cannot be written again is taken."""
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_keys_given_twice() -> None:
    with pytest.raises(ValueError, match="`b` is given twice"):
        parse_json('{"a": {"b": 1, "c": 2, "b": 3}}', unique=True)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("org/name", True), ("/a/größe", True), ("../a", True), ("", False), ("~x/y", False),
        ("a\0b", False), ("a\nb", False), ("x" * 256, False), ("ü" * 128, False),
        ("a/" * 600, False), ("x" * 255 + "/" + "y" * 255, True),
    ],
)  # fmt: skip
def test_what_may_be_a_path(text: str, answer: bool) -> None:
    assert may_be_path(text) is answer
