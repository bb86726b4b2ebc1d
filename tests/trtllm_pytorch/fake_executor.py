"""TensorRT-LLM's executor loop over a fake manager: scheduling, overlap, pauses, and the order of the calls on record.

The "model" stores at each position what the whole text up to it determines, as a real cache does: a number for each
prefix. Rows of the pool are written and read through the block table that the manager fills, so a wrong table shows.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
from trtllm_pytorch.fake_attention import KVCacheParams, make_metadata
from trtllm_pytorch.fake_requests import FakeLlmRequest, FinishReason, LlmRequestState, ScheduledRequests
from trtllm_pytorch.fake_v2 import FakeKVCacheV2Scheduler

NUM_LAYERS, NUM_HEADS, HEAD_DIM, MAX_SEQ_LEN = 2, 1, 2, 256


def make_mapping(**changes):
    return SimpleNamespace(
        **{"tp_size": 1, "pp_size": 1, "cp_size": 1, "rank": 0, "enable_attention_dp": False, **changes}
    )


def make_cache_config(num_blocks, tokens_per_block, **changes):
    values = {"max_attention_window": None, "enable_block_reuse": False, "host_cache_size": None}
    return SimpleNamespace(**{**values, "max_tokens": num_blocks * tokens_per_block, **changes})


def make_manager(
    manager_class, num_blocks, tokens_per_block, max_batch_size=8, reuse=False, config=None, max_seq_len=MAX_SEQ_LEN,
    **arguments,
):  # fmt: skip
    return manager_class(
        make_cache_config(num_blocks, tokens_per_block, enable_block_reuse=reuse, **(config or {})), "SELF",
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_HEADS, head_dim=HEAD_DIM, tokens_per_block=tokens_per_block, max_seq_len=max_seq_len,
        max_batch_size=max_batch_size, **{"mapping": make_mapping(), **arguments},
    )  # fmt: skip


def repetitive_text(rng: random.Random, length: int) -> list[int]:
    """Tokens that come back in phrases, at any shift."""
    phrases = [[rng.randrange(50) for _ in range(rng.randrange(9, 40))] for _ in range(2)]
    text: list[int] = []
    while len(text) < length:
        text += rng.choice(phrases) if rng.random() < 0.8 else [rng.randrange(50) for _ in range(rng.randrange(1, 6))]
    return text[:length]


def submit_texts(executor: FakeExecutor, num_requests: int) -> None:
    """Requests of 24 to 25 pages of 8 tokens each, all at once."""
    rng = random.Random(3)
    for request_id in range(num_requests):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))


class FakeExecutor:
    """Runs scripted requests. ``metadata``: the attention metadata; None = of the manager's release."""

    def __init__(self, manager, overlap: bool, metadata=None) -> None:
        self.manager, self.overlap, self.metadata = manager, overlap, metadata or make_metadata(manager)
        self.pool = self._pool()
        self.table = self.metadata.kv_cache_block_offsets  # one tensor for good: CUDA graphs hold its address
        self.scheduler = (
            FakeKVCacheV2Scheduler(manager, manager.max_batch_size)
            if hasattr(manager, "try_allocate_generation")
            else None
        )
        self.active: list[FakeLlmRequest] = []
        self.cancelled_waiting: set[int] = set()  # ended by `cancel`, without having run
        self.requests: list[FakeLlmRequest] = []
        self.scripts: dict[int, list[int]] = {}
        self.processed: dict[int, int] = {}  # positions that forward passes have written
        self.previous: ScheduledRequests | None = None
        self.tables: list[torch.Tensor] = []
        self.num_pauses = 0
        self.rejected: list[FakeLlmRequest] = []
        self._prefix_ids: dict[tuple[int, int], int] = {}
        self._prefixes: dict[int, list[int]] = {}

    def submit(self, request_id: int, prompt: list[int], output: list[int], max_new_tokens: int = 0) -> FakeLlmRequest:
        """``max_new_tokens``: 0 = an even id reaches its limit with its output, an odd one's end token comes before."""
        limit = max_new_tokens or len(output) + request_id % 2
        request = FakeLlmRequest(request_id, prompt, max_new_tokens=limit)
        budget = getattr(self.manager, "get_request_kv_block_budget", lambda request: None)(request)
        if budget is not None and budget[0] > budget[1]:  # main refuses what can never fit
            self.rejected.append(request)
            return request
        self.scripts[request_id] = prompt + output
        self.requests.append(request)
        number, numbers = 0, self._prefixes.setdefault(request_id, [])
        for token in prompt + output:
            number = self._prefix_ids.setdefault((number, token), len(self._prefix_ids) + 1)
            numbers.append(number)
        self.active.append(request)
        return request

    def cancel(self, request_id: int) -> None:
        """Takes effect where responses are handled; one that waits, before or after it ran, ends at once."""
        request = self.request(request_id)
        self.scripts[request_id] = self.scripts[request_id][: request.max_beam_num_tokens]
        if request.state is LlmRequestState.CONTEXT_INIT and request_id not in self.processed:
            request.finish_by_reason(FinishReason.CANCELLED)
            self.cancelled_waiting.add(request_id)
            self.active.remove(request)
            self.manager.free_resources(request)

    def _own_pages(self, request_id: int) -> list[int]:
        """Pages of the pool that the manager lists for a request; V2's lists count layers."""
        pages = list(self.manager.get_batch_cache_indices([request_id])[0])
        return [p // NUM_LAYERS for p in pages] if hasattr(self.manager, "kv_cache_map") else pages

    def request(self, request_id: int) -> FakeLlmRequest:
        return next(r for r in self.active if r.py_request_id == request_id)

    def step(self) -> None:
        """One iteration."""
        batch, paused = self._schedule()
        for request in paused:
            if self.scheduler is None:  # main's V2 scheduler has freed it
                self.manager.free_resources(request)
            self.processed.pop(request.py_request_id)
        self.manager.prepare_resources(batch)
        self._forward(batch)
        if self.scheduler is not None:
            self.manager.update_context_resources(batch)
        if self.overlap:
            finished, self.previous = self.previous, batch
        else:
            finished = batch
        # With overlap these are the tokens of the batch before the one that runs now.
        self._update_requests(finished)
        for request in paused:
            if request.state is LlmRequestState.GENERATION_IN_PROGRESS:
                request.pause()
        self._process(finished)
        if self.overlap:
            self._mark_last(batch.generation_requests)

    def prefix_id(self, request_id: int, position: int) -> int:
        """What the cache holds for a position: a number of the text up to it."""
        return self._prefixes[request_id][position]

    def content(self, request_id: int, position: int) -> float | torch.Tensor:
        """K and V of a position, broadcast to ``[num_layers, 2, num_heads, head_dim]``."""
        return float(self.prefix_id(request_id, position))

    def num_skipped(self, request_id: int) -> int:
        """By how many tokens attention's sequence was shorter than the text in the last forward pass."""
        row = self._ids.index(request_id)
        length = int(self.metadata.kv_lens_cuda[row])
        assert length == int(self.metadata.kv_lens[row]) == int(self.metadata.kv_lens_runtime[row])
        assert row < self.metadata.num_contexts or int(self.metadata.prompt_lens_cuda[row]) < length
        return self.processed[request_id] - length

    def row(self, request_id: int) -> torch.Tensor:
        """The request's pages in reading order, from the table of the last forward pass."""
        entries = self.table[0, self._ids.index(request_id), 0]
        return entries // (NUM_LAYERS * 2)

    def _pool(self) -> torch.Tensor:
        size = self.manager.tokens_per_block
        pool = self.manager.impl.pool
        return pool.view(pool.shape[0], NUM_LAYERS, 2, NUM_HEADS, size, HEAD_DIM)

    def _schedule(self) -> tuple[ScheduledRequests, list[FakeLlmRequest]]:
        """MAX_UTILIZATION: running requests go on, the youngest give way: V1 frees and recomputes, V2 suspends.

        A prompt comes in if its blocks are free, the last one too (``capacityScheduler.cpp``, 29 November 2026).
        """
        if self.scheduler is not None:
            batch, paused = self.scheduler.schedule_request(self.active)
            self.num_pauses = self.scheduler.num_suspended + self.scheduler.num_recomputed
            return ScheduledRequests(*batch), paused
        size, free = self.manager.tokens_per_block, self._num_free()
        running = [r for r in self.active if r.state is LlmRequestState.GENERATION_IN_PROGRESS]
        ending = [r for r in self.active if r.state is LlmRequestState.GENERATION_TO_COMPLETE]  # they keep their seats
        caches = getattr(self.manager, "kv_cache_map", None)
        suspended = [r for r in running if caches is not None and not caches[r.py_request_id].is_active]
        running = [r for r in running if r not in suspended]
        paused: list[FakeLlmRequest] = []
        while sum(map(self._needs_block, running)) > free:
            victim = running.pop()
            self.num_pauses += 1
            if caches is None:
                paused.append(victim)
                free += self._pages(victim)
            else:
                self.manager.suspend_request(victim)
                free = self._num_free()
        free -= sum(map(self._needs_block, running))
        for request in suspended:
            if self._pages(request) + 1 <= free and self.manager.resume_request(request):
                free -= self._pages(request) + 1
                running.append(request)
        context = []
        for request in self.active:
            if request.state is not LlmRequestState.CONTEXT_INIT or paused:
                continue
            blocks = -(-request.prompt_len // size)
            taken = len(running) + len(ending) + len(context)
            if taken >= self.manager.max_batch_size or blocks > free or self._is_too_full_to_begin(free):
                break
            free -= blocks
            context.append(request)
        return ScheduledRequests(context, running), paused

    def _is_too_full_to_begin(self, free: int) -> bool:
        """Early V2 asserts that a new cache is resumed, which its storage refuses above a threshold."""
        storage = getattr(self.manager, "impl", None)
        if not hasattr(storage, "max_util_for_resume"):
            return False
        return 1 - free / len(storage.is_free) > storage.max_util_for_resume

    def _num_free(self) -> int:
        """What a scheduler of each generation asks: V1 the manager, V2 its storage."""
        if hasattr(self.manager, "kv_cache_map"):
            return self.manager.impl.num_available
        return self.manager.get_num_free_blocks()

    def _pages(self, request: FakeLlmRequest) -> int:
        """Pages that come free for certain; with block reuse some may be held by others."""
        pages = self.manager.get_batch_cache_indices([request.py_request_id])[0]
        counts = getattr(self.manager.impl, "ref_count", None)
        return sum(counts is None or counts[p] == 1 for p in pages)

    def _needs_block(self, request: FakeLlmRequest) -> int:
        if hasattr(self.manager, "kv_cache_map"):
            return int(self.manager.kv_cache_map[request.py_request_id].capacity % self.manager.tokens_per_block == 0)
        return self.manager.impl.get_needed_blocks_one_step(request)

    def _write_table(self, batch: ScheduledRequests) -> None:
        """The block table and the lengths of this iteration, as the model engine has the metadata prepare them."""
        requests, metadata = batch.all_requests(), self.metadata
        self._ids = [r.py_request_id for r in requests]
        if not requests:
            return
        chunks = [r.prompt_len - r.context_current_position for r in batch.context_requests]
        seen = [r.context_current_position for r in batch.context_requests]
        seen += [self.processed[r.py_request_id] for r in batch.generation_requests]
        metadata.request_ids, metadata.num_contexts = self._ids, len(chunks)
        metadata.prompt_lens = [*chunks, *(r.py_prompt_len for r in batch.generation_requests)]
        metadata.seq_lens = torch.tensor(chunks + [1] * len(batch.generation_requests), dtype=torch.int32)
        seen = [self._num_cached(r, count) for r, count in zip(requests, seen, strict=True)]
        metadata.kv_cache_params = params = KVCacheParams(True, list(seen))
        metadata.prepare()
        assert metadata.kv_cache_params is params
        assert params.num_cached_tokens_per_seq == seen
        self.tables.append(self.table[:, : len(self._ids)].clone())

    def _num_cached(self, request: FakeLlmRequest, num_seen: int) -> int:
        """Tokens in the cache of a request, of so many that were computed."""
        return num_seen

    def _forward(self, batch: ScheduledRequests) -> None:
        self._write_table(batch)
        for request in batch.context_requests:
            for position in range(request.context_current_position, request.prompt_len):
                self._write(request.py_request_id, position)
            self.processed[request.py_request_id] = request.prompt_len
            request.context_current_position = request.prompt_len
            request.is_first_context_chunk = False
        for request in batch.generation_requests:
            position = self.processed[request.py_request_id]
            self._write(request.py_request_id, position)
            self.processed[request.py_request_id] = position + 1
        for request in batch.context_requests:
            request.state = LlmRequestState.GENERATION_IN_PROGRESS
        if self.overlap:
            self._mark_last(batch.context_requests)

    def _mark_last(self, requests: list[FakeLlmRequest]) -> None:
        """Those whose pass that runs now makes their last token, by count, are not to be scheduled again."""
        for request in requests:
            if request.state is LlmRequestState.GENERATION_IN_PROGRESS and request.will_complete_next_iteration():
                request.state = LlmRequestState.GENERATION_TO_COMPLETE

    def _write(self, request_id: int, position: int) -> None:
        size = self.manager.tokens_per_block
        if position >= len(self.scripts[request_id]):
            return  # the extra pass of a request whose end token the host does not know yet
        # K and V of a token go where the length says, as kernels append them.
        row = self._ids.index(request_id)
        is_prompt = row < self.metadata.num_contexts
        slot = position if is_prompt else int(self.metadata.kv_lens_cuda[row]) - 1
        entries = [int(e) for e in self.row(request_id)[: slot // size + 1]]
        page = entries[-1]
        assert slot % size == position % size
        assert page in self._own_pages(request_id), f"request {request_id} writes page {page}, which is not its own"
        shared = getattr(self.manager, "memshare", None)
        if self.request(request_id).state is LlmRequestState.GENERATION_COMPLETE or (
            shared is not None and request_id in shared.lost
        ):
            return  # failed alone, or about to: what it computes is thrown away, but must not harm anybody
        assert entries.count(page) == 1, f"page {page} of request {request_id} is written while shared: {entries}"
        self.pool[page, :, :, :, position % size] = self.content(request_id, position)

    def _update_requests(self, batch: ScheduledRequests | None) -> None:
        for request in batch.all_requests() if batch else ():
            script, count = self.scripts[request.py_request_id], request.max_beam_num_tokens
            if request.state is not LlmRequestState.GENERATION_COMPLETE and count < len(script):
                request.add_new_token(script[count], 0)
            if request.max_beam_num_tokens >= len(script):
                request.state = LlmRequestState.GENERATION_COMPLETE

    def _process(self, batch: ScheduledRequests | None) -> None:
        """Answers whoever has ended, in the batch or not, as ``_handle_responses`` looks at all active requests.

        The batch then goes to the managers as it was scheduled, with those that have just been freed
        (``_process_previous_batch``, main, 29 November 2026).
        """
        for request in list(self.active):
            if request.state is LlmRequestState.GENERATION_COMPLETE:
                self.active.remove(request)
                # One that was paused in this iteration too, though that has freed it (``_terminate_request``).
                self.manager.free_resources(request)
                self.processed.pop(request.py_request_id, None)
        if batch is not None:
            self.manager.update_resources(batch)
