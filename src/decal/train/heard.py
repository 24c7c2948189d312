"""Which trainable tensors the loss has reached so far, and when silence is an error.

A tensor that the forward pass does not use would be saved as if it had been trained; that has to
come out in the first steps. But silence alone proves little: LoRA's A has a zero gradient until B
has moved, an expert may see no token for many steps, and float16 turns the gradient of A to zero
while B is still tiny. So tensors are judged by kind: the tensors whose names differ only in their
numbers (`layers.3.mlp.experts.7.up_proj…` and `layers.5.mlp.experts.0.up_proj…`).

    after 2 updates   nothing at all was heard, or autograd reached no tensor of a kind: error
    after 20 updates  a kind was reached, but with zeros only: error
    any later time    single tensors that are silent among others of their kind: a warning, after
                      20 updates and at the end

A disconnected graph is disconnected for a whole kind: targets that the model's code goes around,
an adapter that is switched off. Where a whole model is trained, kinds that are not reached are only
warned of: a model may have parts that this data does not use, and they are saved as what they were.

Rejected: an error for every tensor that is silent after two updates; it ends the training of every
mixture of experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

EARLY, LATE = 2, 20
"""Updates after which silence is judged."""


class Heard:
    """Listens to the gradients of named tensors.

    Args:
        names: the trainable tensors.
    """

    def __init__(self, names: Iterable[str]):
        self.names = tuple(names)
        self.unreached = set(self.names)
        """Those that autograd has given no gradient yet."""
        self.silent = set(self.names)
        """Those whose gradients were all zero so far, and the unreached."""
        self.updates = 0
        """Updates so far, skipped ones apart."""

    def listen(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the gradients of one update; those of tensors already heard cost nothing."""
        self.updates += 1
        news = [(name, g) for name, g in gradients if name in self.silent]
        if not news:
            return
        self.unreached -= {name for name, _ in news}
        loud = torch.stack([(g != 0).any() for _, g in news]).tolist()
        self.silent -= {name for (name, _), yes in zip(news, loud, strict=True) if yes}

    def disconnected(self, *, whole_model: bool = False) -> list[str]:
        """The tensors whose silence is an error by now; see the top of the file."""
        if self.updates < EARLY or not self.silent:
            return []
        if len(self.silent) == len(self.names):
            return list(self.names)
        if whole_model:
            return []
        judged = self.silent if self.updates >= LATE else self.unreached
        kinds = defaultdict(list)
        for name in self.names:
            kinds[_kind(name)].append(name)
        return [n for names in kinds.values() if judged.issuperset(names) for n in names]

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as plain JSON."""
        return {
            "updates": self.updates,
            "silent": sorted(self.silent),
            "unreached": sorted(self.unreached),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.updates = state["updates"]
        self.silent, self.unreached = set(state["silent"]), set(state["unreached"])


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)
