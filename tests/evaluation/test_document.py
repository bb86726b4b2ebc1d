"""Runs that are added to a report are of its workload."""

from __future__ import annotations

import json
import os

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


def test_a_link_is_followed_and_what_is_no_file_is_written_to(tmp_path):
    """As root, a report for /dev/null would have replaced it by a file."""
    (tmp_path / "store").mkdir()
    kept, link, pipe = tmp_path / "store" / "r.json", tmp_path / "r.json", tmp_path / "pipe"
    link.symlink_to(kept)
    write_report({"a": 1}, link)
    write_report({"a": 2}, link)
    assert link.is_symlink()
    assert json.loads(kept.read_text()) == {"a": 2}
    os.mkfifo(pipe)
    read = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_report({"a": 3}, pipe)
    assert pipe.is_fifo()
    assert json.loads(os.read(read, 1000)) == {"a": 3}
    os.close(read)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["pipe", "r.json", "r.json", "store"]
