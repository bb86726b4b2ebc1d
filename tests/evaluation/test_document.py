"""Runs that are added to a report are of its workload."""

from __future__ import annotations

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.document import document_of_runs, write_report


def test_runs_of_another_workload_are_not_added_to_a_report(tmp_path):
    path = tmp_path / "runs.json"
    document = document_of_runs({"requests": 12}, path)
    document["runs"].append({"arm": "vllm"})
    write_report(document, path)
    assert document_of_runs({"requests": 12}, path)["runs"] == [{"arm": "vllm"}]
    with pytest.raises(UserError, match="got requests 12 in it and 8 now"):
        document_of_runs({"requests": 8}, path)
    assert document_of_runs({"requests": 8}, None)["runs"] == []
