"""What steps cost while written text is replayed: one variant after another on the same requests, in rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from trtllm_memshare.evaluation.fixed_sharing import FULL_SEARCHES, HALF_FORGOTTEN, settings_of
from trtllm_memshare.evaluation.random_model import TOKENIZER_SIZE, ModelShape, make_model, zero_null_page
from trtllm_memshare.evaluation.replay import ReplaySampler, cut_scripts, train_tokenizer
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class ReplaySetup:
    """A model with random weights in a pool in which nobody waits, and what its requests will write."""

    runner: TorchRunner
    boundaries: BoundaryTokens
    scripts: list[np.ndarray]
    num_prompt_tokens: int


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
    runner = TorchRunner(model, blocks, tokens_per_block, null_page_set=null_page, **runner_options)
    return ReplaySetup(runner, boundaries, scripts, num_prompt_tokens)


def replay(
    runner: TorchRunner, variant: str, boundaries: BoundaryTokens, scripts: list[np.ndarray], num_prompt_tokens: int
) -> dict[str, Any]:
    """Runs every script to its end; figures of one variant, of the steps in which every request generates."""
    config, kind = settings_of(variant)
    sampler, length = ReplaySampler(), len(scripts[0])
    executor = Executor(runner, config, boundaries, length, len(scripts), max_num_tokens=8192, sampler=sampler)
    executor.sharing = sharing = kind(executor.manager, config)
    for script in scripts:
        handle = executor.submit(script[:num_prompt_tokens].tolist(), SamplingParams(length - num_prompt_tokens))
        sampler.add_script(handle.request_id, script[num_prompt_tokens:].tolist())
    times, used = [], []
    with tqdm(total=length - num_prompt_tokens, desc=variant, unit="step", leave=False) as bar:
        while executor.has_work:
            started = time.perf_counter()
            executor.step()
            batch = executor.last_batch
            if batch is not None and len(batch.chunk_lengths) == len(scripts) and batch.num_contexts == 0:
                times.append(time.perf_counter() - started)
                used.append(executor.manager.pool.num_used)
            bar.update()
    executor.manager.check_integrity()
    stats = executor.manager.stats()
    return {
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


def replay_rounds(
    setup: ReplaySetup, variants: Sequence[str], num_rounds: int, budget_s: float | None
) -> Iterator[dict[str, dict[str, Any]]]:
    """Yields the summary of all rounds so far after each round.

    Args:
      budget_s: no round is started that would not end within so many seconds; None = there is no limit.
    """
    runner, boundaries, num_prompt_tokens = setup.runner, setup.boundaries, setup.num_prompt_tokens
    # With the search, which compiles its kernel at its first turn.
    beginnings = [script[: num_prompt_tokens + _WARM_UP_TOKENS] for script in setup.scripts]
    replay(runner, FULL_SEARCHES, boundaries, beginnings, num_prompt_tokens)
    rounds: list[dict[str, dict[str, Any]]] = []
    started = time.monotonic()
    while len(rounds) < num_rounds:
        spent = time.monotonic() - started
        if rounds and budget_s is not None and spent * (1 + 1 / len(rounds)) > budget_s:
            return
        # Every other round runs backwards, so that a drift of the machine falls on all variants.
        order = variants[:: -1 if len(rounds) % 2 else 1]
        found = {name: replay(runner, name, boundaries, setup.scripts, num_prompt_tokens) for name in order}
        rounds.append({name: found[name] for name in variants})
        yield summarize(rounds)


def summarize(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each variant's figures of its median round, and its cost over ``off`` as the median of all rounds' ratios.

    ``over_off`` is None, with the reason, where no pair was compared: such a run measures no search.
    """
    rows = {}
    for name in rounds[0]:
        entries = sorted((r[name] for r in rounds), key=lambda e: e["step_ms_mean"])
        row = dict(entries[len(entries) // 2])
        row["over_off"] = None
        if "off" in rounds[0] and name != "off":
            ratios = [r[name]["step_ms_mean"] / r["off"]["step_ms_mean"] - 1 for r in rounds]
            if row["pairs_compared"] or name in HALF_FORGOTTEN:
                row["over_off"], row["over_off_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
            else:
                row["no_over_off"] = "no pair was compared"
        rows[name] = row
    return rows
