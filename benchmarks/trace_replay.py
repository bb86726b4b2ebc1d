"""Cost and memory of sharing at the size of a real model: random weights, replayed DeepSeek-R1 traces.

The model computes every step of an in-flight batch; the next tokens come from the traces, cut by a byte-pair tokenizer
that is trained on them. Variants run in turn on the same requests, in rounds; times are of steps in which every request
generates, and a variant's cost is the median over rounds of its mean step over that of `off` in the same round.

    off             no search
    shadow          search, share nothing; how many pairs it compares depends on the traces
    full-searches   shadow, and every search compares max_pairs pairs of blocks from all over the pool: the most that a
                    search costs, whatever the traces repeat
    aligned         search and share
    half-dropped    every second full page of generated text is forgotten, by the order alone; its entries are not read
    half-null       the same pages, whose entries point at one null page and are read there, as TensorRT-LLM's kernels
                    would: what the L2 cache gives. The page of a model with random weights is all zeros, so that this
                    says something of time and nothing else

No cost is given for a variant that compared no pair. Random weights say nothing of accuracy, and their KV distances
need not be those of a trained model. The report is written after each round; the last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.engine.null_page import NullPageSet
from trtllm_memshare.errors import UserError, nearest, run_command_line
from trtllm_memshare.evaluation.document import make_report, publish, write_report
from trtllm_memshare.evaluation.replay import ReplaySampler, cut_scripts, train_tokenizer
from trtllm_memshare.evaluation.texts import read_texts
from trtllm_memshare.runners.torch.attention import IMPLEMENTATION
from trtllm_memshare.runners.torch.paged_decode import CHOICES
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.search.block_search import Distances
from trtllm_memshare.search.config import MemShareConfig, make_config
from trtllm_memshare.search.policy import make_pairs
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import Candidate, PairBatch
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.serving.sharing import Sharing

_VOCAB_SIZE = 8192
_PROMPT_TOKENS = 64
_WARM_UP_TOKENS = 16
_FULL_SEARCHES = "full-searches"
_HALF_FORGOTTEN = {"half-dropped": "dropped", "half-null": "null"}
"""Variants, and what retired pages become in them."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder by its config class and sizes."""

    config_class: type
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float

    def config(self, max_position: int) -> Any:
        """The transformers config."""
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=max_position,
            rope_theta=self.rope_theta,
            tie_word_embeddings=False,
        )


SHAPES = {
    "DeepSeek-R1-Distill-Qwen-7B": ModelShape(Qwen2Config, 3584, 18944, 28, 28, 4, 152064, 1e4),
    "DeepSeek-R1-Distill-Llama-8B": ModelShape(LlamaConfig, 4096, 14336, 32, 32, 8, 128256, 5e5),
    "small": ModelShape(Qwen2Config, 128, 256, 4, 4, 2, _VOCAB_SIZE, 1e4),  # for machines without a GPU
}


def make_model(shape: ModelShape, max_position: int, device: str) -> Any:
    """The model with random weights, bf16 on a GPU and fp32 elsewhere, built where it will run."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = shape.config(max_position)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION, dtype=dtype)
    return model.eval()


class CountedSharing(Sharing):
    """Counts the pairs that were compared."""

    num_pairs = 0

    def search(self, step: int) -> PairBatch | None:
        pairs = super().search(step)
        self.num_pairs += 0 if pairs is None else len(pairs)
        return pairs


class FullSearches(CountedSharing):
    """Runs stage 1 as ever, then compares ``max_pairs`` made-up pairs in place of what it found; decides nothing.

    A pair is a full block and a run across another one and its neighbour, drawn anew from the whole pool each time, so
    that its rows are in no cache.
    """

    def __init__(self, manager: KVCacheManager, config: MemShareConfig) -> None:
        super().__init__(manager, config)
        self._settings, self._rng = config, np.random.default_rng(0)

    def search(self, step: int) -> PairBatch | None:
        super().search(step)
        pool, full = self._manager.pool, np.flatnonzero(self._manager.pool.is_full[:-1])
        if step % self._settings.search_interval or not len(full):
            return None
        started = time.perf_counter()
        size, count = pool.tokens_per_block, self._settings.max_pairs
        slots = np.arange(size, dtype=np.int32)
        blocks, shifts = self._rng.choice(full, (2, count)), self._rng.integers(0, size, count)
        candidates = [
            Candidate(0, 0, 0, int(new), 0, int(old), new * size + slots, old * size + shift + slots, slots)
            for new, old, shift in zip(*blocks, shifts, strict=True)
        ]
        pairs = make_pairs(candidates, pool.origin_position, size, self._settings.undo_rope)
        self.num_pairs += len(pairs)
        self.seconds += time.perf_counter() - started
        return pairs

    def take_distances(self, distances: Distances | None) -> None:
        if distances is not None:
            sums, seconds = distances.read()
            started = time.perf_counter()
            self.policy.layer_vote(sums)
            self.seconds += seconds + time.perf_counter() - started


class HalfForgotten(CountedSharing):
    """Gives up every second full page of generated text once it is there; searches for nothing."""

    def __init__(self, manager: KVCacheManager, config: MemShareConfig) -> None:
        super().__init__(manager, config)
        self._seen: dict[int, int] = {}
        self.num_forgotten = 0

    def search(self, step: int) -> PairBatch | None:
        for request_id, *_ in self._manager.generating_sequences():
            first, full, _table = self._manager.generated_pages(request_id)
            pages = np.arange(self._seen.get(request_id, first), full)
            self._seen[request_id] = max(full, first)
            if len(pages := pages[(pages - first) % 2 == 0]):
                self.num_forgotten += self._manager.retire(request_id, pages)
        return None


def zero_null_page(config: Any, num_positions: int) -> NullPageSet:
    """A page that serves all positions, for a model with random weights."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = torch.zeros(1, config.num_hidden_layers, config.num_key_value_heads, head_dim)
    gaps = torch.full((1, config.num_hidden_layers, config.num_attention_heads), -torch.inf)
    return NullPageSet(keys, np.array([0, num_positions], np.int32), gaps)


def settings_of(variant: str) -> tuple[MemShareConfig, type[CountedSharing]]:
    """The settings of a variant, and what searches or forgets in it."""
    if variant in _HALF_FORGOTTEN:
        become = _HALF_FORGOTTEN[variant]
        return make_config("aligned", retired_becomes=become, read_null=become == "null"), HalfForgotten
    if variant in ("shadow", _FULL_SEARCHES):
        return make_config("aligned", shadow=True), FullSearches if variant == _FULL_SEARCHES else CountedSharing
    return make_config(variant), CountedSharing


def replay(runner: TorchRunner, variant: str, boundaries: BoundaryTokens, scripts: list[np.ndarray]) -> dict[str, Any]:
    """Runs every script to its end; figures of one variant."""
    config, kind = settings_of(variant)
    sampler, length = ReplaySampler(), len(scripts[0])
    executor = Executor(runner, config, boundaries, length, len(scripts), max_num_tokens=8192, sampler=sampler)
    executor.sharing = sharing = kind(executor.manager, config)
    for script in scripts:
        handle = executor.submit(script[:_PROMPT_TOKENS].tolist(), SamplingParams(length - _PROMPT_TOKENS))
        sampler.add_script(handle.request_id, script[_PROMPT_TOKENS:].tolist())
    times, used = [], []
    with tqdm(total=length - _PROMPT_TOKENS, desc=variant, unit="step", leave=False) as bar:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-shape", default="DeepSeek-R1-Distill-Qwen-7B", help=", ".join(SHAPES))
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_aime24.jsonl"))
    parser.add_argument("--batch-size", type=int, default=128, help="requests, all in flight at once")
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--variants", nargs="+", default=["off", "shadow", _FULL_SEARCHES, "aligned"])
    parser.add_argument("--repeat", type=int, default=3, help="rounds over all variants")
    parser.add_argument("--budget-s", type=float, help="start no round that would not end within so many seconds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--decode", choices=CHOICES, default="auto", help="what attends for generation requests")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel of a decode step on its own")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    if options.model_shape not in SHAPES:
        raise UserError(f"unknown model shape {options.model_shape} ({nearest(options.model_shape, SHAPES)})")
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    length = _PROMPT_TOKENS + options.output_tokens
    texts = read_texts(options.traces)
    tokenizer = train_tokenizer(texts, _VOCAB_SIZE)
    scripts = cut_scripts(texts, tokenizer, options.batch_size, length)
    shape = SHAPES[options.model_shape]
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, shape.vocab_size)
    model = make_model(shape, length, device)
    blocks = options.batch_size * -(-length // options.tokens_per_block) + 1  # the null page
    null_page = zero_null_page(model.config, length)
    runner = TorchRunner(
        model,
        blocks,
        options.tokens_per_block,
        null_page_set=null_page,
        use_graphs=not options.no_graphs,
        decode=options.decode,
    )
    print(f"device: {device}; {options.model_shape} with random weights, {options.batch_size} x {length} tokens")
    print(f"block distances: {runner.search.description}\ndecode attention: {runner.decode_description}")
    report = make_report(
        {
            "device": device,
            "model_shape": options.model_shape,
            "batch_size": options.batch_size,
            "output_tokens": options.output_tokens,
            "tokens_per_block": options.tokens_per_block,
            "block_distances": runner.search.description,
            "decode_attention": runner.decode_description,
        }
    )
    # With the search, which compiles its kernel at its first turn.
    replay(runner, _FULL_SEARCHES, boundaries, [s[: _PROMPT_TOKENS + _WARM_UP_TOKENS] for s in scripts])
    rounds: list[dict[str, dict[str, Any]]] = []
    started = time.monotonic()
    while len(rounds) < options.repeat:
        spent = time.monotonic() - started
        if rounds and options.budget_s is not None and spent * (1 + 1 / len(rounds)) > options.budget_s:
            print(f"{options.repeat - len(rounds)} rounds of {options.repeat} not run: no time left (--budget-s)")
            break
        # Every other round runs backwards, so that a drift of the machine falls on all variants.
        order = options.variants[:: -1 if len(rounds) % 2 else 1]
        found = {name: replay(runner, name, boundaries, scripts) for name in order}
        rounds.append({name: found[name] for name in options.variants})
        report["num_rounds"], report["variants"] = len(rounds), summarize(rounds)
        if options.output_json is not None:
            write_report(report, options.output_json)
    print(table(report["variants"]))
    print("random weights: these figures say nothing of accuracy")
    publish(report, options.output_json)


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
            if row["pairs_compared"] or name in _HALF_FORGOTTEN:
                row["over_off"], row["over_off_range"] = statistics.median(ratios), [min(ratios), max(ratios)]
            else:
                row["no_over_off"] = "no pair was compared"
        rows[name] = row
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line a variant."""
    lines = [f"{'variant':<14} {'step ms':>8} {'over off':>9} {'from':>7} {'to':>7} {'pairs':>6} {'search':>7} "
             f"{'shared':>7} {'blocks, mean':>13} {'peak':>6} {'last ms':>8}"]  # fmt: skip
    for name, row in rows.items():
        over = [row["over_off"], *row.get("over_off_range", [None, None])]
        costs = " ".join(("-" if o is None else f"{o:+.1%}").rjust(w) for o, w in zip(over, (9, 7, 7), strict=True))
        shares = f"{row['search_time_fraction']:>7.1%} {row['shared_block_fraction']:>7.1%}"
        blocks = f"{row['mean_used_blocks']:>13.0f} {row['peak_used_blocks']:>6} {row['step_ms_last_tenth']:>8.2f}"
        lines.append(f"{name:<14} {row['step_ms_mean']:>8.2f} {costs} {row['pairs_compared']:>6} {shares} {blocks}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command_line(main)
