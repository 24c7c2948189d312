"""Sequence classification: summed cross entropy and the scores, against torch and scikit-learn."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from decal.objectives import OBJECTIVES, classify


def test_the_loss_is_a_sum_over_samples() -> None:
    """Fails when the mean is taken, or 16-bit logits are summed in 16 bits."""
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    total = classify.losses(logits, labels).sum()
    assert total.item() == pytest.approx(7 * cross_entropy(logits, labels).item(), rel=1e-12)
    low = classify.losses(logits.detach().bfloat16(), labels).sum()
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(total.item(), rel=7 * 2**-8)


@pytest.mark.interop
def test_scores_are_those_of_scikit_learn() -> None:
    """Fails when F1 is averaged by frequency, or over classes that nobody mentions."""
    from sklearn.metrics import accuracy_score, f1_score

    labels = torch.randint(0, 6, (200,)).tolist()
    predicted = [y if i % 3 else (y * 2) % 5 for i, y in enumerate(labels)]
    found = classify.scores(predicted, labels)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert classify.scores([0, 1, 1], [0, 1, 2])["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_registry() -> None:
    """Fails when an objective lacks a name of the protocol."""
    assert set(OBJECTIVES) == {"sft", "classify"}
    names = ("POOLS", "trained_positions", "targets", "losses", "projected_losses")
    assert all(hasattr(o, name) for o in OBJECTIVES.values() for name in names)
