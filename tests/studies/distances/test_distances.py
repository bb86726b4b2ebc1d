"""Definitions of a distance: those that the package uses come out as in the package, and weights are learned back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.studies.distances.distances import (
    DEFAULT,
    QUANTITIES,
    VOTES,
    PairSums,
    all_distances,
    fit_weights,
    layer_distances,
    learned_features,
    pair_sums,
)
from trtllm_memshare.search.block_distance import block_distance, pairs_on, rotate
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.policy import SharingPolicy
from trtllm_memshare.search.types import PairBatch

NUM_BLOCKS, LAYERS, HEADS, SIZE, HEAD_DIM = 9, 4, 2, 8, 16


@pytest.fixture(scope="module")
def pool() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(NUM_BLOCKS, LAYERS, 2, HEADS, SIZE, HEAD_DIM, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def inv_freq() -> torch.Tensor:
    return 1000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


@pytest.fixture(scope="module")
def pairs() -> PairBatch:
    rng = np.random.default_rng(5)
    shape, num_rows = (12, SIZE), NUM_BLOCKS * SIZE
    new, old = (rng.integers(0, num_rows, shape).astype(np.int32) for _ in range(2))
    return PairBatch(new, old, rng.integers(1, 300, shape).astype(np.int32))


@pytest.fixture(scope="module")
def sums(pool, pairs, inv_freq) -> PairSums:
    return pair_sums(pool, pairs, inv_freq)


@pytest.mark.parametrize(
    ("name", "settings", "undo_rope"),
    [
        (DEFAULT, {}, True),
        ("K and V, quorum", {"layer_quorum": 0.75}, True),
        ("K and V, mean", {"layer_vote": "mean"}, True),
        ("K, worst", {"compared": "k"}, True),
        ("V, worst", {"compared": "v"}, True),
        ("K as stored and V, worst", {}, False),
        ("K as stored and V, pooled", {"pool_layers": True}, False),
    ],
)
def test_what_the_policy_can_be_set_to_is_what_the_policy_says(pool, pairs, inv_freq, sums, name, settings, undo_rope):
    stage_2 = block_distance(pool, *pairs_on(pool.device, pairs), inv_freq if undo_rope else inv_freq[:0])
    expected = SharingPolicy(make_config("aligned", **settings)).layer_vote(stage_2.numpy())
    assert all_distances(sums)[name] == pytest.approx(expected, rel=1e-5)


def test_every_quantity_and_vote_is_there_and_equal_rows_are_at_no_distance(pool, pairs, inv_freq):
    # The newer rows hold what the older ones would, written position_delta tokens later: equal but for the rotation.
    fresh = torch.zeros(2, LAYERS, 2, HEADS, SIZE, HEAD_DIM)
    old = pool[pairs.old_rows[0] // SIZE, :, :, :, pairs.old_rows[0] % SIZE].float()  # [rows, layers, 2, heads, dim]
    turned = rotate(old[None, :, :, 0], torch.from_numpy(pairs.position_delta[:1]), inv_freq)[0]
    fresh[0] = old.permute(1, 2, 3, 0, 4)
    fresh[1] = torch.stack([turned, old[:, :, 1]], 2).permute(1, 2, 3, 0, 4)
    slots = np.arange(SIZE, dtype=np.int32)[None]
    distances = all_distances(pair_sums(fresh, PairBatch(slots + SIZE, slots, pairs.position_delta[:1]), inv_freq))
    assert set(distances) == {f"{quantity}, {vote}" for quantity in QUANTITIES for vote in (*VOTES, "pooled")}
    for name, values in distances.items():
        assert values[0] > 0.1 if "stored" in name else values[0] < 1e-5, name


def test_a_change_in_one_frequency_is_seen_where_that_frequency_counts(pool, inv_freq):
    changed = pool[:2].clone()
    changed[1] = changed[0]
    changed[1, 2, 0, :, :, [7, 15]] += 3.0  # layer 2, K, the lowest of 8 frequencies
    slots = np.arange(SIZE, dtype=np.int32)[None]
    batch = PairBatch(slots + SIZE, slots, np.zeros((1, SIZE), np.int32))
    sums = pair_sums(changed, batch, inv_freq)
    by_layer = {quantity: layer_distances(sums, quantity)[0] for quantity in QUANTITIES}
    for quantity in ("K high half", "K quarter 1", "K quarter 3", "V"):
        assert (by_layer[quantity] == 0).all()
    for quantity in ("K", "K low half", "K quarter 4", "K by wavelength", "K by frequency"):
        assert np.flatnonzero(by_layer[quantity]).tolist() == [2]
    by_wavelength, even, by_frequency = (by_layer[f"K{how}"][2] for how in (" by wavelength", "", " by frequency"))
    assert by_wavelength > 1.2 * even
    assert even > 5 * by_frequency


def test_weights_are_learned_back_and_never_negative(sums):
    rng = np.random.default_rng(0)
    features = rng.random((400, 2, 3))
    weights = np.array([[0.0, 0.6, 0.0], [0.1, 0.0, 0.3]])
    harm = 1e-8 * np.exp(10 * (features * weights).sum((1, 2)) + 0.1 * rng.normal(size=400))
    assert fit_weights(features, harm) == pytest.approx(weights, abs=0.01)
    opposed = fit_weights(features, 1e-8 * np.exp(-10 * features[:, 0, 0]))
    assert opposed[0, 0] == 0
    assert (opposed >= 0).all()
    assert learned_features(sums, "learned layers").shape == (12, 1, LAYERS)
    assert learned_features(sums, "learned layers of K quarters and V").shape == (12, 5, LAYERS)


def test_a_head_that_turns_in_part_is_refused(pool, pairs, inv_freq):
    with pytest.raises(ValueError, match="the whole head must turn: 8 of 16 elements do"):
        pair_sums(pool, pairs, inv_freq[:4])
