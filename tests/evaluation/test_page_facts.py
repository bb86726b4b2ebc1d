"""Facts of pages against plain computations from the model's own K, V and attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.evaluation.page_arms import ARMS, FORESEEN, ranking_of
from trtllm_memshare.evaluation.retirement import Moment
from trtllm_memshare.search.signature_index import SignatureIndex
from trtllm_memshare.search.signatures import fields_of_pool, make_projection, page_signatures

SIZE, PAGES = 8, 12
IDS = (np.random.default_rng(3).integers(4, 60, 50).tolist() * 2)[: SIZE * PAGES + 3]


@pytest.fixture(scope="module")
def full(tiny_checkpoint):
    return MaskedReplay(tiny_checkpoint).read(IDS, SIZE)


def moment() -> Moment:
    resident = np.array([2, 3, 5, 6, 8, 9])
    return Moment(10 * SIZE, resident, resident[:4])


def test_attention_by_page_is_the_models(full, tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="eager").eval()
    with torch.inference_mode():
        weights = torch.stack(model(torch.tensor([IDS]), output_attentions=True).attentions).mean((0, 1, 2))
    by_page = weights[: SIZE * PAGES, : SIZE * PAGES].reshape(PAGES, SIZE, PAGES, SIZE).sum(3).mean(1).numpy()
    np.testing.assert_allclose(full.facts.attention, by_page, atol=1e-5)
    facts = full.facts.at(moment(), np.zeros(PAGES, np.float32))
    expected = [by_page[page + 1 : 10, page].mean() for page in moment().may_go]
    np.testing.assert_allclose(facts.attention, expected, rtol=1e-4)
    # 64 queries are 8 pages of 8 tokens.
    np.testing.assert_allclose(facts.recent_attention, by_page[2:10, moment().may_go].mean(0), rtol=1e-4)


def test_who_foresees_gives_up_what_is_read_least_from_now_on(full):
    later = full.facts.attention[10:, moment().may_go].sum(0)
    pages, _ = ranking_of(ARMS[FORESEEN], full.facts, 0)(moment(), 1)
    assert pages.tolist() == [moment().may_go[later.argmin()]]
    pages, _ = ranking_of(ARMS["snapkv"], full.facts, 0)(moment(), 1)
    assert pages.tolist() != [moment().may_go[later.argmin()]]


def test_redundancy_looks_at_later_resident_pages_only(full):
    layers, heads = len(full.states), full.states[0][0].shape[0]
    values = torch.stack([v for _, v in full.states])  # [layers, heads, tokens, head_dim]
    unit = torch.nn.functional.normalize(values, dim=-1)
    cosines = (unit @ unit.transpose(-1, -2)).sum((0, 1)).numpy() / (layers * heads)
    expected = []
    for page in moment().may_go:
        later = np.concatenate([np.arange(p * SIZE, (p + 1) * SIZE) for p in moment().resident if p > page])
        expected.append(cosines[page * SIZE : (page + 1) * SIZE][:, later].max(1).mean())
    found = full.facts.at(moment(), np.zeros(PAGES, np.float32), "v").redundancy
    np.testing.assert_allclose(found, expected, atol=0.01)  # cosines are taken in bfloat16
    exact = full.facts.at(moment(), np.zeros(PAGES, np.float32), "k").redundancy
    assert np.abs(exact - found).max() > 0.01


def test_signatures_are_those_of_serving(full):
    states = torch.stack([torch.stack(pair) for pair in full.states])[:, :, :, : SIZE * PAGES]
    pool = states.unflatten(3, (PAGES, SIZE)).permute(3, 0, 1, 2, 4, 5).contiguous()
    count, layers, _, heads, _, head_dim = pool.shape
    blocks = torch.arange(count)
    projection = make_projection(layers, heads, head_dim)
    fields = fields_of_pool(pool, projection)
    signatures = page_signatures(fields, blocks, torch.zeros(0), blocks * SIZE, projection)
    index = SignatureIndex(SIZE)
    index.extend([(0, np.arange(2, 10))], signatures[2:10])
    index.forget(0, np.array([4, 7]))
    found = full.facts.at(moment(), np.zeros(PAGES, np.float32), "signature").redundancy
    np.testing.assert_allclose(found, index.redundancy(0)[moment().may_go], atol=0.02)


def test_merged_pages(full):
    merged = full.facts.merged(2)
    assert (merged.tokens_per_block, merged.surprisal.shape) == (2 * SIZE, (PAGES // 2,))
    assert merged.surprisal.sum() == pytest.approx(full.facts.surprisal.sum(), rel=1e-4)
    sums = full.facts.attention.sum(1).reshape(-1, 2).mean(1)
    np.testing.assert_allclose(merged.attention.sum(1), sums, rtol=1e-4)
    token, page = 5, 4
    assert merged.cosines["k"][token, page] == full.facts.cosines["k"][token, 2 * page : 2 * page + 2].max()
