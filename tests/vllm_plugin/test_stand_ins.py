"""The stand-ins of vLLM's block pool do what vLLM's own does; needs vLLM (``make test-vllm``)."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fakes.vllm_blocks import Pool

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id


def state(pool: Any, ids: range) -> list[tuple[int, bool, bool]]:
    return [(pool.blocks[i].ref_cnt, pool.blocks[i].is_null, pool.blocks[i].block_hash is not None) for i in ids]


@pytest.mark.parametrize("seed", range(20))
def test_both_pools_give_out_the_same_blocks(seed):
    """Null blocks of our own, references, order of reuse of cached and uncached blocks."""
    draw = random.Random(seed)
    pools = [Pool(20), BlockPool(20, enable_caching=True, hash_block_size=16)]
    held: list[list[int]] = []
    for pool in pools:
        for block in pool.get_new_blocks(2):
            block.is_null = True
    for _ in range(100):
        if draw.random() < 0.5 and pools[0].get_num_free_blocks():
            count = draw.randint(1, min(4, pools[0].get_num_free_blocks()))
            taken = [[block.block_id for block in pool.get_new_blocks(count)] for pool in pools]
            assert taken[0] == taken[1]
            held.append(taken[0])
            if draw.random() < 0.5:
                name = draw.randbytes(32)
                for pool in pools:
                    key = make_block_hash_with_group_id(name, 0)
                    block = pool.blocks[taken[0][0]]
                    if isinstance(pool, Pool):
                        block.block_hash = key
                    else:
                        pool._insert_block_hash(key, block, num_tokens=16)
        elif held:
            ids = held.pop(draw.randrange(len(held)))
            if draw.random() < 0.3:
                for pool in pools:
                    pool.evict_blocks({ids[0]})
            for pool in pools:
                pool.free_blocks([pool.blocks[i] for i in reversed(ids)])
        assert state(pools[0], range(20)) == state(pools[1], range(20))
        assert pools[0].get_num_free_blocks() == pools[1].get_num_free_blocks()
