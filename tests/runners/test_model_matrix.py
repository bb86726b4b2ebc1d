"""Scaled-down checkpoints of the models that users serve: greedy tokens equal those of transformers.

Each keeps what its published config.json says of attention and rotation: heads per KV head, head_dim, base and scaling
of the rotation, norms, biases, tied embeddings. Hidden size, layers and vocabulary are small, weights are random.
``pytest -rP`` shows the ties.
"""

from __future__ import annotations

import json
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

NEW_TOKENS = 64
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
    "R1-Distill-Llama-70B": ("llama", 8, 128, 5e5, LLAMA_31, {"rms_norm_eps": 1e-5}),
    "Llama-3.2-1B": ("llama", 4, 64, 5e5, {**LLAMA_31, "factor": 32.0}, {"tie_word_embeddings": True}),
    "Qwen3-4B-Thinking-2507": ("qwen3", 4, 128, 5e6, None, {"tie_word_embeddings": True}),
    "Qwen3-32B": ("qwen3", 8, 128, 1e6, None, {"rms_norm_eps": 1e-6}),
    "Phi-4-reasoning": ("phi3", 4, 128, 5e5, None, {"rms_norm_eps": 1e-5}),
    "Magistral-Small-2506": ("mistral", 4, 128, 1e9, None, {"rms_norm_eps": 1e-5}),
    "SmolLM2-1.7B": ("llama", 1, 64, 1.3e5, None, {"tie_word_embeddings": True}),
}
TIE = {"float32": 1e-4, "bfloat16": 0.1}
"""Logits that are no further apart may fall either way: a few times what the type rounds in two layers."""
MOST_TIES = {"float32": 0, "bfloat16": NEW_TOKENS // 8}


def write(folder: Path, name: str, dtype: str) -> Path:
    family, ratio, head_dim, theta, scaling, others = MODELS[name]
    hidden = ratio * head_dim if family in ("qwen2", "phi3") else 64
    write_random_checkpoint(
        folder,
        family,
        hidden_size=hidden,
        num_attention_heads=ratio,
        num_key_value_heads=1,
        max_position_embeddings=131072 if scaling else 4096,
        # Scores of attention vary by about 5: what a token looks at, and so the rotation, decides the next one.
        initializer_range=(5 / hidden) ** 0.5,
        **({} if hidden > 64 else {"head_dim": head_dim}),
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


def generate(folder: Path, boundaries, prompts: list[list[int]]) -> list[list[int]]:
    """Our tokens; prompts are computed in chunks, the requests side by side."""
    executor = Executor(TorchRunner(load_model(folder), 64, 16), make_config("off"), boundaries, 512, max_num_tokens=64)
    handles = [executor.submit(p, SamplingParams(NEW_TOKENS)) for p in prompts]
    executor.run_until_idle()
    return [h.result(0).token_ids for h in handles]


@pytest.mark.parametrize("dtype", TIE)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(tmp_path, boundaries, prompts, name, dtype):
    folder = write(tmp_path, name, dtype)
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.dtype, checkpoint.head_dim) == (dtype, MODELS[name][2])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    generated = generate(folder, boundaries, prompts[:3])
    for number, (prompt, tokens) in enumerate(zip(prompts, generated, strict=False)):
        assert len(tokens) == NEW_TOKENS
        choices, behind = greedy_choices(model, prompt, tokens)
        others = [i for i, (a, b) in enumerate(zip(tokens, choices, strict=True)) if a != b]
        for i in others:
            where = f"{name}, {dtype}, prompt {number}, token {i}"
            tie = f"{where}: {tokens[i]}, transformers {choices[i]} by {behind[i]:.4f}"
            assert behind[i] <= TIE[dtype], tie
            print("tie:", tie)
        assert len(others) <= MOST_TIES[dtype]


@pytest.mark.parametrize("name", ["R1-Distill-Qwen-7B", "R1-Distill-Llama-8B"])
def test_a_rotation_that_is_slightly_wrong_is_seen(tmp_path, boundaries, prompts, name):
    folder = write(tmp_path, name, "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    path = folder / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "rope_theta": 1.02 * document["rope_theta"]}))
    generated = generate(folder, boundaries, prompts[:3])
    assert any(greedy_choices(model, p, t)[0] != t for p, t in zip(prompts, generated, strict=False))


@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_models_that_are_refused_by_name(own_checkpoint, architecture):
    """gpt-oss, DeepSeek-R1 itself and Qwen3-30B-A3B: windows, another cache, experts."""
    path = own_checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [architecture]}))
    with pytest.raises(UserError, match=f"has architecture {architecture}, expected one of LlamaForCausalLM"):
        read_checkpoint(own_checkpoint)
