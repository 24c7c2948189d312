"""Patterns are judged by their shape: which could take forever, and which are as good as any."""

from __future__ import annotations

import re
import time

import pytest

from decal.store.patterns import why_costly

QUICK = (
    "q_proj",
    r"model\.layers\.\d+\.(self_attn|mlp)\.\w+",
    r"(.*\.)?layers\.(1|2|3)\.q_proj",
    r"(\w+\.)*q_proj",
    r"([a-z_]+\.)+x",
    r"(?:[^.]+\.){2,40}x",
    r".*\.[0-9]{1,2}\..*",
    r"a{3}b{2,9}(c?d?){3}",
    r"(?!.*vision)(?=.*text).*proj",
    "",
)
NESTED = (
    "(a+)+", "(a*)*", "(a|aa)*b", r"(\w*\.?)+x", "((a|b)+)*", "(a+){20}b", "(a?){50}a{50}",
    r"(?:.+)+", r"(.*\.)*x", r"((?:\w+)\.?)*", r"(?P<n>a+)+", "(?>a+)+|((b+))+", r"([^x]+\.)*",
)  # fmt: skip
LONG = (".*" * 6, ".*a.*b.*c.*d.*e.*f", r"(.*a){16}", r"\w*\w*\w*\w*\w*\w*x", "(a.*){9}")


@pytest.mark.parametrize("pattern", QUICK)
def test_quick_ones_are_taken(pattern: str) -> None:
    """Fails when a repeat that what follows ends is counted."""
    assert why_costly(pattern, ["a.b" * 30]) is None
    start = time.process_time()
    re.fullmatch(pattern, "a.1_" * 100)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("pattern", NESTED)
def test_repeats_of_repeats_are_refused(pattern: str) -> None:
    """Fails when groups, alternatives or atoms are not looked into."""
    assert "repeats a repeat" in str(why_costly(pattern, []))


@pytest.mark.parametrize("pattern", LONG)
def test_many_repeats_in_a_row_are_refused(pattern: str) -> None:
    assert "in a row" in str(why_costly(pattern, []))


def test_long_names_allow_fewer_repeats() -> None:
    """Four repeats take two seconds on 300 characters. Fails when the names are not asked."""
    four = ".*a.*b.*c.*d"
    assert why_costly(four, ["x" * 100]) is None
    assert "4 open repeats" in str(why_costly(four, ["x" * 300]))


def test_alternatives_are_counted_apart() -> None:
    assert why_costly("(.*a.*b.*c|.*d.*e.*f)", []) is None


def test_what_is_no_pattern() -> None:
    for broken in ("(", "a**", "[z-a]", "(?P<a"):
        with pytest.raises(re.error):
            why_costly(broken, [])
    assert "characters" in str(why_costly("a" * 30_000, []))
    assert "nested" in str(why_costly("(" * 3000 + ")" * 3000, []))
