"""Requests, pools and arms of the comparisons with vLLM, which need no vLLM to be laid out."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.counting_runner import CountingRunner, expected

import trtllm_memshare
from benchmarks.vs_vllm import summarize
from trtllm_memshare.evaluation.executor_work import run_executor
from trtllm_memshare.evaluation.vllm_work import VllmWork, ask_in_chat, cut_requests
from trtllm_memshare.vllm import SCHEDULER_CLASS

MODEL = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"


class Words:
    """A tokenizer: the lengths of the words."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


ROWS = [{"problem": "one three", "reasoning": "a " * 40}, {"problem": "seven", "reasoning": "b " * 9}]


def test_traces_come_back_with_their_prompts_reversed_and_answers_are_cut():
    work = cut_requests(ROWS, Words(), count=3, shorter_by=4, longest_answer=8)
    assert work == [([3, 5], [1] * 8), ([5], [1] * 2), ([5, 3], [1] * 8)]


class Chat(Words):
    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert (add_generation_prompt, tokenize) == (True, False)
        return f"<{messages[0]['role']}> {messages[0]['content']} <answer>"

    def __call__(self, text, add_special_tokens=True):
        return super().__call__(text if not add_special_tokens else f"s {text}")


def test_free_answers_are_asked_for_in_the_chat_template_and_end_by_themselves(work):
    asked = ask_in_chat(ROWS, Chat(), count=3, longest_answer=8)
    assert asked == [([6, 3, 5, 8], 8), ([6, 5, 8], 8), ([6, 3, 5, 8], 8)]
    free = replace(work, free=True).sampling(1)
    assert free == {"max_tokens": work.requests[1][1], "temperature": 0.6, "seed": 1}
    assert work.sampling(1) == {"max_tokens": work.requests[1][1], "temperature": 0.0, "ignore_eos": True}


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
    [("admission", "age", 1.0), ("random", "random", 0.5), ("0.25", "redundancy", 0.25)],
)
def test_arms_are_settings_of_the_plugin(work, arm, need, min_kept):
    arguments = work.arm_arguments(arm, "lookahead")
    assert arguments["scheduler_cls"] == SCHEDULER_CLASS
    settings = arguments["additional_config"]["memshare"]
    assert settings == {
        "null_pages": "null", "need": need, "min_kept": min_kept, "protected_tokens": 16, "admission": "lookahead",
        "null_entries": "read",
    }  # fmt: skip
    skips = work.arm_arguments(f"{arm}-skip", "lookahead")["additional_config"]["memshare"]
    del settings["null_pages"]
    assert skips == {**settings, "null_entries": "skip"}
    assert work.arm_arguments("vllm", "lookahead") == {}
    default = work.arm_arguments("default", "lookahead")["additional_config"]["memshare"]
    assert not {"need", "min_kept"} & set(default)


def test_our_executor_answers_in_the_order_of_the_requests_with_their_lengths(work):
    blocks = sum(-(-(len(prompt) + length) // 8) for prompt, length in work.requests)
    run = run_executor(work, CountingRunner(2 * blocks))  # type: ignore[arg-type]
    assert run["answers"] == [expected(prompt, length) for prompt, length in work.requests]
    written = sum(length for _, length in work.requests)
    assert written / 2 <= run["steps"] <= written / 2 + 4  # two at a time


def test_the_peer_is_compared_round_by_round():
    ours = [{"seconds": s, "cpu_seconds": s, "answers": [[1, 2], [3]]} for s in (1.0, 2.0, 4.0)]
    theirs = [{"seconds": s, "cpu_seconds": 1.0, "answers": [[1, 2], [4]]} for s in (3.0, 1.0, 4.0)]
    row = summarize(2, ours, theirs)
    assert (row["ratio"], row["cpu_ratio"], row["same_answers"]) == (1.0, 0.5, 0.5)
    assert (row["ours_tokens_per_s"], row["vllm_tokens_per_s"]) == (1.5, 1.0)
