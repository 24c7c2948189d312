"""The process of one contender: a step for every line on stdin, its figures as JSON on stdout.

    python -m bench.worker NAME SETTING SHAPE FOLDER THREADS

Knows no other process and compares nothing. Memory is the process' own anonymous memory at its
highest, loading included; weight files that are only mapped do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.contenders import Task, decal_steps, peft_steps, trl_steps
from bench.peak import Peak
from bench.shapes import KNOWN

SETTINGS: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "best": {"dropout": 0.0},
    "bf16": {"quant": "none"},
    "chat": {"chat": True},
}
"""What distinguishes the tasks; both sides of a comparison have the same."""


class Anonymous:
    """Watches this process' anonymous memory from a thread; `peak` is in bytes.

    A look takes a few microseconds: it keeps what is measured from running.
    """

    def __init__(self, every: float = 0.01):
        self.peak = 0
        self._every = every
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        pages, page = os.open("/proc/self/statm", os.O_RDONLY), os.sysconf("SC_PAGE_SIZE")
        while True:
            _, resident, of_files, *_ = os.pread(pages, 256, 0).split()
            self.peak = max(self.peak, (int(resident) - int(of_files)) * page)
            time.sleep(self._every)


class Turns:
    """Answers for the last step and waits for the next; ends the process when stdin ends."""

    def __init__(self, memory: Anonymous, more: Callable[[], dict[str, Any]]):
        self._memory = memory
        self._more = more
        self._begun: float | None = None
        self._answers, sys.stdout = sys.stdout, sys.stderr

    def wait(self) -> None:
        seconds = None if self._begun is None else time.perf_counter() - self._begun
        answer = {"seconds": seconds, "memory": self._memory.peak, **self._more()}
        print(json.dumps(answer), file=self._answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self._begun = time.perf_counter()


def run_decal(task: Task, memory: Anonymous) -> None:
    from bench.step_parts import Parts
    from decal.kernels import native

    parts = Parts(KNOWN[task.shape]["vocab_size"])
    parts.wrap()

    def figures() -> dict[str, Any]:
        return {**parts.take(), "isa": native.isa()}

    turns = Turns(memory, figures)
    _take(decal_steps(task, parts.timed), turns)


def run_peak(memory: Anonymous) -> None:
    peak = Peak()
    rates: list[float] = []
    turns = Turns(memory, lambda: {"rate": rates[-1] if rates else None, "what": peak.what})
    while True:
        turns.wait()
        rates.append(peak.rate())


def _take(steps: Iterator[None], turns: Turns) -> None:
    for _ in steps:
        turns.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="decal, peft, peft-best, peft-autocast, trl or peak")
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("shape", choices=KNOWN)
    parser.add_argument("folder")
    parser.add_argument("threads", type=int)
    given = parser.parse_args()
    memory = Anonymous()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    task = Task(given.shape, given.folder, **SETTINGS[given.setting])
    if given.name == "decal":
        run_decal(task, memory)
    elif given.name == "peak":
        run_peak(memory)
    elif given.name == "trl":
        trl_steps(task, Turns(memory, dict).wait)
    else:
        _take(peft_steps(task, given.name), Turns(memory, dict))


if __name__ == "__main__":
    main()
