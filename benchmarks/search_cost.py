"""Host cost of the search per new token, against the length of the request, on replayed real text.

Streams of word pieces from the committed DeepSeek-R1 traces are fed token by token to the cache manager, which
searches and shares every few tokens as the executor does; KV distances are not computed. For each length the time of
the last 1,000 tokens is taken, median over streams. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.evaluation.texts import make_streams
from trtllm_memshare.search.config import MemShareConfig, make_config
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.search.policy import SharingPolicy
from trtllm_memshare.search.steps import BoundaryTokens

_WINDOW = 1000  # tokens timed up to each length


def replay(config: MemShareConfig, stream: np.ndarray, boundaries: BoundaryTokens, lengths: list[int]) -> list[float]:
    """Microseconds per token over the `_WINDOW` tokens before each length."""
    size, prompt = 16, 64
    blocks = len(stream) // size + 1
    manager = KVCacheManager(blocks, 1, size, blocks, 1, config, make_matcher_factory(config, size, boundaries))
    policy = SharingPolicy(config.model_copy(update={"accept_all": True}))
    manager.add_sequence(0, stream[:prompt], prompt)
    spent, totals = 0.0, {prompt: 0.0}
    for position in range(prompt, len(stream)):
        manager.append_tokens(0, [int(stream[position])])
        manager.mark_computed(0, position + 1)
        if position % config.search_interval == 0:
            started = time.perf_counter()
            manager.apply(policy.decide(manager.candidates(), None))
            spent += time.perf_counter() - started
        totals[position + 1] = spent
    return [(totals[n] - totals[max(prompt, n - _WINDOW)]) / _WINDOW * 1e6 for n in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_aime24.jsonl"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1100, 2000, 4000, 8000, 16000], help="tokens")
    parser.add_argument("--presets", nargs="+", default=["aligned", "paper"])
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    streams, boundaries = make_streams(options.traces, max(options.lengths))
    rows = {}
    for preset in options.presets:
        config = make_config(preset)
        replay(config, streams[0][:3000], boundaries, [2000])  # warm-up
        times = [replay(config, s, boundaries, options.lengths) for s in streams]
        rows[preset] = [statistics.median(column) for column in zip(*times, strict=True)]
        cells = "  ".join(f"{n}: {t:.2f}" for n, t in zip(options.lengths, rows[preset], strict=True))
        spread = max(rows[preset]) / min(rows[preset]) - 1
        print(f"{preset}: us per token at length {cells}  (largest over smallest: +{spread:.0%})")
    print(f"{len(streams)} streams")
    report = make_report(
        {
            "num_streams": len(streams),
            "lengths": options.lengths,
            "us_per_token": rows,
        }
    )
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
