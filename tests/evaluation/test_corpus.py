"""The traces: their split by problem, their documents, and the tokenizer of the committed model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.corpus import CAN_TRAIN, EOS, read_traces, train_tokenizer

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
TRACES = read_traces(DATA / "traces")
DOCUMENTS = ["First we add 3 and 4.\n<think>\nThat gives 7. Wait, 3 and 4 make 7.\n</think>\n7<eos>" * 9]


def test_no_problem_is_in_two_splits():
    problems = {s: {t.problem for t in TRACES if t.split == s} for s in ("train", "validation", "test")}
    assert len(set.union(*problems.values())) == sum(map(len, problems.values())) == len(TRACES) == 45
    counts = Counter((t.source, t.split) for t in TRACES)
    assert (counts["r1_aime24", "test"], counts["r1_math500", "test"]) == (7, 3)
    assert (counts["r1_aime24", "validation"], counts["r1_math500", "validation"]) == (2, 1)


def test_the_split_goes_by_the_problem_and_not_by_the_order_of_the_file(tmp_path):
    for name in ("r1_aime24", "r1_math500"):
        lines = (DATA / "traces" / f"{name}.jsonl").read_text().splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(reversed(lines)))
    assert {t.problem: t.split for t in read_traces(tmp_path)} == {t.problem: t.split for t in TRACES}


def test_only_finished_traces_end():
    for trace in TRACES:
        assert trace.document.startswith(trace.problem)
        assert trace.document.endswith(EOS) == bool(trace.content)
        assert trace.reasoning in trace.document


def test_missing_files_and_bad_lines_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no traces at .*r1_aime24\.jsonl"):
        read_traces(tmp_path)
    (tmp_path / "r1_aime24.jsonl").write_text(json.dumps({"problem": "p", "reasoning": 3, "content": ""}))
    with pytest.raises(UserError, match=r"r1_aime24\.jsonl line 1: reasoning must be text, got 3"):
        read_traces(tmp_path)


@pytest.mark.skipif(not CAN_TRAIN, reason="training a tokenizer needs transformers 5")
def test_the_tokenizer_loses_nothing_and_survives_saving(tmp_path):
    """transformers rebuilds the tokenizer of a Qwen2 checkpoint: what is loaded has to cut as what was trained."""
    tokenizer = train_tokenizer(DOCUMENTS, 300, 64)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (DOCUMENTS[0], "12345 Wait — ünï", "a\n\n b"):
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
    assert loaded.eos_token_id == tokenizer.eos_token_id == loaded(EOS)["input_ids"][0]


@pytest.mark.skipif(not CAN_TRAIN, reason="training a tokenizer needs transformers 5")
def test_the_committed_tokenizer_comes_from_the_training_split_alone():
    folder = DATA / "trace_model"
    checkpoint, committed = read_checkpoint(folder), AutoTokenizer.from_pretrained(folder)
    documents = [t.document for t in TRACES if t.split == "train"]
    again = train_tokenizer(documents, checkpoint.vocab_size, checkpoint.max_position_embeddings)
    assert committed.get_vocab() == again.get_vocab()
    assert checkpoint.stop_token_ids == (again.eos_token_id,)
