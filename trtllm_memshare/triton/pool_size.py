"""How many blocks the pool of a deployment must have: a request of full length, beside the null pages."""

from __future__ import annotations

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.engine.null_page_files import load_null_pages
from trtllm_memshare.errors import UserError


def enough_blocks(engine: Engine, num_requests: int) -> int:
    """Blocks that so many requests of full length need.

    Null pages take blocks where something may be forgotten; where nothing may, requests have these too.

    Raises:
      UserError: the engine's null pages are damaged.
    """
    build = engine.build
    pages = (
        load_null_pages(engine.engine_dir, engine.checkpoint, build.max_seq_len) if engine.memshare.forgets else None
    )
    return num_requests * -(-build.max_seq_len // build.tokens_per_block) + (0 if pages is None else pages.num_bands)


def check_one_fits(engine: Engine, num_blocks: int, free_memory_share: float | None = None) -> None:
    """Raises UserError for a pool that one request of full length does not fit into.

    Args:
      free_memory_share: of the GPU's memory, if that is what the pool's size came from.
    """
    build, needed = engine.build, enough_blocks(engine, 1)
    if num_blocks < needed:
        for_request = -(-build.max_seq_len // build.tokens_per_block)
        if free_memory_share is not None:
            raise UserError(
                f"a KV pool in {free_memory_share:g} of the GPU's free memory must hold one request of max_seq_len "
                f"{build.max_seq_len}: {needed} blocks with null pages, got {num_blocks} (build with a lower "
                f"--max-seq-len, or raise --kv-cache-free-gpu-mem-fraction)"
            )
        beside = f" and {needed - for_request} null pages" if needed > for_request else ""
        raise UserError(
            f"--kv-cache-blocks must hold one request of max_seq_len {build.max_seq_len}: {for_request} blocks of "
            f"{build.tokens_per_block} tokens{beside}, got {num_blocks} (set it to {needed} or more)"
        )
