"""How much memory a KV pool may take, and what is said when it is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError, quote


def blocks_that_fit(engine: Engine, num_blocks: int, free_memory_share: float | None, device: torch.device) -> int:
    """``num_blocks``, or as many as fit into a share of the GPU's free memory if these are fewer; at least one.

    To be called once the weights are there. What a step needs beside them must fit into the rest.

    Args:
      free_memory_share: in (0, 1], as TensorRT-LLM's ``kv_cache_free_gpu_mem_fraction``; None = no limit.

    Raises:
      UserError: a share of the memory of a device that is no GPU.
    """
    if free_memory_share is None:
        return num_blocks
    if device.type != "cuda":
        raise UserError(
            f"--kv-cache-free-gpu-mem-fraction needs a GPU, got device {device.type} (set --kv-cache-blocks instead)"
        )
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(num_blocks, int(free_memory_share * free) // engine.bytes_per_block))


@contextmanager
def pool_that_fits(engine: Engine, num_blocks: int, owner: str) -> Iterator[None]:
    """Turns running out of memory in here into a UserError; ``owner``: of the memory that one rank takes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error) and "memory" not in str(error):
            raise
        needed = num_blocks * engine.bytes_per_block // num_ranks(engine)
        raise UserError(
            f"a KV pool of {num_blocks:,} blocks needs {needed:,} bytes, which {owner} "
            f"does not have (give fewer, with --kv-cache-blocks)"
        ) from error


def check_pool(engine: Engine, num_blocks: int) -> None:
    """Raises UserError for a pool that block tables cannot address: an entry is an int32 (see ``cache.offsets``)."""
    most = (2**31 - 1) // (2 * engine.checkpoint.num_layers)
    if not 1 <= num_blocks <= most:
        raise UserError(
            f"the KV pool must have between 1 and {most:,} blocks for a model of {engine.checkpoint.num_layers} "
            f"layers, got {quote(num_blocks)} (set --kv-cache-blocks)"
        )


def num_ranks(engine: Engine) -> int:
    """Processes that an engine was built for."""
    return engine.build.tp_size * engine.build.pp_size
