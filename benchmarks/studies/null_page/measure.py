"""Null pages of a real model, calibrated on the bundled text and held against real traces: every query of every head at
its own place in the text, against its own keys and the page of its band."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.studies.null_page.gaps import gaps_of, worst_by_part, worst_heads
    from trtllm_memshare.engine.attention_queries import observe_queries
    from trtllm_memshare.engine.null_page import TARGET_GAP, calibrate_null_pages
    from trtllm_memshare.engine.null_page_files import calibration_texts, report
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=640, help="first ones of each trace (default: %(default)s)")
    parser.add_argument(
        "--parts",
        type=int,
        nargs="*",
        default=[],
        help="positions that cut a trace into parts, each with its worst gap",
    )
    parser.add_argument("--queries", type=int, help="most of each head, evenly spread over a trace (default: all)")
    parser.add_argument("--output-json", type=Path, default=Path("benchmarks/studies/null_page/results/null_page.json"))
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in calibration_texts(arguments.model_dir)]
    pages = calibrate_null_pages(model, texts)
    inv_freq = model.model.rotary_emb.inv_freq
    rows: list[dict[str, Any]] = []
    for text, _ in zip(token_texts(read_traces(), tokenizer, arguments.tokens), range(arguments.texts), strict=False):
        queries = observe_queries(model, text.ids, arguments.queries or arguments.tokens)
        gaps = gaps_of(queries, pages, inv_freq)
        rows.append(
            {
                "text": text.trace.name,
                "model": text.trace.model,
                "queries": gaps.numel(),
                "worst_gap": float(gaps.max()),
                "nearer_than_target": int((gaps > TARGET_GAP).sum()),
                **({"parts": worst_by_part(gaps, queries.positions, arguments.parts)} if arguments.parts else {}),
            }
        )
        print(rows[-1], flush=True)
    figures = {
        "model": arguments.model_dir.name,
        "calibration_tokens": [len(t) for t in texts],
        "calibration": {key: value for key, value in report(pages).items() if key != "layers"},
        "worst_heads": worst_heads(pages),
        "tokens": arguments.tokens,
        "rows": rows,
    }
    publish(make_report(figures), arguments.output_json)


if __name__ == "__main__":
    run_command_line(main)
