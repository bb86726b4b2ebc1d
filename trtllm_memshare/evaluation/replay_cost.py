"""What steps cost while written text is replayed: one variant after another on the same requests, in rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from trtllm_memshare.evaluation.fixed_sharing import FULL_SEARCHES, HALF_FORGOTTEN, settings_of
from trtllm_memshare.evaluation.graph_clock import GraphClock
from trtllm_memshare.evaluation.random_model import TOKENIZER_SIZE, ModelShape, make_model, zero_null_page
from trtllm_memshare.evaluation.replay import ReplaySampler, cut_scripts, train_tokenizer
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

_WARM_UP_TOKENS = 16
_TIMES = (
    "graph_ms_mean",
    "rest_ms_mean",
    "step_ms_mean",
    "step_ms_median",
    "step_ms_last_tenth",
    "search_time_fraction",
)


@dataclass(frozen=True)
class ReplaySetup:
    """A model with random weights in a pool in which nobody waits, and what its requests will write.

    ``clock``: of its CUDA graphs, None = there are none.
    """

    runner: TorchRunner
    boundaries: BoundaryTokens
    scripts: list[np.ndarray]
    num_prompt_tokens: int
    clock: GraphClock | None = None


def make_setup(
    texts: list[str],
    shape: ModelShape,
    num_requests: int,
    num_prompt_tokens: int,
    num_output_tokens: int,
    tokens_per_block: int,
    device: str,
    **runner_options: Any,
) -> ReplaySetup:
    """The setup of ``num_requests`` stretches of ``texts``, cut by a tokenizer that is trained on them.

    Args:
      device: cpu or cuda.
      runner_options: of ``TorchRunner``.

    Raises:
      ValueError: no text is that long.
    """
    length = num_prompt_tokens + num_output_tokens
    tokenizer = train_tokenizer(texts, TOKENIZER_SIZE)
    scripts = cut_scripts(texts, tokenizer, num_requests, length)
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, shape.vocab_size)
    model = make_model(shape, length, device)
    null_page = zero_null_page(model.config, length)
    blocks = num_requests * -(-length // tokens_per_block) + null_page.num_bands
    clock = GraphClock() if device == "cuda" and runner_options.get("use_graphs", True) else None
    if clock is not None:
        runner_options["new_graph"] = clock.new_graph
    runner = TorchRunner(model, blocks, tokens_per_block, null_page_set=null_page, **runner_options)
    return ReplaySetup(runner, boundaries, scripts, num_prompt_tokens, clock)


def replay(
    runner: TorchRunner,
    variant: str,
    boundaries: BoundaryTokens,
    scripts: list[np.ndarray],
    num_prompt_tokens: int,
    clock: GraphClock | None = None,
    run_step: Callable[[Callable[[], object]], object] = lambda step: step(),
) -> dict[str, Any]:
    """Runs every script to its end; figures of one variant, of the steps in which every request generates.

    ``graph_ms_mean`` is the model on the GPU, where ``clock`` timed its graphs, ``rest_ms_mean`` what a step takes
    beyond it: the host, and the drawing of tokens.

    Args:
      clock: of the runner's graphs.
      run_step: runs a step, for one who watches it.
    """
    config, kind = settings_of(variant)
    sampler, length = ReplaySampler(), len(scripts[0])
    executor = Executor(runner, config, boundaries, length, len(scripts), max_num_tokens=8192, sampler=sampler)
    executor.sharing = sharing = kind(executor.manager, config)
    for script in scripts:
        handle = executor.submit(script[:num_prompt_tokens].tolist(), SamplingParams(length - num_prompt_tokens))
        sampler.add_script(handle.request_id, script[num_prompt_tokens:].tolist())
    times, used = [], []
    if clock is not None:
        clock.take()  # of an earlier run
    with tqdm(total=length - num_prompt_tokens, desc=variant, unit="step", leave=False) as bar:
        while executor.has_work:
            started = time.perf_counter()
            run_step(executor.step)
            batch = executor.last_batch
            if batch is not None and len(batch.chunk_lengths) == len(scripts) and batch.num_contexts == 0:
                times.append(time.perf_counter() - started)
                used.append(executor.manager.pool.num_used)
            bar.update()
    executor.manager.check_integrity()
    stats, graphs = executor.manager.stats(), clock.take() if clock is not None else []
    graph_ms = statistics.fmean(graphs) if graphs else None
    return {
        "graph_ms_mean": graph_ms,
        "rest_ms_mean": None if graph_ms is None else statistics.fmean(times) * 1e3 - graph_ms,
        "step_ms_mean": statistics.fmean(times) * 1e3,
        "step_ms_median": statistics.median(times) * 1e3,
        "step_ms_last_tenth": statistics.fmean(times[-max(1, len(times) // 10) :]) * 1e3,
        "num_steps": len(times),
        "search_time_fraction": executor.stats.search_time_fraction,
        "candidates": sharing.policy.num_candidates,
        "pairs_compared": sharing.num_pairs,
        "rejected": executor.rejected,
        "shared_block_fraction": stats.shared / max(1, stats.generated),
        "mean_used_blocks": statistics.fmean(used),
        "peak_used_blocks": stats.peak_used_blocks,
    }


def replay_setup(setup: ReplaySetup, variant: str, **watched: Any) -> dict[str, Any]:
    """``replay`` of a setup's requests; ``watched``: its ``run_step``."""
    return replay(
        setup.runner, variant, setup.boundaries, setup.scripts, setup.num_prompt_tokens, setup.clock, **watched
    )


def warm_up(setup: ReplaySetup) -> None:
    """A few steps that nobody times, with the search, which compiles its kernel at its first turn."""
    beginnings = [script[: setup.num_prompt_tokens + _WARM_UP_TOKENS] for script in setup.scripts]
    replay(setup.runner, FULL_SEARCHES, setup.boundaries, beginnings, setup.num_prompt_tokens)


def replay_rounds(
    setup: ReplaySetup, variants: Sequence[str], num_rounds: int, budget_s: float | None
) -> Iterator[dict[str, dict[str, Any]]]:
    """Yields the summary of all rounds so far after each round.

    Args:
      budget_s: no round is started that would not end within so many seconds; None = there is no limit.
    """
    warm_up(setup)
    rounds: list[dict[str, dict[str, Any]]] = []
    started = time.monotonic()
    while len(rounds) < num_rounds:
        spent = time.monotonic() - started
        if rounds and budget_s is not None and spent * (1 + 1 / len(rounds)) > budget_s:
            return
        # Every other round runs backwards, so that a drift of the machine falls on all variants.
        order = variants[:: -1 if len(rounds) % 2 else 1]
        found = {name: replay_setup(setup, name) for name in order}
        rounds.append({name: found[name] for name in variants})
        yield summarize(rounds)


def summarize(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each variant's figures as medians of all rounds, its cost over ``off`` as the median of the rounds' ratios.

    ``over_off`` is None, with the reason, where no pair was compared: such a run measures no search.
    """
    rows = {}
    for name in rounds[0]:
        entries = [r[name] for r in rounds]
        times = [key for key in _TIMES if entries[0].get(key) is not None]
        row = {**entries[0], **{key: statistics.median(entry[key] for entry in entries) for key in times}}
        row["over_off"] = None
        if "off" in rounds[0] and name != "off":
            ratios = [r[name]["step_ms_mean"] / r["off"]["step_ms_mean"] - 1 for r in rounds]
            if row["pairs_compared"] or name in HALF_FORGOTTEN:
                row["over_off"], row["over_off_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
            else:
                row["no_over_off"] = "no pair was compared"
        rows[name] = row
    return rows
