"""HTML that escapes itself."""

from __future__ import annotations

from decal.markup import Markup, facts, grid, join, tag, text


def test_texts_are_escaped_once() -> None:
    """Mutation: escape markup again, or leave a text or an attribute as it is."""
    assert tag("p", "<b>", tag("i", "&")) == "<p>&lt;b&gt;<i>&amp;</i></p>"
    assert tag("p", title='"><x') == '<p title="&quot;&gt;&lt;x"></p>'
    assert text("'\"&<>") == "&#x27;&quot;&amp;&lt;&gt;"
    assert isinstance(join((tag("b"), "<")), Markup)
    assert join(("a", None, 3)) == "a3"


def test_what_reorders_or_hides_is_written_out() -> None:
    assert text("a\u202eb\x00\n\t") == "a\\x202eb\\x00\n\t"


def test_attributes() -> None:
    assert tag("p", class_="c", aria_label="x", left=None) == '<p class="c" aria-label="x"></p>'
    assert tag("meta", name="viewport") == '<meta name="viewport">'


def test_tables_for_notebooks() -> None:
    """Mutation: numbers to the left, or a title that is not escaped."""
    made = grid(("a", "n"), [("<x>", "1")], title="<t>")
    assert "<b>&lt;t&gt;</b>" in made
    assert made.count("text-align:right") == 2
    assert "&lt;x&gt;" in made
    assert facts({"k": "<v>"}) == facts([("k", "<v>")])
    assert "&lt;v&gt;" in facts({"k": "<v>"})


def test_spaces_of_any_width_stay_spaces() -> None:
    """Fails when a space that does not break is written out like a control character."""
    assert text("90\u00a0% \u202f:") == "90\u00a0% \u202f:"
    assert text("a\x1b\u202e") == "a\\x1b\\x202e"
