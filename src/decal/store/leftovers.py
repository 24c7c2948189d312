"""Tensors in hub files that are no weights: buffers that older versions of transformers stored.

Causal masks of GPT-2 and NeoX, rotary frequencies, position ids: each follows from the config and
is computed anew. Loading passes over them and a fingerprint leaves them out. Knows names only.
"""

from __future__ import annotations

import re

__all__ = ["is_leftover"]

_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$")
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|token_type_ids)$"
)


def is_leftover(key: str, dims: int | None = None) -> bool:
    """Whether a tensor that the model does not know is such a buffer.

    `dims`, the number of its dimensions, tells a mask from the bias of a layer called `attention`;
    without it the key must be one that no weight of the model has.
    """
    return bool(_BUFFER.search(key) or (_MASK.search(key) and dims != 1))
