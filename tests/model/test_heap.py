"""What glibc does with freed memory while a model trains."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from decal.model.heap import keeping_freed


def faults_of_a_second_step() -> int:
    """Pages that the system clears for 160 MB in blocks when as much was just freed."""
    faults = 0
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.zeros(2 << 20) for _ in range(20)]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        del blocks
    return faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_inside_the_block_only() -> None:
    """Fails when the thresholds are not set, or not set back."""
    with keeping_freed():
        assert faults_of_a_second_step() < 100
    assert faults_of_a_second_step() > 1_000
