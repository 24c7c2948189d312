"""Fused decoder layers against transformers' own, on real architectures.

transformers computes RMSNorm in float32 also in a float64 model. Where float64 is compared, its
norms are replaced by exact ones, so that equality can be asked to 1e-9; without that, float64 is
not fused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal.adapters import DropoutKey, Routing, current_routing, routed
from decal.config import LoraConfig
from decal.kernels import native
from decal.model import attention, switches
from decal.model.blocks import pieces, proof, swap
from decal.model.inject import (
    adapted_layers,
    attach,
    detach,
    disabled,
    fused_line,
    mixed,
    use,
)
from decal.quant import Recipe
from decal.quant.linear import QuantLinear
from tests.zoo import VOCABULARY, build

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
LENGTHS = (1, 9, 6)
IDS = torch.randint(0, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def config(**own: Any) -> LoraConfig:
    shared = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.0, "init_lora_weights": False}
    return LoraConfig(**{**shared, **own})


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(self: Any, x: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * rstd)

    for name in FAMILY:
        kind = type(build(name).model.layers[0].input_layernorm)
        monkeypatch.setattr(kind, "forward", norm)
    monkeypatch.setitem(proof.ROOM, torch.float64, 1e-9)


def quantize(model: nn.Module, form: str) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, QuantLinear.from_linear(child, Recipe(format=form)))


def model_with(
    name: str, config: LoraConfig, dtype: torch.dtype = torch.float64, form: str | None = None
) -> Any:
    model = build(name, dtype)
    if form is not None:
        quantize(model, form)
    attach(model, config, seed=4)
    return model.to(dtype)


def fused(model: Any) -> list[bool]:
    return [not reason for reason in model.decal_adapters.fused.values()]


def dropout_key(p: float) -> DropoutKey | None:
    if not p:
        return None
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return DropoutKey(seed=5, epoch=1, sample_ids=ids, positions=positions)


def recompute() -> tuple[Any, Any]:
    routing = current_routing()
    return routed(routing), routed(routing)


def results(
    model: Any,
    *,
    p: float = 0.0,
    checkpointing: bool = False,
    weights: tuple[tuple[str, float], ...] = (("default", 1.0),),
) -> dict[str, Tensor]:
    """Loss, and gradients of the input embeddings and of every trained parameter."""
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    kwargs = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    again = switches.checkpointed(model, recompute) if checkpointing else nullcontext()
    model.train()
    model.zero_grad()
    token = attention._FLAT.set(True)
    try:
        with routed(Routing(weights, dropout_key(p))), attention.flat_attention(model), again:
            logits = model(
                inputs_embeds=embeds, position_ids=positions, use_cache=False, **kwargs
            ).logits
            target = torch.linspace(-1, 1, logits.numel()).view(logits.shape).sin()
            loss = (logits * target.to(logits)).sum()
            loss.backward()
    finally:
        attention._FLAT.reset(token)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach(), "embeddings": embeds.grad}


def unfused(model: Any) -> Any:
    plain = copy.deepcopy(model)
    swap.release(plain)
    return plain


class Calls:
    """Counts the passes through a fused layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count = 0
        self.real = swap.run
        monkeypatch.setattr(swap, "run", self)

    def __call__(self, *args: Any) -> Tensor:
        self.count += 1
        return self.real(*args)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], room: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert float((found[name] - value).norm()) <= room * float(value.norm()), name


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("form", [None, "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_results_are_the_layers_own(name: str, form: str | None, p: float, calls: Calls) -> None:
    """float64, 1e-9: loss, input and every factor. Fails when the scaling is dropped, a bias or a
    window is forgotten, heads are not normed, k turns with q's angles reversed, 1 / (1 - p) is left
    out, or the residual's gradient is."""
    model = model_with(name, config(lora_dropout=p), form=form)
    assert fused(model) == [True, True]
    found = results(model, p=p)
    assert calls.count == 2
    wanted = results(unfused(model), p=p)
    assert calls.count == 2
    assert_same(found, wanted)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "own",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"], "rank_pattern": {"1.mlp.down_proj": 5}},
        {"rank_pattern": {"k_proj": 1, "up_proj": 7}, "alpha_pattern": {"v_proj": 2}},
    ],
    ids=["q and v", "down alone", "ranks"],
)
def test_some_targets_and_ranks(name: str, own: dict[str, Any], calls: Calls) -> None:
    """float64, 1e-9. Fails when z's columns are given to the wrong projection, or a group without
    adapters in front is taken for one with them."""
    model = model_with(name, config(**own, lora_dropout=0.1))
    found = results(model, p=0.1)
    assert calls.count == 2
    assert_same(found, results(unfused(model), p=0.1))


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_checkpointing(name: str, calls: Calls) -> None:
    """float64, 1e-9, dropout on: the second run draws the same bits, and layers do run twice. Fails
    when the shadowed forward skips checkpointing, or looks up the routing in backward."""
    model = model_with(name, config(lora_dropout=0.1))
    plain = results(model, p=0.1)
    assert calls.count == 2
    assert_same(results(model, p=0.1, checkpointing=True), plain)
    assert calls.count == 2 + 2 * 2


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("form", [None, "nf4"])
def test_bf16_is_as_near_to_the_truth_as_before(name: str, form: str | None) -> None:
    """Against float32, at most 1.2 times the error of the layers' own forward, over all gradients.
    Fails when a sum over rows is kept in bf16, or a product is rounded once more.

    Plain torch rounds between a product, its update and what is added; there it is 1.4 times."""
    model = model_with(name, config(), torch.bfloat16, form)
    exact = results(unfused(model).float())
    errors = []
    for one in (model, unfused(model)):
        found = results(one)
        parts = [found[key].double() - exact[key].double() for key in exact if key != "loss"]
        sizes = [exact[key].double().norm() for key in exact if key != "loss"]
        errors.append(sum(float(p.norm() / s) ** 2 for p, s in zip(parts, sizes, strict=True)))
    assert errors[0] <= (1.2 if native.isa() else 1.4) ** 2 * errors[1]


@pytest.mark.usefixtures("exact_norms")
def test_a_factor_scales_the_adapter(calls: Calls) -> None:
    """float64, 1e-9. Fails when the routing's factor is passed over."""
    model = model_with("llama", config())
    weights = (("default", -0.7),)
    found = results(model, weights=weights)
    assert calls.count == 2
    assert_same(found, results(unfused(model), weights=weights))


@pytest.mark.usefixtures("exact_norms")
def test_weighted_sets_and_the_base_alone(calls: Calls) -> None:
    """Two adapters on one layer run as they always did; none at all runs fused."""
    model = model_with("llama", config())
    attach(model, config(r=2), "other", seed=9)
    both = (("default", 0.5), ("other", 2.0))
    use(model, dict(both))
    found = results(model, weights=both)
    assert calls.count == 0
    assert_same(found, results(unfused(model), weights=both))
    found = results(model, weights=())
    assert calls.count == 2
    assert_same(found, results(unfused(model), weights=()))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_what_is_not_a_flat_batch_runs_as_it_always_did(calls: Calls) -> None:
    """Plain passes, caches, mixed rows, hooks, autocast. Fails when any of them is fused."""
    model = model_with("qwen2", config(), torch.float32)
    plain = unfused(model)
    assert torch.equal(logits(model), logits(plain))
    with disabled(model):
        logits(model)
    with mixed(model, [None]):
        logits(model)
    made = [
        one.generate(IDS[:, :5], max_new_tokens=3, do_sample=False, pad_token_id=0)
        for one in (model, plain)
    ]
    assert torch.equal(*made)
    with torch.autocast("cpu", torch.bfloat16):
        results(model)
    assert calls.count == 0
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    results(model)
    assert calls.count == 1
    hook.remove()
    results(model)
    assert calls.count == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()), "its activation is GELU"),
        (lambda layer: layer.self_attn.add_module("gate", nn.Identity()), "not built as expected"),
        (lambda layer: setattr(layer, "forward", layer.forward), "has been replaced"),
    ],
)
def test_a_layer_that_is_built_otherwise_is_left_alone(
    change: Callable[[Any], None], reason: str
) -> None:
    """Fails when the class name alone decides."""
    model = build("llama")
    change(model.model.layers[1])
    attach(model, config())
    found = model.decal_adapters.fused
    assert found["model.layers.0"] == ""
    assert reason in found["model.layers.1"]
    line = fused_line(model)
    assert line is not None
    assert line.startswith("1 of 2 decoder layers run fused (")
    assert reason in line


def test_float64_is_left_alone(calls: Calls) -> None:
    """Also where the model was cast after its layers were fused. Fails when packed batches get more
    exact norms than padded ones."""
    model = model_with("llama", config(), torch.float32)
    results(model.double())
    assert calls.count == 0
    assert fused(model_with("llama", config())) == [False, False]


@pytest.mark.parametrize("own", [{"lora_bias": True}, {"bias": "lora_only"}])
def test_biases_that_are_trained_are_not_fused(own: dict[str, Any], calls: Calls) -> None:
    """Fails when such an adapter is taken for scale * B A alone."""
    model = model_with("llama", config(**own), torch.float32)
    assert fused(model) == [False, False]
    results(model)
    assert calls.count == 0


@pytest.mark.parametrize("wrong", ["window", "scale", "bias", "all"])
def test_the_proof_sees_what_is_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, where it is hardest to tell from rounding. Fails when the proof compares results
    only by how near the residual is."""
    real = proof.run

    def run(plan: Any, x: Tensor) -> Tensor:
        how, (qkv, *rest) = plan.attention, plan.groups
        if wrong == "window":
            plan = plan._replace(attention=how._replace(window=3))
        if wrong == "scale":
            plan = plan._replace(attention=how._replace(scale=1.1 * how.scale))
        if wrong == "bias":
            lines = (qkv.lines[0]._replace(bias=None), *qkv.lines[1:])
            plan = plan._replace(groups=(qkv._replace(lines=lines), *rest))
        y: Tensor = real(plan, x)
        return y + 0.1 * (y - x) if wrong == "all" else y

    monkeypatch.setattr(proof, "run", run)
    model = build("qwen2", torch.bfloat16)
    attach(model, config())
    assert fused(model) == [False, False]


def test_detach_gives_every_layer_its_own_forward_back() -> None:
    """With the last adapter and with one of two. Fails when the shadow stays behind."""
    model = build("llama")
    before = logits(model)
    attach(model, config())
    attach(model, config(), "other")
    assert all("forward" in layer.__dict__ for layer in model.model.layers)
    detach(model, "default")
    assert all("forward" in layer.__dict__ for layer in model.model.layers)
    detach(model)
    assert not any({"forward", "decal_block"} & layer.__dict__.keys() for layer in model.modules())
    assert torch.equal(logits(model), before)


@pytest.mark.usefixtures("exact_norms")
def test_copies_compute_with_their_own_parameters() -> None:
    """Fails when a copy's forward is bound to the layer it was copied from."""
    model = model_with("llama", config())
    wanted = results(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(results(twin), wanted, 0.0)


def test_names_and_state_stay() -> None:
    """Fails when a block is registered as a module."""
    model = build("qwen3")
    attach(model, config())
    plain = unfused(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]


def test_what_is_kept_for_backward() -> None:
    """Bytes per layer, counted from the list in `pieces.py`. Fails when a normed input, a mask or
    silu(gate) * up is kept."""
    model = model_with("llama", config(lora_dropout=0.1), torch.bfloat16)
    layer, total = model.model.layers[0], sum(LENGTHS)
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    x = torch.randn(1, total, 54).bfloat16().requires_grad_()
    block = layer.decal_block
    generator = torch.Generator().manual_seed(0)
    kwargs = proof._kwargs(block, torch.bfloat16, generator)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    angles = torch.randn(1, total, 10).bfloat16()
    kwargs |= {"position_embeddings": (angles, angles), "cu_seq_lens_q": ends}
    plan = block.plan(Routing((("default", 1.0),), dropout_key(0.1)), x[0], kwargs)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = swap.run(plan, x)
    heads, kv, hidden, inner, ranks = 60, 20, 54, 75, 7 * 3
    values = total * (hidden + heads + 2 * kv + heads + hidden + 2 * inner + ranks)
    words = total * (2 + 6)  # one over the root for each norm, one log-sum-exp for each head
    assert sum(kept.values()) == 2 * values + 4 * words
    y.sum().backward()


@pytest.mark.parametrize("piece", ["q_proj", "o_proj", "down_proj"])
def test_a_weight_that_is_written_to_is_refused(
    piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between forward and backward. Fails when weights are held without a guard."""
    model = model_with("llama", config(), torch.float32, "nf4")
    layer = next(value for key, value in adapted_layers(model).items() if piece in key)
    codes, real = layer.base_layer.weight_packed, pieces.check_frozen

    def write(ctx: Any, *more: Any) -> None:
        codes.copy_(codes.flip(0))
        real(ctx, *more)

    monkeypatch.setattr(pieces, "check_frozen", write)
    with pytest.raises(RuntimeError, match="written to between forward and backward"):
        results(model)
