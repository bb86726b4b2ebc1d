"""No straw man: our `full` beside transformers' continuous batching, same model, page size, blocks and requests.

Both run in this process, in turns, `--repeat` times; medians are reported. The last line is JSON.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.benchmark import Load, run_variant
    from trtllm_memshare.evaluation.dataset import read_dataset
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.transformers_batching import (
        Served,
        run_in_turns,
        run_transformers,
        summarize_rounds,
    )
    from trtllm_memshare.evaluation.variants import make_variant
    from trtllm_memshare.runners.engines import load_engine
    from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
    from trtllm_memshare.search.steps import BoundaryTokens
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


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

    def ours() -> Served:
        run = run_variant(variant, runner, boundaries, items, load, lambda *_: True)
        return run.entry["total_latency_ms"] / 1e3, [result.token_ids for result in run.results]

    def theirs() -> Served:
        return run_transformers(stock, items, eos, options.page_size, options.kv_cache_blocks, options.max_num_tokens)

    rounds = []
    for found in run_in_turns(ours, theirs, options.repeat):
        rounds.append(found)
        seconds = f"ours {found.ours:.2f} s, transformers {found.theirs:.2f} s"
        print(f"round: {seconds}, same tokens {found.same_tokens:.0%}", file=sys.stderr)
    report = make_report(
        {
            "dataset": {"path": str(options.dataset), "num_requests": len(items)},
            "kv_cache_blocks": options.kv_cache_blocks,
            "page_size": options.page_size,
            **summarize_rounds(rounds, len(items)),
        }
    )
    print(f"transformers {transformers.__version__} generate_batch: {report['transformers_req_s']:.2f} req/s")
    same = report["same_tokens"]
    print(f"full: {report['full_req_s']:.2f} req/s, {report['ratio']:.2f} times as fast; same tokens {same:.0%}")
    publish(report, options.output_json)


if __name__ == "__main__":
    torch.manual_seed(0)
    run_command_line(main)
