"""Builds an engine directory from a Hugging Face checkpoint, with KV-cache sharing if asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, describe_plan, plan_build
from trtllm_memshare.builder.summary import summarize
from trtllm_memshare.engine.build_config import BuildConfig


def main(command: str, arguments: list[str]) -> None:
    """Runs it; see ``--help``."""
    defaults = BuildOptions()
    parser = argparse.ArgumentParser(prog=command, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--model-dir",
        type=Path,
        help="Hugging Face checkpoint, or a GGUF file (default: the bundled model); needed by --adopt",
    )
    parser.add_argument("--output-dir", type=Path, default=defaults.output_dir, help="default: %(default)s")
    parser.add_argument("--memshare", action="store_true", help="give KV blocks back under pressure, or share repeats")
    parser.add_argument(
        "--preset",
        help="pressure (default), aligned (TensorRT engines' default), drop-duplicate, paper, lexical or off; needs "
        "--memshare",
    )
    parser.add_argument(
        "--shadow",
        action="store_true",
        help="search and report, share nothing; needs --memshare, takes preset aligned unless another is given",
    )
    parser.add_argument("--backend", choices=("auto", "torch", "tensorrt"), default="auto", help="default: %(default)s")
    for name, field in BuildConfig.model_fields.items():
        is_text = name in ("kv_cache_dtype", "quantization")
        default = "the model's" if name == "max_seq_len" else field.default
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=str if is_text else int,
            metavar=None if is_text else "N",
            help=f"{field.description} (default: {default})",
        )
    parser.add_argument(
        "--search-engine",
        help="embedded (default): the search inside the model's engine; separate: memshare.engine beside an engine "
        "that stays as TensorRT-LLM builds it; for --backend tensorrt",
    )
    parser.add_argument(
        "--plugin-library",
        type=Path,
        default=defaults.plugin_library,
        help="for --backend tensorrt (default: %(default)s)",
    )
    parser.add_argument("--config", type=Path, help='JSON file: {"build": {...}, "memshare": {...}}; options win')
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="--output-dir holds an engine of trtllm-build: add what sharing needs to it; its sizes stay",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan as JSON, write nothing")
    parser.add_argument(
        "--no-self-check",
        action="store_true",
        help="leave out the short greedy run that a new engine of the torch backend must pass",
    )
    parser.add_argument("--force", action="store_true", help="replace an engine that is there")
    options = parser.parse_args(arguments)
    plan = plan_build(
        BuildOptions(
            model_dir=options.model_dir,
            output_dir=options.output_dir,
            memshare=options.memshare,
            preset=options.preset,
            shadow=options.shadow,
            backend=options.backend,
            build={name: getattr(options, name) for name in BuildConfig.model_fields},
            config_file=options.config,
            force=options.force,
            search_engine=options.search_engine,
            plugin_library=options.plugin_library,
            adopt=options.adopt,
        )
    )
    print(f"backend: {plan.backend_reason}")
    if options.dry_run:
        print(describe_plan(plan))
        return
    if options.no_self_check:
        print(summarize(build_engine(plan)))
        return
    from trtllm_memshare.serving.self_check import check_engine_runs  # loads torch, which the rest can do without

    print(summarize(build_engine(plan, check_engine_runs)))
