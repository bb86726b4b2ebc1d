"""Transformers' continuous batching gives the tokens of its plain greedy loop, in the order of the requests."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from trtllm_memshare.evaluation.dataset import DatasetItem
from trtllm_memshare.evaluation.transformers_batching import run_transformers


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
