"""Rounds of ``index_cost``: every request keeps as many pages as before, and is asked of those that it has."""

from __future__ import annotations

import numpy as np

from benchmarks.studies.signatures import index_rounds
from benchmarks.studies.signatures.index_rounds import PAGES_A_ROUND, time_rounds
from trtllm_memshare.search.signature_index import SignatureIndex


def test_every_request_has_as_many_pages_after_each_round(monkeypatch):
    found = []

    class Watched(SignatureIndex):
        def redundancy(self, request_id):
            result = super().redundancy(request_id)
            found.append((request_id, len(result), int(np.isfinite(result).sum())))
            return result

    monkeypatch.setattr(index_rounds, "SignatureIndex", Watched)
    assert len(time_rounds(3, 12, 2, "cpu")) == 2  # and one that warms up
    expected = [(request, 12 + PAGES_A_ROUND * turn, 12) for turn in (1, 2, 3) for request in range(3)]
    assert found == expected
