"""Beside transformers: its batching gives the tokens of its plain greedy loop, and rounds are compared one by one."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from trtllm_memshare.evaluation.dataset import DatasetItem
from trtllm_memshare.evaluation.transformers_batching import Round, run_in_turns, run_transformers, summarize_rounds


@pytest.mark.skipif(not hasattr(transformers, "ContinuousBatchingConfig"), reason="transformers 4.57 has no such class")
def test_outputs_are_those_of_generate(tiny_checkpoint, prompts):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, attn_implementation="sdpa").eval()
    items = [DatasetItem(i, prompt, 6, None, None) for i, prompt in enumerate(prompts[:3])]
    seconds, outputs = run_transformers(model, items, eos=-1, page_size=16, num_blocks=64, max_batch_tokens=64)
    plain = [
        model.generate(torch.tensor([i.input_ids]), max_new_tokens=6, do_sample=False, eos_token_id=-1)[0]
        for i in items
    ]
    assert outputs == [ids[len(i.input_ids) :].tolist() for i, ids in zip(items, plain, strict=True)]
    assert seconds > 0


def test_both_take_turns_and_each_request_counts_once():
    turns = []

    def served(name: str, outputs: list[list[int]]):
        turns.append(name)
        return float(len(turns)), outputs

    rounds = run_in_turns(lambda: served("ours", [[1], [2, 3]]), lambda: served("theirs", [[1], [2, 4]]), 2)
    assert list(rounds) == [Round(1.0, 2.0, 0.5), Round(3.0, 4.0, 0.5)]
    assert turns == ["ours", "theirs"] * 2


def test_a_slow_round_of_both_is_no_advantage():
    found = summarize_rounds([Round(1, 4, 1.0), Round(10, 50, 0.9), Round(2, 12, 1.0)], num_requests=20)
    assert found["ratio"] == 5
    assert (found["full_req_s"], found["transformers_req_s"]) == (10, 20 / 12)
    assert found["same_tokens"] == 0.9
