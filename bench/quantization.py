"""What each format costs the embedded base; writes docs/quantization.md.

Every linear layer but the head is quantized and dequantized again; the model computes in float32,
so that what differs is the weights' rounding and nothing else (in the row that says so, int8's
activations too). Text comes from the generator of the base's own pre-training, held-out half: its
words are drawn from templates and products that training never combined. Not timed, seeded, and the
same on every machine up to float32 rounding.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from decal import demo
from decal.demo.pretrain import answer_flags, render
from decal.demo.skills import draw_documents
from decal.demo.vocabulary import START
from decal.model import hf
from decal.model.quantizer import quantizable_modules
from decal.quant import FORMATS, Packed, Recipe
from decal.quant.base import QuantFormat
from decal.quant.codebook import CodebookFormat
from decal.quant.linear import QuantLinear

OUT = Path(__file__).resolve().parents[1] / "docs" / "quantization.md"
GROUPS = {
    "q, k": ("q_proj", "k_proj"),
    "v, o": ("v_proj", "o_proj"),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
FLOATS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = CodebookFormat(name="e2m1", values=tuple(s * v / 6 for s in (1, -1) for v in FLOATS))
INT4 = CodebookFormat(name="int4", values=tuple(max(i, -7) / 7 for i in range(-8, 8)))


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    label: str
    format: QuantFormat | None = None
    double: bool = False
    activations: bool = False
    """Compute as inference does, with int8 activations."""


WAYS = [
    Way("none (bf16)"),
    Way("int8, weights only", FORMATS["int8"]),
    Way("int8 as it infers", FORMATS["int8"], activations=True),
    Way("NF4", FORMATS["nf4"]),
    Way("NF4 + double", FORMATS["nf4"], double=True),
    Way("E2M1 float", E2M1),
    Way("FP4 (bitsandbytes)", FORMATS["fp4"]),
    Way("Int4, even steps", INT4),
]


@dataclass
class Text:
    """One held-out document."""

    ids: Tensor
    """int64 [1, n]"""
    answers: Tensor
    """bool [n - 1]: which of the predicted tokens an assistant wrote."""


@dataclass
class Row:
    way: Way
    bits: float
    errors: dict[str, float]
    """Relative error of each group of layers, root of summed squares."""
    all_tokens: list[float]
    """Summed losses, one per document."""
    answers: list[float]


def held_out(tokenizer: Any, documents: int) -> list[Text]:
    rng = random.Random("quantization")
    header = tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
    texts: list[Text] = []
    while len(texts) < documents:
        for document in draw_documents(rng, "test", 1.0, rules=True):
            ids = tokenizer.encode(render(document), add_special_tokens=False)
            flags = answer_flags(ids, header, int(tokenizer.eos_token_id))
            texts.append(Text(torch.tensor([ids]), torch.tensor(flags[1:])))
    return texts[:documents]


def quantized(plain: Any, names: list[str], way: Way) -> tuple[Any, float, dict[str, float]]:
    """The model with rounded weights, bits per weight, and the relative errors."""
    model = copy.deepcopy(plain)
    wrong, size = dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 0.0)
    stored = numel = 0
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.weight.detach()
        group = next(g for g, ends in GROUPS.items() if name.endswith(ends))
        numel += weight.numel()
        stored += 2 * weight.numel()
        size[group] += float(weight.double().square().sum())
        if way.format is None:
            continue
        packed = way.format.quantize(weight, Recipe(format=way.format.name, double=way.double))
        stored += sum(part.nbytes for part in packed.parts.values()) - 2 * weight.numel()
        rounded = way.format.dequantize(packed, torch.float32)
        wrong[group] += float((rounded.double() - weight.double()).square().sum())
        put(model, name, layer, packed, rounded, way)
    errors = {group: math.sqrt(wrong[group] / size[group]) for group in GROUPS}
    return model.eval(), 8 * stored / numel, errors


def put(model: Any, name: str, layer: Any, packed: Packed, rounded: Tensor, way: Way) -> None:
    if way.activations:
        model.set_submodule(name, QuantLinear(packed, layer.bias, torch.float32))
    else:
        layer.weight = nn.Parameter(rounded, requires_grad=False)


@torch.no_grad()
def losses(model: Any, texts: list[Text]) -> tuple[list[float], list[float]]:
    """Summed loss of all tokens and of the answers' tokens, per document."""
    every, answers = [], []
    for text in texts:
        logits = model(text.ids).logits[0, :-1]
        loss = functional.cross_entropy(logits, text.ids[0, 1:], reduction="none")
        every.append(float(loss.double().sum()))
        answers.append(float(loss[text.answers].double().sum()))
    return every, answers


def change(row: Row, base: Row, of: Callable[[Row], list[float]], tokens: list[int]) -> str:
    """Mean loss per token against the base's, in thousandths, with its standard error.

    Documents are the units: the difference is a ratio of sums over them.
    """
    total = sum(tokens)
    diffs = [a - b for a, b in zip(of(row), of(base), strict=True)]
    mean = sum(diffs) / total
    spread = sum((d - mean * n) ** 2 for d, n in zip(diffs, tokens, strict=True))
    error = math.sqrt(spread * len(diffs) / (len(diffs) - 1)) / total
    return f"{1000 * mean:+.1f} ± {1000 * error:.1f}"


def table(rows: list[Row], texts: list[Text]) -> str:
    tokens = [text.answers.numel() for text in texts]
    answered = [int(text.answers.sum()) for text in texts]
    head = ["format", "bits", *(f"error {g}" for g in GROUPS)]
    head += ["perplexity, all", "loss change, all", "perplexity, answers", "loss change, answers"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        line = [row.way.label, f"{row.bits:.3f}"]
        line += [f"{100 * row.errors[g]:.2f} %" for g in GROUPS]
        for of, count in ((lambda r: r.all_tokens, tokens), (lambda r: r.answers, answered)):
            same = row is rows[0]
            line.append(f"{math.exp(sum(of(row)) / sum(count)):.4f}")
            line.append("" if same else change(row, rows[0], of, count))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def order(rows: list[Row], by: Callable[[Row], float]) -> str:
    """The 4-bit rows without double quantization, the best first."""
    four = [r for r in rows if isinstance(r.way.format, CodebookFormat) and not r.way.double]
    return " < ".join(row.way.label for row in sorted(four, key=by))


PAGE = """# What quantization costs

Written by `python bench/quantization.py`; the table and the three orders below it are measured.

The model is the embedded base (3.7M parameters, stored in bf16). All its linear layers are
rounded to the format, with one scale per 64 weights for 4-bit formats and one per row for int8;
the embedding, which is also the head, keeps 16 bits. Bits are those of the linear layers, scales
included. The error is that of the weights, relative to their size: root of the summed squares.
Text: {documents} held-out documents, {tokens:,} tokens, {answers:,} of them in answers. Loss
changes are in thousandths of a nat per token against the unquantized model, with the standard
error over documents.

{table}

4-bit formats in order of weight error, best first: {by_error}.

In order of loss on all tokens: {by_loss}.

In order of loss on the answers: {by_answers}.

## How to read it

The QLoRA paper (Dettmers et al. 2023, arXiv 2305.14314, table 2) ranks 4-bit types by perplexity
over models of 125M to 13B parameters: NF4 with double quantization 27.41, FP4 in its two shapes
29.48 (E3M0) and 31.07 (E2M1), Int4 34.34. The reason is where the 16 values lie. Weights of a
trained layer are nearly normal, most of them small against the largest of their block. Even steps
spend as many values on the rare large weights as on the many small ones; a float's steps grow
with the value; NF4 puts its values at the quantiles of a normal distribution.

- **Double quantization** rounds the scales to 8 bits. It saves 0.373 bits a weight and adds next
  to nothing to the error.
- **int8** has 255 even steps, and a scale for a whole row. Its error is that of 8 bits, whatever
  the distribution. The row "as it infers" rounds the activations to 8 bits as well, apart from
  columns that reach 6.0; training does not do that, it computes with the dequantized weight.
- **FP4 is not E2M1.** bitsandbytes' table has 1/16 where E2M1 has 1 (of 12): one of its eight
  magnitudes is almost zero and hardly used. On normal weights in blocks of 64 it therefore errs
  more than true E2M1, and even more than even steps, contrary to what one expects of a float.
  decal stores the table of bitsandbytes, because checkpoints are made of it; E2M1 and Int4 exist
  in the script only. Where there is a choice, take NF4.
- **Block size.** A larger block has a larger maximum, so even steps lose more with it than values
  that crowd around zero.

What came out here: int8 costs nothing that can be measured, double quantization nothing either;
NF4 is ahead of E2M1, and E2M1 of even steps, as in the paper; bitsandbytes' FP4 and even steps are
too close to tell apart.

What the numbers do not show: this is one small model on text of its own kind, with weights from a
short training. Large models have outlier features, for which LLM.int8 keeps columns in 16 bits;
this one hardly has any. A difference of less than two standard errors may be chance.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = hf.load_model(str(demo.base_path()), dtype=torch.float32, device="cpu")
    texts = held_out(hf.load_tokenizer(str(demo.base_path())), options.documents)
    names = quantizable_modules(plain)
    rows = []
    for way in WAYS:
        model, bits, errors = quantized(plain, names, way)
        rows.append(Row(way, bits, errors, *losses(model, texts)))
        print(f"{way.label}: {sum(rows[-1].all_tokens):.1f}", flush=True)
    page = PAGE.format(
        documents=f"{len(texts):,}",
        tokens=sum(text.answers.numel() for text in texts),
        answers=sum(int(text.answers.sum()) for text in texts),
        table=table(rows, texts),
        by_error=order(rows, lambda row: sum(row.errors.values())),
        by_loss=order(rows, lambda row: sum(row.all_tokens)),
        by_answers=order(rows, lambda row: sum(row.answers)),
    )
    options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
