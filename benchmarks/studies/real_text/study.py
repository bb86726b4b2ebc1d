"""What real text says of sharing: how much stage 1 reaches, and what a small model of the traces loses."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.studies.learning_to_copy.copy_loss import copy_loss
from benchmarks.studies.real_text.tables import fidelity_table, plot_fidelity, reach_table
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.arms import parse_arm
from trtllm_memshare.evaluation.benchmark_options import parse_setting
from trtllm_memshare.evaluation.corpus import Trace, read_traces
from trtllm_memshare.evaluation.document import make_report
from trtllm_memshare.evaluation.reach import measure_reach
from trtllm_memshare.evaluation.teacher_forced import Replay, Script, replay
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import MemShareConfig, make_config
from trtllm_memshare.search.steps import BoundaryTokens

_LOOSE = "shingle_tokens=4,min_run_tokens=4"
_SHORT = "shingle_tokens=8,min_run_tokens=8"
_SHARING = ("aligned", "lexical", "drop-duplicate", "random", "streaming", "snapkv", "rkv")
_REACH = [  # preset and settings; `lexical` has the stage 1 of `aligned`
    ("paper", ""),
    ("aligned", ""),
    *(("aligned", f"min_run_tokens=32,max_gap_tokens={gap}") for gap in (2, 4)),
    *(("aligned", f"min_run_tokens=16,max_gap_tokens={gap}") for gap in (0, 2, 4)),
    ("aligned", "direction=keep-earliest,min_run_tokens=16"),
    ("aligned", _SHORT),
    ("aligned", _LOOSE),
]
_ARMS = [  # variant and settings; `full` comes first by itself
    *((name, "") for name in ("paper", *_SHARING)),
    ("paper", "max_distance=1.2"),
    *((name, _LOOSE) for name in _SHARING),
]


def parse_overrides(text: str) -> dict[str, Any]:
    """Settings from `key=value,key=value`."""
    return dict(parse_setting(part) for part in text.split(",") if part)


def split_arm(text: str) -> tuple[str, str]:
    """Variant and settings of `variant:key=value,key=value`."""
    name, _, overrides = text.partition(":")
    return name, overrides


def run_reach(options: argparse.Namespace) -> dict[str, Any]:
    """What stage 1 finds, for every setting, block size and trace."""
    tokenizer, boundaries, _ = load_text_model(options.model_dir)
    traces = read_traces(options.traces)
    texts = [(encode(tokenizer, t.prompt), encode(tokenizer, t.reasoning)) for t in traces]
    sources = {s: [i for i, t in enumerate(traces) if t.source == s] for s in dict.fromkeys(t.source for t in traces)}
    long = [i for i, ids in enumerate(texts) if len(ids[0]) + len(ids[1]) >= 16_000]
    rows = []
    for preset, overrides in tqdm(_REACH, desc="reach"):
        config = make_config(preset, **parse_overrides(overrides))
        found = {
            size: [measure_reach(config, prompt, output, size, boundaries) for prompt, output in texts]
            for size in options.tokens_per_block
        }
        cost = [r.us_per_token for r in found[16 if 16 in found else options.tokens_per_block[0]]]
        rows.append(
            {
                "settings": f"{preset} {overrides}".strip(),
                "ratio": {
                    source: {
                        str(size): sum(results[i].shared_blocks for i in members)
                        / sum(results[i].generated_blocks for i in members)
                        for size, results in found.items()
                    }
                    for source, members in sources.items()
                },
                "us_per_token": statistics.median(cost),
                "us_per_token_16k": statistics.median([cost[i] for i in long] or [float("nan")]),
                "traces": {
                    str(size): {
                        "candidates": [r.candidates for r in results],
                        "shared_blocks": [r.shared_blocks for r in results],
                        "generated_blocks": [r.generated_blocks for r in results],
                    }
                    for size, results in found.items()
                },
            }
        )
    figures = {
        "traces": str(options.traces),
        "num_traces": {source: len(members) for source, members in sources.items()},
        "trace_names": [f"{t.source}/{t.name}" for t in traces],
        "trace_tokens": [len(prompt) + len(output) for prompt, output in texts],
        "num_long_traces": len(long),
        "tokens_per_block": options.tokens_per_block,
        "rows": rows,
    }
    report = make_report(figures)
    print(reach_table(report))
    return report


def run_replay(options: argparse.Namespace) -> dict[str, Any]:
    """Every arm on the same scripts; the full cache is the reference."""
    tokenizer, boundaries, length = load_text_model(options.model_dir)
    traces = [t for t in read_traces(options.traces) if t.split == "test"][: options.num_texts]
    scripts = [make_script(tokenizer, t, options.max_tokens or length) for t in traces]
    size = options.block_size
    num_blocks = sum((len(s.prompt) + len(s.output)) // size + 3 for s in scripts)  # with the scheduler's headroom
    runner = TorchRunner(load_model(options.model_dir), num_blocks, size)
    full = replay(runner, make_config("off"), boundaries, scripts, keep_log_probs=True, description="full")
    reference, arms, held = full.log_probs, list[dict[str, Any]](), dict[str, float]()
    print(f"full: perplexity {full.perplexity:.4f}, {full.block_steps_per_request:.0f} block-steps per text")
    chosen = [split_arm(text) for text in options.arms] if options.arms else _ARMS
    spans = [(len(s.prompt), len(s.output)) for s in scripts]
    for name, overrides in chosen:
        arm = parse_arm(f"{name}:{overrides}" if overrides else name, make_config("aligned"))
        if arm.budget is not None:
            arm = arm.with_memory_of(spans, memory_of_aligned(held, name, overrides), size)
        result = replay(runner, arm.config, boundaries, scripts, reference, description=arm.name)
        if name == "aligned":
            held[overrides] = result.block_steps_per_request
        arms.append(describe(name, overrides, arm.config, result, full))
        print(f"{arm.name}: shared {result.shared_ratio:.2%}, perplexity {result.perplexity:.4f}", flush=True)
    figures = {
        "model_dir": str(options.model_dir),
        "traces": [f"{t.source}/{t.name}" for t in traces],
        "num_problems": len({t.problem for t in traces}),
        "num_scripts": len(scripts),
        "num_tokens": sum(len(s.output) for s in scripts),
        "tokens_per_block": size,
        "copy_loss": copy_loss(AutoModelForCausalLM.from_pretrained(options.model_dir).eval(), 128, first_id=4),
        "full": {"perplexity": full.perplexity, "block_steps_per_request": full.block_steps_per_request},
        "arms": arms,
    }
    report = make_report(figures)
    print(fidelity_table(report))
    if options.plot is not None:
        plot_fidelity(report, options.plot)
        print(f"picture: {options.plot}")
    return report


def memory_of_aligned(held: dict[str, float], name: str, overrides: str) -> float:
    """Block-steps of `aligned` with the settings that a control names; its own settings of the control are left out."""
    asked = set(filter(None, overrides.split(",")))
    fits = [text for text in held if set(filter(None, text.split(","))) <= asked]
    if not fits:
        raise UserError(
            f"{name} holds as much as aligned with the same settings, got it without (put aligned before it)"
        )
    return held[max(fits, key=len)]


def describe(name: str, overrides: str, config: MemShareConfig, arm: Replay, full: Replay) -> dict[str, Any]:
    """The report's entry of one arm; the full cache's losses are what its own are held against, text by text."""
    change = [float((a - b).mean(dtype=np.float64)) for a, b in zip(arm.losses, full.losses, strict=True)]
    divergences = np.concatenate(arm.divergences or [])
    return {
        "variant": name,
        "overrides": overrides,
        "settings": config.model_dump(),
        "shared_ratio": arm.shared_ratio,
        "memory_ratio": arm.block_steps_per_request / full.block_steps_per_request,
        "perplexity": arm.perplexity,
        "perplexity_increase": arm.perplexity / full.perplexity - 1,
        "mean_divergence": arm.mean_divergence,
        "divergence_p99": float(np.percentile(divergences, 99)),
        "loss_change_by_text": change,
        "candidates": arm.candidates,
        "rejected": arm.rejected,
        "refused": arm.refused,
    }


def load_text_model(model_dir: Path) -> tuple[Any, BoundaryTokens, int]:
    """Tokenizer, step boundaries and context length of the model of the traces."""
    checkpoint = read_checkpoint(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, checkpoint.vocab_size)
    return tokenizer, boundaries, checkpoint.max_position_embeddings


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text longer than the model's context."""
    return tokenizer(text, verbose=False)["input_ids"]


def make_script(tokenizer: Any, trace: Trace, max_tokens: int) -> Script:
    """A trace as a replay, cut to `max_tokens` with its prompt."""
    prompt = encode(tokenizer, trace.prompt)
    if len(prompt) >= max_tokens:
        raise UserError(f"--max-tokens {max_tokens} leaves no room behind a prompt of {len(prompt)} (raise it)")
    return Script(prompt, encode(tokenizer, trace.reasoning)[: max_tokens - len(prompt)])
