"""vLLM's real schedulers, with MemShare and without, for models that are not there."""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.structured_output import StructuredOutputManager

from trtllm_memshare.vllm.scheduler import MemShareScheduler


def make_scheduler(
    engine_args: EngineArgs,
    num_blocks: int,
    async_scheduling: bool,
    kind: type = MemShareScheduler,
    windows: tuple[int, ...] = (),
    num_states: int = 0,
    has_checkpoints: bool = False,
) -> Any:
    """A scheduler as vLLM's engine core makes it, for a model of one layer, behind layers with sliding windows and
    others with linear attention, whose states can be hits if there is a prefix cache.

    ``has_checkpoints``: they keep one more state of a prompt, as vLLM's kernels of Mamba 2 do.
    """
    config = engine_args.create_engine_config()
    config.scheduler_config.async_scheduling = async_scheduling
    config.cache_config.num_gpu_blocks = num_blocks
    size = config.cache_config.block_size
    shape = {"block_size": size, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    full = FullAttentionSpec(**shape)
    specs = [SlidingWindowSpec(**shape, sliding_window=window) for window in windows]
    state = {"shapes": ((2, 32),), "dtypes": (torch.float32,), "page_size_padded": full.page_size_bytes}
    length = config.model_config.max_model_len
    if num_states and config.cache_config.enable_prefix_caching:
        length, config.cache_config.mamba_cache_mode = size, "align"
        state["mamba_cache_mode"] = "align"
        if has_checkpoints:
            state |= {"num_prefill_checkpoint_blocks": 1, "prefill_checkpoint_alignment": 1}
    specs += [MambaSpec(length, **state)] * num_states + [full]
    groups = [KVCacheGroupSpec([f"layer{index}"], spec) for index, spec in enumerate(specs)]
    cache = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return (Scheduler if kind is None else MemShareScheduler)(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=math.lcm(*(spec.block_size for spec in specs)),
        hash_block_size=size,
        log_stats=True,
    )


def make_engine_args(
    model: str, null_pages: str | None, num_blocks: int, prefix_caching: bool, **memshare: Any
) -> EngineArgs:
    init_none_hash(hash_function)
    if null_pages is not None:
        memshare["null_pages"] = null_pages
    return EngineArgs(
        model=model, dtype="float32", max_model_len=384, block_size=16, max_num_seqs=12, max_num_batched_tokens=64,
        enforce_eager=True, enable_prefix_caching=prefix_caching, num_gpu_blocks_override=num_blocks,
        additional_config={"memshare": {"protected_tokens": 32, **memshare}},
    )  # fmt: skip


def hash_function(value: Any) -> bytes:
    """Stands for vLLM's sha256 of a block's tokens and its parent's hash; quick, and as good within one run."""
    return hash(value).to_bytes(8, "little", signed=True)
