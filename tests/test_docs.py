"""The documents are fresh: what they name exists, and what is generated was generated."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from decal.cli import app, main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"))
    if path.stat().st_size > 0
)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(text: str) -> str:
    """The fenced blocks of a document."""
    return "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


def command_lines(text: str) -> list[list[str]]:
    """The `decal ...` lines in fenced blocks, comments and pipes apart."""
    joined = code(text).replace("\\\n", " ")
    found = re.findall(r"^\s*(?:\$ )?decal ([a-z-][^\n#|>]*)", joined, flags=re.MULTILINE)
    return [shlex.split(line) for line in found]


def unknown(words: list[str]) -> list[str]:
    """What a `decal` command line names that does not exist."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if words[0].startswith("-"):
        return [] if words[0] in ("--help", "--version") else words[:1]
    if words[0] not in commands:
        return [f"command {words[0]}"]
    options = {o for p in commands[words[0]].params for o in (*p.opts, *p.secondary_opts)}
    options |= {"--help", "-h"}
    given = [w.partition("=")[0] for w in words[1:] if re.match(r"--?[a-z]", w)]
    return [f"option {o} of {words[0]}" for o in given if o not in options]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    """Fails when a linked file is moved or removed."""
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing, f"{named(path)} links to {missing}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_commands_exist(path: Path) -> None:
    """Fails when a command or option is renamed and a document still shows the old one."""
    lines = command_lines(path.read_text(encoding="utf-8"))
    wrong = [text for words in lines for text in unknown(words)]
    assert not wrong, f"{named(path)} shows {wrong}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_make_targets_exist(path: Path) -> None:
    """Fails when a target is renamed and a document still shows the old one."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = path.read_text(encoding="utf-8")
    shown = set(re.findall(r"(?:`|^)make ([a-z]+)\b", text, flags=re.MULTILINE))
    assert shown <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_files_of_the_source_exist(path: Path) -> None:
    """Fails when a source file is renamed and a document still names the old one."""
    text = path.read_text(encoding="utf-8")
    shown = re.findall(r"`((?:[a-z0-9_]+/)+[a-z0-9_]+\.py)`", text)
    roots = (ROOT, ROOT / "src", ROOT / "src" / "decal", ROOT / "tests")
    missing = [name for name in shown if not any((root / name).exists() for root in roots)]
    assert not missing, f"{named(path)} names {missing}"


def test_the_reference_of_the_settings_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails when a field or its docstring changes without `make docs`."""
    main(["init", "-"])
    assert (ROOT / "docs" / "run.yaml").read_text(encoding="utf-8") == capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("train run.yaml --set train.lr=1 --force", []),
        ("train run.yaml --forec", ["option --forec of train"]),
        ("trian run.yaml", ["command trian"]),
        ("merge a b -o out --dtype=fp32", []),
        ("--version", []),
    ],
)
def test_wrong_command_lines_are_found(words: str, wrong: list[str]) -> None:
    """Fails when the check above lets everything pass."""
    assert unknown(words.split()) == wrong


def test_command_lines_are_found_in_blocks_only() -> None:
    """Fails when the check above sees no command lines at all."""
    block = "$ decal init run.yaml  # first\ndecal train \\\n  run.yaml | x\n"
    text = f"decal nothing\n```bash\n{block}```\n"
    assert command_lines(text) == [["init", "run.yaml"], ["train", "run.yaml"]]
