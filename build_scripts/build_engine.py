"""Builds an engine directory from a Hugging Face checkpoint, with KV-cache sharing if asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

from trtllm_memshare.engine.build import DEFAULT_MODEL_DIR, build_engine, describe_plan, plan_build, summarize
from trtllm_memshare.engine.engine_dir import BuildConfig
from trtllm_memshare.errors import run_command_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model-dir",
        type=Path,
        default=DEFAULT_MODEL_DIR,
        help="Hugging Face checkpoint (default: the bundled model)",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("engines/tiny_reasoner"), help="default: %(default)s")
    parser.add_argument("--memshare", action="store_true", help="share KV blocks of repeated reasoning")
    parser.add_argument("--preset", help="aligned (default), paper, lexical or off")
    parser.add_argument("--shadow", action="store_true", help="search and report, share nothing")
    parser.add_argument("--backend", choices=("auto", "torch", "tensorrt"), default="auto", help="default: %(default)s")
    parser.add_argument("--tokens-per-block", type=int, help="power of two, 8 to 128 (default: 16)")
    parser.add_argument("--max-batch-size", type=int, help="most requests in flight (default: 64)")
    parser.add_argument("--max-seq-len", type=int, help="longest request in tokens (default: the model's)")
    parser.add_argument("--max-num-tokens", type=int, help="most tokens in one step (default: 2048)")
    parser.add_argument("--kv-cache-dtype", help="auto (default), float32, float16 or bfloat16")
    parser.add_argument("--quantization", help="weights; TensorRT-LLM only")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor-parallel ranks (default: 1)")
    parser.add_argument("--pp-size", type=int, default=1, help="pipeline-parallel ranks (default: 1)")
    parser.add_argument("--config", type=Path, help='JSON file: {"build": {...}, "memshare": {...}}')
    parser.add_argument("--dry-run", action="store_true", help="print the build configuration, write nothing")
    parser.add_argument("--force", action="store_true", help="replace an engine that is there")
    options = parser.parse_args()
    plan = plan_build(
        options.model_dir,
        options.output_dir,
        options.memshare,
        options.preset,
        options.shadow,
        options.backend,
        {name: getattr(options, name) for name in BuildConfig.model_fields},
        options.quantization,
        options.tp_size,
        options.pp_size,
        options.config,
        options.force,
    )
    print(f"backend: {plan.backend_reason}")
    print(describe_plan(plan) if options.dry_run else summarize(build_engine(plan)))


if __name__ == "__main__":
    run_command_line(main)
