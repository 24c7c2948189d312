"""The training loop and what it needs; `loop.py` is the file to read first."""

from decal.train.events import Event, Job, Memory, Result
from decal.train.loop import total_steps, train

__all__ = ["Event", "Job", "Memory", "Result", "total_steps", "train"]
