"""Which definition of a distance foretells the harm that sharing a pair of blocks does.

    python -m benchmarks.studies.distances             # what the full cache writes on the tuning problems
    python -m benchmarks.studies.distances --traces    # held-out traces, the model trained on the others

Every sampled pair is shared alone, and the divergence of all following tokens is held against every distance. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from benchmarks.studies.distances.study import StudyOptions, judge, study_pairs
    from benchmarks.studies.distances.tables import study_tables
    from benchmarks.studies.real_text.study import load_text_model, make_script
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.corpus import TRACES, read_traces
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.session import Session
    from trtllm_memshare.evaluation.teacher_forced import Script
    from trtllm_memshare.search.config import make_config
    from trtllm_memshare.search.steps import BoundaryTokens
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/tuning.jsonl"))
    parser.add_argument("--num-problems", type=int, help="first lines of the data set only (default: all)")
    parser.add_argument("--keep-dir", type=Path, help="where generations are kept, as for benchmarks/fidelity.py")
    parser.add_argument("--traces", action="store_true", help="read the held-out traces in place of a data set")
    parser.add_argument("--model-dir", type=Path, default=Path("benchmarks/data/trace_model"), help="with --traces")
    parser.add_argument("--max-tokens", type=int, default=2048, help="length of a trace, prompt included")
    parser.add_argument("--pairs-per-kind", type=int, default=StudyOptions.pairs_per_kind, help="from each text")
    parser.add_argument("--seed", type=int, default=StudyOptions.seed)
    parser.add_argument("--output-json", type=Path)
    arguments = parser.parse_args()
    if arguments.traces:
        tokenizer, boundaries, _ = load_text_model(arguments.model_dir)
        traces = [t for t in read_traces(TRACES) if t.split == "test"]
        scripts = [make_script(tokenizer, t, arguments.max_tokens) for t in traces]
        model_dir, size, source = arguments.model_dir, 16, str(TRACES)
    else:
        session = Session(arguments.engine_dir, arguments.dataset, arguments.num_problems, "cpu", arguments.keep_dir)
        outputs = session.generate("full", make_config("off")).token_ids
        scripts = [Script(i.input_ids, ids) for i, ids in zip(session.items, outputs, strict=True)]
        model_dir, size, source = session.engine.model_dir, session.tokens_per_block, str(arguments.dataset)
        boundaries = BoundaryTokens.from_tokenizer(session.tokenizer, session.engine.vocab_size)
    options = StudyOptions(arguments.pairs_per_kind, seed=arguments.seed)
    figures = judge(study_pairs(model_dir, scripts, size, boundaries, options), options)
    settings = {"texts": source, "num_texts": len(scripts), "tokens_per_block": size, "seed": options.seed}
    settings |= {"pairs_per_kind": options.pairs_per_kind, "min_following": options.min_following}
    report = make_report({**settings, **figures})
    print(study_tables(report))
    publish(report, arguments.output_json)


if __name__ == "__main__":
    run_command_line(main)
