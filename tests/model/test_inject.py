from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config

from decal.adapters import AdaptedLayer, DropoutKey, Routing, routed
from decal.config import LoraConfig
from decal.errors import AdapterError, TargetError, TrainingError
from decal.model.adapter import Adapter
from decal.model.inject import (
    active_routing,
    adapted_layers,
    adapter_state,
    adapters_of,
    attach,
    detach,
    disabled,
    load_state,
    trainable_line,
    trainable_parameters,
    use,
)
from decal.quant.base import Recipe
from decal.quant.linear import QuantLinear
from decal.store.peft import LoraTensors

LLAMA = LlamaConfig(
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=61,
    pad_token_id=0,
)
IDS = torch.tensor([[5, 9, 60, 3, 3], [7, 8, 1, 2, 4]])
ACTING = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, init_lora_weights=False)


def llama(config: Any = LLAMA) -> Any:
    torch.manual_seed(1)
    return Auto.from_config(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "bytes": {n: t.clone() for n, t in model.state_dict().items()},
        "keys": set(model.__dict__),
    }


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        Qwen2Config(**{k: getattr(LLAMA, k) for k in ("hidden_size", "vocab_size")},
                    intermediate_size=44, num_hidden_layers=1, num_attention_heads=6,
                    num_key_value_heads=2),
        GPT2Config(n_embd=36, n_layer=1, n_head=4, vocab_size=61),
    ],
    ids=["llama", "qwen2", "gpt2"],
)  # fmt: skip
def test_detach_leaves_the_model_as_it_was(config: Any) -> None:
    """Objects, bytes, requires_grad and modes. Mutation: put a new nn.Linear back."""
    model = llama(config)
    next(model.parameters()).requires_grad_(False)
    list(model.modules())[3].train()
    before, reference = snapshot(model), logits(model)
    attach(model, ACTING)
    model.train()
    attach(model, ACTING, "second", seed=1)
    assert not torch.equal(logits(model), reference)
    detach(model)
    after = snapshot(model)
    torch.testing.assert_close(after.pop("bytes"), before.pop("bytes"), rtol=0, atol=0)
    assert after == before
    assert torch.equal(logits(model), reference)
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())


def test_attach_freezes_the_base_and_starts_from_it() -> None:
    """B = 0, so the logits are the base's bits. Mutation: draw B like A."""
    model = llama()
    reference = logits(model)
    found = attach(model, LoraConfig(r=3, lora_alpha=5))
    assert torch.equal(logits(model), reference)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 7 * 2
    assert all(".adapters.default." in n for n in names)
    assert trainable_parameters(model)[0] == found.parameters
    total = sum(p.numel() for p in model.parameters())
    assert trainable_line(model) == (
        f"trainable params: {found.parameters:,} || all params: {total:,} || "
        f"trainable%: {100 * found.parameters / total:.4f}"
    )


def test_start_does_not_depend_on_the_other_targets() -> None:
    """Mutation: one generator for the whole model."""
    few, all_ = llama(), llama()
    attach(few, LoraConfig(r=3, target_modules=("v_proj",)), seed=4)
    attach(all_, LoraConfig(r=3), seed=4)
    both = adapter_state(all_)
    for name, parts in adapter_state(few).items():
        assert torch.equal(parts.A, both[name].A)


def test_projections_of_one_input_drop_the_same_features() -> None:
    """Mutation: salt each layer with its own name, as one mask per projection (peft's way)."""
    model = llama()
    attach(model, ACTING, "a")
    attach(model, ACTING, "b")
    layers: dict[str, Any] = adapted_layers(model)
    block = "model.layers.0."
    inputs = {
        n.removeprefix(block): layer.adapters["a"].input_salt
        for n, layer in layers.items()
        if n.startswith(block)
    }
    q, k, v, o, gate, up, down = inputs.values()
    assert q == k == v
    assert gate == up
    assert len({q, o, gate, down}) == 4
    first, other = layers[block + "mlp.up_proj"], layers["model.layers.1.mlp.up_proj"]
    assert other.adapters["a"].input_salt != up
    assert first.adapters["b"].input_salt == up
    assert first.adapters["b"].adapter_salt != first.adapters["a"].adapter_salt


def test_weighted_set_is_the_weighted_sum_of_deltas() -> None:
    """float64 on one linear model, rtol 1e-9. Mutation: average A and B separately (F17)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 11), nn.Linear(11, 7)).double().eval()
    x = torch.randn(5, 13, dtype=torch.float64)
    W = [layer.weight.detach().clone() for layer in model]
    b = [layer.bias.detach() for layer in model]
    attach(model, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False), "a", seed=1)
    attach(
        model,
        LoraConfig(r=2, lora_alpha=7, use_rslora=True, init_lora_weights=False),
        "b",
        seed=2,
    )
    model.double()
    use(model, {"a": 0.7, "b": 0.3})
    deltas = [
        0.7 * (5 / 3) * adapter_state(model, "a")[str(i)].B @ adapter_state(model, "a")[str(i)].A
        + 0.3
        * (7 / 2**0.5)
        * adapter_state(model, "b")[str(i)].B
        @ adapter_state(model, "b")[str(i)].A
        for i in range(2)
    ]
    wanted = ((x @ (W[0] + deltas[0]).T + b[0]) @ (W[1] + deltas[1]).T) + b[1]
    torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-11)


def test_use_acts_at_once_and_as_a_block() -> None:
    """Mutation: let __exit__ go back to the first adapter instead of the one before."""
    model = llama()
    base = logits(model)
    attach(model, ACTING, "a", seed=1)
    a = logits(model)
    attach(model, ACTING, "b", seed=2)
    b = logits(model)
    assert not torch.equal(a, b)
    use(model, "a")
    assert torch.equal(logits(model), a)
    with use(model, {"b": 1.0}):
        assert torch.equal(logits(model), b)
        trainable = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == {"b"}
        with disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), b)
    assert torch.equal(logits(model), a)
    assert active_routing(model) == Routing((("a", 1.0),))
    with routed(Routing((("b", 1.0),))):
        assert torch.equal(logits(model), b)
        with disabled(model):
            assert torch.equal(logits(model), base)


def test_detach_one_of_two() -> None:
    model = llama()
    attach(model, ACTING, "a", seed=1)
    a = logits(model)
    attach(model, LoraConfig(**{**ACTING.model_dump(), "target_modules": ("lm_head",)}), "b")
    assert len(adapted_layers(model)) == 15
    detach(model, "b")
    assert list(adapters_of(model)) == ["a"]
    assert len(adapted_layers(model)) == 14
    assert torch.equal(logits(model), a)
    attach(model, ACTING, "b", seed=2)
    use(model, {"a": 0.5, "b": 0.5})
    detach(model, "a")
    assert active_routing(model) == Routing((("b", 0.5),))
    detach(model, "b")
    assert adapters_of(model) == {}


def test_names_are_checked() -> None:
    model = llama()
    for refused in ("", "a.b", "a/b", "a b"):
        with pytest.raises(AdapterError, match="cannot name an adapter"):
            attach(model, ACTING, refused)
    with pytest.raises(AdapterError, match="the model has no adapters"):
        use(model, "default")
    attach(model, ACTING, "tickets")
    layers = [id(m) for m in model.modules()]
    with pytest.raises(AdapterError, match="has an adapter `tickets` already") as caught:
        attach(model, ACTING, "tickets")
    assert caught.value.hint == 'detach(model, "tickets") first, or choose another name'
    assert [id(m) for m in model.modules()] == layers
    with pytest.raises(AdapterError, match="no adapter `ticket`") as caught:
        use(model, "ticket")
    assert caught.value.hint == "did you mean `tickets`?"
    with pytest.raises(AdapterError, match="no adapter `x`"):
        use(model, {"tickets": 0.5, "x": 0.5})
    with pytest.raises(AdapterError, match="has the weight nan"):
        use(model, {"tickets": float("nan")})
    with pytest.raises(AdapterError, match="no adapter named"):
        use(model, {})
    with pytest.raises(AdapterError, match="no adapter `x`"):
        detach(model, "x")


def test_a_failed_attach_changes_nothing() -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(TargetError, match="1 of 2 target_modules match no module"):
        attach(model, LoraConfig(target_modules=("q_proj", "vproj")))
    after = snapshot(model)
    torch.testing.assert_close(after.pop("bytes"), before.pop("bytes"), rtol=0, atol=0)
    assert after == before


def test_nothing_wraps_twice() -> None:
    model = llama()
    for name in ("a", "b", "c"):
        attach(model, ACTING, name)
    for layer in adapted_layers(model).values():
        assert type(layer.base_layer) is nn.Linear
        assert list(layer.adapters) == ["a", "b", "c"]
        assert [n for n, m in layer.named_modules() if isinstance(m, AdaptedLayer)] == [""]


def test_a_module_that_stands_twice_is_adapted_in_both_places() -> None:
    """Mutation: replace the child of the first parent only; half the calls see no adapter."""
    shared = nn.Linear(5, 5)
    model = nn.ModuleDict(
        {"one": nn.Sequential(shared), "two": nn.Sequential(nn.Linear(5, 5), shared)}
    )
    found = attach(model, ACTING)
    assert found.names == ("one.0", "two.0")
    assert model["one"][0] is model["two"][1]
    assert isinstance(model["one"][0], AdaptedLayer)
    detach(model)
    assert model["one"][0] is model["two"][1] is shared


def trained(model: Any) -> Adapter:
    other = copy.deepcopy(model)
    attach(other, ACTING, seed=9)
    return Adapter.from_model(other, source="out/sft", base="org/small")


def test_a_trained_adapter_is_loaded_whole() -> None:
    """Mutation: keep the starting values."""
    model = llama()
    adapter = trained(model)
    attach(model, adapter)
    for name, parts in adapter_state(model).items():
        assert torch.equal(parts.A, adapter.tensors[name][0])
        assert torch.equal(parts.B, adapter.tensors[name][1])
        assert parts.A is not adapter.tensors[name][0]


def test_an_adapter_of_another_width_is_refused_as_the_design_says() -> None:
    """F7. Counts first, the first offender with both values, then where it came from."""
    small = LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 24})
    adapter = trained(llama(small))
    model = llama()
    with pytest.raises(AdapterError) as caught:
        attach(model, adapter)
    assert str(caught.value).splitlines() == [
        "adapter `out/sft` does not fit base `LlamaForCausalLM`: "
        "14 of 14 tensors have the wrong shape",
        "  model.layers.0.self_attn.q_proj: adapter expects in=24, base has in=36  (and 13 more)",
        "hint: the adapter was trained on `org/small` (adapter_config.json)",
    ]
    assert adapters_of(model) == {}
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("drop", "1 of 14 target modules have no tensors"),
        ("prefix", "14 of 14 modules are not in the base, 14 of 14 target modules have no tensors"),
        ("extra", "1 of 15 modules are not in the base"),
        ("rank", "1 of 14 tensors have the wrong shape"),
    ],
)
def test_tensors_and_slots_must_pair_off(change: str, text: str) -> None:
    """F7: peft loads each of these with a warning at most. Mutation: skip unknown modules."""
    model = llama()
    adapter = trained(model)
    first = "model.layers.0.self_attn.q_proj"
    tensors = dict(adapter.tensors)
    if change == "drop":
        del tensors[first]
    elif change == "prefix":
        tensors = {"base_model." + n: t for n, t in tensors.items()}
    elif change == "extra":
        tensors["model.layers.7.self_attn.q_proj"] = tensors[first]
    else:
        A, B, _ = tensors[first]
        tensors[first] = LoraTensors(A[:2], B[:, :2])
    adapter = replace(adapter, tensors=tensors)
    with pytest.raises(AdapterError) as caught:
        attach(model, adapter)
    assert caught.value.message.endswith(text)
    if change == "rank":
        assert f"{first}: adapter expects r=2, its config says r=3" in caught.value.details


def test_load_state_is_strict() -> None:
    model = llama()
    attach(model, ACTING)
    state = {n: (p.A.detach() + 1, p.B.detach() + 1) for n, p in adapter_state(model).items()}
    first = next(iter(state))
    for broken in (
        {n: t for n, t in state.items() if n != first},
        {**state, "x": state[first]},
        {**state, first: (state[first][0].T, state[first][1])},
    ):
        before = {n: p.A.clone() for n, p in adapter_state(model).items()}
        with pytest.raises(AdapterError, match=r"1 of 1[45] modules do not fit adapter `default`"):
            load_state(model, "default", broken)
        assert all(torch.equal(before[n], p.A) for n, p in adapter_state(model).items())
    load_state(model, "default", state)
    assert torch.equal(adapter_state(model)[first].B, state[first][1])


def test_adapters_stay_float32_on_a_bf16_base_and_after_casts() -> None:
    model = llama().bfloat16()
    attach(model, ACTING)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


class Quantized(nn.Module):
    """A BaseLayer whose storage has another size than what it stands for."""

    kind, shape = "linear", (9, 15)

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.zeros(68, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(9), requires_grad=False)

    def weight(self) -> Tensor:
        return torch.zeros(9, 15)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight().T + self.bias


def test_quantized_layers_count_as_what_they_stand_for() -> None:
    """Mutation: sum numel over all parameters."""
    model = nn.Sequential(Quantized())
    assert trainable_parameters(model) == (0, 9 * 15 + 9)
    with pytest.raises(TrainingError, match="0 parameters are trainable"):
        trainable_line(model)
    attach(model, ACTING)
    assert trainable_parameters(model) == (3 * 24, 9 * 15 + 9 + 3 * 24)
    assert model(torch.randn(2, 15)).shape == (2, 9)


def test_a_quantized_base_trains_and_comes_back() -> None:
    """NF4 layers: counts, gradients, and the same bits after detach.

    Mutation: let `base_view` take nn.Linear only (nothing but the head would be left to adapt).
    """
    model = llama().bfloat16()
    plain = trainable_parameters(model)[1]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, QuantLinear.from_linear(module, Recipe(format="nf4")))
    reference = logits(model)
    found = attach(model, ACTING)
    assert len(found.names) == 14
    assert trainable_parameters(model) == (found.parameters, plain + found.parameters)
    assert not torch.equal(logits(model), reference)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    detach(model)
    assert torch.equal(logits(model), reference)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_training_trains_the_adapter_only_and_generate_works() -> None:
    """One step with dropout, gradient checkpointing in the model, then generate."""
    model: LlamaForCausalLM = llama()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    attach(model, LoraConfig(r=3, lora_alpha=5, lora_dropout=0.2, init_lora_weights=False))
    key = DropoutKey(
        seed=0,
        epoch=0,
        sample_ids=torch.tensor([[0] * 5, [1] * 5]),
        positions=torch.arange(5).repeat(2, 1),
    )
    routing = Routing((("default", 1.0),), key)

    def gradients() -> list[Tensor]:
        with routed(routing):
            model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return [g for g in found if g is not None]

    plain = gradients()
    assert len(plain) == 28
    assert all(g.any() for g in plain)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)
    model.gradient_checkpointing_disable()
    model.eval()
    out = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 8)
    detach(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, base[name])
