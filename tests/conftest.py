"""Fixtures that several test files use: small random checkpoints in Hugging Face layout."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # no GPU; read when transformers imports triton

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from build_scripts.tiny_reasoner.problems import sample_problem
from build_scripts.tiny_reasoner.tokenizer import VOCAB_SIZE, build_tokenizer, save_tokenizer
from trtllm_memshare.builder.build_engine import DEFAULT_MODEL_DIR
from trtllm_memshare.search.steps import BoundaryTokens

_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"use_sliding_window": False, "head_dim": 16}),
}


_LONGEST = (
    "serving/test_executor.py", "ranks/test_ranks.py", "trtllm_engine/test_benchmark.py",
    "evaluation/test_masked_replay.py", "real_text/test_tables.py", "report/test_explain.py",
    "evaluation/test_calibrate.py", "fuzz/test_corpus.py", "evaluation/test_curve.py", "trtllm_pytorch/test_suite.py",
    "runners/test_triton_decode.py", "trtllm_pytorch/test_tail_swap.py", "serving/test_pressure.py",
    "trtllm_pytorch/test_parts.py", "trtllm_engine/test_ranked_engine.py", "trtllm_engine/test_builder.py",
    "plugins/test_signatures_on_host.py", "plugins/test_kernels_on_host.py", "evaluation/test_benchmark.py",
)  # fmt: skip
"""Files that take longest. They start first, so that at the end both workers of ``make test`` are busy."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


def write_random_checkpoint(folder: Path, family: str = "qwen2", **changes) -> Path:
    """A two-layer model with random weights and the bundled tokenizer."""
    config_class, model_class, extra = _FAMILIES[family]
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.2,
    }
    config = config_class(**{**sizes, **extra, **changes})
    model_class(config).save_pretrained(folder)
    save_tokenizer(512, folder)
    return folder


@pytest.fixture(scope="session", params=["llama", "mistral", "qwen2", "qwen3"])
def family_checkpoint(request, tmp_path_factory) -> Path:
    """One random checkpoint of each family that every backend serves."""
    return write_random_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A random Qwen2 checkpoint for reading; engines built from it share its weight file by a hard link."""
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def own_checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    return DEFAULT_MODEL_DIR


@pytest.fixture(scope="session")
def boundaries() -> BoundaryTokens:
    return BoundaryTokens.from_tokenizer(build_tokenizer(4096), VOCAB_SIZE)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Fifty prompts of held-out problems, as token ids."""
    rng, tokenizer = random.Random(11), build_tokenizer(4096)
    return [tokenizer(sample_problem(rng, rng.randint(3, 6), held_out=True).prompt)["input_ids"] for _ in range(50)]
