"""Cost and memory of sharing at the size of a real model: random weights, replayed DeepSeek-R1 traces.

The model computes every step of an in-flight batch; the next tokens come from the traces, cut by a byte-pair tokenizer
that is trained on them. `off`, `shadow` (search, share nothing) and `aligned` run in turn on the same requests; times
are of steps in which every request generates. Random weights say nothing of accuracy, and their KV distances need not
be those of a trained model. The last line is JSON.
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

from trtllm_memshare.errors import UserError, nearest, run_command_line
from trtllm_memshare.report.document import make_report, publish
from trtllm_memshare.report.redundancy import read_texts
from trtllm_memshare.runners.torch.attention import IMPLEMENTATION
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.search.config import MemShareConfig, make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.replay import ReplaySampler, cut_scripts, train_tokenizer
from trtllm_memshare.serving.request import SamplingParams

_VOCAB_SIZE = 8192
_PROMPT_TOKENS = 64


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


def replay(
    runner: TorchRunner, config: MemShareConfig, boundaries: BoundaryTokens, scripts: list[np.ndarray]
) -> dict[str, Any]:
    """Runs every script to its end; figures of one variant."""
    sampler, length = ReplaySampler(), len(scripts[0])
    executor = Executor(runner, config, boundaries, length, len(scripts), max_num_tokens=8192, sampler=sampler)
    for script in scripts:
        handle = executor.submit(script[:_PROMPT_TOKENS].tolist(), SamplingParams(length - _PROMPT_TOKENS))
        sampler.add_script(handle.request_id, script[_PROMPT_TOKENS:].tolist())
    times, used = [], []
    with tqdm(total=length - _PROMPT_TOKENS, desc=config.preset, unit="step", leave=False) as bar:
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
        "num_steps": len(times),
        "search_time_fraction": executor.stats.search_time_fraction,
        "candidates": executor.sharing.policy.num_candidates,
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
    parser.add_argument("--variants", nargs="+", default=["off", "shadow", "aligned"])
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all variants; the median round counts")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
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
    blocks = options.batch_size * -(-length // options.tokens_per_block)
    runner = TorchRunner(model, blocks, options.tokens_per_block, use_graphs=not options.no_graphs)
    print(f"device: {device}; {options.model_shape} with random weights, {options.batch_size} x {length} tokens")
    print(f"block distances: {runner.search.description}\ndecode attention: {runner.decode_description}")
    configs = {
        name: make_config("aligned", shadow=True) if name == "shadow" else make_config(name)
        for name in options.variants
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    replay(runner, make_config("off"), boundaries, [s[: _PROMPT_TOKENS + 16] for s in scripts])  # warm-up
    for _ in range(options.repeat):
        for name, config in configs.items():
            rounds[name].append(replay(runner, config, boundaries, scripts))
    rows = {}
    for name, entries in rounds.items():
        ordered = sorted(entries, key=lambda e: e["step_ms_mean"])
        rows[name] = ordered[len(ordered) // 2]
    base = rows.get("off")
    print(f"{'variant':<9} {'step ms':>8} {'over off':>9} {'search':>7} {'shared':>7} {'blocks, mean':>13} {'peak':>6}")
    for name, row in rows.items():
        row["over_off"] = row["step_ms_mean"] / base["step_ms_mean"] - 1 if base else None
        over = "-" if row["over_off"] is None else f"{row['over_off']:+.1%}"
        shares = f"{row['search_time_fraction']:>7.1%} {row['shared_block_fraction']:>7.1%}"
        blocks = f"{row['mean_used_blocks']:>13.0f} {row['peak_used_blocks']:>6}"
        print(f"{name:<9} {row['step_ms_mean']:>8.2f} {over:>9} {shares} {blocks}")
    print("random weights: these figures say nothing of accuracy")
    report = make_report(
        {
            "device": device,
            "model_shape": options.model_shape,
            "batch_size": options.batch_size,
            "output_tokens": options.output_tokens,
            "tokens_per_block": options.tokens_per_block,
            "block_distances": runner.search.description,
            "decode_attention": runner.decode_description,
            "variants": rows,
        }
    )
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
