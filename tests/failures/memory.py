"""Peak memory of some work to the byte, from torch's own allocator.

What the system says of a process moves by megabytes between two runs; this does not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak(work: Callable[[], object]) -> int:
    """Most bytes of tensors on the CPU that `work` held at once beyond what was there before."""
    gc.collect()  # what is garbage already must not be freed, and counted, in between
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            work()
    finally:
        gc.enable()
    assert watched.profiler is not None
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def stored(model: nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())
