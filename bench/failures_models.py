"""Rows of docs/failures.md on adapters and models as wholes: loading, targets, saving, experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bench.failures_row import Case, Heard, MakeRow, Row, Seen, Verdict, watched
from decal import demo
from decal.config import LoraConfig
from decal.model.inject import attach
from decal.model.state import trainable_parameters
from decal.verbs.load import load, load_base, save_adapter
from tests import zoo
from tests.failures.situations import draw, logits, off, tuned, with_fused_mlps

IDS = torch.arange(5, 30)[None]
FILE = "adapter_model.safetensors"
QV = ["q_proj", "v_proj"]


def lora(**settings: Any) -> peft.LoraConfig:
    """Settings of peft: r = 3, lora_alpha = 7."""
    plain = {"r": 3, "lora_alpha": 7, "target_modules": QV, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**plain, **settings})


def randomized(model: Any) -> Any:
    """The model with random values in everything that is trainable."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def f6(folder: Path) -> Row:
    """Adapters on an embedding."""
    base = demo.base_path()
    targets = ["q_proj", "embed_tokens"]
    with watched() as heard:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        adapted = peft.get_peft_model(model, lora(target_modules=targets))
        adapted.save_pretrained(folder / "peft")
    with watched() as ours:
        plain, _ = load_base(base, device="cpu")
        attach(plain, LoraConfig(r=3, lora_alpha=7, target_modules=tuple(targets)))
        save_adapter(plain, folder / "decal")
    numbers = {}
    for who in ("peft", "decal"):
        tensors = load_file(folder / who / FILE).values()
        nbytes = (folder / who / FILE).stat().st_size
        numbers[who] = (sum(tensor.numel() for tensor in tensors), nbytes)
    trained = adapted.get_nb_trainable_parameters()[0]
    texts = {
        who: f"{trained:,} numbers are trained, {count:,} are in the file ({nbytes:,} bytes)"
        for who, (count, nbytes) in numbers.items()
    }
    return Row(
        title="An adapter on the embedding stores the base's embedding",
        failure="A file that should hold two small factors holds the whole embedding of the base "
        "beside them.",
        cases=[
            Case(
                what="LoRA on q_proj and embed_tokens of a tied model",
                seen=[
                    Seen(
                        who="peft",
                        verdict=heard.verdict(numbers["peft"][0] == trained, "save_embedding"),
                        text=f"{texts['peft']}; {heard.words('save_embedding')}",
                    ),
                    Seen(
                        who="decal",
                        verdict=ours.verdict(numbers["decal"][0] == trained),
                        text=texts["decal"],
                    ),
                ],
            )
        ],
        threads=("trl#1287", "peft#2898"),
    )


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _second(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t for k, t in tensors.items() if "layers.1" in k}


CHANGES: dict[str, Change] = {
    "keys with a wrong prefix": lambda tensors: {
        k.replace("model.layers", "model.blocks"): t for k, t in tensors.items()
    },
    "half of the keys missing": lambda tensors: {
        k: t for k, t in tensors.items() if k not in _second(tensors)
    },
    "keys of a layer that the base does not have": lambda tensors: {
        **tensors,
        **{k.replace("layers.1", "layers.7"): t.clone() for k, t in _second(tensors).items()},
    },
}
"""What is done to the file of an adapter on two layers."""


def f7(folder: Path) -> Row:
    """Adapters that load as something else than was trained."""
    base, other = zoo.save("llama", folder / "base"), zoo.save("llama", folder / "other", seed=5)
    wanted, bare = tuned(folder / "adapter", base, target_modules=QV)
    cases = []
    for what, change in CHANGES.items():
        changed = folder / what.replace(" ", "-")
        shutil.copytree(folder / "adapter", changed)
        save_file(change(load_file(folder / "adapter" / FILE)), changed / FILE, {"format": "pt"})
        cases.append(_loaded(what, base, changed, (wanted, bare)))
    what = "another base, of the same shape"
    cases.append(_loaded(what, other, folder / "adapter", (wanted, bare)))
    cases.append(_past())
    cases.append(_targets("one typo among the target modules", "llama", ["q_proj", "v_porj"]))
    return Row(
        title="An adapter that loads as nothing, in part, or on the wrong base",
        failure="Files whose keys do not match the model are loaded as far as they go; which base "
        "an adapter was trained on is a name, and not compared.",
        cases=cases,
        threads=("peft#2699", "peft#2566", "peft#1323", "unsloth#2142", "vllm#55193"),
    )


def _loaded(what: str, base: Path, adapter: Path, trained: tuple[Tensor, Tensor]) -> Case:
    """The adapter on this base, in both; the logits against those of the training."""
    far: dict[str, float] = {}
    count = len(load_file(adapter / FILE))
    with watched() as heard:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(plain, adapter)
        far["peft"] = off(logits(model), *trained)
        used = sum("lora_" in name for name, _ in model.named_parameters())
    with watched() as ours:
        loaded, _ = load(adapter, base=str(base), device="cpu")
        far["decal"] = off(logits(loaded), *trained)
    seen = []
    for who, ears in (("peft", heard), ("decal", ours)):
        verdict = ears.verdict(far.get(who, 1) < 1e-4 and count <= used)
        text = ""
        if who in far:
            text = f"logits off by {far[who]:.2f} of the adapter's effect; "
            text += f"{count - used} of {count} tensors left out; " if count > used else ""
        seen.append(Seen(who=who, verdict=verdict, text=text + ears.words()))
    return Case(what=what, seen=seen)


def _past() -> Case:
    """An adapter whose modules the model does not call."""
    targets = ["gate_proj", "up_proj", "down_proj"]
    effect: dict[str, float] = {}
    with watched() as heard:
        model = peft.get_peft_model(
            with_fused_mlps(zoo.build("llama")), lora(target_modules=targets, task_type=None)
        )
        bare = logits(model, IDS)
        effect["peft"] = float((logits(randomized(model), IDS) - bare).abs().max())
    with watched() as ours:
        settings = LoraConfig(r=3, lora_alpha=7, target_modules=tuple(targets))
        attach(with_fused_mlps(zoo.build("llama")), settings)
    return Case(
        what="a model whose fused MLPs read the weights of their layers and call none",
        seen=[
            Seen(
                who="peft",
                verdict=heard.verdict(effect["peft"] > 0),
                text=f"the adapter loads, and moves the logits by {effect['peft']:g}; "
                f"{heard.words()}",
            ),
            Seen(who="decal", verdict=ours.verdict(False), text=ours.words()),
        ],
    )


def _targets(
    what: str, architecture: str, names: list[str] | str, meant: set[str] | None = None, **more: Any
) -> Case:
    """What target_modules come to; `meant` are modules that have to be adapted."""
    adapted: dict[str, set[str]] = {}
    numbers: dict[str, int] = {}
    with watched() as heard:
        settings = lora(target_modules=names, task_type=None, **more)
        model = peft.get_peft_model(zoo.build(architecture), settings)
        weights = [n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n]
        adapted["peft"] = {name.removeprefix("base_model.model.") for name in weights}
        numbers["peft"] = model.get_nb_trainable_parameters()[0]
    with watched() as ours:
        targets = names if isinstance(names, str) else tuple(names)
        plain = zoo.build(architecture)
        table = attach(plain, LoraConfig(r=3, lora_alpha=7, target_modules=targets, **more))
        adapted["decal"] = set(table.names)
        numbers["decal"] = trainable_parameters(plain)[0]
        ours.lines += [line for line in table.lines() if line.startswith("note:")]
    seen = []
    for who, ears in (("peft", heard), ("decal", ours)):
        text = ears.words()
        if who in adapted:
            lacking = sorted((meant or set()) - adapted[who])
            without = f", not {', '.join(lacking)}" if lacking else ""
            text = f"{len(adapted[who])} modules adapted, {numbers[who]:,} parameters{without}; "
            text += ears.words()
        right = who in adapted and meant is not None and meant <= adapted[who]
        verdict = ears.verdict(
            right, "" if who == "decal" else "v_porj|mlp.down_proj|layers_to_transform"
        )
        seen.append(Seen(who=who, verdict=_noted(who, ears, verdict), text=text))
    return Case(what=what, seen=seen)


def _noted(who: str, ears: Heard, verdict: Verdict) -> Verdict:
    """decal's notes are no warnings: they stand in the table of what is trained."""
    noted = who == "decal" and verdict != "error" and ears.said("^note:") is not None
    return "told" if noted else verdict


def f8(folder: Path) -> Row:
    """Target modules."""
    del folder
    dense = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    return Row(
        title="Target modules that match nothing, no layer, or not all that was meant",
        failure="What is not matched stays frozen. A run that trains half of what was asked for "
        "looks like any other.",
        cases=[
            _targets("a name that matches nothing", "llama", ["query"]),
            _targets("a name that matches Dropout modules too", "bert", ["query", "dropout"]),
            _targets("the name of the experts' module", "qwen3_moe", ["q_proj", "experts"]),
            _targets(
                "the MLP's projections, where layer 0 is dense and layer 1 has experts",
                "qwen3_moe",
                ["gate_proj", "up_proj", "down_proj"],
                dense,
            ),
            _targets("all-linear on that model", "qwen3_moe", "all-linear", dense),
            _targets(
                "layers_to_transform with a layer that does not exist",
                "llama",
                QV,
                layers_to_transform=[1, 9],
            ),
        ],
        threads=("peft#1206", "unsloth#6936", "unsloth#11014"),
    )


def f25(folder: Path) -> Row:
    """Wrapped models, saved."""
    ways: dict[str, Callable[[Any], object]] = {
        "peft, inject_adapter_in_model": lambda m: peft.inject_adapter_in_model(lora(), m),
        "peft, get_peft_model": lambda m: peft.get_peft_model(m, lora()),
        "transformers, add_adapter": lambda m: m.add_adapter(lora()),
        "decal": _ours,
    }
    return Row(
        title="A wrapped model saved whole comes back with random layers",
        failure="Wrapping a layer puts `base_layer` into its weights' names. Saved under these, it "
        "is not found on loading and drawn anew.",
        cases=[
            Case(
                what="a model that was given an adapter, then `model.save_pretrained`",
                seen=[_saved(folder / f"{i}", who, ways[who]) for i, who in enumerate(ways)],
            ),
        ],
    )


def _ours(model: Any) -> None:
    attach(model, LoraConfig(r=3, lora_alpha=7, target_modules=tuple(QV)))
    draw(model)


def _saved(out: Path, who: str, wrap: Callable[[Any], object]) -> Seen:
    """What is in the folder, and what a base that is loaded from it computes."""
    model = zoo.build("llama")
    bare = logits(model, IDS)
    with watched() as heard:
        wrap(model)
        model.save_pretrained(out)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    if files == [FILE]:
        return Seen(who=who, verdict=heard.verdict(True), text=f"writes the adapter alone, {FILE}")
    keys = [key for file in files for key in load_file(out / file) if "base_layer" in key]
    with watched() as later:
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        far = float((logits(again, IDS) - bare).abs().max())
    report = next(iter(later.lines), "").splitlines()
    later.lines = sorted(" ".join(line.split()) for line in report if "| MISSING" in line)
    return Seen(
        who=who,
        verdict=later.verdict(far < 1e-4),
        text=f"writes {len(keys)} keys such as `{keys[0]}`, with {heard.words()}; the base that is "
        f"loaded from there has logits off by up to {far:.1f}, and loading reports "
        f"{later.words()}",
    )


def f26(folder: Path) -> Row:
    """Experts in 4 bit."""
    base = zoo.save("qwen3_moe", folder / "base")
    total = sum(p.numel() for p in zoo.build("qwen3_moe").parameters())
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with watched() as heard:
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=settings, dtype=torch.bfloat16
        )
    packed: list[Any] = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert all(isinstance(m, nn.Linear) for m in packed)
    share = sum(m.in_features * m.out_features for m in packed) / total
    bits = 8 * model.get_memory_footprint() / total
    with watched() as ours:
        load_base(base, quant="nf4", device="cpu")
    return Row(
        title='A mixture of experts "in 4 bit" that is mostly 16-bit',
        failure="Experts are one parameter of three dimensions and no linear layer, so that "
        "quantizing all linear layers passes them by.",
        cases=[
            Case(
                what="a small Qwen3-MoE loaded in NF4",
                seen=[
                    Seen(
                        who="bitsandbytes",
                        verdict=heard.verdict(bits < 8),
                        text=f"loads; {100 * share:.0f} % of the parameters are in 4 bits, the "
                        f"model has {bits:.1f} bits per parameter; {heard.words()}",
                    ),
                    Seen(who="decal", verdict=ours.verdict(False), text=ours.words(limit=400)),
                ],
            )
        ],
    )


ROWS: dict[str, MakeRow] = {"F6": f6, "F7": f7, "F8": f8, "F25": f25, "F26": f26}
