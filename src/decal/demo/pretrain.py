"""Pre-train the embedded base: `python -m decal.demo.pretrain --out DIR`.

A plain loop over documents that are generated as training goes; none is seen twice. It knows the
model class and the documents' shape, and does not know the routing task.

    weights   fp32 masters updated by Muon; a bf16 copy runs forward and backward (matrix products
              in bf16 are about four times as fast as in fp32 on CPUs with AVX-512 bf16)
    batches   about `BATCH_TOKENS` tokens, documents of similar length padded on the right; with
              causal attention the padding needs no mask, and no document sees another one
    threads   a step is the mean over `WORKERS` batches, each computed by one thread of its own;
              these meet once a step, where threads inside each operation meet hundreds of times,
              which on a busy machine is four times as slow
    loss      counts an assistant's tokens, and a tenth of the rest, drawn at random: what is to be
              learned is the answers, while a ticket's own words are random draws
    attention eager: at these lengths its bf16 backward takes half of the time of torch's fused one
    schedule  two parts, each a fixed number of steps with linear warm-up and a cosine to a tenth of
              the rate. In the first, tickets with a second mention come in slowly, over
              `EASY_POOLS` pools; the second adds the house rules (skills.py)

Packing documents into full windows was rejected: it saves the padding (about 5 %), but the model
then hardly sees a document at position 0, which is where every ticket of the task starts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decal.demo.skills import Document, draw_documents, drill_document
from decal.demo.vocabulary import END_OF_TEXT, START, VOCABULARY, render_turn, train_tokenizer

BATCH_TOKENS = 2048
WORKERS = 2
POOL = 1024
EASY_POOLS = 12
MUON_RATE, ADAM_RATE = 5e-3, 3e-3
USER_SHARE = 0.1


def render(document: Document) -> str:
    """A document as the text that is tokenized."""
    if not document.turns:
        return document.text + END_OF_TEXT
    turns = ((turn.question, turn.answer) for turn in document.turns)
    return "".join(render_turn("user", q) + render_turn("assistant", a) for q, a in turns)


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on documents of its own; extra drills make every queue name one token."""
    rng = random.Random(f"tokenizer {seed}")
    documents = [document for _ in range(16000) for document in draw_documents(rng)]
    documents += [drill_document(rng) for _ in range(6000)]
    return train_tokenizer(render(document) for document in documents)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model, fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """`ids` [documents, length] int64; bool masks of the same shape.

    `answers`: what an assistant wrote. `targets`: the tokens that the loss counts, all answers and
    a random sample of the rest.
    """

    ids: torch.Tensor
    answers: torch.Tensor
    targets: torch.Tensor


def answer_flags(ids: list[int], header: list[int], end: int) -> list[bool]:
    """For each token, whether an assistant wrote it (the end of its turn included)."""
    flags, inside = [], False
    for position, token in enumerate(ids):
        flags.append(inside)
        if inside and token == end:
            inside = False
        elif not inside and ids[max(0, position - len(header) + 1) : position + 1] == header:
            inside = True
    return flags


def to_batch(
    documents: list[list[int]], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Batch:
    """Pad documents on the right and choose the tokens that count."""
    header = tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
    end = int(tokenizer.eos_token_id)
    shape = len(documents), max(map(len, documents))
    ids = torch.full(shape, tokenizer.pad_token_id)
    answers, targets = torch.zeros(2, *shape, dtype=torch.bool)
    for row, tokens in enumerate(documents):
        flags = answer_flags(tokens, header, end)
        ids[row, : len(tokens)] = torch.tensor(tokens)
        answers[row, : len(tokens)] = torch.tensor(flags)
        chosen = [flag or rng.random() < USER_SHARE for flag in flags]
        targets[row, : len(tokens)] = torch.tensor(chosen)
    return Batch(ids, answers, targets)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, rules: bool) -> Iterator[Batch]:
    """Endless batches: pools of documents, sorted by length, cut by tokens, in random order."""
    rng = random.Random(f"documents {seed}" + (" rules" if rules else ""))
    for number in count():
        hard = 1.0 if rules else min(1.0, number / EASY_POOLS)
        pool = [doc for _ in range(POOL) for doc in draw_documents(rng, "train", hard, rules)]
        encoded = tokenizer.backend_tokenizer.encode_batch([render(document) for document in pool])
        ready: list[list[list[int]]] = [[]]
        for tokens in sorted((encoding.ids for encoding in encoded), key=len):
            if (len(ready[-1]) + 1) * len(tokens) > BATCH_TOKENS:
                ready.append([])
            ready[-1].append(tokens)
        rng.shuffle(ready)
        for documents in ready:
            yield to_batch(documents, tokenizer, rng)


@dataclass(frozen=True)
class Part:
    """One batch's share of a step: gradients of the summed loss, and the sums behind them."""

    gradients: tuple[torch.Tensor, ...]
    count: int
    answer_loss: float
    answers: int


def batch_part(model: LlamaForCausalLM, batch: Batch) -> Part:
    """Forward and backward of one batch, in the calling thread; the model is not changed.

    Logits are only computed where a token counts: they would be a third of the work.
    """
    torch.set_num_threads(1)
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
    chosen = batch.targets[:, 1:]
    logits = model.lm_head(hidden[chosen]).float()
    losses = functional.cross_entropy(logits, batch.ids[:, 1:][chosen], reduction="none")
    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
    answer_losses = losses.detach()[batch.answers[:, 1:][chosen]]
    return Part(gradients, len(losses), float(answer_losses.sum()), len(answer_losses))


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: warm-up over 2 % of the steps, then a cosine to a tenth."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


class Masters:
    """fp32 master weights with their optimizers, and the bf16 model that they are copied into.

    Muon for the matrices of the layers, AdamW for the embedding and the norms.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model.bfloat16()
        self.weights: list[torch.Tensor] = []
        matrices: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for name, parameter in model.named_parameters():
            master = parameter.detach().float().requires_grad_()
            self.weights.append(master)
            (matrices if master.ndim == 2 and "embed" not in name else others).append(master)
        muons = [
            torch.optim.Muon(
                matrices[part::WORKERS],
                lr=MUON_RATE,
                weight_decay=0.05,
                adjust_lr_fn="match_rms_adamw",
            )
            for part in range(WORKERS)
        ]
        adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.optimizers = (*((muon, MUON_RATE) for muon in muons), (adam, ADAM_RATE))

    @torch.no_grad()
    def step(self, parts: list[Part], rate: float, pool: ThreadPoolExecutor) -> None:
        """Apply the parts' mean gradient (clipped to norm 1) and refresh the model."""
        scale = 1.0 / sum(part.count for part in parts)
        for master, *gradients in zip(
            self.weights, *(part.gradients for part in parts), strict=True
        ):
            master.grad = torch.stack([g.float() for g in gradients]).sum(0).mul_(scale)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, peak in self.optimizers:
            optimizer.param_groups[0]["lr"] = peak * rate
        list(pool.map(lambda entry: entry[0].step(), self.optimizers))
        torch._foreach_copy_(list(self.model.parameters()), self.weights)


@torch.no_grad()
def skill_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, draws: int = 300
) -> dict[str, float]:
    """Share of right answers by skill on documents with fillings that training never used.

    An answer is right if each of its tokens is the most likely one after the right ones before it.
    For "bare", whose facts come in a random order, this says little.
    """
    rng = random.Random("evaluation")
    header = tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
    end = int(tokenizer.eos_token_id)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    documents = [
        d for _ in range(draws) for d in draw_documents(rng, "test", rules=True) if d.turns
    ]
    for document in documents:
        ids = tokenizer.encode(render(document), add_special_tokens=False)
        best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
        flags = answer_flags(ids, header, end)
        starts = [i for i in range(1, len(ids)) if flags[i] and not flags[i - 1]]
        for start, turn in zip(starts, document.turns, strict=True):
            stop = ids.index(end, start)
            total[turn.skill] += 1
            right[turn.skill] += best[start - 1 : stop] == ids[start : stop + 1]
    return {skill: round(right[skill] / total[skill], 4) for skill in sorted(total)}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a plain Hugging Face folder (bf16 safetensors, tokenizer with its chat template)."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain(out: Path, part: Phase, model: LlamaForCausalLM, tokenizer: Any, seed: int) -> None:
    """Train one part's steps; write a log, checkpoints and the skills reached to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    masters = Masters(model)
    stream = batches(tokenizer, seed, part.rules)
    started, tokens, recent = time.time(), 0, deque[float](maxlen=50)
    with (out / "log.jsonl").open("w") as log, ThreadPoolExecutor(WORKERS) as pool:
        for step in range(1, part.steps + 1):
            work = list(islice(stream, WORKERS))
            parts = list(pool.map(batch_part, [model] * WORKERS, work))
            masters.step(parts, part.rate * rate_at(step, part.steps), pool)
            tokens += sum(int((batch.ids != tokenizer.pad_token_id).sum()) for batch in work)
            recent.append(sum(p.answer_loss for p in parts) / sum(p.answers for p in parts))
            if step % 50 and step != part.steps:
                continue
            record: dict[str, Any] = {
                "step": step,
                "answer_loss": round(sum(recent) / len(recent), 4),
            }
            record |= {"tokens": tokens, "seconds": round(time.time() - started, 1)}
            if step % part.save_every == 0 or step == part.steps:
                save(model, tokenizer, out / "latest")
                record["skills"] = skill_accuracy(model, tokenizer)
            print(json.dumps(record), file=log, flush=True)
            print(json.dumps(record), flush=True)


@dataclass(frozen=True)
class Phase:
    """One part of the training."""

    steps: int
    rules: bool
    rate: float
    """Of the peak rates."""
    save_every: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for log and checkpoints")
    parser.add_argument("--steps", type=int, default=2500, help="of the first part")
    parser.add_argument("--rule-steps", type=int, default=1000, help="of the second part")
    parser.add_argument("--start", type=Path, help="a finished first part; only the second is run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    options = parser.parse_args()
    first = options.start or options.out / "skills" / "latest"
    if options.start is None:
        tokenizer = build_tokenizer(options.seed)
        skills = Phase(options.steps, False, 1.0, options.save_every)
        model = build_model(tokenizer, options.seed)
        pretrain(options.out / "skills", skills, model, tokenizer, options.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(first)
    model = LlamaForCausalLM.from_pretrained(
        first, dtype=torch.float32, attn_implementation="eager"
    )
    rules = Phase(options.rule_steps, True, 0.5, options.save_every)
    pretrain(options.out / "rules", rules, model, tokenizer, options.seed)


if __name__ == "__main__":
    main()
