"""How much sharing V alone could free: blocks with a copy in phase, beside what stage 1 reaches at any phase.

    python -m benchmarks.studies.in_phase --output-json benchmarks/studies/in_phase/results/in_phase.json

Token ids alone, no model is run. The last line is JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.corpus import FILES, TRACES, read_traces
from trtllm_memshare.evaluation.dataset import read_dataset
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.evaluation.reach import count_in_phase_copies, measure_reach
from trtllm_memshare.evaluation.texts import read_texts
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens

_Text = tuple[list[int], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--trace-tokenizer", type=Path, default=Path("benchmarks/data/trace_model"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/evaluation.jsonl"))
    parser.add_argument("--texts", type=Path, default=Path("benchmarks/results/evaluation.texts.jsonl"))
    parser.add_argument("--tokenizer", type=Path, default=Path("trtllm_memshare/assets/tiny_reasoner"))
    parser.add_argument("--tokens-per-block", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    of_traces = AutoTokenizer.from_pretrained(options.trace_tokenizer, local_files_only=True)
    of_toy = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True)
    traces = read_traces(options.traces)
    sources: dict[str, tuple[Any, list[_Text]]] = {
        source: (
            of_traces,
            [(of_traces.encode(t.prompt), of_traces.encode(t.reasoning)) for t in traces if t.source == source],
        )
        for source in FILES
    }
    prompts = [item.input_ids for item in read_dataset(options.dataset, of_toy)]
    outputs = [of_toy.encode(text, add_special_tokens=False) for text in read_texts(options.texts)]
    sources[options.dataset.stem] = (of_toy, list(zip(prompts, outputs, strict=True)))
    rows = []
    for source, (tokenizer, texts) in sources.items():
        boundaries = BoundaryTokens.from_tokenizer(tokenizer, len(tokenizer))
        for size in options.tokens_per_block:
            counts = [count_in_phase_copies(*text, size) for text in texts]
            blocks = sum(count for _, count in counts)
            reached = [
                measure_reach(make_config("aligned"), prompt, output, size, boundaries)
                for prompt, output in tqdm(texts, desc=f"{source} {size}", leave=False)
            ]
            in_phase = sum(copies for copies, _ in counts) / blocks
            rows.append(
                {
                    "texts": source,
                    "num_texts": len(texts),
                    "tokens_per_block": size,
                    "in_phase": in_phase,
                    "memory_of_v_alone": in_phase / 2,
                    "aligned": sum(r.shared_blocks for r in reached) / blocks,
                }
            )
    print("texts             tokens per block   in phase %   V alone frees %   aligned reaches %")
    for row in rows:
        print(
            f"{row['texts']:<18}{row['tokens_per_block']:>16}{row['in_phase']:>13.2%}"
            f"{row['memory_of_v_alone']:>18.2%}{row['aligned']:>20.2%}"
        )
    publish(make_report({"rows": rows}), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
