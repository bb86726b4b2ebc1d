"""Host cost of the search per new token, against the length of the request, on replayed real text.

Streams of word pieces from the committed DeepSeek-R1 traces are fed token by token to the cache manager, which
searches and shares every few tokens as the executor does; KV distances are not computed. For each length the time of
the last 1,000 tokens is taken, median over streams. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.search_cost import median_search_times
    from trtllm_memshare.evaluation.texts import make_streams
    from trtllm_memshare.search.config import make_config
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


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
        rows[preset] = times = median_search_times(make_config(preset), streams, boundaries, options.lengths)
        cells = "  ".join(f"{n}: {t:.2f}" for n, t in zip(options.lengths, times, strict=True))
        spread = max(times) / min(times) - 1
        print(f"{preset}: us per token at length {cells}  (largest over smallest: +{spread:.0%})")
    print(f"{len(streams)} streams")
    figures = {"num_streams": len(streams), "lengths": options.lengths, "us_per_token": rows}
    publish(make_report(figures), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
