"""run.yaml <-> RunConfig. Knows files and YAML; knows no models, no data and no run folders.

YAML is read as version 1.2, in which `1e-5` is a float and `no` is text, and composed to nodes
rather than loaded: a node has its line, so that every problem can name one, and nothing in a file
can name a Python type. The values are then plain Python, and config.py says what they must be.

`--set` overrides are written into the same tree before it is checked, so that an override and the
line it replaces obey the same rules. Rejected: checking the file first and the overrides after,
which refuses a file whose missing key an override supplies.

All problems of a file are collected and raised as one `ConfigError`.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from decal.config import SHORTHAND, RunConfig
from decal.errors import ConfigError
from decal.problems import Key, collected, describe, dotted, problems

__all__ = ["dump_run", "load_run", "parse_run"]

MAX_BYTES = 100_000
"""Of a file; one with every key and its comment has about eight thousand."""
MAX_NODES = 10_000
"""More values than a settings file can mean; aliases of aliases would multiply without end."""
MAX_DEPTH = 20
MAX_OPEN = 100
"""Brackets that are open at once, before anything is known of them."""
WIDTH = 96

_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")}
_TEXT_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "timestamp", "merge", "value")}
_BRACKETS = re.compile(r"[\[\]{}]")
_DASHES = re.compile(rf"(?:[-?:] ){{{MAX_OPEN}}}")
"""Lists or keys that begin inside each other on one line."""
_PLAIN_TEXT = re.compile(r"[A-Za-z_/~][\w./~+-]*", re.ASCII)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings in a run.yaml.

    Args:
        path: the file.
        overrides: `key=value` texts with dotted keys, values in YAML: `train.lr=1e-4`.

    Raises:
        ConfigError: for a file that is missing or not YAML, and for all settings in it and in
            `overrides` that are unknown, missing, of the wrong type or contradictory.
    """
    return parse_run(_read(Path(path)), name=str(path), overrides=overrides)


def parse_run(text: str, *, name: str = "run.yaml", overrides: Sequence[str] = ()) -> RunConfig:
    """The settings in the text of a run.yaml that is called `name`; raises as `load_run` does."""
    tree = _Tree(name)
    values = tree.values(text)
    if values is None:
        raise _not_settings(name, "it is empty")
    if not isinstance(values, dict):
        raise _not_settings(name, f"it holds {describe(values)} instead of keys")
    for override in overrides:
        _apply(tree, values, override)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        tree.problems += [(tree.place(p.key), str(p)) for p in problems(error, RunConfig)]
    if tree.problems:
        in_order = sorted(tree.problems, key=lambda problem: problem[0].line)
        raise collected([f"{place.label}: {text}" for place, text in in_order], name)
    return config


def _not_settings(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"{name} has no settings: {what}",
        hint="`decal init` writes a run.yaml with every key explained",
    )


def _read(path: Path) -> str:
    """The file's text; refuses what cannot be a settings file before reading all of it."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist", hint="`decal init` writes one with every key explained"
        ) from None
    except IsADirectoryError:
        inside = path / "run.yaml"
        hint = f"it holds {inside}" if inside.is_file() else None
        raise ConfigError(f"{path} is a folder, not a run.yaml", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} is not a run.yaml: it is larger than {MAX_BYTES:,} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} is not") from None


class _Place(NamedTuple):
    label: str
    """`run.yaml:7`, or `--set train.lr=x`"""
    line: float
    """Orders problems; those of no line come last."""


class _Tree:
    """YAML texts turned into plain values, remembering where each key was given."""

    def __init__(self, name: str):
        self.name = name
        self.problems: list[tuple[_Place, str]] = []
        self._places: dict[Key, _Place] = {}
        self._nodes = 0

    def place(self, key: Key) -> _Place:
        """Where a key, or the nearest section around it, was given."""
        for end in range(len(key), 0, -1):
            if key[:end] in self._places:
                return self._places[key[:end]]
        return _Place(self.name, math.inf)

    def mark(self, key: Key, label: str) -> None:
        """Remembers that `key` and all below it now come from `label`."""
        self._places = {k: v for k, v in self._places.items() if k[: len(key)] != key}
        self._places[key] = _Place(label, math.inf)

    def values(self, text: str, label: str | None = None, at: Key = ()) -> Any:
        """The plain values of `text`; `label` names the place if it is not a line of the file."""
        where = label or self.name
        if label:
            self.mark(at, label)
        if _too_deep(text):
            raise ConfigError(f"{where} is not YAML: it is nested too deeply")
        try:
            node = YAML(typ="safe", pure=True).compose(text)
            return None if node is None else self._plain(node, at, label)
        except MarkedYAMLError as error:
            raise _not_yaml(where, error, with_line=label is None) from None
        except YAMLError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{where} is not YAML: {reason}") from None
        except RecursionError:
            raise ConfigError(f"{where} is not YAML: it is nested too deeply") from None

    def _plain(self, node: Node, key: Key, label: str | None, depth: int = 0) -> Any:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise ConfigError(f"{label or self.name} holds more than settings can mean")
        if isinstance(node, MappingNode):
            return self._mapping(node, key, label, depth)
        if isinstance(node, SequenceNode):
            return [self._plain(item, key, label, depth + 1) for item in node.value]
        return self._scalar(node, label)

    def _mapping(self, node: MappingNode, key: Key, label: str | None, depth: int) -> Any:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            where = self._where(name_node, label)
            if not isinstance(name_node, ScalarNode):
                self.problems.append((where, "a key must be text"))
                continue
            name = str(name_node.value)
            inner = (*key, name)
            if name in values:
                text = f"{dotted(inner)}: given twice, first in {self._places[inner].label}"
                self.problems.append((where, text))
                continue
            self._places[inner] = where
            values[name] = self._plain(value_node, inner, label, depth + 1)
        return values

    def _scalar(self, node: Node, label: str | None) -> Any:
        tag = str(node.tag)
        shown = tag.replace("tag:yaml.org,2002:", "!!")
        if tag in _TEXT_TAGS:
            return str(node.value)
        if tag in _TAGS:
            try:
                return YAML(typ="safe", pure=True).constructor.construct_object(node)
            except (ValueError, KeyError, YAMLError):
                shown += f" {describe(node.value)}"
        self.problems.append((self._where(node, label), f"{shown} means nothing here"))
        return str(node.value)

    def _where(self, node: Node, label: str | None) -> _Place:
        line = node.start_mark.line + 1
        return _Place(label, math.inf) if label else _Place(f"{self.name}:{line}", line)


def _too_deep(text: str) -> bool:
    """Whether the parser need not try: its time grows with the square of the open brackets.

    Brackets in quotes and comments count too; nobody leaves that many open there.
    """
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth = max(depth + (1 if found[0] in "[{" else -1), 0)
        if depth > MAX_OPEN:
            return True
    return _DASHES.search(text) is not None


def _not_yaml(where: str, error: MarkedYAMLError, *, with_line: bool) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    place = f"{where}:{mark.line + 1}" if mark and with_line else where
    reason = str(error.problem or error.context)
    hint = None
    if "'\\t'" in reason:
        reason, hint = "a tab", "YAML indents with spaces only"
    elif "another document" in reason:
        reason = "a second document"
    elif "mapping values are not allowed" in reason:
        reason, hint = "a second `:`", "put text that contains `: ` in quotes"
    return ConfigError(f"{place} is not YAML: {reason}", hint=hint)


def _apply(tree: _Tree, values: dict[str, Any], override: str) -> None:
    """Writes `train.lr=1e-4` into `values`.

    A text for a section that is a mapping sets the key which the text stands for (`base=x` sets
    base.path and keeps base.dtype); a section that is one text is written out when a key inside it
    is set.
    """
    name, equals, text = override.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    label = f"--set {override:.200}"
    if not equals or not all(key):
        raise ConfigError(f"{label}: expected key=value", hint="for example --set train.lr=1e-4")
    section = values
    for depth, part in enumerate(key[:-1], start=1):
        inside = section.get(part)
        if isinstance(inside, str) and depth == 1 and part in SHORTHAND:
            inside = {SHORTHAND[part]: inside}
        if inside is None:
            inside = {}
            tree.mark(key[:depth], label)
        if not isinstance(inside, dict):
            text = f"{dotted(key[:depth])} is a value and has no keys"
            tree.problems.append((_Place(label, math.inf), text))
            return
        section[part] = inside
        section = inside
    before = section.get(key[-1])
    short = SHORTHAND.get(key[0]) if len(key) == 1 else None
    if short and isinstance(before, dict):
        value = tree.values(text, label, (*key, short))
        section[key[0]] = value if isinstance(value, dict) else {**before, short: value}
    else:
        section[key[-1]] = tree.values(text, label, key)


def dump_run(config: RunConfig) -> str:
    """A complete run.yaml for `config`, every key with its documentation; `parse_run` reads it."""
    lines = [
        "# A run of decal: `decal train` with this file.",
        "# Single values can be changed on the command line: --set train.lr=1e-4",
    ]
    for name, field in type(config).model_fields.items():
        lines += ["", *_comment(str(field.description), "")]
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            lines += [f"{name}:", *_section_lines(value)]
        else:
            lines.append(f"{name}: {_yaml(value)}")
    return "\n".join(lines) + "\n"


def _section_lines(section: BaseModel) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        line = f"  {field.alias or name}: {_yaml(getattr(section, name))}"
        doc = str(field.description).replace("\n", " ")
        if len(line) + len(doc) + 4 <= WIDTH:
            yield f"{line}  # {doc}"
        else:
            yield from _comment(doc, "  ")
            yield line


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text.replace("\n", " "),
        WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _yaml(value: Any) -> str:
    """A value of the settings in YAML's flow style, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_yaml(v) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(k)}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return describe(value)


def _is_plain(text: str) -> bool:
    """Whether `text` without quotes is read as itself, and not as null, true or a number."""
    if not _PLAIN_TEXT.fullmatch(text):
        return False
    return str(YAML(typ="safe", pure=True).compose(text).tag) in _TEXT_TAGS


def _quoted(text: str) -> str:
    """`text` in double quotes, everything that is not printable ASCII or a letter escaped."""
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    code = ord(char)
    if char.isprintable() and code < 0xD800:
        return char
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
