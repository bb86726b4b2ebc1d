"""The cost of choosing tokens is measured on rows that are really drawn."""

from __future__ import annotations

import pytest

from benchmarks import sampling_cost
from trtllm_memshare.serving.sampling import NO_TOKEN, Sampler


@pytest.mark.parametrize("name", sampling_cost.DECODING)
def test_each_decoding_is_timed_on_likely_tokens(monkeypatch, name):
    seen = []

    class Watched(Sampler):
        def sample(self, logits, requests):
            seen.append(super().sample(logits, requests))
            return seen[-1]

    monkeypatch.setattr(sampling_cost, "Sampler", Watched)
    assert sampling_cost.sampling_ms(2000, 3, sampling_cost.DECODING[name], "cpu", repeat=4) > 0
    assert len(seen) == 5
    assert all(NO_TOKEN not in tokens for tokens in seen)
    # Greedy takes the same each time; a sampled row does not.
    assert (len({tuple(tokens) for tokens in seen}) == 1) == (name == "greedy")
