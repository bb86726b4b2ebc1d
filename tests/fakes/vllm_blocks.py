"""Stand-ins for the parts of vLLM that the plugin's pure half touches, as read in vLLM 0.32.0 on 26 November 2026.

Sources: ``v1/core/block_pool.py`` (BlockPool), ``v1/core/kv_cache_utils.py`` (KVCacheBlock),
``v1/core/single_type_kv_cache_manager.py`` (the group). ``tests/vllm_plugin/test_stand_ins.py`` holds
them against vLLM where it is installed.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.vllm.blocks import VllmBlocks
from trtllm_memshare.vllm.relief import Relief
from trtllm_memshare.vllm.request_options import RequestOptions

BLOCK_SIZE = 4
BOUNDARIES = BoundaryTokens.from_texts([" a"] * 50 + [".\n"] + [" b"] * 49)  # token 50 ends a line


@dataclass
class Block:
    block_id: int
    ref_cnt: int = 0
    is_null: bool = False
    block_hash: object = None


class Pool:
    """vLLM's BlockPool without events: block 0 is its null block, whose references are not maintained."""

    def __init__(self, num_gpu_blocks: int) -> None:
        self.num_gpu_blocks = num_gpu_blocks
        self.blocks = [Block(i) for i in range(num_gpu_blocks)]
        self._free = deque(self.blocks)
        self.null_block = self._free.popleft()
        self.null_block.is_null = True

    def get_num_free_blocks(self) -> int:
        return len(self._free)

    def get_new_blocks(self, num_blocks: int) -> list[Block]:
        if num_blocks > len(self._free):
            raise ValueError(f"Cannot get {num_blocks} free blocks from the pool")
        taken = [self._free.popleft() for _ in range(num_blocks)]
        for block in taken:
            assert block.ref_cnt == 0
            block.block_hash = None
            block.ref_cnt = 1
        return taken

    def free_blocks(self, ordered_blocks: Any) -> None:
        first, last = [], []
        for block in ordered_blocks:
            block.ref_cnt -= 1
            if block.ref_cnt == 0 and not block.is_null:
                (last if block.block_hash is not None else first).append(block)
        self._free.extendleft(reversed(first))
        self._free.extend(last)

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self._free.remove(block)
            block.ref_cnt += 1

    def evict_blocks(self, block_ids: set[int]) -> None:
        for block_id in block_ids:
            self.blocks[block_id].block_hash = None


@dataclass
class Group:
    """The one ``FullAttentionManager``."""

    block_size: int
    req_to_blocks: defaultdict[str, list[Block]] = field(default_factory=lambda: defaultdict(list))
    num_cached_block: dict[str, int] = field(default_factory=dict)


def cache_manager(num_gpu_blocks: int, block_size: int = BLOCK_SIZE) -> Any:
    """A ``KVCacheManager`` with one group."""
    coordinator = SimpleNamespace(single_type_managers=[Group(block_size)])
    return SimpleNamespace(coordinator=coordinator, block_pool=Pool(num_gpu_blocks))


@dataclass
class Request:
    """A vLLM request that has computed all its tokens but the one just sampled."""

    request_id: str
    num_prompt_tokens: int
    all_token_ids: list[int]
    max_tokens: int = 100
    resumable: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_computed_tokens(self) -> int:
        return len(self.all_token_ids) - 1

    @property
    def num_output_tokens(self) -> int:
        return len(self.all_token_ids) - self.num_prompt_tokens


class Host:
    """A pool with relief over it and requests that grow, in place of vLLM's scheduler."""

    def __init__(
        self, num_gpu_blocks: int, bands: tuple[int, ...] = (0, 1000), longest: int = 40, **config: Any
    ) -> None:
        self.manager = cache_manager(num_gpu_blocks)
        self.config = make_config(
            "pressure",
            **{"need": "age", "protected_tokens": 4, "high_watermark": 0.9, "low_watermark": 0.8, **config},
        )
        has_aliases = self.config.retired_becomes == "alias"
        self.blocks = VllmBlocks(self.manager, 0, len(bands) - 1, longest, has_aliases)
        factory = make_matcher_factory(self.config, BLOCK_SIZE, BOUNDARIES)
        self.relief = Relief(self.config, self.blocks, np.array(bands, np.int32), factory)
        self.requests: dict[str, Request] = {}
        self.draw = np.random.default_rng(1)

    def add(self, name: str, num_prompt: int, num_tokens: int, options: RequestOptions | None = None) -> Request:
        """A request of ``num_tokens`` tokens in all, with blocks for them."""
        tokens = self.draw.integers(0, 50, num_tokens).tolist()
        self.requests[name] = request = Request(name, num_prompt, tokens)
        self.relief.add(name, num_prompt, options or RequestOptions(True, self.config.min_kept))
        self.give_blocks(request)
        return request

    def give_blocks(self, request: Request) -> None:
        """Blocks for what is computed, as vLLM has given them out after a step."""
        table = self.table(request.request_id)
        table.extend(self.manager.block_pool.get_new_blocks(-(-request.num_computed_tokens // BLOCK_SIZE) - len(table)))

    def grow(self, request: Request, token_ids: list[int]) -> None:
        """The request has sampled these."""
        request.all_token_ids.extend(token_ids)
        self.give_blocks(request)

    def table(self, name: str) -> list[Block]:
        return self.manager.coordinator.single_type_managers[0].req_to_blocks[name]

    def ids(self, name: str) -> list[int]:
        return [block.block_id for block in self.table(name)]

    def free(self, name: str) -> None:
        """vLLM frees a request's blocks, last first."""
        group = self.manager.coordinator.single_type_managers[0]
        group.num_cached_block.pop(name, None)
        self.manager.block_pool.free_blocks(reversed(group.req_to_blocks.pop(name, [])))
