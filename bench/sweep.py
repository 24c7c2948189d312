"""Seconds and memory of a sweep's step: five ranks over one base, beside five runs one by one.

    python bench/sweep.py
    python bench/sweep.py --lengths 64,128 --rounds 5 --json
    python bench/sweep.py --write docs/performance.md

The base has the shape of SmolLM2-135M in NF4 with double quantization; candidates have r = 4, 8,
16, 32 and 64 on all linear layers, dropout 0.05, and each takes a step of 2 rows of so many tokens.

    sweep    one joint step of all five (verbs/joint.py), each with its own optimizer
    alone    the same five steps, one after the other, in the same process: loading and attaching,
             which five runs would do five times, are not counted
    peft     five steps of the tutorials' loop with peft + bitsandbytes, one adapter after the other
             on one base, in a process of its own

The three alternate, round after round; ratios are medians over the rounds of sweep by the other.
Memory is anonymous memory of processes of their own: the base alone, each candidate alone after two
steps, all of them together. A candidate's own part is what its process takes beyond the base's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

from bench import performance_page  # noqa: E402
from bench.shapes import KNOWN, write_base  # noqa: E402

RANKS = (4, 8, 16, 32, 64)
ROWS = 2
SHAPE = "smollm2-135m"
_OPEN = ExitStack()
"""Holds a training open until its process ends."""


# --- the process of one contender ---------------------------------------------------------------


def batches(length: int) -> Any:
    """One optimizer step of ROWS rows, as a run builds it."""
    import numpy as np

    from decal.data.pack import Batches
    from decal.data.sample import Sample

    drawn = np.random.default_rng(0).integers(5, KNOWN[SHAPE]["vocab_size"], (ROWS, length))
    samples = [
        Sample(row=i, input_ids=row.astype(np.int32), trained=np.arange(length) > 0)
        for i, row in enumerate(drawn)
    ]
    return Batches(samples=samples, batch_size=ROWS, micro_batch_tokens=4096)


def sessions_of(folder: str, ranks: tuple[int, ...], length: int) -> dict[str, Any]:
    """A session for every rank, on one model."""
    from decal.config import BaseConfig, DataConfig, LoraConfig, QuantConfig, RunConfig
    from decal.model.attention import Flattening
    from decal.model.inject import attach
    from decal.model.state import train_only
    from decal.objectives import sft
    from decal.verbs.load import load_base
    from decal.verbs.loss import head_of
    from decal.verbs.session import Session

    model, tokenizer = load_base(folder, quant=QuantConfig(format="nf4"))
    head = None
    sessions = {}
    for r in ranks:
        config = RunConfig(
            base=BaseConfig(path=folder),
            quant=QuantConfig(format="nf4"),
            adapter=LoraConfig(r=r, lora_dropout=0.05),
            data=DataConfig(path="generated"),
            output=f"{folder}/run",
        )
        attach(model, config.adapter, f"r{r}", drops_as="default")
        head = head or head_of(model, sft)
        sessions[f"r{r}"] = Session(
            config=config,
            model=model,
            tokenizer=tokenizer,
            samples=[],
            batches=batches(length),
            eval_batches=[],
            flattening=Flattening(True),
            head=head,
            rates={},
            table=None,
            bits_per_weight=0.0,
            adapter=f"r{r}",
        )
    train_only(model, frozenset(sessions))
    return sessions


def decal_steps(folder: str, ranks: tuple[int, ...], length: int) -> dict[str, Callable[[], None]]:
    """`sweep` takes a joint step, `alone` one step of each candidate after the other."""
    from decal.train.optim import Optimizer
    from decal.train.together import Share
    from decal.verbs import joint

    sessions = sessions_of(folder, ranks, length)
    optimizers = {n: Optimizer(s.parameters, s.config.train) for n, s in sessions.items()}
    first = next(iter(sessions.values()))
    _OPEN.enter_context(first.training())
    step = next(first.batches.steps())
    [batch] = step.micro

    def update(name: str) -> None:
        optimizers[name].update(2e-4, optimizers[name].gradient_norm())

    def sweep() -> None:
        losses = joint.losses(sessions, [Share(name, batch, 0) for name in sessions])
        sum(loss / step.trained for loss in losses).backward()  # type: ignore[union-attr]
        for name in sessions:
            update(name)

    def alone() -> None:
        for name, session in sessions.items():
            loss, _ = session.loss(batch, 0)
            (loss / step.trained).backward()
            update(name)

    return {"sweep": sweep, "alone": alone}


def peft_steps(folder: str, length: int) -> dict[str, Callable[[], None]]:
    """`peft` takes a step with each rank."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quant, dtype=torch.bfloat16
    )
    model: Any = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    optimizers = {}
    for r in RANKS:
        config = peft.LoraConfig(
            r=r,
            lora_alpha=2 * r,
            lora_dropout=0.05,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        if isinstance(model, peft.PeftModel):
            model.add_adapter(f"r{r}", config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=f"r{r}")
        model.set_adapter(f"r{r}")
        own = [p for p in model.parameters() if p.requires_grad]
        optimizers[f"r{r}"] = (own, torch.optim.AdamW(own, lr=2e-4))
    model.train()
    [batch] = next(batches(length).steps()).micro
    ids = batch.input_ids.view(ROWS, length)

    def step() -> None:
        for name, (own, optimizer) in optimizers.items():
            model.set_adapter(name)
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return {"peft": step}


def serve(given: argparse.Namespace) -> None:
    """Answers each line on stdin, the name of a step, with its seconds and the peak memory."""
    import torch

    from bench.worker import Anonymous

    answers, sys.stdout = sys.stdout, sys.stderr
    memory = Anonymous()
    torch.set_num_threads(given.threads)
    ranks = tuple(int(r) for r in given.ranks.split(",") if r)
    if given.serve == "peft":
        steps = peft_steps(given.folder, given.length)
    elif ranks:
        steps = decal_steps(given.folder, ranks, given.length)
    else:  # the base alone
        sessions_of(given.folder, ranks, given.length)
        steps = {}
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        if line.strip():
            steps[line.strip()]()
        seconds = time.perf_counter() - begun
        print(json.dumps({"s": seconds, "memory": memory.peak}), file=answers, flush=True)
    os._exit(0)


# --- the bench ----------------------------------------------------------------------------------


class Worker:
    """A contender's process."""

    def __init__(self, given: argparse.Namespace, what: str, length: int, ranks: tuple[int, ...]):
        words = ["--serve", what, "--length", str(length), "--folder", given.folder]
        words += ["--ranks", ",".join(map(str, ranks)), "--threads", str(given.threads)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(given.threads)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._answer()

    def step(self, name: str = "") -> dict[str, float]:
        """Seconds of a step, and the process' memory at its highest so far."""
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended without an answer")
        found: dict[str, float] = json.loads(line)
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def race(given: argparse.Namespace, length: int) -> dict[str, Any]:
    """Medians of one length; the first round is not counted."""
    decal = Worker(given, "decal", length, RANKS)
    peft = Worker(given, "peft", length, RANKS) if given.peft else None
    rounds = []
    for round_ in range(given.rounds + 1):
        row = {name: decal.step(name)["s"] for name in ("sweep", "alone")}
        if peft:
            row["peft"] = peft.step("peft")["s"]
        if round_:
            rounds.append(row)
    decal.end()
    if peft:
        peft.end()
    found = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    for other in [name for name in found if name != "sweep"]:
        found[f"of_{other}"] = statistics.median(row["sweep"] / row[other] for row in rounds)
    return found


def memory(given: argparse.Namespace, length: int) -> dict[str, int]:
    """Bytes: the base alone, the sum of the candidates' own parts, and the sweep."""

    def peak(ranks: tuple[int, ...], steps: Iterator[str]) -> int:
        worker = Worker(given, "decal", length, ranks)
        for name in steps:
            worker.step(name)
        found = int(worker.step()["memory"])
        worker.end()
        return found

    base = peak((), iter(()))
    own = sum(peak((r,), iter(["alone", "alone"])) - base for r in RANKS)
    return {"base": base, "own": own, "sweep": peak(RANKS, iter(["sweep", "sweep"]))}


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    head = ["5 candidates, tokens each", "sweep, s", "one by one, s", "share"]
    peft = any("peft" in row for row in found["lengths"].values())
    head += ["peft, s", "share"] if peft else []
    rows = []
    for length, row in found["lengths"].items():
        cells = [f"{ROWS} x {length}", f"{row['sweep']:.2f}", f"{row['alone']:.2f}"]
        cells.append(f"{row['of_alone']:.0%}")
        if peft:
            cells += [f"{row['peft']:.2f}", f"{row['of_peft']:.0%}"]
        rows.append(cells)
    used = found["memory"]
    text = (
        f"Memory at {ROWS} x {found['memory_length']}: the base alone {used['base'] / 1e9:.2f} GB,"
        f" own parts of the five runs {used['own'] / 1e9:.2f} GB, the sweep"
        f" {used['sweep'] / 1e9:.2f} GB."
    )
    parts = [performance_page.run_on(found["threads"], found["isa"])]
    return "\n\n".join([*parts, performance_page.table(head, rows), text])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="64,128", help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a document")
    for hidden in ("--serve", "--folder", "--ranks"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parsed()
    if given.serve:
        serve(given)
        return
    from decal.kernels import native

    lengths = [int(text) for text in given.lengths.split(",")]
    found: dict[str, Any] = {"threads": given.threads, "isa": native.isa()}
    with tempfile.TemporaryDirectory() as folder:
        given.folder = folder
        write_base(SHAPE, folder)
        found["lengths"] = {}
        for length in lengths:
            print(f"{ROWS} x {length} ...", file=sys.stderr, flush=True)
            found["lengths"][length] = race(given, length)
        print("memory ...", file=sys.stderr, flush=True)
        found["memory"] = memory(given, lengths[0])
        found["memory_length"] = lengths[0]
    if given.write:
        performance_page.write(given.write, "sweep", page(found))
    print(json.dumps(found) if given.json else page(found))


if __name__ == "__main__":
    main()
