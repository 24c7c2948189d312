"""Rows of docs/failures.md on merging: which base, what rounding leaves, tied heads, scalings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bench.failures_row import Case, Heard, MakeRow, Row, Seen, quoted, watched
from decal import demo
from decal.config import LoraConfig
from decal.model.inject import adapter_state, attach, use
from decal.verbs.load import load_base
from decal.verbs.merge import Merged, merge
from decal.verbs.verify import verify
from decal.weights import merge as files
from decal.weights.delta import FileDelta, add_delta, cast
from tests import zoo
from tests.failures.situations import LIGHT, draw, logits, off, read, tuned

BASE = demo.base_path()
IDS = torch.arange(5, 30)[None]
RATIOS = (LIGHT, 0.037, 0.37)
"""Sizes of the delta relative to the weight: a light fine-tune, a usual one, a heavy one."""
RIGHT = 0.25
"""Up to this much of the adapter's effect counts as right where bf16 has to round."""


def plain(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def in_4_bit(dtype: torch.dtype = torch.float32) -> Any:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(BASE, quantization_config=settings, dtype=dtype)


def codes(model: Any) -> Tensor:
    """All 4-bit codes of a model of bitsandbytes."""
    found = [m.weight.data.flatten() for m in model.modules() if type(m).__name__ == "Linear4bit"]
    packed = torch.cat(found)
    return torch.cat([packed >> 4, packed & 15])


def merged(folder: Path, out: Path, **how: Any) -> tuple[Merged, Tensor]:
    """decal's merge, and the logits of what was written."""
    done = merge(None, folder, out, **how)
    return done, logits(plain(out))


def f1(folder: Path) -> Row:
    """Merging into 4 bit."""
    cases = []
    for ratio in RATIOS:
        adapter = folder / f"{ratio}"
        trained = tuned(adapter, ratio=ratio, quant="nf4")
        with watched() as heard:
            wanted, alone = _in_peft(adapter), logits(in_4_bit())
            # A fresh model: on a CPU a forward pass packs the weights anew, see below.
            model = peft.PeftModel.from_pretrained(in_4_bit(), adapter).merge_and_unload()
            moved = float((codes(model) != codes(in_4_bit())).float().mean())
            far = off(logits(model), wanted, alone)
        done, ours = merged(adapter, folder / f"{ratio}-merged")
        own = off(ours, *trained)
        assert done.report.verification.error is not None
        cases.append(
            Case(
                what=f"a delta of {100 * ratio:g} % of the weights' size, base in NF4",
                seen=[
                    Seen(
                        who="peft",
                        verdict=heard.verdict(far < RIGHT, "rounding"),
                        text=f"merge_and_unload quantizes again: {100 * moved:.2f} % of the codes "
                        f"change, logits are off by {far:.2f} of the adapter's effect; "
                        f"{heard.words('rounding')}",
                    ),
                    Seen(
                        who="decal",
                        verdict="right" if own < RIGHT else "silent",
                        text=f"writes {done.report.dtype} onto the dequantized weights: off by "
                        f"{own:.3f}; reports that rounding changed the delta by "
                        f"{100 * done.report.verification.error:.1f} %",
                    ),
                    _packed_again(adapter, folder / f"{ratio}-packed", trained),
                ],
            )
        )
    return Row(
        title="A QLoRA adapter merged and quantized again is lost",
        failure="A 4-bit step is larger than the delta of a light fine-tune, so that most codes "
        "stay what they were. Here a result counts as right if it is off by less than "
        f"{RIGHT:g} of the adapter's effect, which leaves room for bf16.",
        cases=[*cases, _after_a_pass(folder)],
        threads=("peft#2321", "peft#1043", "peft#2105", "peft#2501", "mlx-lm#1172", "mflux#668"),
    )


def _packed_again(adapter: Path, out: Path, trained: tuple[Tensor, Tensor]) -> Seen:
    """decal, asked to quantize what it merged."""
    far, kept = math.inf, 0.0
    with watched() as heard:
        done = merge(None, adapter, out, quantize="nf4")
        model, _ = load_base(out, dtype="float32", device="cpu")
        far = off(logits(model), *trained)
        kept = done.packed["survival"] if done.packed else 0.0
    text = f"reports that {100 * kept:.1f} % of the delta survive; off by {far:.2f}"
    return Seen(
        who="decal, --quantize nf4",
        verdict="told" if heard.error is None else "error",
        text=text if heard.error is None else heard.words(),
    )


def _in_peft(adapter: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(in_4_bit(dtype), adapter))


def _after_a_pass(folder: Path) -> Case:
    """On a CPU bitsandbytes packs weights anew in the first forward pass."""
    adapter = folder / "bf16"
    trained = tuned(adapter, ratio=RATIOS[1], quant="nf4", dtype="bfloat16")
    with watched() as heard:
        alone = logits(in_4_bit(torch.bfloat16))
        model = peft.PeftModel.from_pretrained(in_4_bit(torch.bfloat16), adapter)
        wanted = logits(model)
        far = off(logits(model.merge_and_unload()), wanted, alone)
    _, ours = merged(adapter, folder / "bf16-merged")
    own = off(ours, *trained)
    return Case(
        what=f"a delta of {100 * RATIOS[1]:g} %, in bf16 on a CPU, merged after one forward pass",
        seen=[
            Seen(
                who="peft and bitsandbytes",
                verdict=heard.verdict(far < RIGHT, "forward"),
                text=f"logits off by {far:.1f} of the adapter's effect; {heard.words()}",
            ),
            Seen(
                who="decal",
                verdict="right" if own < RIGHT else "silent",
                text=f"off by {own:.3f}: packed weights never change",
            ),
        ],
    )


def f2(folder: Path) -> Row:
    """Onto which base."""
    cases = []
    for ratio in RATIOS:
        adapter = folder / f"{ratio}"
        trained = tuned(adapter, ratio=ratio, quant="nf4")
        with watched() as heard:
            model = peft.PeftModel.from_pretrained(plain(BASE), adapter).merge_and_unload()
            far = off(logits(model), *trained)
        done, ours = merged(adapter, folder / f"{ratio}-merged", dtype="fp32")
        apart = done.report.verification.quantization
        assert apart is not None
        cases.append(
            Case(
                what=f"a delta of {100 * ratio:g} % of the weights' size, all in float32",
                seen=[
                    Seen(
                        who="peft",
                        verdict=heard.verdict(far < RIGHT),
                        text=f"onto the 16-bit base, as tutorials do: logits are off by {far:.2f} "
                        f"of the adapter's effect; {heard.words()}",
                    ),
                    Seen(
                        who="decal",
                        verdict="right" if off(ours, *trained) < 1e-3 else "silent",
                        text=f"onto the {done.onto} base by default: off by "
                        f"{off(ours, *trained):.1e}; reports that the original weights are "
                        f"{apart['all']:.2f} deltas away",
                    ),
                ],
            )
        )
    return Row(
        title="A QLoRA adapter merged onto a base that it was not trained on",
        failure="Training computed with the dequantized 4-bit weights. Merged onto the original "
        "ones, the rounding of quantization comes in as a second delta.",
        cases=cases,
        threads=("peft#2105", "qlora#254", "unsloth-zoo#810", "trl#1193"),
    )


def f3(folder: Path) -> Row:
    """Rounding to bf16."""
    tuned(folder / "a", ratio=LIGHT)
    stored = load_file(BASE / "model.safetensors")
    adapter = read(folder / "a")
    meant = {
        f"{m}.weight": adapter.config.scaling_of(m) * p.B @ p.A for m, p in adapter.tensors.items()
    }

    def lost(weights: dict[str, Tensor]) -> str:
        moved = {key: weights[key].float() - stored[key].float() for key in meant}
        wrong = torch.cat([(moved[key] - meant[key]).flatten() for key in meant]).norm()
        error = wrong / torch.cat([delta.flatten() for delta in meant.values()]).norm()
        still = torch.cat([(moved[key] == 0).flatten() for key in meant]).float().mean()
        return f"error of the delta {100 * error:.1f} %, {100 * still:.1f} % of weights unmoved"

    with watched() as heard:
        model = peft.PeftModel.from_pretrained(plain(BASE, torch.bfloat16), folder / "a")
        model = model.merge_and_unload(safe_merge=True)
    done = merge(None, folder / "a", folder / "m").report
    wide = merge(None, folder / "a", folder / "w", dtype="fp32").report
    assert done.unmoved is not None
    assert done.verification.error is not None
    assert wide.verification.error is not None
    return Row(
        title="bf16 rounds a small delta away, unsaid",
        failure="bf16 has 8 bits of precision. What is smaller than half of a weight's last place "
        "vanishes in the sum.",
        cases=[
            Case(
                what=f"a delta of {100 * LIGHT:g} % of the weights' size, merged in bf16",
                seen=[
                    Seen(
                        who="peft",
                        verdict=heard.verdict(False),
                        text=f"{lost(model.state_dict())}; {heard.words()}",
                    ),
                    Seen(
                        who="decal",
                        verdict="told",
                        text=f"{lost(load_file(folder / 'm' / 'model.safetensors'))}; reports "
                        f"{100 * done.verification.error:.1f} % and {100 * done.unmoved:.1f} %; "
                        f"with --dtype fp32 {100 * wide.verification.error:.2g} %",
                    ),
                ],
            )
        ],
        threads=("torchtune#1101", "peft#1388", "unsloth#3091"),
    )


def f4(folder: Path) -> Row:
    """Merges that went wrong."""
    tuned(folder / "a", ratio=LIGHT)
    large = zoo.save("llama", folder / "base", torch.float16)
    tuned(folder / "large", large, ratio=1e7)
    return Row(
        title="What was merged is not compared with what was meant",
        failure="A merge is checked for NaN, on request. Whether the file holds base and adapter "
        "is looked at by nobody.",
        cases=[
            _faulty(folder, "a delta of zeros in one layer of 28 (a fault put into both)"),
            _damaged(folder, "one number of one merged weight, damaged later on the disk"),
            _overflow(folder / "large", large, "a sum that float16 cannot hold"),
        ],
    )


def _faulty(folder: Path, what: str) -> Case:
    module = "model.layers.2.mlp.up_proj"
    model = peft.PeftModel.from_pretrained(plain(BASE, torch.bfloat16), folder / "a")
    layer: Any = model.base_model.model.get_submodule(module)
    zeros = torch.zeros_like(layer.base_layer.weight)
    with mock.patch.object(layer, "get_delta_weight", return_value=zeros), watched() as heard:
        model.merge_and_unload(safe_merge=True)

    def faulty(key: str, weight: Tensor, delta: FileDelta, dtype: torch.dtype) -> Tensor:
        wrong = key == f"{module}.weight"
        return cast(key, weight, dtype) if wrong else add_delta(key, weight, delta, dtype)

    with mock.patch.object(files, "add_delta", faulty), watched() as ours:
        merge(None, folder / "a", folder / "faulty")
    return _told_or_not(what, heard, ours)


def _damaged(folder: Path, what: str) -> Case:
    key = "model.layers.2.mlp.up_proj.weight"
    model = peft.PeftModel.from_pretrained(plain(BASE, torch.bfloat16), folder / "a")
    model.merge_and_unload(safe_merge=True).save_pretrained(folder / "theirs")
    merge(None, folder / "a", folder / "ours")
    for place in (folder / "theirs", folder / "ours"):
        tensors = load_file(place / "model.safetensors")
        tensors[key].view(-1)[1234] += 0.5
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with watched() as heard:
        plain(folder / "theirs")
    problems = verify(folder / "ours")["problems"]
    found = [f"{len(problems)} problems", *(quoted(text, 150) for text in problems)]
    return Case(
        what=what,
        seen=[
            Seen(
                who="transformers",
                verdict=heard.verdict(False),
                text=f"from_pretrained: {heard.words()}",
            ),
            Seen(
                who="decal verify",
                verdict="found" if problems else "silent",
                text="; ".join(found),
            ),
        ],
    )


def _overflow(adapter: Path, base: Path, what: str) -> Case:
    with watched() as heard:
        model = peft.PeftModel.from_pretrained(plain(base, torch.float16), adapter)
        model.merge_and_unload()
    with watched() as safe:
        model = peft.PeftModel.from_pretrained(plain(base, torch.float16), adapter)
        model.merge_and_unload(safe_merge=True)
    with watched() as ours:
        merge(None, adapter, adapter.with_name("overflow"))
    case = _told_or_not(what, safe, ours)
    first = Seen(
        who="peft", verdict=heard.verdict(False), text=f"merge_and_unload: {heard.words()}"
    )
    return Case(what=what, seen=[first, *case.seen])


def _told_or_not(what: str, heard: Heard, ours: Heard) -> Case:
    return Case(
        what=what,
        seen=[
            Seen(who="peft, safe_merge", verdict=heard.verdict(False), text=heard.words()),
            Seen(who="decal", verdict=ours.verdict(False), text=ours.words()),
        ],
    )


def f5(folder: Path) -> Row:
    """An adapter on a tied head."""
    base = zoo.save("llama", folder / "base")
    targets = ["q_proj", "lm_head"]
    wanted, bare = tuned(folder / "a", base, target_modules=targets, r=3, lora_alpha=7)
    with watched() as heard:
        model = peft.PeftModel.from_pretrained(plain(base), folder / "a")
        model = model.merge_and_unload()
        far = [off(logits(model), wanted, bare)]
        model.save_pretrained(folder / "peft")
        far.append(off(logits(plain(folder / "peft")), wanted, bare))
    done, ours = merged(folder / "a", folder / "m")
    return Row(
        title="An adapter on a tied head is merged into the embedding too",
        failure="Head and embedding are one matrix. What was trained for the way out changes what "
        "every token is on the way in.",
        cases=[
            Case(
                what="LoRA on q_proj and lm_head of a tied model, merged",
                seen=[
                    Seen(
                        who="peft",
                        verdict=heard.verdict(max(far) < 1e-3, "tie_word_embeddings"),
                        text=f"logits off by {far[0]:.2f} of the adapter's effect, after saving "
                        f"and loading {far[1]:.2f}; {heard.words('tie_word_embeddings')}",
                    ),
                    Seen(
                        who="decal",
                        verdict="right" if off(ours, wanted, bare) < 1e-3 else "silent",
                        text=f"unties {', '.join(done.report.untied)}: off by "
                        f"{off(ours, wanted, bare):.1e} after loading",
                    ),
                ],
            )
        ],
        threads=("peft#2018", "transformers#45127", "unsloth#9331"),
    )


def f16(folder: Path) -> Row:
    """Scalings and biases in merges and mixes."""
    base = zoo.save("llama", folder / "base")
    cases = []
    for what, settings in {
        "rsLoRA with ranks and alphas of its own, merged": {
            "use_rslora": True,
            "rank_pattern": {"k_proj": 5},
            "alpha_pattern": {"v_proj": 4},
        },
        "a bias of B (lora_bias), merged": {"lora_bias": True},
    }.items():
        out = folder / what[:6]
        trained = tuned(
            out, base, r=3, lora_alpha=7, target_modules=["q_proj", "k_proj", "v_proj"], **settings
        )
        with watched() as heard:
            model = peft.PeftModel.from_pretrained(plain(base), out)
            far = off(logits(model.merge_and_unload()), *trained)
        _, ours = merged(out, folder / f"{what[:6]}-merged")
        text = "logits off by {:.1e} of the adapter's effect"
        seen = [Seen(who="peft", verdict=heard.verdict(far < 1e-4), text=text.format(far))]
        own = off(ours, *trained)
        verdict = "right" if own < 1e-4 else "silent"
        cases.append(
            Case(what=what, seen=[*seen, Seen(who="decal", verdict=verdict, text=text.format(own))])
        )
    cases += [_mixed("two rsLoRA adapters, half of each", use_rslora=True)]
    cases += [_mixed("two adapters with a bias of B, half of each", lora_bias=True)]
    return Row(
        title="rsLoRA and biases of B are scaled wrongly or left out in mixes",
        failure="Where each way of merging and mixing has a scaling of its own, one of them "
        "forgets the square root of rsLoRA, or the bias.",
        cases=cases,
        threads=("peft#3449", "peft#3741", "peft#2489"),
    )


def _mixed(what: str, **settings: Any) -> Case:
    """Half of each of two adapters, by concatenation in peft and by `use` in decal."""
    names = ["default", "b"]
    weights = dict.fromkeys(names, 0.5)
    model = zoo.build("llama")
    shared = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], **settings}
    for seed, name in enumerate(names):
        attach(model, LoraConfig(**shared, lora_dropout=0), name, seed=seed)
        draw(model, name, seed=seed)
    summed = _summed(model, weights, 7 / math.sqrt(3) if "use_rslora" in settings else 7 / 3)
    wanted, bare = logits(summed, IDS), logits(zoo.build("llama"), IDS)
    use(model, weights)
    own = off(logits(model, IDS), wanted, bare)
    with watched() as heard:
        theirs = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(**shared))
        theirs.add_adapter("b", peft.LoraConfig(**shared))
        _copy(model, theirs, names)
        theirs.add_weighted_adapter(names, [0.5, 0.5], "mix", combination_type="cat")
        theirs.set_adapter("mix")
        far = off(logits(theirs, IDS), wanted, bare)
    return Case(
        what=what,
        seen=[
            Seen(
                who="peft",
                verdict=heard.verdict(far < 1e-4),
                text=f'add_weighted_adapter(combination_type="cat"): logits off by {far:.2f} of '
                f"the mix's effect; {heard.words()}",
            ),
            Seen(
                who="decal",
                verdict="right" if own < 1e-4 else "silent",
                text=f"use(model, {{...}}): off by {own:.1e}",
            ),
        ],
    )


def _parts(model: Any, name: str) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    return {m: (p.A, p.B, p.bias) for m, p in adapter_state(model, name).items()}


@torch.no_grad()
def _summed(model: Any, weights: dict[str, float], scale: float) -> Any:
    """A plain model with the deltas added to its weights by hand."""
    plain_model = zoo.build("llama")
    for name, weight in weights.items():
        for module, (a, b, bias) in _parts(model, name).items():
            layer = plain_model.get_submodule(module)
            layer.weight += weight * scale * b @ a
            if bias is not None:
                layer.bias += weight * scale * bias
    return plain_model


@torch.no_grad()
def _copy(model: Any, theirs: Any, names: list[str]) -> None:
    """decal's factors into peft's adapters of the same names."""
    for name in names:
        for module, (a, b, bias) in _parts(model, name).items():
            layer: Any = theirs.base_model.model.get_submodule(module)
            layer.lora_A[name].weight.copy_(a)
            layer.lora_B[name].weight.copy_(b)
            if bias is not None:
                layer.lora_B[name].bias.copy_(bias)


ROWS: dict[str, MakeRow] = {"F1": f1, "F2": f2, "F3": f3, "F4": f4, "F5": f5, "F16": f16}
