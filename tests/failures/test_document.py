"""docs/failures.md and the rows of the bench that wrote it are the same set."""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from pathlib import Path

from bench.failures_page import PACKAGES, overview, page
from bench.failures_row import Case, Row, Seen, quoted, watched

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "failures.md"


def rows() -> list[str]:
    """The ids in the bench's registries, in the order of their numbers.

    These are read and not imported: the bench imports all peers.
    """
    found: list[str] = []
    for file in (ROOT / "bench").glob("failures_*.py"):
        for registry in re.findall(
            r"^ROWS: [^{]*\{([^}]*)\}", file.read_text(encoding="utf-8"), re.M
        ):
            found += re.findall(r'"(F\d+)":', registry)
    return sorted(found, key=lambda name: int(name[1:]))


def test_every_row_is_in_the_document_and_the_other_way_round() -> None:
    """Fails when a row is added without `python -m bench.failures`, or removed from the bench."""
    text = DOCUMENT.read_text(encoding="utf-8")
    wanted = rows()
    assert len(wanted) == len(set(wanted)) > 10
    assert re.findall(r"^## (F\d+)\. ", text, flags=re.MULTILINE) == wanted
    assert re.findall(r"^\| (F\d+) \|", text, flags=re.MULTILINE) == wanted


def test_every_row_has_a_test_named_after_it() -> None:
    """Fails when a failure is shown in the document and nothing keeps decal from it."""
    files = {path.name[:8] for path in Path(__file__).parent.glob("test_f*.py")}
    assert {f"test_f{int(name[1:]):02}" for name in rows()} <= files


def test_the_document_says_with_what_it_was_made_and_not_where() -> None:
    """Fails when a folder of the machine, or no version, is in it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(re.search(rf"\b{package}\s\d", text) for package in PACKAGES)
    assert not re.search(r"/(tmp|home|root|work|usr|Users)/", text)


def test_the_page_is_made_of_its_rows() -> None:
    """Fails when a case, a tool or a thread is left out of the page."""
    cases = [
        Case(
            what=f"case {i}",
            seen=[
                Seen(who="peft", verdict="silent", text=f"theirs {i}"),
                Seen(who="decal", verdict="error", text=f"ours {i}"),
            ],
        )
        for i in range(2)
    ]
    row = Row(title="Title", failure="Why.", cases=cases, threads=("peft#1",))
    text = page({"F1": row})
    assert all(f"{who} {i}" in text for who in ("case", "theirs", "ours") for i in range(2))
    assert "Reported in peft#1." in text
    assert overview({"F1": row}).splitlines()[2:] == [
        "| F1 | case 0 | peft: **silently wrong** | refuses |",
        "|  | case 1 | peft: **silently wrong** | refuses |",
    ]


def test_what_is_said_is_heard() -> None:
    """Fails when warnings, logs or errors are lost, or a folder of the machine is quoted."""
    with watched() as heard:
        warnings.warn("one", stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.x").warning("two")
        raise ValueError("three")
    assert sorted(heard.lines) == ["one", "two"]
    assert heard.verdict(True) == "error"
    assert heard.words() == '"ValueError: three"'
    with watched() as quiet:
        pass
    assert [quiet.verdict(right) for right in (True, False)] == ["right", "silent"]
    text = f"no {tempfile.gettempdir()}/x1/a/y.bin nor /opt/x/z.bin, see https://a.b/c"
    assert quoted(text) == '"no a/y.bin nor …/z.bin, see https://a.b/c"'
