"""Signatures taken where vLLM hands values to its cache are those of the pool."""

from types import SimpleNamespace

import numpy as np
import torch

from trtllm_memshare.search.signatures import SignatureIndex, fields_of_pool, page_signatures
from trtllm_memshare.vllm.redundancy import PageReports, ValueSignatures
from trtllm_memshare.vllm.update import MemShareUpdate

BLOCKS, LAYERS, HEADS, SIZE, DIM = 6, 5, 2, 4, 8


class Layer:
    """An attention layer whose cache is part of a pool in TensorRT-LLM's layout."""

    num_kv_heads, head_size = HEADS, DIM

    def __init__(self, pool, index):
        self.impl = SimpleNamespace(do_kv_cache_update=self.update)
        self.values = pool[:, index, 1]

    def update(self, layer, key, value, kv_cache, slot_mapping):
        for row, slot in zip(value, slot_mapping.tolist(), strict=False):
            if slot >= 0:
                self.values[slot // SIZE, :, slot % SIZE] = row


def test_signatures_are_those_of_the_pool_whatever_the_order_of_writes():
    draw = torch.Generator().manual_seed(0)
    pool = torch.zeros(BLOCKS, LAYERS, 2, HEADS, SIZE, DIM)
    layers = [Layer(pool, i) for i in range(LAYERS)]
    signatures = ValueSignatures(layers, BLOCKS * SIZE, SIZE, torch.device("cpu"))
    slots = torch.randperm(BLOCKS * SIZE, generator=draw)
    for step in (slots[:13], slots[13:], slots[:7]):  # the last are written anew
        padded = torch.cat([step, torch.tensor([-1, -1])])
        for layer in layers:
            value = torch.randn(len(padded) + 3, HEADS, DIM, generator=draw)  # more rows than slots, as vLLM pads
            layer.impl.do_kv_cache_update(layer, value, value, None, padded)
    blocks, projection = [4, 0, 5], signatures.projection
    expected = page_signatures(
        fields_of_pool(pool, projection), torch.tensor(blocks), torch.zeros(0), torch.zeros(3), projection
    )
    torch.testing.assert_close(torch.from_numpy(signatures.of_blocks(blocks)), expected)


def test_answers_are_those_of_an_index_over_the_pages_that_are_there():
    rows = np.random.default_rng(0).standard_normal((20, SIZE, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    source = SimpleNamespace(of_blocks=lambda ids: rows[ids])
    reports = PageReports(source, None, SIZE)
    table = list(range(10, 20))
    reports.answer(MemShareUpdate(asked={"a": [2, 3, 4]}), {"a": table}, set())
    update = MemShareUpdate(asked={"a": [5, 6]}, null_entries={"a": {3: 0}, "unknown": {1: 0}})
    answer = reports.answer(update, {"a": table}, set())
    expected = SignatureIndex(SIZE)
    for page in (2, 3, 4, 5, 6):
        expected.append(page, rows[table[page]])
    expected.forget(np.array([3]))
    np.testing.assert_array_equal(answer["a"].redundancy, expected.redundancy())
    assert answer["a"].surprisal is None
    assert reports.answer(MemShareUpdate(null_entries={"a": {4: 0}}), {}, {"a"}) == {}
