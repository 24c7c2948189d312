"""Which modules the settings choose, and every setting that does nothing."""

from __future__ import annotations

from typing import Any

import pytest

from decal.config import LoraConfig
from decal.errors import TargetError
from decal.model.targets import ModuleInfo, TargetRow, resolve, select, table


def model() -> dict[str, ModuleInfo]:
    other = ModuleInfo(kind="other", shape=None, cls="Block")
    infos = {"": other, "model": other}
    infos["model.embed_tokens"] = ModuleInfo(kind="embedding", shape=(6, 50), cls="Embedding")
    for i in range(3):
        block = f"model.layers.{i}"
        infos |= {block: other, f"{block}.self_attn": other, f"{block}.mlp": other}
        for name, shape in (("q_proj", (8, 6)), ("v_proj", (4, 6))):
            infos[f"{block}.self_attn.{name}"] = ModuleInfo(
                kind="linear", shape=shape, cls="Linear", attention=True
            )
        infos[f"{block}.mlp.experts.7.up"] = ModuleInfo(kind="linear", shape=(9, 6), cls="Linear")
        infos[f"{block}.norm"] = ModuleInfo(kind="other", shape=None, cls="RMSNorm")
    infos["lm_head"] = ModuleInfo(kind="linear", shape=(50, 6), cls="Linear", is_head=True)
    return infos


def chosen(new: bool = True, **fields: Any) -> list[str]:
    return select(model(), LoraConfig(**fields), new=new)[0]


def test_excluded_modules_are_left_out() -> None:
    """Mutation: read an ending without its dot (`proj`)."""
    assert all("q_proj" not in n for n in chosen(exclude_modules=("q_proj",)))
    assert len(chosen(exclude_modules=("1.self_attn.q_proj",))) == 8
    assert len(chosen(exclude_modules=r".*\.self_attn\..*")) == 3
    assert len(chosen(exclude_modules=("lm_head",))) == 9, "a layer that is no target anyway"


@pytest.mark.parametrize(
    ("exclude", "text"),
    [
        (("q_proj", "vproj"), "`vproj`: did you mean `v_proj`?"),
        (("self_attn",), "`self_attn`: model.layers.0.self_attn is a Block, no target"),
        ("self_attn", "`self_attn`: is read as a regular expression for the whole name"),
        ("(q", r"exclude_modules `(q` is no regular expression: missing )"),
    ],
)
def test_an_exclusion_that_excludes_nothing_is_an_error(exclude: Any, text: str) -> None:
    """peft leaves out what it can. Mutation: ask only whether a name matches."""
    with pytest.raises(TargetError) as caught:
        chosen(exclude_modules=exclude)
    assert text in str(caught.value)
    if exclude != "(q":
        assert chosen(exclude_modules=exclude, new=False)


def test_layers_are_the_first_number() -> None:
    """An expert's number comes later. Mutation: take the last number."""
    found = chosen(layers_to_transform=(0, 2))
    assert {n.split(".")[2] for n in found} == {"0", "2"}
    assert len(found) == 6
    assert len(chosen(layers_to_transform=1, layers_pattern="layers")) == 3
    assert len(chosen(layers_to_transform=7, layers_pattern=("h", "experts"))) == 3
    with_head = ("q_proj", "lm_head")
    assert "lm_head" not in chosen(target_modules=with_head, layers_to_transform=1)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"layers_to_transform": (1, 5)}, "1 of 2 layers_to_transform are not there: 5"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, "are not there: 0"),
        ({"layers_pattern": "layers"}, "layers_pattern is set, but layers_to_transform is not"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "with an expression"),
        ({"exclude_modules": r".*"}, "none of 9 target modules is left"),
    ],
)
def test_layers_that_are_not_there_are_errors(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(TargetError, match=text):
        chosen(**fields)


def test_modules_to_save_win_over_targets() -> None:
    """With all inside them. Mutation: leave out the module itself only."""
    names, saved = select(
        model(), LoraConfig(modules_to_save=("1.self_attn", "norm", "2.self_attn.q_proj"))
    )
    assert saved == [
        "model.layers.0.norm",
        "model.layers.1.self_attn",
        "model.layers.1.norm",
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.norm",
    ]
    assert not any(n.startswith("model.layers.1.self_attn") for n in names)
    assert "model.layers.2.self_attn.v_proj" in names
    assert "model.layers.2.self_attn.q_proj" not in names
    inner = select(model(), LoraConfig(modules_to_save=("0.mlp", "0.mlp.experts.7.up")))[1]
    assert inner == ["model.layers.0.mlp"]


def test_a_module_to_save_that_is_not_there_is_an_error() -> None:
    """peft names two heads for a classifier; a trained adapter may name one in vain."""
    with pytest.raises(TargetError, match="1 of 2 modules_to_save match no module") as caught:
        chosen(modules_to_save=("lm_head", "embed_token"))
    assert "`embed_token`: did you mean `embed_tokens`?" in str(caught.value)
    assert chosen(modules_to_save=("lm_head", "embed_token"), new=False)


def test_patterns_must_fit_a_target() -> None:
    """Mutation: look for them among all modules."""
    with pytest.raises(TargetError) as caught:
        chosen(rank_pattern={"q_proj": 3, "qproj": 2}, alpha_pattern={"lm_head": 4})
    assert caught.value.message == (
        "2 keys of rank_pattern and alpha_pattern match no target module"
    )
    assert caught.value.details == (
        "rank_pattern `qproj`: did you mean `q_proj`?",
        "alpha_pattern `lm_head`",
    )
    assert chosen(rank_pattern={"qproj": 2}, new=False)


def test_the_table_says_where_ranks_differ() -> None:
    """Exact counts: r per module, biases and what is whole. Mutation: the config's r everywhere."""
    config = LoraConfig(
        r=4,
        rank_pattern={"0.self_attn.q_proj": 7, "up": 2},
        lora_bias=True,
        modules_to_save=("lm_head",),
    )
    infos = model()
    names = select(infos, config)[0]
    whole = TargetRow(pattern="lm_head (whole)", count=1, shapes=((50, 6),), parameters=300)
    found = table(infos, names, config, whole=[whole], biases={"model.layers.0.self_attn.v_proj"})
    assert [row.parameters for row in found.rows] == [
        (7 + 4 + 4) * 14 + 3 * 8,
        3 * 4 * 10 + 3 * 4 + 4,
        3 * 2 * 15 + 3 * 9,
        300,
    ]
    assert found.parameters == sum(row.parameters for row in found.rows)
    assert found.lines() == [
        "target modules   layers  shape (out x in)      r  parameters",
        "q_proj                3  8 x 6              7, 4         234",
        "v_proj                3  4 x 6                 4         136",
        "up                    3  9 x 6                 2         117",
        "lm_head (whole)       1  50 x 6            whole         300",
        "total                10                                  787",
    ]
    assert "at r=4" in table(infos, names, LoraConfig(r=4)).lines()[0]


def test_shortcuts_leave_embeddings_and_head_out() -> None:
    assert "model.embed_tokens" not in resolve(model(), "all-linear")
    assert "lm_head" not in resolve(model(), "all-linear")
    assert resolve(model(), ("embed_tokens",)) == ["model.embed_tokens"]


def test_a_trained_adapter_may_name_targets_that_are_elsewhere() -> None:
    """peft writes the list it was given. Fails if one list cannot serve several architectures, or
    if a list of which nothing is there is taken."""
    with pytest.raises(TargetError, match="1 of 2 target_modules match no module"):
        chosen(target_modules=("q_proj", "query_key_value"))
    assert chosen(target_modules=("q_proj", "query_key_value"), new=False)
    with pytest.raises(TargetError, match="1 of 1 target_modules match no module"):
        chosen(target_modules=("query_key_value",), new=False)
