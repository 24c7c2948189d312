"""A process that has everything loaded and forks one child per training or merge.

Starting Python, torch and transformers takes seconds and is not what the tests here are about.
The server loads them, does the runs that are never stopped in its own process (so that the children
find all lazy imports done), and then forks: every child loads base and data from the disk, and
trains or merges as `decal train --resume` and `decal merge` do.

`python -m tests.chaos.server FOLDER`, then one JSON object per line on stdin, one per line back.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from decal.config import RunConfig
from decal.errors import DecalError
from decal.train.events import Event, Note
from decal.verbs.merge import merge
from decal.verbs.train import train
from tests import zoo
from tests.chaos.points import Points, install

STEPS = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "nf4": {"base": "bfloat16", "quant": "nf4"},
    "fp16": {"base": "float16", "quant": "none"},
}
"""A quantized base, and one whose losses are scaled."""
OUTCOMES = {0: "done", -int(signal.SIGKILL): "killed"}


def settings(root: Path, output: str, variant: str) -> RunConfig:
    """A run of 8 steps: evaluations, checkpoints and the best one at different steps."""
    own = VARIANTS[variant]
    return RunConfig(
        base={"path": str(root / "base"), "device": "cpu", "dtype": own["base"]},
        quant=own["quant"],
        adapter={
            "r": 3,
            "lora_alpha": 7,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "down_proj"],
        },
        data={"path": str(root / "rows.jsonl"), "max_length": 64, "eval": 0.2},
        train={
            "max_steps": STEPS,
            "batch_size": 4,
            "lr": 1e-2,
            "micro_batch_tokens": 64,
            "eval_every": 3,
            "save_every": 2,
            "early_stopping": 3,
        },
        output=str(root / output),
    )


def write_inputs(root: Path) -> None:
    """A base of the zoo and 24 rows of unequal length."""
    zoo.save("llama", root / "base")
    rows = [
        {"prompt": f"{i} and {7 * i % 5}", "completion": f" is {i + 7 * i % 5}" + "!" * (i % 4)}
        for i in range(24)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def do(root: Path, request: dict[str, Any]) -> None:
    """The work of one child."""
    if request["do"] == "merge":
        merge(None, root / request["run"], root / request["output"])
        return
    config = settings(root, request["output"], request["variant"])

    def observe(event: Event) -> None:
        if isinstance(event, Note) and event.warning:
            print("warning:", event.text, flush=True)

    begun = (Path(config.output) / "run.yaml").exists()
    train(config, resume=begun, observe=observe)


def child(root: Path, request: dict[str, Any]) -> int:
    """Does the request with its kill; what it prints goes to child.log."""
    log = os.open(root / "child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    kill = request.get("kill")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def decide(phase: str, kind: str, number: int) -> Any:
        if kill and (phase, number) == (kill["phase"], kill["number"]):
            return kill["when"], die
        return None

    install(Points(decide, root / "phase"), root)
    try:
        do(root, request)
    except DecalError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def serve(root: Path) -> None:
    """Answers until stdin ends."""
    (root / "phase").write_bytes(b" " * 32)
    write_inputs(root)
    counts: dict[str, list[int]] = {}
    points = Points(lambda phase, kind, number: None)
    undo = install(points, root)
    answers, sys.stdout = sys.stdout, sys.stderr  # a run may have a warning to print
    for variant in VARIANTS:
        do(root, {"do": "train", "output": f"straight-{variant}", "variant": variant})
    do(root, {"do": "merge", "run": "straight-nf4", "output": "merged-straight"})
    undo()
    counts = {phase: [points.counts[phase], points.calls[phase]] for phase in points.calls}
    print(json.dumps(counts), file=answers, flush=True)
    pid = 0
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "wait":
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer: Any = OUTCOMES.get(code, code)
        else:
            pid = os.fork()
            if pid == 0:
                os._exit(child(root, request))
            answer = pid
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Path(sys.argv[1]))
