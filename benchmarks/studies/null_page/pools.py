"""Null pages of a real model in pools of other element types: calibrated for each, then held against real traces.

What is stored is the page's K, rounded and scaled as the pool would; the real keys and the queries stay float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.studies.null_page.gaps import gaps_of
    from trtllm_memshare.engine.attention_queries import observe_queries
    from trtllm_memshare.engine.null_page import TARGET_GAP, NullPageRefused, calibrate_null_pages
    from trtllm_memshare.engine.null_page_files import calibration_texts
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

POOLS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=640, help="of each trace")
    parser.add_argument("--output-json", type=Path, default=Path("benchmarks/studies/null_page/results/pools.json"))
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model_dir, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in calibration_texts(options.model_dir)]
    traces = zip(token_texts(read_traces(), tokenizer, options.tokens), range(options.texts), strict=False)
    queries = [observe_queries(model, t.ids, options.tokens) for t, _ in traces]
    inv_freq = model.model.rotary_emb.inv_freq
    rows = list[dict[str, Any]]()
    for name, dtype in POOLS.items():
        row: dict[str, Any] = {"pool": name}
        try:
            pages = calibrate_null_pages(model, texts, 4096, dtype)
        except NullPageRefused as refusal:
            row["refused"] = str(refusal)
        else:
            gaps = [gaps_of(q, pages, inv_freq) for q in queries]
            row |= {
                "worst_gap": float(pages.gaps.max()),
                "worst_gap_traces": max(float(g.max()) for g in gaps),
                "queries": sum(g.numel() for g in gaps),
                "nearer_than_target": sum(int((g > TARGET_GAP).sum()) for g in gaps),
                "shortest_key": float(pages.lengths.min()),
                "longest_key": float(pages.lengths.max()),
            }
        rows.append(row)
        print(row, flush=True)
    publish(make_report({"model": options.model_dir.name, "rows": rows}), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
