"""Which rank does ticket routing need? Base, full fine-tuning, LoRA and QLoRA at five ranks.

    python examples/ticket_routing/ladder.py                 all 33 runs, then README.md is written
    python examples/ticket_routing/ladder.py --small         four short runs, nothing is written

Every run is an ordinary decal run, scored on the 2,400 test tickets by generating the queue's name.
Finished runs are kept in results.jsonl beside this file and not repeated.
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
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
RANKS = (1, 2, 4, 8, 16)
STEPS = 200
BATCH = 32
LR = {"full": 1e-3, "lora": 1.5e-3}
WARMUP = 0.1


def plan(small: bool) -> list[dict[str, Any]]:
    """All runs, the large ranks first."""
    if small:
        kinds = [("full", "none", 0), ("lora", "nf4", 16), ("lora", "nf4", 1), ("lora", "none", 4)]
        return [{"method": m, "quant": q, "r": r, "seed": 0} for m, q, r in kinds]
    kinds = [("full", "none", 0)]
    kinds += [("lora", quant, r) for r in reversed(RANKS) for quant in ("nf4", "none")]
    return [
        {"method": m, "quant": q, "r": r, "seed": seed} for m, q, r in kinds for seed in range(3)
    ]


def run_one(job: dict[str, Any], steps: int, limit: int | None) -> dict[str, Any]:
    """Trains and scores one job; called in a process of its own."""
    from decal import demo
    from decal.config import DataConfig, FullConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
    from decal.verbs.text import complete
    from decal.verbs.train import train

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "train.jsonl")
        demo.write_jsonl(data, "train")
        adapter = (
            FullConfig()
            if job["method"] == "full"
            else LoraConfig(r=job["r"], lora_alpha=2 * job["r"], lora_dropout=0.0)
        )
        config = RunConfig(
            base=str(demo.base_path()),
            quant=QuantConfig(format=job["quant"]),
            adapter=adapter,
            data=DataConfig(path=str(data), max_length=256, eval=0.05),
            train=TrainConfig(
                max_steps=steps,
                batch_size=BATCH,
                lr=LR[job["method"]],
                warmup=WARMUP,
                seed=job["seed"],
            ),
            output=str(Path(folder, "run")),
        )
        done = train(config)
        assert done is not None
        test = demo.rows("test")[:limit]
        prompts = [row.messages[:-1] for row in test]
        says = complete(
            done.session.model, done.session.tokenizer, prompts, max_new_tokens=8, batch_size=100
        )
    right = [s == row.queue for s, row in zip(says, test, strict=True)]
    paired = [ok for ok, row in zip(right, test, strict=True) if row.pair is not None]
    wrong = Counter(
        (row.queue, said) for ok, said, row in zip(right, says, test, strict=True) if not ok
    )
    return {
        **job,
        "accuracy": sum(right) / len(right),
        "pairs": sum(paired) / len(paired) if paired else None,
        "trainable": done.trainable_params,
        "eval_loss": done.result.best_eval_loss,
        "seconds": done.result.seconds,
        "tokens_per_second": done.result.tokens_per_second,
        "confused": [[*pair, n] for pair, n in wrong.most_common(20)],
    }


def base_scores(limit: int | None) -> dict[str, Any]:
    """The base without training: by likelihood over the 48 names, and what it generates."""
    import torch

    from decal import demo, load_base
    from decal.verbs.text import complete, encode_prompt

    model, tokenizer = load_base(demo.base_path())
    test = demo.rows("test")[:limit]
    names = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in demo.QUEUES]
    assert all(len(name) == 1 for name in names)  # so that one position holds all likelihoods
    choices = torch.tensor(names).squeeze(1)
    right = 0
    with torch.inference_mode():
        for row in test:
            ids = torch.tensor([encode_prompt(tokenizer, row.messages[:-1])])
            best = int(model(ids, logits_to_keep=1).logits[0, -1, choices].argmax())
            right += demo.QUEUES[best] == row.queue
    shown = complete(model, tokenizer, [r.messages[:-1] for r in test[:3]], max_new_tokens=24)
    return {"likelihood": right / len(test), "generates": shown}


def bag_of_words() -> dict[str, float]:
    """Logistic regression on words and pairs of neighbouring words (scikit-learn)."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from decal import demo

    train, test = demo.rows("train"), demo.rows("test")
    model = make_pipeline(
        CountVectorizer(ngram_range=(1, 2), binary=True), LogisticRegression(max_iter=200, C=10.0)
    )
    model.fit([r.prompt for r in train], [r.queue for r in train])
    says = model.predict([r.prompt for r in test])
    right = [s == r.queue for s, r in zip(says, test, strict=True)]
    pairs = [ok for ok, r in zip(right, test, strict=True) if r.pair is not None]
    return {"accuracy": sum(right) / len(right), "pairs": sum(pairs) / len(pairs)}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[k] == b[k] for k in ("method", "quant", "r", "seed"))


def _read() -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )


def _spawn(job: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, __file__, "--job", json.dumps(job), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _mean(values: Iterable[float]) -> str:
    numbers = [100 * v for v in values]
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.1f} ± {spread:.1f}"


def write_readme(rows: list[dict[str, Any]], base: dict[str, Any], words: dict[str, float]) -> None:
    """The table, from the results alone."""
    lines = [
        f"| base, likelihood over the 48 names | – | {100 * base['likelihood']:.1f} | – |",
        f"| bag of words, logistic regression | – | {100 * words['accuracy']:.1f}"
        f" | {100 * words['pairs']:.1f} |",
    ]
    kinds = [("full", "none", 0)] + [("lora", q, r) for q in ("none", "nf4") for r in RANKS]
    names = {"none": "LoRA, bf16 base", "nf4": "QLoRA, NF4 base"}
    for method, quant, r in kinds:
        group = [x for x in rows if (x["method"], x["quant"], x["r"]) == (method, quant, r)]
        if not group:
            continue
        name = "full fine-tuning" if method == "full" else f"{names[quant]}, r = {r}"
        accuracy, pairs = _mean(x["accuracy"] for x in group), _mean(x["pairs"] for x in group)
        lines.append(f"| {name} | {group[0]['trainable']:,} | {accuracy} | {pairs} |")
    confused: Counter[tuple[str, str]] = Counter()
    for x in rows:
        if x["quant"] == "nf4" and x["r"] == max(RANKS):
            confused.update({(a, b): n for a, b, n in x["confused"]})
    pairs_text = [f"| {a} | {b} | {n} |" for (a, b), n in confused.most_common(8)]
    said = [f"> {text!r}" for text in base["generates"]]
    text = (HERE / "README.template.md").read_text()
    for name, block in (("TABLE", lines), ("CONFUSED", pairs_text), ("GENERATES", said)):
        text = text.replace(f"{{{{{name}}}}}", "\n".join(block))
    seconds = statistics.mean(x["seconds"] for x in rows)
    text = text.replace("{{STEPS}}", str(STEPS)).replace("{{BATCH}}", str(BATCH))
    text = text.replace("{{SECONDS}}", f"{seconds:.0f}").replace("{{SEEDS}}", "3")
    (HERE / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="four short runs, nothing is written")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--limit", type=int, help="score only so many test tickets")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(run_one(json.loads(given.job), given.steps, given.limit)))
        return
    if given.small:
        given.steps, given.limit = min(given.steps, 20), 100
    finished = [] if given.small else _read()
    todo = [job for job in plan(given.small) if not any(_same(job, x) for x in finished)]
    arguments = ["--steps", str(given.steps)]
    arguments += ["--limit", str(given.limit)] if given.limit else []
    begun = time.perf_counter()
    with ThreadPoolExecutor(given.jobs) as pool:
        for result in pool.map(lambda job: _spawn(job, arguments), todo):
            finished.append(result)
            if not given.small:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            shown = {k: result[k] for k in ("method", "quant", "r", "seed", "accuracy", "pairs")}
            print(f"{time.perf_counter() - begun:6.0f} s  {shown}", flush=True)
    if not given.small:
        write_readme(finished, base_scores(None), bag_of_words())


if __name__ == "__main__":
    main()
