"""One vLLM engine of an architecture that has sliding windows in some layers, with random weights, for tests.

``python gpu_choices.py architectures_process.py ARCHITECTURE MODEL FOLDER``: makes a small model of it in ``FOLDER``,
with the tokenizer of ``MODEL``, and prints what a load under pressure and a random schedule did as one line of JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from vllm_plugin.engine_process import BLOCK_SIZE, LLM, MAX_LENGTH, generate, schedules, texts

_SHAPE = {
    "vocab_size": 80, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0, "sliding_window": 48, "rms_norm_eps": 1e-6, "dtype": "float32",
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "GptOssForCausalLM": {"model_type": "gpt_oss", "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
                          "attention_bias": True, "rope_theta": 150_000},
    "Gemma3ForCausalLM": {"model_type": "gemma3_text", "query_pre_attn_scalar": 32, "rope_theta": 1_000_000,
                          "rope_local_base_freq": 10_000, "hidden_activation": "gelu_pytorch_tanh"},
    "Olmo3ForCausalLM": {"model_type": "olmo3", "rope_theta": 500_000, "hidden_act": "silu"},
}  # fmt: skip
_WINDOWS_TO_FULL = {"GptOssForCausalLM": 1, "Gemma3ForCausalLM": 5, "Olmo3ForCausalLM": 2}  # of real ones: 1, 5, 3


def save(architecture: str, tokenizer: str, folder: Path) -> None:
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    period = ["sliding_attention"] * _WINDOWS_TO_FULL[architecture] + ["full_attention"]
    kinds = {"architectures": [architecture], "layer_types": period * (6 // len(period))}
    (folder / "config.json").write_text(json.dumps({**_SHAPE, **_OWN[architecture], **kinds}))


def main() -> None:
    architecture, tokenizer, folder = sys.argv[1:]
    save(architecture, tokenizer, Path(folder))
    llm = LLM(
        folder, load_format="dummy", dtype="float32", max_model_len=MAX_LENGTH, enforce_eager=True, max_num_seqs=10,
        block_size=BLOCK_SIZE, num_gpu_blocks_override=90, max_num_batched_tokens=128, disable_log_stats=False, seed=0,
        scheduler_cls="trtllm_memshare.vllm.scheduler.MemShareScheduler",
        worker_cls="trtllm_memshare.vllm.worker.MemShareWorker",
        additional_config={"memshare": {"protected_tokens": 64, "min_kept": 0.25, "admission": "vllm"}},
    )  # fmt: skip
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    groups = [len(group.layer_names) for group in scheduler.kv_cache_config.kv_cache_groups]
    generate(llm, texts(3, 8, 40), [300 + 10 * i for i in range(8)])
    print(json.dumps({"groups": groups, "retired": scheduler.relief.totals.retired, "schedules": schedules(llm, 1)}))


if __name__ == "__main__":
    main()
