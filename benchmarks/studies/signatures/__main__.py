"""How well signatures rank pages: rank correlation with the exact redundancy, on real traces and a real model.

    python -m benchmarks.studies.signatures

The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import Any

try:
    from transformers import AutoTokenizer

    from benchmarks.studies.signatures.ranking import FORMS, LAST_PAGES, TextPool
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.masked_replay import MaskedReplay
    from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="of each text (default: %(default)s)")
    parser.add_argument(
        "--output-json", type=Path, default=Path("benchmarks/studies/signatures/results/signatures.json")
    )
    arguments = parser.parse_args()
    replay = MaskedReplay(arguments.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    rows: list[dict[str, Any]] = []
    for text in islice(token_texts(read_traces(), tokenizer, arguments.tokens), arguments.texts):
        pool = TextPool.read(replay, text.ids)
        row = {"text": text.trace.name, "model": text.trace.model, "pages": len(pool.pool) - LAST_PAGES}
        rows.append(row | pool.correlations())
        print(rows[-1], flush=True)
    figures = {
        "tokens": arguments.tokens,
        "rows": rows,
        "mean": {form: statistics.fmean(r[form] for r in rows) for form in FORMS},
        "smallest": {form: min(r[form] for r in rows) for form in FORMS},
    }
    publish(make_report(figures), arguments.output_json)


if __name__ == "__main__":
    run_command_line(main)
