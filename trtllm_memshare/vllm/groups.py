"""vLLM's KV cache groups: which one gives pages up, and what a request holds in the others.

A model with sliding windows in some of its layers (gpt-oss, Gemma 3, Olmo 3) has a group of layers with full attention
and others with windows, with a block table each, all out of one pool. Windows give back by themselves what they have
left behind, so pages are given up in the group of full attention alone. In a model with linear attention (Qwen3.5) the
others hold one state for each request, a block of the pool; with prefix caching a state goes on in a new block wherever
one of full attention ends, and the one before may be somebody's hit. A model with multi-head latent attention (MLA:
DeepSeek-R1) has one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trtllm_memshare.errors import UserError

_FULL, _WINDOW, _STATE, _MLA = "FullAttentionSpec", "SlidingWindowSpec", "MambaSpec", "MLAAttentionSpec"
_ALL = 2**62  # tokens or blocks, more than any request has
_ALIGNED = "align"  # vLLM's mode in which states can be hits
_IN_FLIGHT = 2
"""Steps that may run or wait to run with async scheduling: until they have, vLLM keeps what their tokens see."""


def find_full_group(groups: Sequence[Any]) -> int:
    """Index of the group whose layers have full attention, or MLA.

    Args:
      groups: vLLM's ``KVCacheGroupSpec`` of each group.

    Raises:
      UserError: none, more than one, or a group of another kind than full attention and sliding windows.
    """
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != [_MLA] and (kinds.count(_FULL) != 1 or not {_FULL, _WINDOW, _STATE}.issuperset(kinds)):
        raise UserError(
            f"MemShare needs a model with one KV cache group of full attention, beside it sliding windows and linear "
            f"attention at most, or with one of MLA alone, got KV cache groups of {', '.join(kinds) or 'none'} (serve "
            f"this model without MemShare)"
        )
    index = 0 if kinds == [_MLA] else kinds.index(_FULL)
    spec = groups[index].kv_cache_spec
    for window in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, window, None) is not None:
            raise UserError(f"MemShare excludes {window}, got {getattr(spec, window)} (serve without MemShare)")
    return index


def num_unused(hits: Iterable[Any]) -> int:
    """How many of a request's hits in the prefix cache nobody uses: they are taken from the pool as new ones are."""
    return sum(block.ref_cnt == 0 and not block.is_null for block in hits)


def has_states(groups: Iterable[Any]) -> bool:
    """Whether some layers have linear attention, or another one that keeps a state of each request."""
    return any(type(group.kv_cache_spec).__name__ == _STATE for group in groups)


class OtherGroups:
    """What requests hold of the pool beside their pages.

    Args:
      managers: vLLM's ``SlidingWindowManager`` of each group of sliding windows, its ``MambaManager`` of each group of
        states, whose blocks are as long as any request unless states can be hits; none for most models.
    """

    def __init__(self, managers: Sequence[Any]) -> None:
        self._managers = [(manager, getattr(manager, "sliding_window", _ALL)) for manager in managers]

    def most_held(self, num_tokens: int) -> int:
        """Blocks that a request of so many tokens holds while it generates, at most.

        A state that goes on in a new block is in the one before too, for a step or two. That is not counted, since it
        is not there for most requests at a time.
        """
        return sum(min(-(-num_tokens // m.block_size), _most_steady(m, window)) for m, window in self._managers)

    def most_ever(self, num_tokens: int) -> int:
        """The same while its prompt is read too, when pieces of it are held whole, and with states in two blocks.

        As vLLM counts it at its start: with a step in flight a state may be in one block more, which is somebody's
        preemption at worst.
        """
        return sum(min(-(-num_tokens // m.block_size), _most_admitted(m) + _is_aligned(m)) for m, _ in self._managers)

    def num_missing(self, request_id: str, num_tokens: int, hits: Sequence[Sequence[Any]] = ()) -> int:
        """Blocks that vLLM takes until a request holds so many tokens; it has given back what a window left.

        Args:
          hits: blocks of each group that a request which holds none finds in the prefix cache; null blocks stand for
            those that its window leaves out.
        """
        missing = 0
        for index, (manager, _) in enumerate(self._managers):
            found = hits[index] if hits else ()
            # Entries stay in the list when their blocks have gone.
            there = len(manager.req_to_blocks.get(request_id, ())) or len(found)
            new = max(0, -(-num_tokens // manager.block_size) - there)
            missing += min(new, _most_admitted(manager)) + num_unused(found)
        return missing

    def num_wanted(self, num_computed: int) -> int:
        """Blocks that a request takes for its next token, more than it gives back by then, about."""
        return sum(num_computed % m.block_size == 0 and num_computed < window for m, window in self._managers)

    def own_blocks(self, request_id: str, first_token: int) -> list[Any]:
        """Blocks that hold tokens from ``first_token`` on."""
        return [
            block
            for manager, _ in self._managers
            for block in manager.req_to_blocks.get(request_id, ())[first_token // manager.block_size :]
            if not block.is_null
        ]

    def cache_no_more(self, request_id: str, never: int) -> None:
        """None of this request's blocks enters the prefix cache from now on."""
        for manager, _ in self._managers:
            manager.num_cached_block[request_id] = never


def _is_aligned(manager: Any) -> bool:
    return getattr(manager, "mamba_cache_mode", None) == _ALIGNED


def _most_steady(manager: Any, window: int) -> int:
    return 1 if _is_aligned(manager) else -(-(window - 1 + _IN_FLIGHT) // manager.block_size) + 1


def _most_admitted(manager: Any) -> int:
    """Blocks that vLLM takes for one request at once, at most."""
    if _is_aligned(manager):  # the state, and where a kernel keeps one more as it reads a prompt to its end
        return 1 + int(manager.kv_cache_spec.num_prefill_checkpoint_blocks)
    most = manager.max_admission_blocks_per_request
    return _ALL if most is None else int(most)
