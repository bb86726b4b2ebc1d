"""Host time that sharing adds to an iteration of TensorRT-LLM's PyTorch backend, measured on the tests' fake manager.

256 requests decode real reasoning text with the overlap scheduler's delay of one token. Timed is what runs inside the
manager's `prepare_resources` and `copy_batch_block_offsets` beyond TensorRT-LLM's own work: reading tokens, stage 1,
candidates, decisions, page lists, rows. What a GPU does by itself is left to a stand-in: the comparison returns at once
with a distance of 0, so that everything is shared, which is the most work for the host; page copies and the gather run
on tiny tensors on the CPU and count in full. The launch of the CUDA kernel is not in it. Preset `pressure` has room for
three quarters of the pages, so that the others go; how redundant each page is, a GPU says.

The last line is JSON; times in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from trtllm_memshare.evaluation.texts import make_streams

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the fakes hold the recorded contracts
from trtllm_pytorch.conftest import TextlessFacts, sharing_class, write_null_pages
from trtllm_pytorch.fake_executor import make_cache_config, make_mapping
from trtllm_pytorch.fake_requests import FakeLlmRequest, LlmRequestState, ScheduledRequests
from trtllm_pytorch.fake_v1 import FakeKVCacheManager

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.search.block_search import ReadyDistances
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.trtllm.pytorch.settings import AdapterOptions, Settings


class InstantSearch:
    """The host's share of a search: the pairs are packed, the sums come back as zeros."""

    description = "stand-in, distance 0 at once"

    def compare(self, pairs: PairBatch) -> ReadyDistances:
        np.stack((pairs.new_rows, pairs.old_rows, pairs.position_delta))
        sums = np.ones((len(pairs), 1, 4), np.float32)
        sums[:, :, [0, 2]] = 0
        return ReadyDistances(sums, 0.0)


class InstantRedundancy:
    """Products on the GPU are not the host's work: every page is as redundant as any."""

    def of(self, request_id: int, first: int, blocks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.zeros(len(wanted), np.float32)

    def forget(self, request_id: int) -> None:
        pass


def measure(options: argparse.Namespace, preset: str | None) -> dict[str, float]:
    """Milliseconds of an iteration for one preset, or without sharing (None)."""
    longest = options.max_length + options.warm_up + options.steps + 2
    streams, boundaries = make_streams(options.traces, longest)

    class Facts(TextlessFacts):
        def boundaries(self, tokenizer_dir: str | None):
            return boundaries

    size, count = options.tokens_per_block, options.requests
    manager_class = FakeKVCacheManager
    if preset is not None:
        folder = write_null_pages(tempfile.mkdtemp(), list(range(0, longest + 2048, 2048)), num_layers=1)
        settings = Settings(make_config(preset), AdapterOptions(stats_interval=100, null_pages=folder))
        manager_class = sharing_class(FakeKVCacheManager, Facts(None), settings)
    rng = np.random.default_rng(0)
    prompts = [int(rng.integers(options.min_length, options.max_length)) for _ in range(count)]
    blocks = sum(-(-(p + options.steps) // size) for p in prompts)
    # Under pressure there is room for three quarters; the others have all that they need.
    blocks = round(0.75 * blocks) if preset == "pressure" else count * (longest // size + 2)
    manager = manager_class(
        make_cache_config(blocks, size), "SELF", num_layers=1, num_kv_heads=1, head_dim=2,
        tokens_per_block=size, max_seq_len=longest, max_batch_size=count, mapping=make_mapping(),
    )  # fmt: skip
    shared = getattr(manager, "memshare", None)
    if shared is not None:
        shared._searcher._search = InstantSearch()
        if shared.pressure is not None:
            shared.pressure._redundancy = InstantRedundancy()
    requests, scripts = [], []
    for request_id in range(count):
        text = streams[request_id % len(streams)].tolist()
        request = FakeLlmRequest(request_id, text[: prompts[request_id]])
        request.orig_prompt_len = 100  # the rest counts as generated: shared from the start
        requests.append(request)
        scripts.append(text)
    table = torch.zeros(1, count, 2, manager.max_blocks_per_seq, dtype=torch.int32)
    running: list[FakeLlmRequest] = []
    hook, whole = [], []
    for step in range(options.warm_up + options.steps):
        # Prompts enter a few at a time, as max_num_tokens of a forward pass allows.
        arriving, free = [], manager.get_num_free_blocks() - len(running)
        for request in requests[len(running) : len(running) + options.admitted_per_step]:
            free -= request.prompt_len // size + 1
            if free >= 0 and step < options.warm_up:
                arriving.append(request)
        batch = ScheduledRequests(arriving, list(running))
        ids = [r.py_request_id for r in batch.all_requests()]
        before, started = shared.seconds if shared else 0.0, time.perf_counter()
        manager.prepare_resources(batch)
        manager.copy_batch_block_offsets(table, ids, 1, len(arriving), len(ids))
        whole.append((time.perf_counter() - started) * 1e3)
        hook.append(((shared.seconds if shared else 0.0) - before) * 1e3)
        for request in running:
            request.add_new_token(scripts[request.py_request_id][request.max_beam_num_tokens], 0)
        for request in arriving:
            request.state = LlmRequestState.GENERATION_IN_PROGRESS
        running += arriving
    assert len(running) == count, "--warm-up is too short to admit all requests"
    first = hook[: options.warm_up]
    hook, whole = hook[options.warm_up :], whole[options.warm_up :]
    result = {
        "hook_ms_mean": statistics.mean(hook),
        "hook_ms_p50": statistics.median(hook),
        "hook_ms_p99": float(np.percentile(hook, 99)),
        "hook_ms_max": max(hook),
        "iteration_ms_mean": statistics.mean(whole),
        "admission_ms_per_1000_tokens": sum(first) / sum(r.prompt_len for r in requests) * 1e3,
    }
    if shared is not None:
        stats = shared.manager.stats()
        result |= {"blocks_shared": stats.shared + stats.forgotten, "candidates": shared.policy.num_candidates}
        assert shared.failures.num_errors == 0
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_aime24.jsonl"))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--min-length", type=int, default=1000, help="tokens of a request at the start")
    parser.add_argument("--max-length", type=int, default=8000)
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--steps", type=int, default=600, help="iterations that count")
    parser.add_argument("--admitted-per-step", type=int, default=2, help="prompts that one forward pass takes")
    parser.add_argument("--warm-up", type=int, default=150, help="iterations before, that admit all requests")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the one with the median mean counts")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"{'preset':<10} {'mean ms':>8} {'p50':>6} {'p99':>6} {'max':>6}  {'fake iteration':>14} {'freed':>7}")
    for preset in (None, "aligned", "lexical", "pressure"):
        rounds = sorted((measure(options, preset) for _ in range(options.repeat)), key=lambda r: r["hook_ms_mean"])
        row = rows[preset or "unpatched"] = rounds[len(rounds) // 2]
        times = " ".join(f"{row[f'hook_ms_{n}']:>6.3f}" for n in ("p50", "p99", "max"))
        print(
            f"{preset or 'unpatched':<10} {row['hook_ms_mean']:>8.3f} {times}  {row['iteration_ms_mean']:>14.3f} "
            f"{row.get('blocks_shared', 0):>7}"
        )
    publish(
        make_report(
            {
                "requests": options.requests,
                "tokens_per_block": options.tokens_per_block,
                "lengths": [options.min_length, options.max_length],
                "steps": options.steps,
                "rows": rows,
            }
        ),
        options.output_json,
    )


if __name__ == "__main__":
    run_command_line(main)
