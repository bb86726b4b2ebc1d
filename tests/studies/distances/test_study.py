"""The study from texts to tables, on a few texts of the tiny engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.studies.distances.block_attention import block_attention
from benchmarks.studies.distances.block_pairs import KINDS
from benchmarks.studies.distances.distances import DEFAULT, LEARNED, all_distances
from benchmarks.studies.distances.study import GROUPS, NO_DISTANCES, StudyOptions, beats, judge, study_pairs
from benchmarks.studies.distances.tables import MEASURES, SHOWN, count_confirmed, count_different, study_tables
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.teacher_forced import Script

OPTIONS = StudyOptions(pairs_per_kind=3, min_following=20, num_resamples=30)


@pytest.fixture(scope="module")
def scripts(boundaries) -> list[Script]:
    """Lines of 24 tokens that come again, word for word or with one token changed."""
    rng, scripts = np.random.default_rng(2), []
    for _ in range(6):
        lines = rng.integers(4, 60, (5, 24))
        lines[:, -1] = np.flatnonzero(boundaries.ends_line)[0]
        again = lines.copy()
        again[1::2, 12] += 1
        scripts.append(Script([5, 6, 7], np.concatenate([lines, again, lines, again[::-1]]).ravel().tolist()))
    return scripts


@pytest.fixture(scope="module")
def pairs(tiny_checkpoint, scripts, boundaries):
    return study_pairs(tiny_checkpoint, scripts, 8, boundaries, OPTIONS)


def test_pairs_are_sampled_of_every_text_and_measured(pairs, scripts):
    assert set(pairs.kind) >= {"repeat", "near", "random", "repeat-earliest"}
    assert set(pairs.kind) <= set(KINDS)
    for kind in set(pairs.kind):
        counts = np.bincount(pairs.text[pairs.kind == kind], minlength=len(scripts))
        assert counts.max() <= 3
    assert (pairs.harm > 0).all()
    assert (pairs.differing_tokens[pairs.kind == "repeat"] == 0).all()
    near = pairs.differing_tokens[pairs.kind == "near"]
    assert ((near >= 1) & (near <= 4)).all()
    distance = all_distances(pairs.sums)[DEFAULT]
    assert len(distance) == len(pairs.harm)
    # A random model: text that is equal lies nearer than other text, and its harm is smaller.
    for measured in (distance, pairs.harm):
        assert np.median(measured[pairs.kind == "repeat"]) < np.median(measured[pairs.kind == "random"])


def test_attention_on_a_block_is_the_mean_over_layers_and_heads(tiny_checkpoint, scripts):
    token_ids = (scripts[0].prompt + scripts[0].output)[:43]
    shows = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    attention = block_attention(shows, token_ids, 8)
    assert attention.shape == (43, 5)
    torch.testing.assert_close(attention[:40].sum(1), torch.ones(40))
    assert (attention[40:].sum(1) < 1).all()  # the partial block has the rest
    assert (attention[:16, 2:] == 0).all()
    with torch.inference_mode():
        weights = torch.stack(shows(torch.tensor([token_ids]), output_attentions=True).attentions)
    torch.testing.assert_close(attention[30, 2], weights[:, 0, :, 30, 16:24].sum(-1).mean())
    with pytest.raises(ValueError, match="attention is shown by eager alone, got sdpa"):
        block_attention(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), token_ids, 8)


def test_a_report_has_every_definition_and_its_tables_show_its_figures(pairs):
    figures, unfit = judge(pairs, OPTIONS), {DEFAULT, *LEARNED, *NO_DISTANCES}
    assert set(figures["groups"]) == {g for g, kinds in GROUPS.items() if set(kinds) & set(pairs.kind)}
    first, *_ = (group["definitions"] for group in figures["groups"].values())
    assert next(iter(first)) == DEFAULT == SHOWN[0]
    assert set(SHOWN) | set(LEARNED) <= set(first)
    for name in LEARNED:
        weights = np.array(figures["learned"][name]["weights"])
        assert weights.shape == (len(LEARNED[name]), 2)
        assert weights.sum() in (pytest.approx(0), pytest.approx(1, abs=0.01))
    for measure in MEASURES:
        better, worse, total = count_different(figures, "all", measure)
        assert total == len(first) - 6  # the first, and five that are no distances
        assert 0 <= better + worse <= total
    for group, again in figures["again"].items():
        definitions = figures["groups"][group]["definitions"]
        assert next(iter(again)) == DEFAULT
        assert set(again) == {DEFAULT} | {n for n in definitions if n not in unfit and beats(definitions[n])}
        once, twice = count_confirmed(figures, group)
        assert len(again) - 1 <= once <= 5 * (len(again) - 1)
        assert 0 <= twice <= once
    machine = {"cpu": "c", "cores": 1, "memory_gib": 1, "gpu": None, "python": "3", "torch": "2", "transformers": "5"}
    text = study_tables({**figures, "machine": machine})
    value = first["attention"]["auc"]["value"]
    assert any(line.startswith("attention ") and f" {value:.2f} " in line for line in text.splitlines())
    assert f"{figures['kinds']['repeat']['pairs']}" in text


def test_texts_without_pairs_are_refused(tiny_checkpoint, scripts, boundaries):
    short = [Script(s.prompt, s.output[:60]) for s in scripts]
    with pytest.raises(UserError, match="both halves of the texts, got 0 pairs of any kind in 6 texts"):
        study_pairs(tiny_checkpoint, short, 8, boundaries, OPTIONS)


def test_the_same_seed_gives_the_same_study(tiny_checkpoint, scripts, boundaries, pairs):
    again = study_pairs(tiny_checkpoint, scripts, 8, boundaries, OPTIONS)
    assert (again.harm == pairs.harm).all()
    assert (again.kind == pairs.kind).all()
