"""vLLM's block pool as pressure uses it: null pages taken for good, blocks retired one by one.

Who owns what, before and after block 7 of a request is retired into null page 3::

    req_to_blocks   [12, 15, 7, 9]     ->  [12, 15, 3, 9]
    free queue      ...                ->  7, ...           7 is the next block that anybody gets
    prefix cache    hash(15, 7) -> 7   ->  -                nobody may hit a block that is given away

With block 12 read in its place (an alias) the table is ``[12, 15, 12, 9]``, and block 12 has one reference more. When
the request ends, vLLM takes one off for each entry.

vLLM does not count references to blocks with ``is_null``; it has one of its own, block 0, which stands for what a
sliding window has left behind. That one is never written, and padding reads it, so null pages are blocks
of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.groups import OtherGroups, num_unused

_NEVER_CACHED = 2**62
"""More blocks than any request has: vLLM then takes all of its blocks for cached already, and caches no more."""


class VllmBlocks:
    """The blocks of one vLLM scheduler.

    Args:
      kv_cache_manager: vLLM's ``KVCacheManager`` with one group of full attention.
      group: index of that group, see ``find_full_group``.
      num_null_pages: how many bands of positions the model has; 1 without null pages.
      longest_request_tokens: vLLM's ``max_model_len``; one such request must still fit.
      has_aliases: entries of a request may come to point at its earlier blocks.

    Attributes:
      others: what requests hold in the other groups.

    Raises:
      UserError: the pool is too small for null pages beside one request of full length.
    """

    def __init__(
        self,
        kv_cache_manager: Any,
        group: int,
        num_null_pages: int,
        longest_request_tokens: int,
        has_aliases: bool = False,
    ) -> None:
        self._has_aliases = has_aliases
        managers = list(kv_cache_manager.coordinator.single_type_managers)
        self._index, self._group = group, managers.pop(group)
        self.others = OtherGroups(managers)
        self._pool = kv_cache_manager.block_pool
        self.block_size: int = self._group.block_size
        self.longest_request_tokens = longest_request_tokens
        longest = -(-longest_request_tokens // self.block_size) + self.others.most_ever(longest_request_tokens)
        usable = self._pool.num_gpu_blocks - 1 - num_null_pages
        if usable < longest:
            raise UserError(
                f"the KV pool must hold one request of max_model_len {longest_request_tokens}, {longest} blocks, "
                f"beside {num_null_pages} for null entries, got {usable} (raise the KV memory or lower --max-model-len)"
            )
        self._null_pages = self._pool.get_new_blocks(num_null_pages)
        for block in self._null_pages:
            block.is_null = True
        # They are nobody's: vLLM's usage and its test for an idle pool count without them.
        self._pool.num_gpu_blocks -= num_null_pages
        self.num_blocks: int = usable

    @property
    def null_block_ids(self) -> list[int]:
        """The null pages' block ids, by band."""
        return [block.block_id for block in self._null_pages]

    @property
    def num_free(self) -> int:
        """Blocks that vLLM could hand out now, cached ones that nobody uses included."""
        return self._pool.get_num_free_blocks()

    def num_missing(self, request_id: str, num_tokens: int, hits: Sequence[Sequence[Any]] = ()) -> int:
        """Blocks of the pool that a request takes until it holds so many tokens.

        Args:
          hits: blocks of every group that a request which holds none finds in the prefix cache.
        """
        others = list(hits)
        found = others.pop(self._index) if hits else ()
        there = len(self._group.req_to_blocks.get(request_id, ())) or len(found)
        missing = -(-num_tokens // self.block_size) - there + num_unused(found)
        return missing + self.others.num_missing(request_id, num_tokens, others)

    def num_wanted(self, num_computed: int) -> int:
        """Blocks that a request of so many computed tokens takes for its next one."""
        return (num_computed % self.block_size == 0) + self.others.num_wanted(num_computed)

    def num_shared(self, prompts: Iterable[tuple[str, int]], hits: Sequence[Sequence[Any]] = ()) -> list[int]:
        """How many blocks of each request's prompt one that stands before it holds too: the pool has them once.

        Args:
          prompts: request ids, and how many tokens of prompt each has. What follows is not counted: it may be another
            one's prompt, and is given up by nobody then, whatever the floor says.
          hits: blocks of every group that a request which holds none finds in the prefix cache.
        """
        found = hits[self._index] if hits else ()
        hit_ids = {block.block_id for block in found}
        seen, shared = set[int](), []
        for request_id, num_prompt_tokens in prompts:
            own = set[int]()
            for block in islice(self._table(request_id) or found, num_prompt_tokens // self.block_size):
                # Prompts share their beginning: behind a block that is nobody else's there is none.
                if block.is_null or (block.ref_cnt < 2 and block.block_id not in hit_ids):
                    break
                own.add(block.block_id)
            shared.append(len(own & seen))
            seen |= own
        return shared

    def owned(self, request_id: str, first: int, last: int) -> list[int]:
        """Logical blocks in ``[first, last)`` that are there and this request's alone, whatever they stand for."""
        blocks = self._table(request_id)
        held = self.held(request_id, first, last)
        if not self._has_aliases:
            return [i for i in held if blocks[i].ref_cnt == 1]
        named = Counter(block.block_id for block in blocks)
        return [i for i in held if blocks[i].ref_cnt == named[blocks[i].block_id]]

    def held(self, request_id: str, first: int, last: int) -> list[int]:
        """Logical blocks in ``[first, last)`` that are not retired: neither null, nor an earlier block's once more."""
        blocks = self._table(request_id)
        there = [i for i in range(first, min(last, len(blocks))) if not blocks[i].is_null]
        if not self._has_aliases:
            return there  # and a long prompt is not looked at for each request that is asked
        homes = {blocks[i].block_id: i for i in reversed(range(len(blocks)))}
        return [i for i in there if homes[blocks[i].block_id] == i]

    def retire(self, request_id: str, logical_blocks: Iterable[int], band: int, num_computed: int) -> list[int]:
        """Gives blocks back to the pool, the band's null page in their place; modifies the request's list.

        Tokens from ``num_computed`` on see a shorter past than their blocks' hashes say, so none of those blocks may be
        in the prefix cache: vLLM caches a block when it plans the step that fills it, which may be this one.

        Returns:
          The entries that changed: of the blocks, and of those that they were read in place of.
        """
        null_page, changed = self._null_pages[band], list[int]()
        freed = []
        for logical in logical_blocks:
            block, entries = self._replace(request_id, logical, null_page)
            freed += [block] * len(entries)
            changed += entries
        self._give_back(request_id, freed, num_computed)
        return changed

    def let_stand_in(self, request_id: str, donors: Mapping[int, int], num_computed: int) -> dict[int, int]:
        """Gives blocks back to the pool, an earlier one of the request read in the place of each; else as ``retire``.

        Args:
          donors: the earlier logical block by logical block, in the order in which they go.

        Returns:
          Block ids by entry, of all that changed.
        """
        blocks, changed, freed = self._table(request_id), dict[int, int](), []
        for logical, donor in donors.items():
            kept = blocks[donor]
            home = next(i for i, entry in enumerate(blocks) if entry is kept)
            if kept.is_null or not home == donor < logical:
                raise RuntimeError(
                    f"block {kept.block_id} at {donor} of {request_id} cannot stand in for {logical}: null "
                    f"{kept.is_null}, it is the block of {home}"
                )
            block, entries = self._replace(request_id, logical, kept)
            self._pool.touch([kept] * len(entries))
            freed += [block] * len(entries)
            changed |= dict.fromkeys(entries, kept.block_id)
        if donors:
            self._give_back(request_id, freed, num_computed)
        return changed

    def _table(self, request_id: str) -> list[Any]:
        blocks: list[Any] = self._group.req_to_blocks.get(request_id, [])
        return blocks

    def _replace(self, request_id: str, logical: int, other: Any) -> tuple[Any, list[int]]:
        """Points all entries of a block at another one; returns it, and its entries, ascending."""
        blocks = self._table(request_id)
        block = blocks[logical]
        entries = [i for i, entry in enumerate(blocks) if entry is block] if self._has_aliases else [logical]
        if block.is_null or block.ref_cnt != len(entries) or entries[0] != logical:
            raise RuntimeError(
                f"block {block.block_id} at {logical} of {request_id} cannot be retired: null {block.is_null}, "
                f"references {block.ref_cnt}, entries {entries}"
            )
        for entry in entries:
            blocks[entry] = other
        return block, entries

    def _give_back(self, request_id: str, freed: list[Any], num_computed: int) -> None:
        """Frees blocks that no table names any more; one stands in the list for each entry that named it."""
        blocks = self._table(request_id)
        gapped = [block for block in blocks[num_computed // self.block_size :] if not block.is_null]
        gapped += self.others.own_blocks(request_id, num_computed)  # the next layer reads what this one has computed
        self._pool.evict_blocks({block.block_id for block in (*freed, *gapped)})
        self._pool.free_blocks(freed)
        self._group.num_cached_block[request_id] = _NEVER_CACHED
        self.others.cache_no_more(request_id, _NEVER_CACHED)

    def move_band(self, request_id: str, logical_blocks: Iterable[int], band: int) -> None:
        """Points retired entries at another band's null page."""
        blocks = self._group.req_to_blocks[request_id]
        for logical in logical_blocks:
            blocks[logical] = self._null_pages[band]
