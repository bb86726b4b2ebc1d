"""A real language model on real reasoning text in ten minutes: what giving up pages costs, and what is still known.

Downloads SmolLM2-135M where it is missing, builds an engine of it, reads the first texts of the study with a few arms
at several shares kept, asks for facts stated once, prints both tables and draws the curve. The whole study is in
benchmarks/studies/real_model/.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path

try:
    from transformers import AutoTokenizer

    from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
    from trtllm_memshare.builder.summary import summarize
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR, get_smollm2
    from trtllm_memshare.errors import UserError, run_command_line
    from trtllm_memshare.evaluation.machine import describe_machine
    from trtllm_memshare.evaluation.masked_replay import MaskedReplay
    from trtllm_memshare.evaluation.page_arms import Budget
    from trtllm_memshare.evaluation.page_study import Task, compute_rows
    from trtllm_memshare.evaluation.page_table import Setting
    from trtllm_memshare.evaluation.real_rows import RowFile
    from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
    from trtllm_memshare.evaluation.recall_study import compute_recall
    from trtllm_memshare.report.real_model import main_table, recall_table, summary
    from trtllm_memshare.report.real_model_plots import plot_curve
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

ARMS = ("random", "attention-redundancy", "surprisal-led-recency-signature")
SHARES = (0.75, 0.5, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s, fetched if missing")
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=10, help="no text begins later (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=10, help="most texts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a text (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("demo/real_model"), help="default: %(default)s")
    arguments = parser.parse_args()
    started = time.monotonic()

    def in_time(share: float) -> bool:
        return time.monotonic() - started < 60 * arguments.minutes * share

    if arguments.model_dir == DEFAULT_DIR and not DEFAULT_DIR.is_dir():
        get_smollm2(DEFAULT_DIR)
    build = {"max_seq_len": 8192}
    options = BuildOptions(arguments.model_dir, arguments.engine_dir, memshare=True, build=build, force=True)
    print(summarize(build_engine(plan_build(options))))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    replay = MaskedReplay(arguments.model_dir, "bfloat16")
    rows = RowFile(arguments.output_dir / f"table_{arguments.tokens}.jsonl")
    recalled = RowFile(arguments.output_dir / "recall.jsonl")
    tasks = [Task(arm, Budget(kept)) for kept in SHARES for arm in ARMS]
    texts = islice(token_texts(read_traces(), tokenizer, arguments.tokens), arguments.texts)
    print(f"reading texts of {arguments.tokens} tokens with {len(tasks)} arms each", file=sys.stderr)
    compute_rows(replay, ((text, tasks) for text in texts), rows, lambda: in_time(0.7))
    compute_recall(replay, tokenizer, ["full", *ARMS], Budget(), 4, recalled, lambda: in_time(1.0))
    if not rows.rows:
        raise UserError(f"no text was read in {arguments.minutes:g} minutes (give --minutes more, or --tokens fewer)")
    for kept in SHARES:
        print(f"\n{kept:.0%} of the generated pages kept\n{main_table(rows.rows, Setting(kept, 16, arguments.tokens))}")
    if recalled.rows:
        print(f"\nfacts stated once, 50 % kept\n{recall_table(recalled.rows)}")
    model = "SmolLM2-135M" if arguments.model_dir == DEFAULT_DIR else arguments.model_dir.resolve().name
    plot_curve(rows.rows, arguments.output_dir / "curve.png", model)
    document = {**summary(rows.rows, recalled.rows), "seconds": round(time.monotonic() - started), **describe_machine()}
    print(json.dumps(document))


if __name__ == "__main__":
    run_command_line(main)
