"""``memshare serve --engine-dir E``: an OpenAI-compatible server over our executor, in one process without Triton."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer

from trtllm_memshare.errors import UserError, quote, read_text, shorten
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.serving.scheduler import MAX_UTILIZATION, POLICIES
from trtllm_memshare.triton.inputs import TEXT_NAMES
from trtllm_memshare.triton.metrics import ExecutorCollector
from trtllm_memshare.triton.repository import FRACTION_HELP, RepositoryOptions, deployment_limits
from trtllm_memshare.triton.request_metrics import RequestMetrics
from trtllm_memshare.triton.server import check_port
from trtllm_memshare.triton.service import ExecutorService, LocalCall
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.text_service import TextLimits, TextService
from trtllm_memshare.triton.token_model import make_executor
from trtllm_memshare.triton.token_requests import Limits

API_KEY_VARIABLE = "MEMSHARE_API_KEY"
_CHECK_S, _ANSWER_S = 0.5, 1.0
_MAX_DRAIN_S = 86_400


def main(command: str, arguments: list[str]) -> None:
    """Serves until SIGTERM or Ctrl-C, then lets requests in flight end.

    Raises:
      UserError: a wrong option, a damaged engine, or FastAPI and uvicorn are missing.
    """
    options = _parser(command).parse_args(arguments)
    try:
        import uvicorn

        from trtllm_memshare.triton.openai_app import Endpoint, make_app
    except ImportError as error:
        raise UserError(f"serve --engine-dir needs {error.name} (pip install '.[serve]')") from error
    check_port("--port", options.host, options.port)
    if not 0 <= options.drain_seconds <= _MAX_DRAIN_S:
        raise UserError(f"--drain-seconds must be between 0 and {_MAX_DRAIN_S}, got {quote(options.drain_seconds)}")
    api_key = _api_key()
    engine = load_engine(options.engine_dir)
    deployment = deployment_limits(
        engine,
        RepositoryOptions(
            options.engine_dir,
            Path(),
            kv_cache_blocks=options.kv_cache_blocks,
            kv_cache_free_gpu_mem_fraction=options.kv_cache_free_gpu_mem_fraction,
            max_prompt_tokens=options.max_prompt_tokens,
            max_output_tokens=options.max_output_tokens,
            max_prompt_bytes=options.max_prompt_bytes,
            max_queue_size=options.max_queue_size,
            batch_scheduler_policy=options.batch_scheduler_policy,
        ),
    )
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir, local_files_only=True)
    if options.chat_template is not None:
        tokenizer.chat_template = read_text(options.chat_template, "--chat-template")
        _check_template(tokenizer, options.chat_template)
    executor, description = make_executor(
        engine, deployment.num_blocks, options.batch_scheduler_policy, options.kv_cache_free_gpu_mem_fraction
    )
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry)
    registry.register(ExecutorCollector(executor.status, engine.build.max_batch_size, engine.bytes_per_block))
    token_service = ExecutorService(
        executor,
        Limits(deployment.max_prompt_tokens, deployment.max_output_tokens, deployment.max_requests, engine.vocab_size),
        engine.stop_token_ids,
        engine.build.tokens_per_block,
        True,
        metrics,
    )

    async def submit(inputs: dict[str, Any]) -> LocalCall:
        return LocalCall(token_service, RequestTensors.of_values(inputs, TEXT_NAMES))

    limits = TextLimits(deployment.max_prompt_tokens, deployment.max_prompt_bytes, deployment.max_requests)
    endpoint = Endpoint(
        TextService(tokenizer, limits, submit, metrics),
        options.served_model_name or options.engine_dir.resolve().name,
        deployment.max_output_tokens,
        engine.build.max_seq_len,
        lambda: executor.is_alive,
        registry,
        api_key,
    )
    print(f"{engine.engine_dir}: {description}")
    print(f"OpenAI-compatible endpoint: http://{options.host}:{options.port}/v1, model {endpoint.model}", flush=True)
    config = uvicorn.Config(
        make_app(endpoint),
        options.host,
        options.port,
        log_level="warning",
        timeout_graceful_shutdown=options.drain_seconds,
    )
    with executor:
        _end_when(lambda: not executor.is_alive)
        server = uvicorn.Server(config)
        # Until uvicorn has its own, and once more after draining: it must not end the process before the executor is
        # left.
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
        server.run()


def _api_key() -> str:
    """What requests must carry; empty where the variable is not set. Raises UserError if it is set to nothing."""
    key = os.environ.get(API_KEY_VARIABLE)
    if key is not None and not key.strip():  # a secret that was not filled in would open the server to everybody
        raise UserError(f"{API_KEY_VARIABLE} must hold a key, got an empty one (set it, or unset it to serve without)")
    key = (key or "").strip()  # of a secret's file, the end of its line
    if not (key.isascii() and key.isprintable()):  # never shown
        raise UserError(f"{API_KEY_VARIABLE} must hold printable ASCII characters, got others (choose another key)")
    return key


def _check_template(tokenizer: Any, path: Path) -> None:
    """Raises UserError for a template that no conversation could be put into."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(f"--chat-template {shorten(str(path))} is no template: {shorten(str(error))}") from error
    except Exception:
        return  # it may refuse this conversation and take others


def _end_when(has_failed: Any) -> None:
    """A failed executor takes the process with it, for a supervisor to start it anew."""

    def check() -> None:
        if has_failed():
            print("memshare: the executor has failed, or its step does not end: the server ends", flush=True)
            threading.Timer(_ANSWER_S, os._exit, (1,)).start()
        else:
            again()

    def again() -> None:
        timer = threading.Timer(_CHECK_S, check)
        timer.daemon = True
        timer.start()

    again()


def _parser(command: str) -> argparse.ArgumentParser:
    defaults = RepositoryOptions(Path(), Path())
    parser = argparse.ArgumentParser(
        prog=command,
        description="With --engine-dir: an OpenAI-compatible server over an engine of build_scripts/build_engine.py "
        "(/v1/completions, /v1/chat/completions, /v1/models, /health, /metrics). Without it, as serve MODEL "
        "[--null-pages FOLDER | --null-entries skip] [--memshare-config FILE] ...: trtllm-serve with MemShare and all "
        "its own options (see docs/pytorch_backend.md). An API key, if there shall be one, is read from the variable "
        f"{API_KEY_VARIABLE}.",
        allow_abbrev=False,
    )
    parser.add_argument("--engine-dir", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--served-model-name", help="name that clients use (default: the engine folder's)")
    parser.add_argument("--chat-template", type=Path, metavar="JINJA", help="default: the tokenizer's own")
    parser.add_argument("--kv-cache-blocks", type=int, help="blocks of the KV pool (default: for a full batch)")
    parser.add_argument("--kv-cache-free-gpu-mem-fraction", type=float, metavar="F", help=FRACTION_HELP)
    for name in ("max-prompt-tokens", "max-output-tokens", "max-prompt-bytes"):
        parser.add_argument(f"--{name}", type=int, help="limit (default: what max_seq_len allows)")
    parser.add_argument("--max-queue-size", type=int, default=defaults.max_queue_size, help="default: %(default)s")
    parser.add_argument("--batch-scheduler-policy", choices=POLICIES, default=MAX_UTILIZATION)
    parser.add_argument(
        "--drain-seconds", type=int, default=60, help="for requests in flight after SIGTERM (default: %(default)s)"
    )
    return parser
