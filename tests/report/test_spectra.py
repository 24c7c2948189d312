"""Spectra as text and as tables: the numbers of the modules, in their places."""

from __future__ import annotations

import pytest

from decal.report.heat import heat_maps, spectra_table
from decal.report.spectra import kinds, lines, percent, ranks_shown, sentence, strip
from tests.report.made_up import KINDS, learned


def test_kinds_are_averaged_layer_by_layer() -> None:
    """Mutation: mix layers, or average what is not there as nothing."""
    given = learned(8, 3)
    twin = {**given["modules"][0], "relative": 0.025}
    given["modules"] = [m for m in given["modules"] if (m["layer"], m["kind"]) != (2, "v_proj")]
    given["modules"].append(twin)
    rows = {row.name: row for row in kinds(given)}
    assert list(rows) == list(KINDS)
    assert rows["q_proj"].sizes == pytest.approx([0.015, 0.015, 0.025])
    assert rows["v_proj"].sizes == [pytest.approx(0.005), pytest.approx(0.015), None]
    assert (rows["k_proj"].directions, rows["k_proj"].r) == ((1, 7), 8)


def test_the_text_fits_a_terminal() -> None:
    """100 characters at 40 layers, no colour codes. Mutation: one character for each layer."""
    shown = lines(learned(8, 4))
    assert max(map(len, shown)) <= 100
    assert not any("\x1b" in line for line in shown)
    assert shown[0] == "runs/x: r=8, lora_alpha=16, 28 modules, 8,000 parameters"
    row = next(line for line in shown if line.startswith("q_proj"))
    assert row.split() == ["q_proj", "▂▄▆█", "2.00", "%", "3.50", "%",
                           "▃▃▃▃", "2.0", "1", "7", "8"]  # fmt: skip
    assert len(next(x for x in lines(learned(8, 80)) if x.startswith("q_proj")).split()[1]) == 40


def test_without_the_base_norms_stand_alone() -> None:
    shown = lines(learned(8, relative=False))
    assert "norms stand alone, because base `x` is not on this disk" in shown
    assert "norm of the update" in "".join(shown)
    assert "%" not in shown[-2]


def test_strips() -> None:
    assert strip([0.0, 0.5, None, 1.0], 1.0) == "▁▅·█"
    assert strip([0.0], 0.0) == "▁"


def test_sentences() -> None:
    """Mutation: say that less would do where all directions are in use."""
    assert sentence({**learned(8), "kept": []}).startswith("The adapter changes nothing")
    assert "All directions are in use" in sentence({**learned(8), "rank": 8})
    found = sentence({**learned(8), "rank": 3, "rank_everywhere": 6})
    assert found.endswith("99 % of the update's energy in all, r=6 in every module; it has r=8.")


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100 %"), (0.99999, "99.99 %"), (0.9996, "99.96 %"), (0.072, "7.2 %")]
)
def test_nothing_less_is_all_of_it(share: float, text: str) -> None:
    assert percent(share) == text


def test_ranks_shown() -> None:
    assert [ranks_shown(n) for n in (0, 1, 6, 8)] == [[], [1], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_maps_name_their_cells() -> None:
    """Mutation: numbers in 80 layers, or cells that cannot be told apart."""
    few, many = (heat_maps("a", learned(8, n)) for n in (4, 80))
    assert 'title="q_proj, layer 3: 3.50"' in few
    assert "<span>3.50</span>" in few
    assert 'title="q_proj, layer 79: 79.5"' in many
    assert "<span>79.5</span>" not in many
    assert "<details" not in few
    assert "<details open" in heat_maps("a", learned(8), folded=True)


def test_the_table_of_adapters() -> None:
    shown = spectra_table({"r8": learned(8), "r2": learned(2, relative=False)})
    assert shown.count("<tr>") == 3
    assert ">2 %<" in shown
    assert ">–<" in shown
