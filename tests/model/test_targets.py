from __future__ import annotations

import subprocess
import sys

import pytest

from decal.config import LoraConfig
from decal.errors import TargetError
from decal.model.targets import ModuleInfo, input_group, resolve, table

LINEAR = {
    "self_attn.q_proj": (8, 6),
    "self_attn.v_proj": (4, 6),
    "mlp.down_proj": (6, 20),
}


def model() -> dict[str, ModuleInfo]:
    other = ModuleInfo(kind="other", shape=None, cls="Block")
    infos = {"": other, "model": other}
    infos["model.embed"] = ModuleInfo(kind="embedding", shape=(6, 50), cls="Embedding")
    for i in range(3):
        infos[f"model.layers.{i}"] = other
        infos[f"model.layers.{i}.self_attn"] = other
        infos[f"model.layers.{i}.self_attn.dropout"] = ModuleInfo(
            kind="other", shape=None, cls="Dropout", attention=True
        )
        for name, shape in LINEAR.items():
            infos[f"model.layers.{i}.{name}"] = ModuleInfo(
                kind="linear", shape=shape, cls="Linear", attention="attn" in name
            )
    infos["lm_head"] = ModuleInfo(kind="linear", shape=(50, 6), cls="Linear", is_head=True)
    return infos


def names(*leaves: str) -> list[str]:
    return [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in LINEAR if leaf in leaves]


@pytest.mark.parametrize(
    ("target", "leaves"),
    [
        ("all-linear", tuple(LINEAR)),
        ("attention", ("self_attn.q_proj", "self_attn.v_proj")),
        (("q_proj",), ("self_attn.q_proj",)),
        (("v_proj", "q_proj"), ("self_attn.q_proj", "self_attn.v_proj")),
        (r".*\.mlp\..*", ("mlp.down_proj",)),
        (("self_attn.q_proj", "mlp.down_proj"), ("self_attn.q_proj", "mlp.down_proj")),
    ],
)
def test_patterns(target: str | tuple[str, ...], leaves: tuple[str, ...]) -> None:
    """In the model's order, head left out. Mutations: re.match instead of fullmatch; endswith(t)
    without the dot (`_proj`)."""
    assert resolve(model(), target) == names(*leaves)


@pytest.mark.parametrize(
    "pattern",
    ["experts", "gate_proj", "gate_up_proj", "experts.up_proj", "mlp.experts.3.gate_proj"],
)
def test_experts_are_refused_with_what_is_left(pattern: str) -> None:
    """Mutations: look for modules only; forget the file's names of single experts."""
    infos = model()
    infos["model.layers.2.mlp.experts"] = ModuleInfo(
        kind="experts", shape=None, cls="Experts", weights=("gate_up_proj", "down_proj")
    )
    with pytest.raises(TargetError, match="1 of 2 target_modules name experts") as caught:
        resolve(infos, ("q_proj", pattern))
    assert f"`{pattern}` means model.layers.2.mlp.experts" in caught.value.details[0]
    assert "3 layers are left: q_proj" in str(caught.value.hint)
    assert resolve(infos, ("q_proj", "down_proj"))  # the other layers have one that is linear


def test_exact_names_and_the_head_by_name() -> None:
    exact = ("model.layers.1.self_attn.q_proj", "lm_head")
    assert resolve(model(), exact) == list(exact)
    assert resolve(model(), r"lm_.*") == ["lm_head"]


def test_an_expression_must_match_the_whole_name() -> None:
    with pytest.raises(TargetError, match="1 of 1 target_modules match no module"):
        resolve(model(), "model.layers.0.self_attn.q")


def test_one_typo_among_several_is_an_error() -> None:
    """F7: peft adapts q_proj and says nothing."""
    with pytest.raises(TargetError) as caught:
        resolve(model(), ("q_proj", "vproj", "xyz"))
    assert caught.value.message == "2 of 3 target_modules match no module"
    assert caught.value.details == (
        "`vproj`: did you mean `v_proj`?",
        "`xyz`: nothing has a name like it",
    )
    assert caught.value.hint is not None
    assert "q_proj, v_proj, down_proj" in caught.value.hint


def test_a_partial_ending_is_no_match() -> None:
    with pytest.raises(TargetError, match="match no module"):
        resolve(model(), ("proj",))


def test_what_cannot_be_adapted_is_named() -> None:
    """F8: Dropout and containers."""
    with pytest.raises(TargetError, match="match 3 modules that are no linear layers") as caught:
        resolve(model(), ("q_proj", "dropout"))
    assert "model.layers.0.self_attn.dropout, which is a Dropout  (and 2 more)" in str(caught.value)
    assert resolve(model(), ("embed",)) == ["model.embed"]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("q_proj", "is read as a regular expression for the whole name; write [q_proj]"),
        (("all-linear",), "stands alone, not in a list"),
        ("all_linear", "did you mean `all-linear`?"),
    ],
)
def test_common_slips_get_their_own_advice(target: str | tuple[str, ...], text: str) -> None:
    with pytest.raises(TargetError) as caught:
        resolve(model(), target)
    assert text in str(caught.value)


def test_broken_expressions_and_empty_targets() -> None:
    with pytest.raises(TargetError, match=r"`\(q` is no regular expression: missing \)"):
        resolve(model(), "(q")
    with pytest.raises(TargetError, match="target_modules is empty"):
        resolve(model(), ())
    with pytest.raises(TargetError, match="the model has no linear layer inside an attention"):
        resolve({"fc": ModuleInfo(kind="linear", shape=(2, 3), cls="Linear")}, "attention")


def test_table_counts_and_sums() -> None:
    """r * (in + out) each. Mutation: r * in * out, or a layer counted under two patterns."""
    patterns = ("v_proj", "self_attn.v_proj", "q_proj")
    found = table(model(), resolve(model(), patterns), LoraConfig(r=5, target_modules=patterns))
    assert {row.pattern: (row.count, row.parameters) for row in found.rows} == {
        "q_proj": (3, 3 * 5 * 14),
        "v_proj": (3, 3 * 5 * 10),
    }
    assert found.parameters == 3 * 5 * 24
    infos = model()
    found = table(infos, resolve(infos, "all-linear"), LoraConfig(), notes=["mind the gap"])
    assert found.lines() == [
        "target modules  layers  shape (out x in)  parameters at r=16",
        "q_proj               3  8 x 6                            672",
        "v_proj               3  4 x 6                            480",
        "down_proj            3  6 x 20                         1,248",
        "total                9                                 2,400",
        "note: mind the gap",
    ]
    assert str(found) == "\n".join(found.lines())


def test_projections_of_one_input_share_its_name() -> None:
    q, k, v, o = (input_group(f"model.layers.0.self_attn.{p}_proj") for p in "qkvo")
    assert q == k == v != o
    assert input_group("l.0.mlp.gate_proj") == input_group("l.0.mlp.up_proj")
    assert input_group("l.0.mlp.gate_proj") != input_group("l.1.mlp.up_proj")
    assert input_group("l.0.attn.q_proj") != input_group("l.0.cross.q_proj")
    assert input_group("lm_head") == "lm_head"


def test_no_torch_is_needed() -> None:
    code = "import sys; import decal.model.targets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
