"""The two measures of redundancy that the study of signatures compares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.studies.signatures.ranking import LAST_PAGES, PAGE_TOKENS, TextPool, rank_correlation
from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.search.block_distance import rotate


def test_a_page_is_redundant_where_a_later_page_holds_its_keys_at_any_position():
    """Page 2 repeats page 0 eight tokens on; nothing repeats pages 1 and 2."""
    inv_freq = torch.tensor([0.5, 0.01])
    plain = torch.randn(3, PAGE_TOKENS, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    plain[2, 8:], plain[2, :8] = plain[0, :8], plain[0, 8:]
    keys = rotate(plain.flatten(0, 1)[None], torch.arange(3 * PAGE_TOKENS)[None], inv_freq)[0]
    pool = torch.randn(3, 1, 2, 1, PAGE_TOKENS, 4)
    pool[:, 0, 0, 0] = keys.view(3, PAGE_TOKENS, 4)
    redundancy = TextPool(pool, inv_freq).exact_redundancy()
    assert redundancy[0] == pytest.approx(1, abs=1e-5)
    assert redundancy[1] < 0.99
    assert redundancy[2] == -1  # the last page has no later one


def test_ranks_do_not_look_at_the_size_of_a_step():
    values = np.array([0.1, 0.5, 0.2, 0.9])
    assert rank_correlation(values, np.exp(9 * values)) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)


def test_the_pool_of_a_text_holds_what_the_model_computed(tiny_checkpoint):
    ids = torch.randint(2, 60, (PAGE_TOKENS * (LAST_PAGES + 3) + 5,), generator=torch.Generator().manual_seed(0))
    found = TextPool.read(MaskedReplay(tiny_checkpoint), ids.tolist())
    with torch.inference_mode():
        cache = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()(ids[None]).past_key_values
    for layer, stored in enumerate(cache.layers):
        for field, states in enumerate((stored.keys, stored.values)):
            held = found.pool[:, layer, field].transpose(0, 1).flatten(1, 2)
            torch.testing.assert_close(held, states[0, :, : held.shape[1]], rtol=1e-4, atol=1e-4)
    assert set(found.correlations()) == {"v_16", "v_32", "v_64", "k_16", "k_32", "k_64"}
