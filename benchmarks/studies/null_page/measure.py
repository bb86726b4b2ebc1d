"""Null pages of a real model, calibrated on the bundled text and held against the start of a real trace, position by
position: queries and keys are those of the trace, at their own places."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.engine.attention_queries import FIRST_POSITION, Queries, observe_queries
from trtllm_memshare.engine.null_page import NullPageSet, calibrate_null_pages
from trtllm_memshare.engine.null_page_files import calibration_texts, report
from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.block_distance import rotate
from trtllm_memshare.search.config import make_config

PAGE_TOKENS, CONTEXT_TOKENS = 16, 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=4608, help="of the trace (default: %(default)s)")
    parser.add_argument("--range-tokens", type=int, default=512, help="positions of one row (default: %(default)s)")
    parser.add_argument("--output-json", type=Path, default=Path("benchmarks/results/null_page.json"))
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in calibration_texts(arguments.model_dir)]
    pages = calibrate_null_pages(model, texts)
    trace = next(token_texts(read_traces(), tokenizer, arguments.tokens))
    queries = observe_queries(model, trace.ids, 1024)
    positions = np.unique(np.linspace(FIRST_POSITION, len(trace.ids) - 1, 1024).astype(int))
    inv_freq = model.model.rotary_emb.inv_freq
    gaps = {band: gaps_at(queries, positions, pages.keys[band], inv_freq) for band in range(pages.num_bands)}
    rows = []
    for start in range(0, arguments.tokens, arguments.range_tokens):
        stop = min(start + arguments.range_tokens, arguments.tokens)
        inside = torch.from_numpy((positions >= start) & (positions < stop))
        band = int(np.searchsorted(pages.bands, start, "right")) - 1
        rows.append(
            {
                "start": start,
                "stop": stop,
                "band": band,
                "queries": int(inside.sum()) * gaps[band].shape[0] * gaps[band].shape[1],
                "worst_gap": float(gaps[band][..., inside].max()),
                "worst_gap_of_the_first_page": float(gaps[0][..., inside].max()),
            }
        )
    figures = {
        "model": arguments.model_dir.name,
        "rope_theta": float(getattr(model.config, "rope_theta", None) or model.config.rope_parameters["rope_theta"]),
        "calibration_tokens": [len(t) for t in texts],
        "calibration": {key: value for key, value in report(pages).items() if key != "layers"},
        "worst_heads": worst_heads(pages),
        "trace": trace.trace.name,
        "tokens": len(trace.ids),
        "rows": rows,
        "reading": compare_reading(arguments.model_dir, pages, trace.ids[:CONTEXT_TOKENS]),
    }
    publish(make_report(figures), arguments.output_json)


def compare_reading(model_dir: Path, pages: NullPageSet, ids: list[int]) -> dict[str, Any]:
    """Logits after half of the pages were given up, null entries skipped and read: how far apart, in one step each."""
    found = []
    for read_null in (False, True):
        runner = TorchRunner(load_model(model_dir), 80, PAGE_TOKENS, null_page_set=pages)
        config = make_config("aligned", retired_becomes="null")
        cache = KVCacheManager(80, runner.num_layers, PAGE_TOKENS, 80, 1, config, None, runner.null_pages)
        cache.add_sequence(0, np.array(ids, np.int32), num_prompt_tokens=PAGE_TOKENS)
        retired = np.arange(2, len(ids) // PAGE_TOKENS - 8, 2)
        for start, stop in ((0, len(ids) - 32), (len(ids) - 32, len(ids))):
            batch = StepBatch(
                input_ids=np.array(ids[start:stop], np.int32),
                position_ids=np.arange(start, stop, dtype=np.int32),
                num_contexts=1,
                chunk_lengths=np.array([stop - start], np.int32),
                sequence_lengths=np.array([stop], np.int32),
                block_offsets=cache.block_offsets([0]),
                read_null=read_null,
            )
            logits = runner.step(runner.prepare(batch)).logits
            cache.mark_computed(0, stop)
            if start == 0:
                cache.retire(0, retired)
        found.append(logits[0])
    return {
        "tokens": len(ids),
        "retired_pages": len(retired),
        "largest_logit": float(found[0].abs().max()),
        "largest_difference": float((found[0] - found[1]).abs().max()),
    }


def gaps_at(queries: Queries, positions: np.ndarray, keys: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Null logit of each query at its own position less its log-sum-exp, float32 ``[layers, heads, n]``."""
    found = []
    for layer, unrotated in enumerate(queries.unrotated):
        at = torch.from_numpy(positions)[None]
        turned = rotate(unrotated.transpose(0, 1)[None, :, None], at, inv_freq)[0, :, 0].transpose(0, 1)
        per_head = keys[layer].repeat_interleave(len(turned) // len(keys[layer]), 0)
        found.append((turned * per_head[:, None]).sum(-1) * queries.scaling - queries.log_sum_exp[layer])
    return torch.stack(found)


def worst_heads(pages: NullPageSet, count: int = 5) -> list[dict[str, Any]]:
    """The heads that come nearest to a null page, and the length of the key that keeps them away."""
    gaps, lengths = pages.gaps.amax(0), pages.lengths.amax(0)
    order = gaps.flatten().argsort(descending=True)[:count].tolist()
    heads, each = gaps.shape[1], gaps.shape[1] // lengths.shape[1]
    return [
        {
            "layer": i // heads,
            "head": i % heads,
            "gap": float(gaps.flatten()[i]),
            "length": float(lengths[i // heads, i % heads // each]),
        }
        for i in order
    ]


if __name__ == "__main__":
    run_command_line(main)
