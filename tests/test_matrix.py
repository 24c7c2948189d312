"""Formats x methods x kinds of layers x architectures: every seam fits every other.

The lists are the registries themselves, so a new format, method or architecture is in the matrix
the day it is registered. Every cell does all of it: train, save, read, take off, put on, merge.

`make test` runs half of the cells, chosen like the squares of one colour on a board (the numbers of
architecture, kind and format add up to an even number): every architecture meets every format, so
does every kind, and each kind on each architecture meets two formats. `make soak` runs the other
half too. The options of the adapter take turns from cell to cell; all are in the cells' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from decal.adapters import METHODS
from decal.config import LoraConfig, QuantConfig
from decal.errors import TargetError
from decal.model.adapter import Adapter
from decal.model.inject import attach, detach
from decal.model.state import adapter_state, full_state
from decal.model.survey import module_infos
from decal.model.switches import without_dropout
from decal.quant import FORMATS
from decal.quant.linear import QuantLinear
from decal.verbs.in_place import merge_in_place
from decal.verbs.load import load_base
from tests import zoo
from tests.zoo import ZOO

IDS = torch.arange(3, 25).view(2, 11)
OPTIONS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "plain": lambda targets: {},
    "rslora": lambda targets: {"use_rslora": True},
    "patterns": lambda targets: {
        "rank_pattern": {targets[-1]: 5},
        "alpha_pattern": {targets[0]: 3},
    },
    "bias": lambda targets: {"bias": "all"},
    "gaussian": lambda targets: {"init_lora_weights": "gaussian", "bias": "lora_only"},
}
"""Settings by the names of the targets."""


def kinds(name: str) -> dict[str, dict[str, Any]]:
    """Kind of layer -> the settings that name all layers of this kind in an architecture."""
    model, tiny = zoo.build(name), ZOO[name]
    infos = module_infos(model)
    linear = [n for n, i in infos.items() if i.kind == "linear" and not i.is_head]
    fused = [n for n in linear if n.endswith(tiny.fused)] if tiny.fused else []
    found = {
        "linear": [n for n in linear if infos[n].cls == "Linear" and n not in fused],
        "conv1d": [n for n in linear if infos[n].cls == "Conv1D"],
        "fused": fused,
        "embedding": [n for n, i in infos.items() if i.kind == "embedding" and "embed" in n][:1],
        "head": [n for n, i in infos.items() if i.is_head and tiny.causal],
    }
    settings = {kind: {"target_modules": names} for kind, names in found.items() if names}
    head = next(n for n in ("lm_head", "score", "classifier", "embed_out") if n in infos)
    last = [n for n in linear if not n.startswith(head)][-1:]
    return settings | {"whole": {"target_modules": last, "modules_to_save": [head]}}


def cells() -> Iterator[Any]:
    options = cycle(OPTIONS)
    formats = ["none", *FORMATS]
    numbered = list(enumerate(ZOO))
    for (a, name), method in product(numbered, METHODS):
        for k, (kind, settings) in enumerate(kinds(name).items()):
            for f, fmt in enumerate(formats):
                option = next(options)
                yield pytest.param(
                    name,
                    fmt,
                    {
                        **settings,
                        **OPTIONS[option](settings["target_modules"]),
                        "method": method,
                    },
                    id=f"{name}-{kind}-{fmt}-{method}-{option}",
                    marks=[pytest.mark.slow] if (a + k + f) % 2 else [],
                )


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """Architecture and format -> a freshly loaded base that computes in float32."""
    folders: dict[str, Path] = {}

    def fresh(name: str, fmt: str) -> Any:
        if name not in folders:
            folders[name] = zoo.save(name, tmp_path_factory.mktemp(name))
        quant = QuantConfig(format=fmt, skip_modules=ZOO[name].experts if fmt != "none" else ())
        labels = None if ZOO[name].causal else zoo.LABELS
        return load_base(folders[name], quant=quant, dtype="float32", labels=labels)[0]

    return fresh


def logits(model: Any) -> Tensor:
    """In training mode without dropout: int8 then computes with its weights and rounds no input."""
    with without_dropout(model):
        return model.train()(IDS).logits


def train(model: Any) -> None:
    """Two steps on labels or on the next token."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    for _ in range(2):
        found = logits(model)
        targets = torch.tensor([2, 0]) if found.dim() == 2 else IDS[:, 1:].flatten()
        found = found if found.dim() == 2 else found[:, :-1].flatten(0, 1)
        cross_entropy(found, targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("name", "fmt", "settings"), list(cells()))
def test_cell(
    name: str, fmt: str, settings: dict[str, Any], load: Callable[[str, str], Any], tmp_path: Path
) -> None:
    """What was trained is what is saved, read and merged (to 1e-5 in float32); the base is intact.

    Fails when one kind of layer, format or option is forgotten in any of these.
    """
    model = load(name, fmt)
    assert any(isinstance(m, QuantLinear) for m in model.modules()) == (fmt != "none")
    before = copy(model.state_dict())
    table = attach(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0, **settings))
    started = copy(full_state(model))
    train(model)
    state = adapter_state(model)
    assert list(state) == list(table.names)
    assert all(parts.B.any() for parts in state.values())
    assert all(not torch.equal(p, started[n]) for n, p in full_state(model).items())
    with torch.no_grad():
        wanted = logits(model)

    trained = Adapter.from_model(model)
    trained.save_pretrained(tmp_path / "adapter")
    read = Adapter.from_pretrained(tmp_path / "adapter")
    for part in ("A", "B"):
        assert_same(*({m: getattr(t, part) for m, t in a.tensors.items()} for a in (read, trained)))
    assert_same(dict(read.full), dict(trained.full))

    detach(model)
    assert_same(model.state_dict(), before)
    with torch.no_grad():
        attach(model, read, "again")
        assert torch.equal(logits(model), wanted)
        merge_in_place(model, "again")
        assert float((logits(model) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fmt", ["none", *FORMATS])
def test_experts_are_refused(fmt: str, method: str, load: Callable[[str, str], Any]) -> None:
    """The one kind of layer that no cell above has."""
    model = load("qwen3_moe", fmt)
    with pytest.raises(TargetError, match="name experts"):
        attach(model, LoraConfig(method=method, target_modules=["experts"]))
    assert not [m for m in model.modules() if isinstance(m, nn.ModuleDict)]
