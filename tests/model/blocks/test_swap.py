"""What people do to a model whose layers are fused: the layers' own results, or fused ones."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal.model import attention
from decal.model.blocks import swap
from decal.model.inject import attach, detach
from tests.model.blocks.test_blocks import (
    IDS,
    LENGTHS,
    Calls,
    assert_same,
    config,
    fused,
    logits,
    model_with,
    results,
    unfused,
)
from tests.zoo import build

ROOM = 1e-4
"""Of float32, over two layers: differences in the order of sums."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def other_activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.GELU()


def other_mlp(layer: Any) -> None:
    layer.mlp = nn.Identity()


def other_norm(layer: Any) -> None:
    layer.input_layernorm = doubled(layer.input_layernorm)


def one_more(layer: Any) -> None:
    layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Tanh())


def doubled(norm: Any) -> Any:
    """The same norm of another class, whose forward returns twice as much."""

    class Doubled(type(norm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    norm.__class__ = Doubled
    twin = Doubled(len(norm.weight)).to(norm.weight.dtype).requires_grad_(False)
    twin.load_state_dict(norm.state_dict())
    return twin


@pytest.mark.parametrize("change", [other_activation, other_mlp, other_norm, one_more])
def test_parts_replaced_after_attach_are_what_runs(
    change: Callable[[Any], None], calls: Calls
) -> None:
    """Fails when the block computes with the modules that stood there at attach."""
    model = model_with("llama", config(), torch.float32)
    change(model.model.layers[0])
    found = results(model)
    assert calls.count == 1
    assert_same(found, results(unfused(model)), ROOM)


def test_layers_of_one_class_need_parts_of_one_class_to_share_a_proof() -> None:
    """Fails when the second layer is taken for proven by the first."""
    model = build("llama")
    doubled(model.model.layers[1].input_layernorm)
    attach(model, config(), seed=4)
    assert fused(model) == [True, False]
    assert_same(results(model), results(unfused(model)), ROOM)


def test_hooks_on_all_modules_see_all_modules(calls: Calls) -> None:
    """Fails when only a module's own hooks are looked at."""
    model, seen = model_with("llama", config(), torch.float32), []
    hook = nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call[0]))
    try:
        results(model)
    finally:
        hook.remove()
    assert calls.count == 0
    assert {layer.mlp for layer in model.model.layers} <= {*seen}


def test_asking_for_hidden_states_once_does_not_end_fusing(calls: Calls) -> None:
    """transformers leaves hooks that record attention weights behind. Fails when they count."""
    model = model_with("llama", config(), torch.float32)
    with torch.no_grad():
        whole = model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    assert len(whole.hidden_states) == 3
    results(model)
    assert calls.count == 2


def test_a_pickled_model_computes_with_its_own_parameters(calls: Calls) -> None:
    """And can be detached and attached to. Fails when the shadow is pickled as a method, which
    comes back as the class's own."""
    model = model_with("llama", config(), torch.float32)
    wanted, file = results(model), io.BytesIO()
    torch.save(model, file)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    calls.count = 0
    assert_same(results(twin), wanted, 0.0)
    assert calls.count == 2
    detach(twin)
    attach(twin, config())
    assert fused(twin) == [True, True]


def test_a_second_backward_gives_the_same_gradients(calls: Calls) -> None:
    """With retain_graph. Fails when backward writes over what forward kept."""
    model = model_with("qwen3", config(), torch.bfloat16, "nf4")
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = flat(model, LENGTHS).float().square().sum()
    assert calls.count == 2
    first, second = (torch.autograd.grad(loss, trained, retain_graph=True) for _ in "ab")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def flat(model: Any, lengths: tuple[int, ...]) -> Tensor:
    ends = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    own = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "use_cache": False}
    own |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    ids = IDS[:, : sum(lengths)]
    with attention.flat_attention(model):
        found: Tensor = model(input_ids=ids, position_ids=positions, **own).logits
    return found


@pytest.mark.parametrize("lengths", [(1,), (0, 3, 0, 5), (1, 1)])
def test_lengths_at_the_edge(lengths: tuple[int, ...], calls: Calls) -> None:
    """Fails when an empty sample or a single token is no sample."""
    model = model_with("qwen3", config(), torch.float32)
    found = flat(model, lengths)
    assert calls.count == 2
    torch.testing.assert_close(found, flat(unfused(model), lengths), rtol=0, atol=1e-4)


def test_samples_must_cover_the_rows() -> None:
    """Fails when rows after the last sample come back without values."""
    model = model_with("llama", config(), torch.bfloat16)
    ends = torch.tensor((0, 3), dtype=torch.int32)
    own = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 3, "max_length_k": 3}
    with attention.flat_attention(model), pytest.raises(ValueError, match="from 0 to 3"):
        model(input_ids=IDS[:, :5], use_cache=False, **own)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        lambda: torch.device("meta"),
    ],
    ids=["autocast", "inference mode", "default device"],
)
def test_where_attach_is_called_decides_nothing(context: Callable[[], Any]) -> None:
    """Fails when the proof runs in whatever surrounds it."""
    model = build("llama")
    with context():
        attach(model, config(), seed=4)
    assert fused(model) == [True, True]


def test_a_base_made_in_inference_mode_runs_unfused() -> None:
    """Autograd cannot keep its tensors. Fails when attach raises, or asks for their versions."""
    with torch.inference_mode():
        model = build("llama")
        attach(model, config())
        assert fused(model) == [False, False]
        assert logits(model).isfinite().all()
        assert flat(model, LENGTHS).isfinite().all()


def test_threads_train_models_beside_each_other() -> None:
    """Fails when kernels or routing keep something that two passes share."""
    models = [model_with(name, config(), torch.bfloat16, "nf4") for name in ("qwen2", "qwen3")]
    wanted, found = [results(one, p=0.1) for one in models], [[] for _ in models]

    def train(i: int) -> None:
        found[i] += [results(models[i], p=0.1) for _ in range(3)]

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runs, alone in zip(found, wanted, strict=True):
        assert len(runs) == 3
        for run in runs:
            assert_same(run, alone, 1e-6)


def test_release_leaves_forwards_of_others() -> None:
    """Fails when every shadowed forward is taken for ours."""
    model = build("llama")
    attach(model, config())
    layer = model.model.layers[0]
    layer.forward = own = lambda *args, **kwargs: args[0]
    swap.release(model)
    assert layer.forward is own
