"""What retired pages cost on vLLM is told for each token that was written, as in the other studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trtllm_memshare.evaluation.masked_replay import Change, nothing_retired
from trtllm_memshare.evaluation.vllm_fidelity import BLOCK_SIZE, WrittenText, compare_with_replay


class Replay:
    """Each token of an answer behind 64 tokens of prompt costs a twentieth of a nat."""

    def logits(self, ids, retired):
        return torch.zeros(len(ids), 4)

    def read(self, ids, tokens_per_block):
        return ids

    def change(self, full, retired):
        cost = np.where(np.arange(len(full) - 1) < 63, 0.0, 0.05).astype(np.float32)
        return Change(cost, cost / 2, cost > 0)


def test_the_prompt_is_not_among_the_tokens_that_a_cost_is_spread_over():
    text = WrittenText([0] * 64, [0] * 224, [-math.log(4)] * 224, nothing_retired(288, BLOCK_SIZE))
    found = compare_with_replay([text], Replay())
    assert found["loss_change_nats_per_token"] == pytest.approx(0.05)
    assert found["divergence_nats_per_token"] == pytest.approx(0.025)
    assert found["largest_difference_from_masked_replay"] < 1e-6
