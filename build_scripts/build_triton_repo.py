"""Writes a Triton model repository over an engine directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.serving.scheduler import POLICIES
from trtllm_memshare.triton.repository import RepositoryOptions, write_repository


def main() -> None:
    defaults = RepositoryOptions(Path("engines/tiny_reasoner"), Path("model_repository"))
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--engine-dir", type=Path, default=defaults.engine_dir, help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, default=defaults.output_dir, help="default: %(default)s")
    parser.add_argument("--kv-cache-blocks", type=int, help="blocks of the KV pool (default: for a full batch)")
    parser.add_argument("--max-prompt-tokens", type=int, help="limit (default: what max_seq_len allows)")
    parser.add_argument("--max-output-tokens", type=int, help="limit (default: what max_seq_len allows)")
    parser.add_argument("--max-queue-size", type=int, default=defaults.max_queue_size, help="default: %(default)s")
    parser.add_argument("--batch-scheduler-policy", choices=POLICIES, default=defaults.batch_scheduler_policy)
    parser.add_argument(
        "--include-input-in-output",
        dest="exclude_input_in_output",
        action="store_false",
        help="repeat the prompt in answers to requests that do not say",
    )
    for name in ("cancellation_check_period_ms", "stats_check_period_ms"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(defaults, name), help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace a repository that is there")
    options = RepositoryOptions(**vars(parser.parse_args()))
    parameters = write_repository(options)
    print(f"model repository: {options.output_dir} (models ensemble and tensorrt_llm over {parameters['engine_dir']})")
    print(
        f"limits: {parameters['max_prompt_tokens']} prompt tokens, {parameters['max_output_tokens']} output tokens, "
        f"{parameters['max_requests']} requests in the system; KV pool of {parameters['max_tokens_in_paged_kv_cache']} "
        f"tokens"
    )
    print(f"start it: python build_scripts/launch_triton.py {options.output_dir}")


if __name__ == "__main__":
    run_command_line(main)
