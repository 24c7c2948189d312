"""Seconds and memory of one optimizer step: decal beside peft + bitsandbytes and trl, in one run.

    python bench/train_step.py --shape smollm2-135m --peers peft,peft-best,trl

Every contender is a process of its own that loads the same base (random weights in the shape of a
known model, NF4 with double quantization), attaches LoRA (r 16, all linear layers) and then takes
a step whenever it is told to. The steps of all contenders alternate, so that a change of the
machine's speed meets all of them; what is printed are medians and ratios. Peak memory is the
process' own anonymous memory at its highest, loading included.

    peft        the tutorials' settings: prepare_model_for_kbit_training, dropout 0.05
    peft-best   bf16 throughout, no float32 upcasts, dropout 0
    trl         SFTTrainer with its defaults
    decal       dropout 0.05; against peft-best decal-0, the same with dropout 0

Asserts nothing: a bench is read by people.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    },
}
ROWS, LENGTH, RANK, LR = 4, 256, 16, 2e-4
PARTNERS = {"peft": "decal", "peft-best": "decal-0", "trl": "decal"}
"""Peer -> the contender of decal's with the same settings."""


# --- contenders: each yields once when it is ready and once after every step --------------------


def _ids(vocabulary: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (ROWS, LENGTH), generator=generator)


def decal_steps(folder: str, dropout: float) -> Iterator[None]:
    """decal's own loss, optimizer and flattened batch."""
    import numpy as np

    from decal.adapters import DropoutKey, Routing, routed
    from decal.config import LoraConfig, TrainConfig
    from decal.data.pack import flat_batch
    from decal.data.sample import Sample
    from decal.model import attention
    from decal.model.inject import attach
    from decal.objectives import sft
    from decal.train.optim import Optimizer
    from decal.verbs.load import load_base

    model, _ = load_base(folder, quant="nf4")
    attach(model, LoraConfig(r=RANK, lora_dropout=dropout))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = Optimizer(parameters, TrainConfig(lr=LR))
    rows = _ids(model.config.vocab_size).numpy().astype(np.int32)
    trained = np.ones(LENGTH, dtype=np.bool_)
    trained[0] = False
    batch = flat_batch(
        [Sample(row=i, input_ids=ids, trained=trained.copy()) for i, ids in enumerate(rows)]
    )
    keep = sft.trained_positions(batch)
    model.train()
    with attention.flat_attention(model):
        for epoch in _forever():
            yield
            ids, positions = batch.sample_ids.flatten(), batch.positions.flatten()
            key = DropoutKey(0, epoch, ids, positions, keep) if dropout else None
            with routed(Routing((("default", 1.0),), key)):
                logits = attention.forward(model, batch, keep)
            optimizer.backward(sft.loss(logits, sft.targets(batch)) / batch.trained)
            optimizer.update(LR, optimizer.gradient_norm())


def peft_steps(folder: str, best: bool) -> Iterator[None]:
    """The hand-written loop of the tutorials."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quant, dtype=torch.bfloat16
    )
    if not best:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0 if best else 0.05,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=not best)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    ids = _ids(model.config.vocab_size)
    model.train()
    for _ in _forever():
        yield
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def trl_steps(folder: str, wait: Callable[[], None]) -> None:
    """SFTTrainer as it comes; `wait` is called before every step."""
    import datasets
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()

    quant = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quant, dtype=torch.bfloat16
    )
    ids = _ids(model.config.vocab_size).tolist()
    with tempfile.TemporaryDirectory() as out:
        args = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=ROWS,
            max_steps=10**6,
            learning_rate=LR,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        SFTTrainer(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids * 8}),
            processing_class=_tokenizer(folder),
            peft_config=peft.LoraConfig(
                r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules="all-linear"
            ),
            callbacks=[Turns()],
        ).train()


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _forever() -> Iterator[int]:
    count = 0
    while True:
        yield count
        count += 1


# --- the process of a contender -----------------------------------------------------------------


def work(name: str, folder: str, threads: int) -> None:
    """Takes a step for every line on stdin; answers with its seconds and the peak memory."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    watched = Anonymous()
    begun = 0.0
    first = True

    def wait() -> None:
        nonlocal begun, first
        if not first:
            answer = {"seconds": time.perf_counter() - begun, "memory": watched.peak}
            print(json.dumps(answer), file=answers, flush=True)
        else:
            print(json.dumps({"ready": True}), file=answers, flush=True)
        first = False
        if not sys.stdin.readline():
            os._exit(0)
        begun = time.perf_counter()

    if name == "trl":
        trl_steps(folder, wait)
        return
    contenders: dict[str, Callable[[], Iterator[None]]] = {
        "decal": lambda: decal_steps(folder, 0.05),
        "decal-0": lambda: decal_steps(folder, 0.0),
        "peft": lambda: peft_steps(folder, best=False),
        "peft-best": lambda: peft_steps(folder, best=True),
    }
    for _ in contenders[name]():
        wait()


class Anonymous:
    """Watches this process' anonymous memory from a thread; `peak` is in bytes."""

    def __init__(self, every: float = 0.01):
        self.peak = 0
        self._every = every
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            text = Path("/proc/self/status").read_text()
            line = next(x for x in text.splitlines() if x.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(self._every)


# --- the race -----------------------------------------------------------------------------------


def race(shape: str, names: list[str], steps: int, threads: int) -> dict[str, Any]:
    """Medians of seconds and peak memory by contender; the first step of each is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        write_base(shape, folder)
        workers = {name: _start(name, folder, threads) for name in names}
        for worker in workers.values():
            _answer(worker)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        memory: dict[str, int] = {}
        for round_ in range(steps + 1):
            for name, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                answer = _answer(worker)
                memory[name] = answer["memory"]
                if round_:
                    seconds[name].append(answer["seconds"])
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "tokens_per_second": ROWS * LENGTH / statistics.median(seconds[name]),
            "memory": memory[name],
        }
        for name in names
    }


def _start(name: str, folder: str, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", name, folder, "--threads", str(threads)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"},
    )


def _answer(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise SystemExit(f"{worker.args} ended without an answer")  # type: ignore[str-bytes-safe]


def write_base(shape: str, folder: str) -> None:
    """A Llama of the shape with random weights in bf16, and a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "[UNK]": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(folder)


def show(found: dict[str, Any], shape: str, threads: int) -> None:
    print(f"{shape}, {ROWS} x {LENGTH} tokens, r {RANK} all-linear, NF4, {threads} threads")
    for name, row in found.items():
        print(
            f"  {name:10} {row['seconds']:8.3f} s/step  {row['tokens_per_second']:8.0f} tokens/s"
            f"  {row['memory'] / 1e9:6.2f} GB"
        )
    for key, value in ratios(found).items():
        print(f"  {key:22} {value:.2f}")


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """How many times faster, and how many times leaner, decal is than each peer."""
    out = {}
    for peer, own in PARTNERS.items():
        if peer in found and own in found:
            key = peer.replace("-", "_")
            out[f"ratio_{key}"] = found[peer]["seconds"] / found[own]["seconds"]
            out[f"memory_ratio_{key}"] = found[peer]["memory"] / found[own]["memory"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="One optimizer step, beside the peers.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--peers", default="peft,peft-best", help="of peft, peft-best, trl")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker[0], given.worker[1], given.threads)
        return
    peers = [name for name in given.peers.split(",") if name]
    own = list(dict.fromkeys(PARTNERS[name] for name in peers)) or ["decal"]
    found = race(given.shape, [*own, *peers], given.steps, given.threads)
    if given.json:
        print(json.dumps({"shape": given.shape, "contenders": found, **ratios(found)}))
    else:
        show(found, given.shape, given.threads)


if __name__ == "__main__":
    main()
