"""An executor over the stand-ins that adds up what each iteration would take on a GPU; nothing is computed."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_pytorch.conftest import TextlessFacts, sharing_class, write_null_pages
from trtllm_pytorch.fake_executor import FakeExecutor, make_cache_config, make_mapping
from trtllm_pytorch.fake_requests import LlmRequestState, ScheduledRequests
from trtllm_pytorch.fake_v1 import FakeKVCacheManager
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2

from trtllm_memshare.evaluation.texts import make_streams
from trtllm_memshare.evaluation.variants import parse_variant
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.trtllm.pytorch.settings import AdapterOptions, Settings

MANAGERS = {"V1": FakeKVCacheManager, "V2": FakeMainKVCacheManagerV2}
MAX_UTILIZATION, GUARANTEED_NO_EVICT = "MAX_UTILIZATION", "GUARANTEED_NO_EVICT"


@dataclass(frozen=True)
class Machine:
    """A model on a GPU. Defaults: DeepSeek-R1-Distill-Qwen-7B in bf16 on an H200; bandwidth as in its data sheet, the
    shares of it and of the FLOP rate that kernels reach are assumptions."""

    weights_bytes: float = 15.2e9
    parameters: float = 7.6e9
    kv_bytes_per_token: int = 28 * 2 * 4 * 128 * 2
    bandwidth: float = 4.8e12 * 0.8
    flops: float = 990e12 * 0.5
    overhead_s: float = 2e-3
    hook_s_per_request: float = 0.0


class ModelledExecutor(FakeExecutor):
    """Adds up the modelled time of each iteration, twice: ``seconds`` as if entries that name a null page were skipped,
    ``seconds_null_read`` as if each were read like any page. No schedule depends on either."""

    def __init__(self, manager, policy: str, machine: Machine, max_output: dict[int, int]) -> None:
        super().__init__(manager, overlap=True)
        self.policy, self.machine, self.max_output = policy, machine, max_output
        self.seconds = self.seconds_null_read = self.running = self.recomputed = 0.0
        self.steps = self.peak_blocks = 0

    def _schedule(self):
        batch, paused = super()._schedule()
        if self.policy == GUARANTEED_NO_EVICT:
            batch.context_requests = self._reserved(batch.generation_requests)
        return batch, paused

    def _reserved(self, running):
        """Requests whose worst case fits beside the worst cases of all that run: this policy's rule."""
        impl, budget = self.manager.impl, self.manager.get_num_free_blocks()
        budget -= sum(impl.get_remaining_blocks_to_completion(r, self.max_output[r.py_request_id]) for r in running)
        admitted: list[Any] = []
        for request in self.active:
            if request.state is LlmRequestState.CONTEXT_INIT:
                budget -= impl.get_remaining_blocks_to_completion(request, self.max_output[request.py_request_id])
                if budget < 0 or len(running) + len(admitted) >= self.manager.max_batch_size:
                    break
                admitted.append(request)
        return admitted

    def _write_table(self, batch: ScheduledRequests) -> None:
        """Nobody reads it; sharing is told that there was one."""
        shared = getattr(self.manager, "memshare", None)
        if shared is not None:
            shared.tables.num += 1

    def _write(self, request_id: int, position: int) -> None:
        pass

    def _forward(self, batch: ScheduledRequests) -> None:
        m = self.machine
        prompt_tokens = sum(r.prompt_len for r in batch.context_requests)
        self.recomputed += sum(r.prompt_len for r in batch.context_requests if r.num_lives > 1)
        super()._forward(batch)
        entries = sum(self.processed[r.py_request_id] for r in batch.generation_requests)
        forgotten = sum(self._forgotten(r) for r in batch.generation_requests)
        computing = 2 * m.parameters * prompt_tokens / m.flops
        self.seconds += max(self._reading(entries - forgotten), computing) + m.overhead_s
        self.seconds_null_read += max(self._reading(entries), computing) + m.overhead_s
        self.steps += 1
        self.running += len(batch.generation_requests)
        self.peak_blocks = max(self.peak_blocks, self.pool.shape[0] - self._num_free())

    def _reading(self, kv_tokens: int) -> float:
        """Seconds that the weights and these tokens' K and V take from memory."""
        return (self.machine.weights_bytes + kv_tokens * self.machine.kv_bytes_per_token) / self.machine.bandwidth

    def _forgotten(self, request) -> int:
        """Tokens whose entries name a null page."""
        shared = getattr(self.manager, "memshare", None)
        if shared is None or shared.pressure is None:
            return 0
        return shared.manager.page_counts(request.py_request_id)[1] * self.manager.tokens_per_block

    def add_sharing_time(self) -> None:
        """Host cost of every iteration, and the reads and copies of pages, none of it hidden behind the GPU's work."""
        shared, m = self.manager.memshare, self.machine
        page = self.manager.tokens_per_block * m.kv_bytes_per_token
        pages = 2 * shared.tail.num_copies + 2 * shared.policy.num_candidates
        added = self.running * m.hook_s_per_request + pages * page / m.bandwidth
        self.seconds += added
        self.seconds_null_read += added


def make_settings_of(preset: str, longest: int) -> Settings:
    """The preset's (``NAME[:KEY=VALUE,...]``), with made-up null pages for two bands where it needs some."""
    config = parse_variant(preset, make_config("off")).config
    if not config.pressure:
        return Settings(config, AdapterOptions(stats_interval=1000))
    folder = write_null_pages(tempfile.mkdtemp(), [0, longest // 2, longest])
    config = config.model_copy(update={"need": "age"})
    return Settings(config, AdapterOptions(stats_interval=1000, null_pages=folder))


def run(
    texts, boundaries, policy: str, preset: str | None, blocks: int, size: int, machine: Machine,
    in_flight: int | None = None, manager: str = "V1",
) -> dict:  # fmt: skip
    """One workload to its end.

    Args:
      in_flight: most requests outstanding at once, None = all of them.
      manager: TensorRT-LLM's, see ``MANAGERS``. V2's host tier is as large as the pool; its copies cost nothing here,
        as if all of them went on behind the computing.
    """

    class Facts(TextlessFacts):
        def boundaries(self, tokenizer_dir):
            return boundaries

    longest = max(len(prompt) + len(output) for prompt, output in texts) + size
    manager_class: Any = MANAGERS[manager]
    if preset is not None:
        manager_class = sharing_class(manager_class, Facts(None), make_settings_of(preset, longest))
    reserved = {"num_reserved_index_slots": 2} if manager == "V2" else {}
    made = manager_class(
        make_cache_config(blocks, size), "SELF", num_layers=2, num_kv_heads=1, head_dim=2, tokens_per_block=size,
        max_seq_len=longest, max_batch_size=256, mapping=make_mapping(), **reserved,
    )  # fmt: skip
    # Servers reserve for the longest answer they allow, since nobody knows the length of this one.
    limit = max(len(output) for _, output in texts)
    executor = ModelledExecutor(made, policy, machine, dict.fromkeys(range(len(texts)), limit))
    coming = [(i, prompt, output) for i, (prompt, output) in enumerate(texts)][::-1]
    while coming or executor.active:
        while coming and len(executor.active) < (in_flight or len(texts)):
            executor.submit(*coming.pop(), max_new_tokens=limit + 1)  # answers end by their end token
        executor.step()
    if preset is not None:
        executor.add_sharing_time()
    shared = made.memshare.manager.stats() if preset is not None else None
    return {
        "request_throughput_req_s": len(texts) / executor.seconds,
        "request_throughput_req_s_null_read": len(texts) / executor.seconds_null_read,
        "mean_requests_in_flight": executor.running / executor.steps,
        "mean_step_ms": executor.seconds / executor.steps * 1e3,
        "peak_blocks": executor.peak_blocks,
        "paused": executor.num_pauses,
        "recomputed_tokens": executor.recomputed,
        "pages_copied_to_host_and_back": getattr(made.impl, "num_copied", 0),
        "shared_block_fraction": shared.shared_block_fraction if shared else 0.0,
        "pages_forgotten": shared.forgotten if shared else 0,
    }


def load_texts(name: str, count: int) -> tuple[list[tuple[list[int], list[int]]], BoundaryTokens]:
    """(prompt, output) token ids of a workload, and the step boundaries of its vocabulary."""
    if name == "toy":
        vocabulary: dict[str, int] = {}
        problems, rows = (
            [json.loads(line) for line in Path("benchmarks", name).read_text().splitlines()]
            for name in ("data/evaluation.jsonl", "results/evaluation.texts.jsonl")
        )
        pairs = [(p["prompt"], r["text"]) for p, r in zip(problems, rows, strict=True)][:count]
        coded = [[[vocabulary.setdefault(c, len(vocabulary)) for c in text] for text in pair] for pair in pairs]
        return [(prompt, output) for prompt, output in coded], BoundaryTokens.from_texts(list(vocabulary))
    length = 8000
    streams, boundaries = make_streams(Path("benchmarks/data/traces/r1_aime24.jsonl"), length + 100)
    # Lengths between a quarter and all of the stream, as answers differ.
    return [
        (s[:100].tolist(), s[100 : 100 + length // 4 + (i * 7919) % (3 * length // 4)].tolist())
        for i, s in enumerate(streams[:count])
    ], boundaries
