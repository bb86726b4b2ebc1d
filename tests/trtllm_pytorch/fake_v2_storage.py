"""KV cache manager V2 below its Python wrapper: pages with a host tier, capacities, history that cannot be cut.

Mirrors ``tensorrt_llm/runtime/kv_cache_manager_v2`` (its ``__init__.pyi`` and ``_core/_kv_cache.py``, May to September
2026): what ``resize``, ``suspend`` and ``resume`` do, refuse and raise.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

BAD_PAGE_INDEX = -1


class Storage:
    """Pages on the GPU and room for copies of them on the host.

    ``max_util_for_resume``: no cache is resumed, a new one neither, while more of the pages than that cannot be had
    (``KvCacheConfig``, 0.95 by default; ``_resume_gate_refuses`` of main, 29 November 2026).

    A suspended cache keeps its pages where they are until somebody needs the room; then they move to the host, if the
    host tier has room, and otherwise stay: nobody can have it.
    """

    def __init__(self, num_slots, shape, tokens_per_block, host_slots, max_util_for_resume=0.95):
        self.max_util_for_resume = max_util_for_resume
        self.pool = torch.zeros(num_slots, *shape)
        self.tokens_per_block = tokens_per_block
        self.free = deque(range(num_slots))
        self.is_free = [True] * num_slots
        self.host_free = host_slots
        self.suspended: list[FakeKVCacheV2] = []
        self.num_copied = 0  # pages, to the host and back

    @property
    def num_available(self):
        """Free, or held by suspended caches and movable to the host."""
        evictable = sum(c.num_resident for c in self.suspended)
        return len(self.free) + min(evictable, self.host_free)

    @property
    def refuses_to_resume(self):
        return 1 - self.num_available / len(self.is_free) > self.max_util_for_resume

    def take(self):
        if not self.free:
            next(c for c in self.suspended if c.num_resident).move_one_to_host()
        slot = self.free.popleft()
        assert self.is_free[slot]
        self.is_free[slot] = False
        return slot

    def give(self, slot):
        assert not self.is_free[slot], f"slot {slot} freed twice"
        self.is_free[slot] = True
        self.free.appendleft(slot)


class FakeKVCacheV2:
    """``_KVCache`` of one request. A page is a slot of the pool, or a tensor while it is on the host."""

    def __init__(self, storage):
        self._storage = storage
        self._pages: list[int | torch.Tensor] = []
        self.capacity = self.history_length = 0
        self.num_committed_tokens = 0
        self._buffer = None
        self.is_active = False
        self.is_open = True

    @property
    def num_blocks(self):
        return len(self._pages)

    @property
    def num_resident(self):
        return sum(isinstance(p, int) for p in self._pages)

    def set_base_page_index_buf(self, beam, layer_group, buffer):
        """The row that indices are written to at once; suspending lets go of it."""
        self._buffer = None if buffer is None else np.frombuffer(buffer, np.int32)
        self._write_indices()

    def stop_committing(self):
        pass

    def discard_pending_stats(self):
        pass

    def resume(self, stream):
        assert not self.is_active
        if self._storage.refuses_to_resume:
            return False
        on_host = [i for i, page in enumerate(self._pages) if not isinstance(page, int)]
        storage = self._storage
        if self in storage.suspended:
            storage.suspended.remove(self)
            if storage.num_available < len(on_host):
                storage.suspended.append(self)
                return False
        for index in on_host:  # the copy back lands in any slot
            slot, saved = storage.take(), self._pages[index]
            storage.pool[slot] = saved
            storage.host_free += 1
            storage.num_copied += 1
            self._pages[index] = slot
        self.is_active = True
        self._write_indices()
        return True

    def suspend(self):
        assert self.is_active
        self.is_active = False
        self._write_indices()
        self._buffer = None
        self._storage.suspended.append(self)

    def move_one_to_host(self):
        index = max(i for i, page in enumerate(self._pages) if isinstance(page, int))
        assert self._storage.host_free > 0
        self._storage.host_free -= 1
        self._storage.num_copied += 1
        slot = self._pages[index]
        self._pages[index] = self._storage.pool[slot].clone()
        self._storage.pool[slot] = -1.0
        self._storage.give(slot)

    def resize(self, capacity, history_length=None):
        if capacity is not None:
            if capacity < max(self.history_length, self.num_committed_tokens):
                raise ValueError("cannot remove historical or committed tokens")
            assert self.is_active
            need = -(-capacity // self._storage.tokens_per_block)
            if need - len(self._pages) > self._storage.num_available:
                return False
            while len(self._pages) > need:
                self._storage.give(self._pages.pop())
            while len(self._pages) < need:
                self._pages.append(self._storage.take())
            self.capacity = capacity
            self._write_indices()
        if history_length is not None:
            if history_length < self.history_length:
                raise ValueError("History length cannot be decreased")
            if history_length > self.capacity:
                raise ValueError("History length cannot exceed the capacity")
            self.history_length = history_length
        return True

    def get_base_page_indices(self, layer_group):
        """Bad indices where the pages are not locked on the GPU, and behind the last one up to the row's end."""
        width = len(self._buffer) if self._buffer is not None else len(self._pages)
        indices = list(self._pages) if self.is_active else [BAD_PAGE_INDEX] * len(self._pages)
        return indices + [BAD_PAGE_INDEX] * (width - len(indices))

    def close(self):
        assert self.is_open
        self.is_open = False
        if self in self._storage.suspended:
            self._storage.suspended.remove(self)
        for page in self._pages:
            if isinstance(page, int):
                self._storage.give(page)
            else:
                self._storage.host_free += 1

    def _write_indices(self):
        if self._buffer is not None:
            self._buffer[:] = BAD_PAGE_INDEX
            if self.is_active:
                self._buffer[: len(self._pages)] = np.array(self._pages, np.int32)
