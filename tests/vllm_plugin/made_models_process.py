"""One vLLM engine of an architecture that the bundled model is not of, small and with random weights, for tests.

``python gpu_choices.py made_models_process.py ARM MODEL FOLDER ARCHITECTURE``: makes the model in ``FOLDER`` by
transformers' class of it, with the tokenizer of ``MODEL``. ``plain``: vLLM alone with room; ``pressure``: with
MemShare, under pressure and in random schedules; ``preempted``: in a pool too short for all; ``uncached``: the same
without a prefix cache. Where attention is interpreted texts are half as long, without a schedule. Prints what it did as
one line of JSON.
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
from vllm_plugin.gpu_choices import order_as_flash_mla, read_in_pieces, rotate_in_pytorch

from trtllm_memshare.vllm.skipped_entries import SkippedEntries

engine_process.MAX_LENGTH = 256
_SETTINGS: dict[str, Any] = {"min_kept": 0.25, "protected_tokens": 32, "admission": "vllm"}
_IN_TRITON = "-triton" in RUNNER
if _IN_TRITON:
    engine_process.MAX_LENGTH, _SETTINGS["protected_tokens"] = 144, 16
_SHAPE = {
    "vocab_size": 80, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "DeepseekV3": {
        "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
        "first_k_dense_replace": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10_000, "factor": 4, "original_max_position_embeddings": 1024,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "Qwen3Next": {
        "head_dim": 64, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_only_layers": [0, 1, 2], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "conv_dim": 64, "block_dim": 64,
             "block_ff_dim": 128, "block_auto_adjust_ff_dim": False},
}  # fmt: skip
_NUM_BLOCKS = {"DeepseekV3": {"pressure": 21, "preempted": 34}, "Lfm2": {"pressure": 17, "preempted": 13},
               "Qwen3Next": {"pressure": 12}}  # fmt: skip
_LENGTHS = {"pressure": (200, 210), "preempted": (190, 200, 210)}
_MORE_LENGTHS = tuple(range(150, 220, 10))  # of so many that some come and go while others run


def save(architecture: str, tokenizer: str, folder: Path) -> None:
    import transformers

    shutil.copytree(tokenizer, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**_SHAPE, **_OWN[architecture])
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)


def short_room(llm: LLM) -> list[list[int]]:
    # vLLM 0.32 on CPUs ends with an error where a prompt that is read in pieces has a seed; states end one at a block.
    return with_room(llm, (30, 40, 50), 30, prompt_length=30)


def watch_prefill_path() -> list[int]:
    """Collects how many tokens are left out of each request that latent attention has in its prefill path, if any."""
    from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder

    collected, whole = list[int](), list[torch.Tensor]()
    build, shorten = MLACommonMetadataBuilder.build, SkippedEntries._shorten

    def shorten_and_keep(self: SkippedEntries, metadata: Any) -> Any:
        whole[:] = [metadata.seq_lens.clone()]
        return shorten(self, metadata)

    def build_and_look(self: Any, prefix: int, common: Any, *rest: Any, **keywords: Any) -> Any:
        metadata = build(self, prefix, common, *rest, **keywords)
        if whole and len(whole[0]) == len(common.seq_lens):
            left_out = (whole[0] - common.seq_lens)[metadata.num_decodes : metadata.num_reqs]
            collected.extend(left_out[left_out > 0].tolist())
        return metadata

    MLACommonMetadataBuilder.build, SkippedEntries._shorten = build_and_look, shorten_and_keep
    return collected


def main() -> None:
    arm, tokenizer, folder, architecture = sys.argv[1:]
    if arm == "uncached":
        arm, engine_process.MORE["enable_prefix_caching"] = "preempted", False
    save(architecture, tokenizer, Path(folder))
    rotate_in_pytorch()
    if architecture == "DeepseekV3":
        read_in_pieces(32 if arm == "preempted" else 128)
        # On a CPU with AMX vLLM would choose another one, which has no float32.
        engine_process.BLOCK_SIZE, engine_process.MORE["attention_backend"] = 16, "CPU_MLA"
    if architecture == "Qwen3Next":
        engine_process.DTYPE = "bfloat16"  # all that vLLM's gated delta net on CPUs takes
        engine_process.MAX_LENGTH = 1024  # a state is as large as 160 tokens, so blocks are as long
    if arm == "plain":
        print(json.dumps({"with_room": short_room(make_engine(folder, "", num_blocks=38))}))
        return
    gaps = watch_prefill_path()
    if architecture == "DeepseekV3" and arm == "preempted":
        order_as_flash_mla()
    num_blocks, lengths = (15, (95, 100)) if _IN_TRITON else (_NUM_BLOCKS[architecture][arm], _LENGTHS[arm])
    if architecture == "Qwen3Next":
        lengths = (700, 800)
    elif architecture == "DeepseekV3" and arm == "preempted":
        lengths = _MORE_LENGTHS
    llm = make_engine(folder, "", num_blocks=num_blocks, **_SETTINGS)
    core = llm.llm_engine.engine_core.engine_core
    runner, scheduler = core.model_executor.driver_worker.worker.model_runner, core.scheduler
    engine_process.BLOCK_SIZE = scheduler.blocks.block_size  # a state makes blocks longer that are too small for it
    groups = [type(group.kv_cache_spec).__name__ for group in scheduler.kv_cache_config.kv_cache_groups]
    result: dict[str, Any] = {"elements": "auto", "groups": groups}
    if arm == "pressure" and not _IN_TRITON:
        result["with_room"] = short_room(llm)
    result["pressure"] = under_pressure(llm, folder, None, lengths, (20 if _IN_TRITON else 60,))
    result["schedules"] = schedules(llm, 0 if _IN_TRITON else 3, most=10, longest=200)
    result["gaps_in_prefill_path"] = len(gaps)
    result["attention"] = [group[0].backend.get_name() for group in runner.attn_groups]
    result["cache_mode"] = core.vllm_config.cache_config.mamba_cache_mode
    result["runner"], result["is_async"] = type(runner).__module__, core.batch_queue is not None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
