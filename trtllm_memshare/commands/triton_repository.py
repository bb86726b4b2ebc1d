"""Writes a Triton model repository: over an engine directory, or around TensorRT-LLM's own llmapi model."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from trtllm_memshare.errors import UserError
from trtllm_memshare.serving.scheduler import POLICIES
from trtllm_memshare.triton.llmapi_repository import LlmapiOptions, write_llmapi_repository
from trtllm_memshare.triton.model_configs import MODELS
from trtllm_memshare.triton.repository import FRACTION_HELP, RepositoryOptions, write_repository


def main(command: str, arguments: list[str]) -> None:
    """Runs it; see ``--help``."""
    defaults = RepositoryOptions(Path("engines/tiny_reasoner"), Path("model_repository"))
    parser = argparse.ArgumentParser(
        prog=command, description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--flavour", choices=("engine", "llmapi"), default="engine", help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, default=defaults.output_dir, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace a repository that is there")
    parser.add_argument(
        "--decoupled",
        action=argparse.BooleanOptionalAction,
        help="several responses to a request, which streaming needs; without, Triton's plain infer works (default: "
        "--decoupled)",
    )
    engine = parser.add_argument_group("flavour engine: this project's models under TensorRT-LLM's names")
    engine.add_argument("--engine-dir", type=Path, help=f"default: {defaults.engine_dir}")
    engine.add_argument("--kv-cache-blocks", type=int, help="blocks of the KV pool (default: for a full batch)")
    engine.add_argument("--kv-cache-free-gpu-mem-fraction", type=float, metavar="F", help=FRACTION_HELP)
    engine.add_argument("--max-prompt-tokens", type=int, help="limit (default: what max_seq_len allows)")
    engine.add_argument("--max-output-tokens", type=int, help="limit (default: what max_seq_len allows)")
    engine.add_argument(
        "--batch-scheduler-policy", choices=POLICIES, help=f"default: {defaults.batch_scheduler_policy}"
    )
    engine.add_argument(
        "--include-input-in-output",
        dest="exclude_input_in_output",
        action="store_false",
        help="repeat the prompt in answers to requests that do not say",
    )
    engine.add_argument("--max-prompt-bytes", type=int, help="limit before tokenizing (default: 16 for each token)")
    for name in ("max_queue_size", "cancellation_check_period_ms", "stats_check_period_ms"):
        option = f"--{name.replace('_', '-')}"
        engine.add_argument(option, type=int, help=f"default: {getattr(defaults, name)}")
    llmapi = parser.add_argument_group("flavour llmapi: TensorRT-LLM's PyTorch backend through its own Triton model")
    llmapi.add_argument("--model", help="checkpoint folder or hub name (required)")
    llmapi.add_argument(
        "--llmapi-model-dir", dest="stock_model_dir", type=Path, help=f"default: {LlmapiOptions.stock_model_dir}"
    )
    llmapi.add_argument("--llm-options", type=Path, metavar="YAML", help="options of the LLM API")
    llmapi.add_argument("--memshare-config", type=Path, metavar="JSON", help="settings of sharing")
    given = vars(parser.parse_args(arguments))
    flavour = given.pop("flavour")
    known = RepositoryOptions if flavour == "engine" else LlmapiOptions
    if flavour == "llmapi" and "model" not in given:
        instead = ", in place of --engine-dir" if "engine_dir" in given else ""
        raise UserError(f"--flavour llmapi needs --model, a checkpoint folder or hub name{instead} (add --model)")
    spelled = {action.dest: action.option_strings[0] for action in parser._actions}
    for name in given:
        if name not in known.__dataclass_fields__:
            raise UserError(f"{spelled[name]} is no option of --flavour {flavour} (leave it out)")
    if flavour == "llmapi":
        document = write_llmapi_repository(LlmapiOptions(**given))
        print(f"model repository: {given['output_dir']} (TensorRT-LLM's llmapi model over {document['model']})")
    else:
        given.setdefault("engine_dir", defaults.engine_dir)
        parameters = write_repository(RepositoryOptions(**given))
        most = "" if "kv_cache_free_gpu_mem_fraction" not in given else "at most "
        print(f"model repository: {given['output_dir']} (models {', '.join(MODELS)} over {parameters['engine_dir']})")
        print(
            f"limits: {parameters['max_prompt_tokens']} prompt tokens, {parameters['max_output_tokens']} output "
            f"tokens, {parameters['max_requests']} requests in the system; KV pool of {most}"
            f"{parameters['max_tokens_in_paged_kv_cache']} tokens"
        )
    print(f"start it: memshare triton launch {shlex.quote(str(given['output_dir']))}")
