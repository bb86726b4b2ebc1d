"""Stage 2's vote: which distances count, and how layers are put together."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.policy import SharingPolicy
from trtllm_memshare.search.types import Candidate

# Two layers; |dK|^2, |K|^2, |dV|^2, |V|^2. Relative distances: K 0.1 and 0.6, V 0.3 and 0.2.
SUMS = np.array([[[0.01, 1.0, 0.09, 1.0], [1.44, 4.0, 0.16, 4.0]]], np.float32)


@pytest.mark.parametrize(
    ("settings", "distance"),
    [
        ({}, 0.6),
        ({"layer_quorum": 0.5}, 0.3),
        ({"layer_vote": "mean"}, 0.45),
        ({"compared": "k"}, 0.6),
        ({"compared": "v"}, 0.3),
        ({"compared": "v", "layer_vote": "mean"}, 0.25),
        ({"pool_layers": True}, (1.7 / 10) ** 0.5),
    ],
)
def test_distance_by_setting(settings, distance):
    policy = SharingPolicy(make_config("aligned", **settings))
    assert policy.layer_vote(SUMS) == pytest.approx([distance], rel=1e-5)
    broken = SUMS.copy()
    broken[0, 1, 0] = np.nan
    assert np.isnan(policy.layer_vote(broken)).all()


def _candidates(count: int) -> list[Candidate]:
    rows = np.arange(4, dtype=np.int32)
    return [Candidate(1, 0, n, n, 0, 9, rows, rows + 8, rows) for n in range(count)]


@pytest.mark.parametrize("settings", [{}, {"layer_vote": "mean"}, {"pool_layers": True}, {"layer_quorum": 0.5}])
def test_what_was_not_compared_is_not_shared(settings):
    """Zeros are what a kernel leaves that never ran; no sums at all is what a runner without a search gives."""
    policy = SharingPolicy(make_config("aligned", max_distance=0.9, **settings))
    assert len(policy.decide(_candidates(1), SUMS)) == 1
    unknown = [np.zeros((1, 2, 4), np.float32)]
    for place in ((0, 0, 1), (0, 1, 3)):
        unknown.append(SUMS.copy())
        unknown[-1][place] = 0.0
    for value in (np.nan, np.inf, -np.inf):
        for place in ((0, 0, 0), (0, 1, 1)):
            unknown.append(SUMS.copy())
            unknown[-1][place] = value
    for sums in unknown:
        assert policy.decide(_candidates(1), sums) == []
    assert policy.rejected == {"not_finite": len(unknown)}
    assert policy.decide(_candidates(3), None) == []
    assert policy.rejected["not_compared"] == 3


def test_the_preset_without_a_comparison_needs_none():
    policy = SharingPolicy(make_config("lexical"))
    assert len(policy.decide(_candidates(3), None)) == 3
    assert not policy.rejected


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"compared": "k"}, "compared k"), ({"layer_vote": "mean"}, "layer_vote mean"),
     ({"compared": "v", "layer_quorum": 0.5}, "compared v")],
)  # fmt: skip
def test_votes_of_layers_are_refused_where_one_distance_is_taken_over_all(settings, named):
    with pytest.raises(UserError, match=rf"{named} has no effect .*, which pool_layers replaces"):
        make_config("paper", **settings)
    assert make_config("paper", pool_layers=False, **settings).pool_layers is False
