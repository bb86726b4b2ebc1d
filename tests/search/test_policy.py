"""Stage 2's vote: which distances count, and how layers are put together."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.policy import SharingPolicy

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
