"""Batch: what a micro-batch is, in both layouts. Knows no models.

Flattened (the default): all samples of the micro-batch one after the other in one row, no padding;
`cu_seq_lens` says where each begins, and attention must honour it. Padded: one row per sample,
filled up on the right; for models or objectives that cannot work on flattened rows.

`targets` are already shifted: `targets[.., t]` is the token that position t must predict, or
IGNORE. The last token of a sample predicts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. With n samples and T tokens in all, S the longest sample:

    layout      flat                padded
    input_ids   int64 [1, T]        int64 [n, S]
    targets     int64 [1, T]        int64 [n, S]     IGNORE where nothing is trained
    positions   int64 [1, T]        int64 [n, S]     restart at 0 in every sample
    attention   None                int64 [n, S]     1 on tokens, 0 on padding
    cu_seq_lens int32 [n + 1]       None
    sample_ids  int64 [1, T]        int64 [n, S]     the sample's id: its row's number
    labels      None                int64 [n]        classes, for classification; else None
    rows        the samples' ids (line of the file, from 1), one per sample, in order
    """

    layout: Literal["flat", "padded"]
    input_ids: Tensor
    targets: Tensor
    positions: Tensor
    attention: Tensor | None
    cu_seq_lens: Tensor | None
    max_length: int
    sample_ids: Tensor
    rows: tuple[int, ...]
    trained: int
    """Trained tokens: targets that are not IGNORE; with labels, the samples."""
    tokens: int
    """Real tokens, padding apart."""
    labels: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; itself if they are there."""
        if self.input_ids.device == torch.device(device):
            return self
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)
