"""Requests, pools and arms of the comparisons with vLLM, which need no vLLM to be laid out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import trtllm_memshare
from trtllm_memshare.evaluation.vllm_work import VllmWork, cut_requests
from trtllm_memshare.vllm import SCHEDULER_CLASS

MODEL = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"


class Words:
    """A tokenizer: the lengths of the words."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


ROWS = [{"problem": "one three", "reasoning": "a " * 40}, {"problem": "seven", "reasoning": "b " * 9}]


def test_traces_come_back_with_their_prompts_reversed_and_answers_are_cut():
    work = cut_requests(ROWS, Words(), count=3, shorter_by=4, longest_answer=8)
    assert work == [([3, 5], 8), ([5], 2), ([5, 3], 8)]


@pytest.fixture
def work(tmp_path) -> VllmWork:
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parser = argparse.ArgumentParser()
    VllmWork.add_options(
        parser, requests=4, in_flight=2, shorter_by=1, longest_answer=30, block_size=8, protected_tokens=16
    )
    return VllmWork.from_options(
        parser.parse_args(["--model-dir", str(MODEL), "--traces", str(traces), "--null-pages", "null"])
    )


def test_pools_are_parts_of_what_the_requests_in_flight_hold_at_their_ends(work):
    ends = [-(-(len(prompt) + length) // 8) for prompt, length in work.requests]
    assert work.demand_blocks == round(sum(ends) / 2)  # two of four requests at a time
    assert work.pool_blocks(2) == -(-work.demand_blocks // 2) + 2
    assert work.max_model_len == 8 * max(ends)
    assert work.describe("vllm")["demand_blocks"] == work.demand_blocks


@pytest.mark.parametrize(
    ("arm", "need", "min_kept"),
    [("admission", "age", 1.0), ("random", "random", 0.5), ("0.25", "redundancy-recency", 0.25)],
)
def test_arms_are_settings_of_the_plugin(work, arm, need, min_kept):
    arguments = work.arm_arguments(arm, "lookahead")
    assert arguments["scheduler_cls"] == SCHEDULER_CLASS
    settings = arguments["additional_config"]["memshare"]
    assert settings == {
        "null_pages": "null", "need": need, "min_kept": min_kept, "protected_tokens": 16, "admission": "lookahead"
    }  # fmt: skip
    assert work.arm_arguments("vllm", "lookahead") == {}
