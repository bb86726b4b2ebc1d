"""A real model whose null entries are skipped, and read: the same requests in the same short pool, written from traces.

Pages go by age, so that all runs give up the same ones; what is compared is each next-token distribution. Entries are
read one by one, as TensorRT-LLM's kernels do. Two controls: a page of zeros in place of the null page, whose entries
must change what is read, and the full cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

try:
    import torch
    from transformers import AutoTokenizer

    from trtllm_memshare.engine.null_page import NullPageSet, calibrate_null_pages
    from trtllm_memshare.engine.null_page_files import calibration_texts
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.evaluation.real_texts import cut_traces
    from trtllm_memshare.evaluation.teacher_forced import Replay, Script, replay
    from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
    from trtllm_memshare.search.config import make_config
    from trtllm_memshare.search.steps import BoundaryTokens
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=384, help="of the longest text, problem and answer")
    parser.add_argument("--blocks", type=int, default=28, help="of the pool, 16 tokens each; null pages included")
    parser.add_argument("--output-json", type=Path, default=Path("benchmarks/studies/null_page/results/agreement.json"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    model = load_model(options.model_dir, dtype=torch.float32)
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in calibration_texts(options.model_dir)]
    pages = calibrate_null_pages(model, texts, options.tokens)
    scripts = [Script(*text) for text in cut_traces(tokenizer, options.texts, options.tokens, 0)]
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, len(tokenizer))

    def run(name: str, num_blocks: int, null_pages: NullPageSet, **settings: object) -> Replay:
        config = (
            make_config("pressure", need="age", protected_tokens=32, **settings) if settings else make_config("off")
        )
        runner = TorchRunner(model, num_blocks, _SIZE, fold_aliases=False, null_page_set=null_pages)
        return replay(runner, config, boundaries, scripts, keep_log_probs=True, description=name)

    enough = sum((len(s.prompt) + len(s.output)) // _SIZE + 2 for s in scripts) + pages.num_bands
    skipped = run("skipped", options.blocks, pages, read_null=False)
    read = run("read", options.blocks, pages, read_null=True)
    zeros = dataclasses.replace(pages, keys=torch.zeros_like(pages.keys))
    wrong = run("zeros", options.blocks, zeros, read_null=True)
    full = run("full", enough, pages)
    assert read.shared_ratio == wrong.shared_ratio == skipped.shared_ratio
    figures = {
        "model": options.model_dir.name,
        "pool_blocks": options.blocks,
        "written_tokens": sum(len(s.output) for s in scripts),
        "given_up": skipped.shared_ratio,
        "read_against_skipped": compare(skipped, read),
        "zeros_against_skipped": compare(skipped, wrong),
        "full_against_skipped": compare(skipped, full),
    }
    publish(make_report(figures), options.output_json)


def compare(one: Replay, other: Replay) -> dict[str, float]:
    """How far apart two runs' next-token log-probabilities are, over all written tokens."""
    assert one.log_probs is not None
    assert other.log_probs is not None
    a, b = torch.cat(one.log_probs), torch.cat(other.log_probs)
    return {
        "largest_log_prob_difference": float((a - b).abs().max()),
        "largest_loss_difference": max(float(abs(x - y).max()) for x, y in zip(one.losses, other.losses, strict=True)),
        "largest_divergence": float((a.exp() * (a - b)).sum(-1).max()),
        "same_best_token": int((a.argmax(-1) == b.argmax(-1)).sum()),
    }


if __name__ == "__main__":
    run_command_line(main)
