"""No straw man: our `full` beside transformers' continuous batching, same model, page size, blocks and requests.

Both run in this process, in turns, `--repeat` times; medians are reported. The last line is JSON.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.benchmark import Load, run_variant
from trtllm_memshare.evaluation.dataset import read_dataset
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.evaluation.transformers_batching import run_transformers
from trtllm_memshare.evaluation.variants import make_variant
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.steps import BoundaryTokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/demo.jsonl"))
    parser.add_argument("--kv-cache-blocks", type=int, default=2700, help="pages of both caches")
    parser.add_argument("--page-size", type=int, default=16, help="tokens per page")
    parser.add_argument("--max-num-tokens", type=int, default=2048, help="tokens per step, both")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    engine = load_engine(options.engine_dir)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir)
    items = read_dataset(options.dataset, tokenizer)
    eos = engine.stop_token_ids[0]
    runner = TorchRunner(load_model(engine.model_dir), options.kv_cache_blocks, options.page_size)
    stock = AutoModelForCausalLM.from_pretrained(engine.model_dir, attn_implementation="sdpa")
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, engine.vocab_size)
    load = Load(64, options.max_num_tokens, engine.build.max_seq_len, "MAX_UTILIZATION", engine.stop_token_ids)
    variant = make_variant("full", engine.memshare)
    ours: list[float] = []
    theirs: list[float] = []
    agree = 0.0
    for _ in range(options.repeat):
        mine = run_variant(variant, runner, boundaries, items, load, lambda *_: True)
        ours.append(mine.entry["total_latency_ms"] / 1e3)
        seconds, outputs = run_transformers(
            stock, items, eos, options.page_size, options.kv_cache_blocks, options.max_num_tokens
        )
        theirs.append(seconds)
        agree = sum(a.token_ids == b for a, b in zip(mine.results, outputs, strict=True)) / len(items)
        print(f"round: ours {ours[-1]:.2f} s, transformers {seconds:.2f} s, same tokens {agree:.0%}", file=sys.stderr)
    count = len(items)
    report = make_report(
        {
            "dataset": {"path": str(options.dataset), "num_requests": count},
            "kv_cache_blocks": options.kv_cache_blocks,
            "page_size": options.page_size,
            "full_seconds": ours,
            "transformers_seconds": theirs,
            "full_req_s": count / statistics.median(ours),
            "transformers_req_s": count / statistics.median(theirs),
            "ratio": statistics.median(t / o for t, o in zip(theirs, ours, strict=True)),
            "same_tokens": agree,
        }
    )
    print(f"transformers {transformers.__version__} generate_batch: {report['transformers_req_s']:.2f} req/s")
    print(f"full: {report['full_req_s']:.2f} req/s, {report['ratio']:.2f} times as fast; same tokens {agree:.0%}")
    publish(report, options.output_json)


if __name__ == "__main__":
    torch.manual_seed(0)
    run_command_line(main)
