"""What stage 2 turns down: pairs of blocks with equal text whose K and V differ too much, or differ after a chain.

Runs `aligned` over a data set and prints the distribution of distances and the worst pairs as text. The last line is
JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.dataset import read_dataset
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.evaluation.variants import make_variant
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.policy import SharingPolicy
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.search.types import Candidate, Decision
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams


class RecordingPolicy(SharingPolicy):
    """Keeps (request, position of the retired block, first kept position, distance) of every candidate."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor.config)
        self._pool = executor.manager.pool
        self.seen: list[tuple[int, int, int, float]] = []

    def decide(self, candidates: list[Candidate], sums: np.ndarray | None) -> list[Decision]:
        if sums is not None:
            size = self._pool.tokens_per_block
            for candidate, distance in zip(candidates, self.layer_vote(sums).tolist(), strict=True):
                kept = int(candidate.kept_rows[0])
                start = int(self._pool.origin_position[candidate.block])
                other = int(self._pool.origin_position[kept // size]) + kept % size
                self.seen.append((candidate.request_id, start, other, distance))
        return super().decide(candidates, sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/small.jsonl"))
    parser.add_argument("--worst", type=int, default=10, help="pairs shown as text")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    engine = load_engine(options.engine_dir)
    tokenizer: Any = AutoTokenizer.from_pretrained(engine.model_dir)
    items = read_dataset(options.dataset, tokenizer)
    size = engine.build.tokens_per_block
    runner = TorchRunner(load_model(engine.model_dir), 200 * len(items), size)
    config = make_variant("aligned", engine.memshare).config
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, engine.vocab_size)
    executor = Executor(runner, config, boundaries, engine.build.max_seq_len, len(items))
    policy = executor.sharing.policy = RecordingPolicy(executor)
    params = [SamplingParams(i.output_tokens, stop_token_ids=engine.stop_token_ids) for i in items]
    handles = [executor.submit(i.input_ids, p) for i, p in zip(items, params, strict=True)]
    executor.run_until_idle()
    tokens = [i.input_ids + h.result().token_ids for i, h in zip(items, handles, strict=True)]
    distances = np.array([d for *_, d in policy.seen])
    quantiles = {f"p{q}": float(np.percentile(distances, q)) for q in (10, 50, 90, 99, 100)}
    print(f"{len(distances)} candidates; distance {quantiles}")
    worst = []
    for request, start, other, distance in sorted(policy.seen, key=lambda s: -s[3])[: options.worst]:
        texts = [tokenizer.decode(tokens[request][max(0, p - 24) : p + size]) for p in (start, other)]
        worst.append({"distance": distance, "retired": texts[0], "kept": texts[1]})
        print(f"{distance:.2f}  retired {texts[0]!r}\n      kept    {texts[1]!r}")
    report = make_report(
        {
            "dataset": str(options.dataset),
            "num_candidates": len(distances),
            "distance": quantiles,
            "turned_down_by_distance": policy.rejected,
            "turned_down_at_apply": executor.manager.stats().refused,
            "worst": worst,
        }
    )
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
