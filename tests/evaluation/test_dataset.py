"""Reading data sets, good and bad."""

from __future__ import annotations

import json

import pytest

from build_scripts.tiny_reasoner.tokenizer import build_tokenizer
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.dataset import read_dataset

TOKENIZER = build_tokenizer(512)
GOOD = {"task_id": 3, "prompt": "Q: 1 + 2 = ?\n", "output_tokens": 9, "answer": 3}


def test_prompts_and_ids_are_read(tmp_path):
    path = tmp_path / "d.jsonl"
    ids = {"task_id": 4, "input_ids": [5, 6], "output_tokens": 2, "output": "12 34"}
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(ids) + "\n" + json.dumps(GOOD))
    first, second = read_dataset(path, TOKENIZER, limit=2)
    assert (first.task_id, first.output_tokens, first.answer) == (3, 9, "3")
    assert TOKENIZER.decode(first.input_ids) == GOOD["prompt"]
    assert (second.input_ids, second.answer) == ([5, 6], None)
    assert TOKENIZER.decode(second.output_ids) == "12"  # cut to output_tokens
    assert first.output_ids is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"d.jsonl line 2 is not JSON: .* \(one object per line\)"),
        ("[1]", "line 2 must be a JSON object, got list"),
        (json.dumps({**GOOD, "output_tokens": 0}), "line 2: output_tokens must be a positive integer, got 0"),
        (json.dumps({**GOOD, "task_id": "x"}), "line 2: task_id must be an integer, got 'x'"),
        (json.dumps({**GOOD, "output": ""}), "line 2: output must be text that continues the prompt, got ''"),
        (json.dumps({"task_id": 1, "output_tokens": 1}), "line 2 needs a prompt"),
        (json.dumps({"task_id": 1, "output_tokens": 1, "input_ids": [99]}), "line 2: input_ids must be integers"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        read_dataset(path, TOKENIZER)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="no data set at"):
        read_dataset(tmp_path / "none.jsonl", TOKENIZER)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no requests"):
        read_dataset(tmp_path / "empty.jsonl", TOKENIZER)
