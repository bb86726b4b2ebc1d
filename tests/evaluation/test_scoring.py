"""Teacher-forced scores: known values, and the limit on what is kept."""

from __future__ import annotations

import math

import pytest
import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.scoring import Reference, ScoringSampler, summarize
from trtllm_memshare.serving.request import RequestHandle, RequestState, SamplingParams

SCRIPTS = [[1, 0], [1]]


def read(sampler: ScoringSampler, probabilities: list[list[float]]) -> None:
    """Feeds request 0 its two tokens and request 1 its one: rows (0, 0), (1, 0), then (0, 1)."""
    states = [RequestState(i, [5], SamplingParams(2), RequestHandle(i), tokens=[5]) for i in range(2)]
    logits = torch.tensor(probabilities).log() + 3.0  # a constant does not matter to a softmax
    assert sampler.sample(logits[:2], states) == [1, 1]
    states[0].tokens.append(1)
    assert sampler.sample(logits[2:], states[:1]) == [0]


def test_known_divergence_perplexity_and_flips():
    reference = Reference(SCRIPTS, 2)
    full = ScoringSampler(reference, fills=True)
    read(full, [[0.5, 0.5], [0.2, 0.8], [0.75, 0.25]])
    own = summarize(full.scores)
    assert own["kl_nats"] == own["kl_standard_error"] == own["flipped_token_fraction"] == 0
    assert own["perplexity"] == pytest.approx((0.5 * 0.8 * 0.75) ** (-1 / 3), rel=1e-6)
    arm = ScoringSampler(reference, fills=False)
    read(arm, [[0.25, 0.75], [0.2, 0.8], [0.25, 0.75]])
    first = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    last = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert arm.scores[0].divergence == pytest.approx([first, last], rel=1e-5)
    assert arm.scores[1].divergence == pytest.approx([0], abs=1e-7)
    summary = summarize(arm.scores)
    assert summary["kl_nats"] == pytest.approx((first + last) / 3, rel=1e-5)
    # Two requests: residuals of the ratio estimator are +r and -r, so the error is r * sqrt(2 * 2 / 1) / 3 tokens.
    residual = first + last - 2 * (first + last) / 3
    assert summary["kl_standard_error"] == pytest.approx(residual * math.sqrt(2 * 2) / 3, rel=1e-5)
    assert summary["perplexity"] == pytest.approx((0.75 * 0.8 * 0.25) ** (-1 / 3), rel=1e-6)
    assert summary["flipped_token_fraction"] == pytest.approx(2 / 3)  # the full cache's tie goes to token 0


def test_a_reference_that_would_not_fit_is_refused():
    with pytest.raises(UserError, match=r"keep 11\.\d GiB of log-probabilities, expected at most 4 \(set a smaller"):
        Reference([[0] * 20_000], 152_064)
