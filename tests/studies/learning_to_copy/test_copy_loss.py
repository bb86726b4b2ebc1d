"""The loss on a second copy tells a model that looks back from one that does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from benchmarks.studies.learning_to_copy.copy_loss import copy_loss

VOCAB = 50


class Copier:
    """Predicts the token ``period`` - 1 places back: right throughout the second copy, if the period is right."""

    config, device = SimpleNamespace(vocab_size=VOCAB), torch.device("cpu")

    def __init__(self, period: int, sharpness: float) -> None:
        self._back, self._sharpness = period - 1, sharpness

    def __call__(self, ids, use_cache):
        return SimpleNamespace(logits=self._sharpness * one_hot(ids.roll(self._back, 1), VOCAB).float())


def test_a_copier_loses_nothing_and_a_guesser_everything():
    assert copy_loss(Copier(20, 50.0), 20) < 1e-6
    assert copy_loss(Copier(20, 0.0), 20) == pytest.approx(torch.log(torch.tensor(float(VOCAB))).item())
    assert copy_loss(Copier(7, 50.0), 20) > 10  # sure of the wrong token
