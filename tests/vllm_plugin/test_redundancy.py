"""Reports of redundancy are those of an index over the pages that are there."""

from types import SimpleNamespace

import numpy as np
import torch

from trtllm_memshare.search.signature_index import SignatureIndex
from trtllm_memshare.vllm.redundancy import PageReports
from trtllm_memshare.vllm.update import MemShareUpdate

SIZE = 4


def test_answers_are_those_of_an_index_over_the_pages_that_are_there():
    rows = np.random.default_rng(0).standard_normal((20, SIZE, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    source = SimpleNamespace(of_blocks=lambda ids: torch.from_numpy(rows[ids]), device="cpu")
    reports = PageReports(source, None, SIZE)
    table = np.arange(10, 20)
    reports.answer(MemShareUpdate(asked={"a": [2, 3, 4]}), {"a": table}, set())
    update = MemShareUpdate(asked={"a": [5, 6]}, null_entries={"a": {3: 0}, "unknown": {1: 0}})
    answer = reports.answer(update, {"a": table}, set())
    expected = SignatureIndex(SIZE)
    for page in (2, 3, 4, 5, 6):
        expected.extend([("a", np.array([page]))], torch.from_numpy(rows[table[page]])[None])
    expected.forget("a", np.array([3]))
    np.testing.assert_allclose(answer["a"].redundancy, expected.redundancy("a"), atol=1e-6)
    assert answer["a"].surprisal is None
    assert reports.answer(MemShareUpdate(null_entries={"a": {4: 0}}), {}, {"a"}) == {}
