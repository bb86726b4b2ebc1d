"""Drives the executor with a data set under load and measures what a server would be judged by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from trtllm_memshare.evaluation.controls import make_control
from trtllm_memshare.evaluation.dataset import DatasetItem
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.evaluation.step_model import GpuModel, ModelledClock
from trtllm_memshare.evaluation.variants import Variant
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.ranked_executor import RankedExecutor, Ranks
from trtllm_memshare.serving.request import RequestHandle, RequestResult, SamplingParams
from trtllm_memshare.serving.sampling import Sampler

_TIMELINE_POINTS = 400


@dataclass(frozen=True)
class Load:
    """How requests arrive and run.

    Attributes:
      concurrency: most requests outstanding at once, None = all of the data set.
      request_rate: mean arrivals per second (Poisson), None = as soon as concurrency allows. Times count from when a
        request was due; with ``concurrency``, which holds requests back at the client, from when it was sent.
      max_batch_size, max_num_tokens, max_seq_len: the engine's limits.
      scheduler_policy: capacity policy of variants that do not insist on one.
      stop_token_ids: ids that end a request.
      temperature: of the sampling, 0 = greedy.
      seed: of the arrivals.
      replay: requests generate the outputs of the data set, token by token, whatever the model says.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    scheduler_policy: str
    stop_token_ids: tuple[int, ...]
    concurrency: int | None = None
    request_rate: float | None = None
    temperature: float = 0.0
    seed: int = 0
    replay: bool = False


@dataclass(frozen=True)
class Measurement:
    """Results of one variant: the report's entry, and the outputs for comparisons between variants."""

    entry: dict[str, Any]
    results: list[RequestResult]
    right: list[bool]  # of the items that have an answer
    config: MemShareConfig
    loss: list[float]  # nats a token of each request, of replays


def run_variant(
    variant: Variant,
    runner: Runner,
    boundaries: BoundaryTokens,
    items: list[DatasetItem],
    load: Load,
    is_right: Callable[[DatasetItem, list[int]], bool],
    ranks: Ranks | None = None,
) -> Measurement:
    """Runs all requests of a data set through a fresh executor, in this thread.

    Args:
      ranks: of an engine on several GPUs; the others follow with ``follow_variant``.
      is_right: whether generated ids contain the item's answer; called after the clock has stopped.

    Raises:
      UserError: a request that cannot fit the pool or max_seq_len, before anything runs.
    """
    replayed = ReplaySampler() if load.replay else None
    executor = _make_executor(variant, runner, boundaries, load, ranks, replayed)
    clock = ModelledClock(GpuModel())
    rng, count = np.random.default_rng(load.seed), len(items)
    gaps = rng.exponential(1 / load.request_rate, count) if load.request_rate else np.zeros(count)
    due, handles, late_s = np.cumsum(gaps), list[RequestHandle](), list[float]()
    outstanding = load.concurrency or count
    started, cpu_started = time.perf_counter(), time.process_time()
    with tqdm(total=count, desc=f"{variant.name:>15}", unit="req", leave=False) as bar:
        while executor.stats.num_finished < count:
            now = time.perf_counter() - started
            while len(handles) < count and due[len(handles)] <= now:
                if len(handles) - executor.stats.num_finished >= outstanding:
                    break
                item = items[len(handles)]
                script = item.output_ids if load.replay else None
                params = SamplingParams(
                    item.output_tokens if script is None else len(script),
                    load.temperature,
                    seed=item.seed,
                    stop_token_ids=() if load.replay else load.stop_token_ids,
                )
                late_s.append(time.perf_counter() - started - due[len(handles)])
                handles.append(executor.submit(item.input_ids, params, item.group))
                if replayed is not None and script is not None:
                    replayed.add_script(handles[-1].request_id, script)
            if executor.has_work:
                before, executor.last_batch = executor.stats.num_steps, None
                executor.step()
                if executor.last_batch is not None and executor.stats.num_steps > before:
                    manager, pool = executor.manager, executor.manager.pool
                    null_use = manager.stats().null_entries / pool.num_usable
                    clock.tick(len(executor.last_batch.input_ids), pool.num_used / pool.num_usable, null_use, handles)
            else:
                time.sleep(max(0.0, min(0.01, due[len(handles)] - now)))
            bar.update(executor.stats.num_finished - bar.n)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    if isinstance(executor, RankedExecutor):
        executor.close()
    results = [handle.result() for handle in handles]
    if load.request_rate and load.concurrency is None:
        results = [_since_due(result, late) for result, late in zip(results, late_s, strict=True)]
    right = [is_right(i, r.token_ids) for i, r in zip(items, results, strict=True) if i.answer is not None]
    entry = _entry(variant, executor, results, right, seconds)
    entry["requests_per_cpu_s"] = count / cpu_seconds
    entry["modelled_gpu"], entry["modelled_gpu_null_read"] = clock.summaries()
    loss = []
    if replayed is not None:
        loss = [replayed.loss[h.request_id] / r.stats.num_output_tokens for h, r in zip(handles, results, strict=True)]
        entry["loss_nats_per_token"] = float(np.mean(loss))
        entry["loss_by_request"] = [round(nats, 6) for nats in loss]
    return Measurement(entry, results, right, variant.config, loss)


def _since_due(result: RequestResult, late_s: float) -> RequestResult:
    """The result with times from when the request was due: a step that had to end first is the server's wait."""
    stats = result.stats
    times = {name: getattr(stats, name) + late_s for name in ("ttft_s", "latency_s", "queue_s")}
    return replace(result, stats=replace(stats, **times))


def follow_variant(variant: Variant, runner: Runner, boundaries: BoundaryTokens, load: Load, ranks: Ranks) -> None:
    """Takes part in ``run_variant`` of rank 0."""
    executor = _make_executor(variant, runner, boundaries, load, ranks)
    assert isinstance(executor, RankedExecutor)
    executor.follow()


def _make_executor(
    variant: Variant,
    runner: Runner,
    boundaries: BoundaryTokens,
    load: Load,
    ranks: Ranks | None,
    sampler: Sampler | None = None,
) -> Executor:
    policy = variant.policy or load.scheduler_policy
    limits = (load.max_batch_size, load.max_num_tokens, policy)
    if ranks is not None:
        return ranks.executor(runner, variant.config, boundaries, load.max_seq_len, *limits, make_control=make_control)
    return Executor(
        runner, variant.config, boundaries, load.max_seq_len, *limits, sampler=sampler, make_control=make_control
    )


def _entry(
    variant: Variant, executor: Executor, results: list[RequestResult], right: list[bool], seconds: float
) -> dict[str, Any]:
    """The report's object for one variant, under trtllm-bench's names where it has one."""
    latencies = np.array([r.stats.latency_s for r in results]) * 1e3
    tokens = sum(r.stats.num_output_tokens for r in results)
    cache, stats = executor.manager.stats(), executor.stats
    executor.manager.check_integrity()
    percentiles = {f"p{q}": float(np.percentile(latencies, q)) for q in (50, 90, 95, 99)}
    times, used, in_flight = zip(*_thinned(stats.timeline), strict=True)
    return {
        "variant": variant.name,
        "settings": variant.config.model_dump(),
        "total_latency_ms": seconds * 1e3,
        "request_throughput_req_s": len(results) / seconds,
        "system_output_throughput_tok_s": tokens / seconds,
        "avg_request_latency_ms": float(latencies.mean()),
        "request_latency_percentiles_ms": {
            **percentiles,
            "minimum": float(latencies.min()),
            "maximum": float(latencies.max()),
            "average": float(latencies.mean()),
        },
        "ttft_percentiles_ms": {
            f"p{q}": float(np.percentile([r.stats.ttft_s * 1e3 for r in results], q)) for q in (50, 99)
        },
        "avg_ttft_ms": float(np.mean([r.stats.ttft_s for r in results]) * 1e3),
        "avg_tpot_ms": float(np.mean([r.stats.tpot_s for r in results]) * 1e3),
        "accuracy": sum(right) / len(right) if right else None,
        # Over all requests, as the seconds are: of a data set that has answers in part it would count too few.
        "correct_answers_per_s": sum(right) / seconds if len(right) == len(results) else None,
        "mean_output_tokens": tokens / len(results),
        "num_length_stops": sum(r.finish_reason == "length" for r in results),
        "peak_used_blocks": cache.peak_used_blocks,
        "mean_resident_blocks_per_request": stats.mean_resident_blocks_per_request,
        "block_seconds_per_request": stats.block_seconds / len(results),
        "block_steps_per_request": stats.block_steps / len(results),
        "mean_requests_in_flight": stats.request_seconds / stats.busy_seconds,
        "mean_requests_in_a_step": stats.request_steps / stats.num_steps,
        "shared_block_fraction": cache.shared_block_fraction,
        "shadow_decisions": cache.shadowed,
        "refused": cache.refused,
        "rejected": executor.rejected,
        "paused_requests": stats.num_pauses,
        "recomputed_tokens": stats.num_recomputed_tokens,
        "pressure": None
        if executor.pressure is None
        else {**asdict(executor.pressure.stats), "num_failed_reliefs": executor.pressure.faults.num},
        "num_steps": stats.num_steps,
        "search_time_fraction": stats.search_time_fraction,
        "mean_step_ms": stats.busy_seconds / stats.num_steps * 1e3,
        "timeline": {"time_s": list(times), "used_blocks": list(used), "requests_in_flight": list(in_flight)},
    }


def _thinned(timeline: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """Some ``_TIMELINE_POINTS`` points: of each piece the one with most blocks in use, so that no peak is lost."""
    piece = max(1, len(timeline) // _TIMELINE_POINTS)
    return [max(timeline[i : i + piece], key=lambda point: point[1]) for i in range(0, len(timeline), piece)]


def blocks_without_waiting(items: list[DatasetItem], load: Load, size: int) -> int:
    """Blocks of ``size`` tokens with which no request ever waits."""
    longest = sorted((len(i.input_ids) + i.output_tokens for i in items), reverse=True)
    in_flight = min(load.max_batch_size, load.concurrency or len(longest))
    return sum(-(-n // size) for n in longest[:in_flight])


def streaming_window(spans: list[tuple[int, int]], block_steps_per_request: float, sink: int, size: int) -> int:
    """The recent window at which the control ``streaming`` holds as many block-steps per request as a sharing arm.

    A request of n tokens holds ``min(n, prompt + sink + window) / size`` blocks after n tokens; summed over its life
    and averaged over the requests, this grows with the window, so bisection finds it.

    Args:
      spans: tokens of the prompt and of the output of each request, with the full cache.
      block_steps_per_request: what the sharing arm held, blocks x steps.
      sink: first generated tokens that stay, in tokens.
      size: tokens per block.
    """

    def held(window: int) -> float:
        return _block_steps(spans, size, lambda generated: np.minimum(generated, sink + window))

    low, high = 1, max(p + g for p, g in spans)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if held(middle) <= block_steps_per_request else (low, middle - 1)
    return low


def budget_share(spans: list[tuple[int, int]], block_steps_per_request: float, protected: int, size: int) -> float:
    """The share of its generated tokens that a control may keep to hold as many block-steps as a sharing arm.

    Args:
      spans, block_steps_per_request, size: as for ``streaming_window``.
      protected: recent tokens that stay in any case.
    """
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2

        def kept(generated: np.ndarray, share: float = share) -> np.ndarray:
            return np.maximum(share * generated, np.minimum(generated, protected))

        low, high = (share, high) if _block_steps(spans, size, kept) <= block_steps_per_request else (low, share)
    return max(low, 1e-3)


def _block_steps(spans: list[tuple[int, int]], size: int, kept: Callable[[np.ndarray], np.ndarray]) -> float:
    """Block-steps of a request, mean over requests, if it keeps ``kept(generated)`` of its generated tokens."""
    total = 0.0
    for prompt, output in spans:
        generated = np.arange(output)
        # Half a block for the partial one, and half a block more that an eviction by whole blocks keeps on average.
        total += float(np.minimum(generated + size / 2, kept(generated) + size).sum() + prompt * output) / size
    return total / len(spans)
