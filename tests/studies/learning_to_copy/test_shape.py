"""The head that the model of the traces starts with reads the token before, and nothing else is set."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2ForCausalLM

from benchmarks.studies.learning_to_copy.shape import look_one_back, model_config


@pytest.mark.parametrize("length", [64, 1000])
def test_the_first_head_looks_one_token_back_wherever_it_stands(length):
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(model_config(90, 1024, 0, 1)).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(90, (1, length))
    with torch.inference_mode():
        before = model(ids, output_attentions=True).attentions[0][0]
        look_one_back(model)
        after = model(ids, output_attentions=True).attentions[0][0]
    assert before[0].diagonal(-1)[8:].max() < 0.5
    assert after[0].diagonal(-1).min() > 0.99
    assert torch.allclose(before[2:], after[2:])  # the heads of the other KV head
