"""Scaled-down checkpoints of the models that users serve: greedy tokens equal those of transformers.

Each keeps what its published config.json says of attention and rotation: heads per KV head, head_dim, base and scaling
of the rotation, norms, biases, tied embeddings. Hidden size, layers and vocabulary are small, weights are random.
MEMSHARE_NIGHTLY=1 runs all of them in both types with 64 tokens.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import write_random_checkpoint
from transformers import AutoModelForCausalLM

from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

IS_NIGHTLY = os.environ.get("MEMSHARE_NIGHTLY") == "1"
NEW_TOKENS = 64 if IS_NIGHTLY else 24
LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

# name -> (family, heads per KV head, head_dim, rope_theta, rope_scaling, other keys)
MODELS: dict[str, tuple[str, int, int, float, dict | None, dict]] = {
    "R1-Distill-Qwen-1.5B": ("qwen2", 6, 128, 1e4, None, {"rms_norm_eps": 1e-6}),
    "R1-Distill-Qwen-7B": ("qwen2", 7, 128, 1e4, None, {"rms_norm_eps": 1e-6}),
    "R1-Distill-Qwen-32B": ("qwen2", 5, 128, 1e6, None, {"rms_norm_eps": 1e-5}),
    "QwQ-32B": ("qwen2", 5, 128, 1e6, None, {"rms_norm_eps": 1e-5, "max_window_layers": 64}),
    "QwQ-32B with yarn": ("qwen2", 5, 128, 1e6, YARN, {"rms_norm_eps": 1e-5}),
    "R1-Distill-Llama-8B": ("llama", 4, 128, 5e5, LLAMA_31, {"rms_norm_eps": 1e-5}),
    "Llama-3.2-1B": ("llama", 4, 64, 5e5, {**LLAMA_31, "factor": 32.0}, {"tie_word_embeddings": True}),
    "Qwen3-4B-Thinking-2507": ("qwen3", 4, 128, 5e6, None, {"tie_word_embeddings": True}),
    "Qwen3-32B": ("qwen3", 8, 128, 1e6, None, {"rms_norm_eps": 1e-6}),
    "Magistral-Small-2506": ("mistral", 4, 128, 1e9, None, {"rms_norm_eps": 1e-5}),
    "SmolLM2-1.7B": ("llama", 1, 64, 1.3e5, None, {"tie_word_embeddings": True}),
}
IN_EVERY_RUN = {
    ("R1-Distill-Qwen-1.5B", "bfloat16"),
    ("R1-Distill-Llama-8B", "bfloat16"),
    ("Qwen3-4B-Thinking-2507", "bfloat16"),
    *((name, "float32") for name in MODELS),
}
CASES = [(n, d) for n in MODELS for d in ("float32", "bfloat16") if IS_NIGHTLY or (n, d) in IN_EVERY_RUN]


def write(folder: Path, name: str, dtype: str) -> Path:
    family, ratio, head_dim, theta, scaling, others = MODELS[name]
    hidden = ratio * head_dim if family == "qwen2" else 64
    write_random_checkpoint(
        folder,
        family,
        hidden_size=hidden,
        num_attention_heads=ratio,
        num_key_value_heads=1,
        max_position_embeddings=131072 if scaling else 4096,
        initializer_range=0.08,
        **({} if family == "qwen2" else {"head_dim": head_dim}),
        **others,
    )
    path = folder / "config.json"
    document = json.loads(path.read_text())
    for key in ("rope_parameters", "rope_scaling"):
        document.pop(key, None)
    path.write_text(json.dumps({**document, "rope_theta": theta, "rope_scaling": scaling, "dtype": dtype}))
    return folder


def greedy_choices(model, prompt: list[int], tokens: list[int]) -> tuple[list[int], list[float]]:
    """What transformers would choose after each beginning of ``tokens``, and by how much it is ahead of ``tokens``.

    If it would choose them all, they are its greedy continuation; one pass takes the place of a step for each.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    behind = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return logits.argmax(-1).tolist(), behind.tolist()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_greedy_tokens_are_those_of_transformers(tmp_path, boundaries, prompts, name, dtype):
    folder = write(tmp_path, name, dtype)
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.dtype, checkpoint.head_dim) == (dtype, MODELS[name][2])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    runner = TorchRunner(load_model(folder), 64, 16)
    executor = Executor(runner, make_config("off"), boundaries, 512, max_num_tokens=64)
    chosen = prompts[: 3 if IS_NIGHTLY else 2]
    handles = [executor.submit(p, SamplingParams(NEW_TOKENS)) for p in chosen]
    executor.run_until_idle()
    for prompt, handle in zip(chosen, handles, strict=True):
        tokens = handle.result(0).token_ids
        choices, behind = greedy_choices(model, prompt, tokens)
        # A tie, to the rounding of the type, may fall either way.
        tie = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
        wrong = [(i, gap) for i, (a, b, gap) in enumerate(zip(tokens, choices, behind, strict=True))
                 if a != b and gap > tie]  # fmt: skip
        assert not wrong, f"{name}: other tokens at {wrong}"
        assert sum(a == b for a, b in zip(tokens, choices, strict=True)) >= 0.8 * NEW_TOKENS


@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "Phi3ForCausalLM", "DeepseekV3ForCausalLM"])
def test_models_that_are_refused_by_name(own_checkpoint, architecture):
    """gpt-oss, Phi-4-reasoning and DeepSeek-R1 itself: windows, another layout of weights, another cache."""
    path = own_checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [architecture]}))
    with pytest.raises(UserError, match=f"has architecture {architecture}, expected one of LlamaForCausalLM"):
        read_checkpoint(own_checkpoint)
