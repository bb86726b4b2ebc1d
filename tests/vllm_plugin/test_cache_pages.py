"""Distances of pages in caches as vLLM's backends keep them: those of what was written, or a refusal."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.nearest_page import page_distances
from trtllm_memshare.vllm.cache_pages import open_cache_pages
from trtllm_memshare.vllm.distance_reports import DistanceReports
from trtllm_memshare.vllm.update import MemShareUpdate

BLOCKS, LAYERS, HEADS, SIZE, DIM, SPARE = 6, 3, 2, 16, 32, 4


class Layer:
    """An attention layer over a cache ``[blocks, heads, tokens, 2 * head size]`` in one of the backends' orders.

    ``gpu``: K in front of V. ``cpu``: V of a head behind all of its K, and K in an order of its own. ``mixed``: K and V
    of a token in turns, which no backend does.
    """

    num_kv_heads, head_size, dtype = HEADS, DIM, torch.float32
    _k_scale, _v_scale = torch.tensor(0.25), torch.tensor(2.0)

    def __init__(self, cache: torch.Tensor, order: str) -> None:
        self.kv_cache, self.order = cache, order
        self.kv_cache_dtype = "fp8" if cache.dtype is torch.uint8 else "auto"
        self.impl = SimpleNamespace(do_kv_cache_update=self.update)

    def update(self, layer, key, value, kv_cache, slot_mapping):
        size = kv_cache.shape[2]
        if self.kv_cache_dtype == "fp8":
            key, value = (
                (rows / scale).to(torch.float8_e4m3fn).view(torch.uint8)
                for rows, scale in ((key, self._k_scale), (value, self._v_scale))
            )
        for slot, k, v in zip(slot_mapping.tolist(), key, value, strict=True):
            block, token = kv_cache[slot // size], slot % size
            if self.order == "gpu":
                block[:, token] = torch.cat([k, v], -1)
            elif self.order == "mixed":
                block[:, token] = torch.stack([k, v], -1).flatten(1)
            else:
                keys, values = block.view(HEADS, 2, size * DIM).unbind(1)
                keys[:, token::size] = k  # a column for each token
                values[:, token * DIM : (token + 1) * DIM] = v


def make_layers(order: str, size: int = SIZE, dtype: torch.dtype = torch.bfloat16) -> list[Layer]:
    num_blocks = BLOCKS * SIZE // size
    if order == "gpu":  # in memory blocks, layers, tokens, heads
        pool = torch.zeros(num_blocks, LAYERS, size, HEADS, 2 * DIM, dtype=dtype).transpose(2, 3)
        return [Layer(pool[:, i], order) for i in range(LAYERS)]
    return [Layer(torch.zeros(num_blocks, HEADS, size, 2 * DIM, dtype=dtype), order) for _ in range(LAYERS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("order", "size"), [("gpu", SIZE), ("gpu", SIZE // 2), ("cpu", SIZE), ("cpu", SIZE // 2)])
def test_distances_are_those_of_the_pool_that_was_written(order, size, dtype):
    layers = make_layers(order, size, dtype)
    pages = open_cache_pages(layers, SIZE, SPARE)
    generator = torch.Generator().manual_seed(1)
    rounded = torch.float8_e4m3fn if dtype is torch.uint8 else dtype  # times a power of two: exact with either scale
    pool = torch.randn(BLOCKS, LAYERS, 2, HEADS, SIZE, DIM, generator=generator)
    pool[3] = pool[0] + 0.1 * torch.randn(pool[0].shape, generator=generator)
    pool = (64 * pool).to(rounded).float() / 64  # far from numbers that fp8 has no exponent for
    slots = torch.randperm(BLOCKS * SIZE, generator=generator)
    for index, layer in enumerate(layers):
        key, value = pool[:, index].permute(1, 0, 3, 2, 4).reshape(2, -1, HEADS, DIM)[:, slots]
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
    found = pages.distances([3, 5], [0, 1, 5])
    expected = page_distances(pool, torch.tensor([3, 5]), torch.tensor([0, 1, 5]))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=2e-3)  # roots of what rounding leaves
    assert found[0, 0] < 0.2 < 1 < found[0, 1]


def test_a_cache_that_mixes_k_and_v_is_refused():
    with pytest.raises(UserError, match=r"distances read there are not those of what was written, by 0\.\d+ .take red"):
        open_cache_pages(make_layers("mixed"), SIZE, SPARE)


def test_an_operator_that_writes_elsewhere_is_refused():
    layers = make_layers("gpu")
    layers[1].impl.do_kv_cache_update = lambda *_: None
    with pytest.raises(UserError, match="distances read there are not those of what was written"):
        open_cache_pages(layers, SIZE, SPARE)


def test_a_cache_of_another_form_is_refused():
    layers = make_layers("gpu")
    layers[2].kv_cache = [layers[2].kv_cache]
    with pytest.raises(UserError, match=r"a layer's cache must be \[blocks, 2, tokens, 64\], got \[\]"):
        open_cache_pages(layers, SIZE, SPARE)


class Blocks:
    """A distance that names its two blocks."""

    def distances(self, new_blocks, old_blocks):
        return np.array([[100 * new + old for old in old_blocks] for new in new_blocks], np.float32)


def answer(reports, asked, block_ids, null_entries=None, ended=()):
    """The one report, as lists."""
    update = MemShareUpdate(asked={"a": asked} if asked else {}, null_entries=null_entries or {})
    found = reports.answer(update, {"a": np.array(block_ids)}, set(ended))
    return [part.tolist() for part in found["a"].distances] if found else None


def test_new_pages_are_compared_with_those_that_are_there():
    reports, table = DistanceReports(Blocks()), [10, 11, 12, 13, 14, 15]
    assert answer(reports, [2, 3], table) == [[2, 3], [2, 3], [[1212, 1213], [1312, 1313]]]
    # Page 3 goes into page 2 in the step in which page 4 is asked about: it is there until then.
    assert answer(reports, [4], table, {"a": {3: 12}, "other": {1: 9}})[1] == [2, 3, 4]
    table[3] = 12
    assert answer(reports, [5], table) == [[5], [2, 4, 5], [[1512, 1514, 1515]]]
    assert answer(reports, [], table) is None


def test_after_a_pause_all_are_compared_anew():
    reports, table = DistanceReports(Blocks()), [10, 11, 12, 13, 14, 15]
    answer(reports, [2, 3, 4], table)
    assert answer(reports, [2, 4], [20, 21, 22, 22, 24]) == [[2, 4], [2, 4], [[2222, 2224], [2422, 2424]]]
    assert answer(reports, [5], [30] * 9, ended=["a"])[1] == [5]


def test_who_is_not_in_the_batch_is_not_answered():
    reports = DistanceReports(Blocks())
    assert reports.answer(MemShareUpdate(asked={"a": [1]}), {}, set()) == {}
