"""How well a distance foretells harm: known answers, and intervals that know about problems."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.studies.distances.foretelling import Judged, accepted_harm, compare_definitions, weighted_midranks

RNG = np.random.default_rng(1)
PROBLEM = np.repeat(np.arange(40), 5)
HARM = np.exp(3 * RNG.normal(size=200))


def test_midranks_count_repeats_and_ties():
    assert weighted_midranks(np.array([0, 1, 1]), np.array([2.0, 1, 1])).tolist() == [1, 3, 3]
    values, counts = RNG.integers(0, 6, 30), RNG.integers(0, 4, 30)
    written_out = np.repeat(values, counts)
    below = (written_out[None] < values[:, None]).sum(1) + (written_out[None] == values[:, None]).sum(1) / 2
    assert weighted_midranks(np.unique(values, return_inverse=True)[1], counts.astype(float)) == pytest.approx(below)


def test_accepted_harm_is_the_mean_of_the_nearest_and_takes_a_share_of_ties():
    assert accepted_harm(np.array([0, 1, 2, 3]), np.array([1.0, 2, 30, 400]), np.ones(4)) == [1, 1.5, 11]
    assert accepted_harm(np.zeros(4, int), np.array([1.0, 2, 30, 7]), np.ones(4)) == [10, 10, 10]
    # The first pair counts three times: of four, a quarter is one of them and three quarters are all of them.
    assert accepted_harm(np.array([0, 1]), np.array([8.0, 100]), np.array([3.0, 1])) == pytest.approx([8, 8, 8])


def test_extremes_and_ties_come_out_as_they_must():
    distances = {"noise": RNG.random(200), "harm": HARM, "against": -HARM, "blind": np.zeros(200)}
    figures = compare_definitions(Judged(HARM, PROBLEM, distances), 200)
    assert (figures["harm"]["rank_correlation"]["value"], figures["harm"]["auc"]["value"]) == (1, 1)
    assert (figures["against"]["rank_correlation"]["value"], figures["against"]["auc"]["value"]) == (-1, 0)
    assert (figures["blind"]["rank_correlation"]["value"], figures["blind"]["auc"]["value"]) == (0, 0.5)
    assert figures["blind"]["accepted"]["50"]["harm"] == pytest.approx(HARM.mean(), rel=1e-3)
    assert figures["harm"]["accepted"]["50"]["harm"] == pytest.approx(np.sort(HARM)[:100].mean(), rel=1e-3)
    low, high = figures["noise"]["rank_correlation"]["interval"]
    assert low < 0 < high
    assert figures["harm"]["rank_correlation"]["gain_interval"][0] > 0.5
    assert figures["harm"]["accepted"]["50"]["ratio_interval"][1] < 0.5
    assert figures["noise"]["auc"]["gain_interval"] == [0, 0]
    assert figures["noise"]["accepted"]["75"]["ratio_interval"] == [1, 1]


def test_spearman_and_auc_by_their_definitions():
    distance = HARM * np.exp(2 * RNG.normal(size=200))
    figures = compare_definitions(Judged(HARM, PROBLEM, {"d": distance}), 50)["d"]
    ranks = [np.argsort(np.argsort(v)) for v in (HARM, distance)]
    assert figures["rank_correlation"]["value"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-3)
    harmful = np.sort(HARM)[-20] <= HARM
    expected = (distance[harmful][:, None] > distance[~harmful]).mean()
    assert figures["auc"]["value"] == pytest.approx(expected, rel=1e-3)


def test_pairs_of_one_problem_count_as_one_piece_of_evidence():
    few = np.repeat(np.arange(8), 25)
    shared = np.repeat(RNG.normal(size=8), 25)
    distance, harm = shared + 0.1 * RNG.normal(size=200), np.exp(shared + 0.1 * RNG.normal(size=200))
    widths = []
    for problem in (few, np.arange(200)):
        figures = compare_definitions(Judged(harm, problem, {"d": distance}), 300)["d"]
        low, high = figures["rank_correlation"]["interval"]
        widths.append(high - low)
    assert widths[0] > 2 * widths[1]
