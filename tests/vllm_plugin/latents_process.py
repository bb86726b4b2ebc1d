"""One vLLM engine of a model with multi-head latent attention, DeepSeek-R1's shapes made small, for tests.

``python gpu_choices.py latents_process.py ARM MODEL FOLDER``: makes the model in ``FOLDER`` with random weights and the
tokenizer of ``MODEL``. ``plain``: vLLM alone with room; ``pressure``: with MemShare, under pressure and in a random
schedule; ``preempted``: in a pool too short for all. Where attention is interpreted texts are half as long, without a
schedule. Prints what it did as one line of JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from vllm_plugin import engine_process
from vllm_plugin.engine_process import LLM, RUNNER, make_engine, schedules, under_pressure, with_room
from vllm_plugin.gpu_choices import read_in_pieces

from trtllm_memshare.vllm.skipped_entries import SkippedEntries

engine_process.BLOCK_SIZE, engine_process.MAX_LENGTH = 16, 256
# On a CPU with AMX vLLM would choose another one, which has no float32.
engine_process.MORE["attention_backend"] = "CPU_MLA"
_SETTINGS: dict[str, Any] = {"min_kept": 0.25, "protected_tokens": 32, "admission": "vllm"}
_IN_TRITON = "-triton" in RUNNER
if _IN_TRITON:
    engine_process.MAX_LENGTH, _SETTINGS["protected_tokens"] = 144, 16
_SHAPE = {
    "vocab_size": 80, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64,
    "v_head_dim": 32, "first_k_dense_replace": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0, "initializer_range": 0.2,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000, "factor": 4, "original_max_position_embeddings": 1024,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip


def save(tokenizer: str, folder: Path) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    shutil.copytree(tokenizer, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**_SHAPE)).save_pretrained(folder)


def short_room(llm: LLM) -> list[list[int]]:
    return with_room(llm, (30, 40, 50), 30)


def watch_pieces() -> list[int]:
    """Collects, of each text that is read in pieces while others have gaps, how many tokens are left out before it."""
    collected: list[int] = []
    original = SkippedEntries._shorten

    def shorten(self: SkippedEntries, metadata: Any) -> Any:
        lengths, is_piece = metadata.seq_lens.clone(), metadata.query_start_loc_cpu.diff() > 1
        shorter = original(self, metadata)
        if self._names and self._is_step:
            collected.extend((lengths - shorter.seq_lens)[is_piece].tolist())
        return shorter

    SkippedEntries._shorten = shorten
    return collected


def main() -> None:
    arm, tokenizer, folder = sys.argv[1:]
    save(tokenizer, Path(folder))
    if arm == "plain":
        read_in_pieces(128)
        print(json.dumps({"with_room": short_room(make_engine(folder, "", num_blocks=38))}))
        return
    read_in_pieces(32 if arm == "preempted" else 128)
    pieces = watch_pieces()
    num_blocks, lengths = (15, (95, 100)) if _IN_TRITON else (21, (200, 210))
    if arm == "preempted":
        num_blocks, lengths = 18, (190, 200, 210)
    llm = make_engine(folder, "", num_blocks=num_blocks, **_SETTINGS)
    result: dict[str, Any] = {"elements": "auto"}
    if arm == "pressure" and not _IN_TRITON:
        result["with_room"] = short_room(llm)
    result["pressure"] = under_pressure(llm, folder, None, lengths, (20 if _IN_TRITON else 60,))
    result["schedules"] = schedules(llm, 0 if _IN_TRITON else 3, most=10, longest=200)
    # Backends of latent attention count these on the host, where nothing makes lengths shorter.
    result["pieces"], result["left_out_before_pieces"] = len(pieces), sum(pieces)
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    result["attention"] = runner.attn_groups[0][0].backend.get_name()
    result["runner"], result["is_async"] = type(runner).__module__, core.batch_queue is not None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
