"""Writes a Triton model repository over an engine directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.serving.scheduler import MAX_UTILIZATION
from trtllm_memshare.triton.model_configs import MODELS, write_model
from trtllm_memshare.triton.pool_size import check_one_fits, enough_blocks
from trtllm_memshare.triton.repository_marker import MARKER

FRACTION_HELP = (
    "share in (0, 1] of the GPU memory that the weights leave free: the pool takes no more, so that it may have fewer "
    "blocks (default: it has all of them, or does not start)"
)
_SHARE = "kv_cache_free_gpu_mem_fraction"  # TensorRT-LLM's name
_BYTES_PER_TOKEN = 16  # of the default limit in bytes; text of several languages has three to five
_PERIODS_MS = (10, 60_000)


@dataclass(frozen=True)
class RepositoryOptions:
    """What a deployment allows and how large its pool is.

    Attributes:
      engine_dir: written by ``build_engine.py``; named in the repository, not copied.
      output_dir: where the repository goes.
      kv_cache_blocks: blocks of the KV pool; None = enough for ``max_batch_size`` requests of ``max_seq_len``.
      kv_cache_free_gpu_mem_fraction: most of the GPU's memory that is free beside the weights, which the pool may take,
        in (0, 1]; the pool is smaller than ``kv_cache_blocks`` where that is less. None = it has all its blocks.
      max_prompt_tokens, max_output_tokens: of one request; None = what ``max_seq_len`` allows.
      max_prompt_bytes: of one prompt, checked before it is tokenized; None = 16 for each token.
      max_queue_size: requests that may wait beside those in flight.
      batch_scheduler_policy: ``MAX_UTILIZATION`` or ``GUARANTEED_NO_EVICT``.
      decoupled: several responses to a request, which streaming needs; without, Triton's plain ``infer`` works.
      exclude_input_in_output: leave the prompt out of answers to requests that do not say.
      cancellation_check_period_ms, stats_check_period_ms: how often clients and counters are looked at.
      force: replace a repository that is there.
    """

    engine_dir: Path
    output_dir: Path
    kv_cache_blocks: int | None = None
    kv_cache_free_gpu_mem_fraction: float | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_prompt_bytes: int | None = None
    max_queue_size: int = 256
    batch_scheduler_policy: str = MAX_UTILIZATION
    decoupled: bool = True
    exclude_input_in_output: bool = True
    cancellation_check_period_ms: int = 100
    stats_check_period_ms: int = 100
    force: bool = False


def write_repository(options: RepositoryOptions) -> dict[str, str]:
    """Writes every model of ``MODELS``; nothing is left behind if it fails.

    Returns:
      The parameters that went into the models' ``config.pbtxt``.

    Raises:
      UserError: a damaged engine, limits that cannot hold, a pool too small for one request, or a folder in the way.
    """
    engine = load_engine(options.engine_dir)
    parameters = _parameters(engine, options)
    with new_repository(options.output_dir, options.force) as draft:
        for name in MODELS:
            write_model(draft, name, parameters, engine.build.max_batch_size, options.decoupled)
        (draft / MARKER).write_text(
            json.dumps({"flavour": "engine", "engine_dir": str(engine.engine_dir), "can_wait": True}) + "\n"
        )
    return parameters


@contextlib.contextmanager
def new_repository(output_dir: Path, force: bool) -> Iterator[Path]:
    """A folder to make and fill, which takes the place of ``output_dir`` when the block has ended well.

    A repository that was there is moved aside first and goes last. Nothing is left behind if the block fails.

    Raises:
      UserError: see ``check_target``.
    """
    check_target(output_dir, force)
    target = output_dir.resolve()
    draft, retired = (target.parent / f".{target.name}.{uuid.uuid4().hex}{kind}" for kind in ("", ".retired"))
    try:
        yield draft
        if target.exists():
            os.rename(target, retired)
        os.rename(draft, target)
    finally:
        if retired.exists() and not target.exists():
            os.rename(retired, target)
        for left in (draft, retired):
            shutil.rmtree(left, ignore_errors=True)
            if left.exists():
                print(f"cannot remove all of {left} (remove it by hand)", file=sys.stderr)


def check_target(output_dir: Path, force: bool) -> None:
    """Refuses a folder that holds something else, or a repository unless ``force``."""
    if output_dir.exists() and not (output_dir / MARKER).is_file() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir} is not empty and not a repository of this project (choose another --output-dir)")
    if (output_dir / MARKER).is_file() and not force:
        raise UserError(f"there is a model repository at {output_dir} already (add --force to replace it)")


@dataclass(frozen=True)
class Deployment:
    """Limits of one deployment, with the defaults filled in; see ``RepositoryOptions``."""

    num_blocks: int
    max_prompt_tokens: int
    max_output_tokens: int
    max_prompt_bytes: int
    max_requests: int


def deployment_limits(engine: Engine, options: RepositoryOptions) -> Deployment:
    """Limits of a deployment over an engine.

    Raises:
      UserError: limits that cannot hold, or a pool too small for one request.
    """
    build = engine.build
    longest, blocks = build.max_seq_len, options.kv_cache_blocks
    if blocks is None:
        blocks = enough_blocks(engine, build.max_batch_size)
    check_one_fits(engine, blocks)
    share = options.kv_cache_free_gpu_mem_fraction
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--kv-cache-free-gpu-mem-fraction must be above 0 and at most 1, got {share:g}")
    for name in ("max_prompt_tokens", "max_output_tokens"):
        value = getattr(options, name)
        if value is not None and not 1 <= value < longest:
            raise UserError(
                f"--{name.replace('_', '-')} must be between 1 and {longest - 1}, got {value} (max_seq_len is "
                f"{longest})"
            )
    if options.max_queue_size < 0:
        raise UserError(f"--max-queue-size must not be negative, got {options.max_queue_size}")
    if options.max_prompt_bytes is not None and options.max_prompt_bytes < 1:
        raise UserError(f"--max-prompt-bytes must be at least 1, got {options.max_prompt_bytes}")
    max_prompt_tokens = options.max_prompt_tokens or longest - 1
    return Deployment(
        blocks,
        max_prompt_tokens,
        options.max_output_tokens or longest - 1,
        options.max_prompt_bytes or max_prompt_tokens * _BYTES_PER_TOKEN,
        options.max_queue_size + build.max_batch_size,
    )


def _parameters(engine: Engine, options: RepositoryOptions) -> dict[str, str]:
    limits = deployment_limits(engine, options)
    for name in ("cancellation_check_period_ms", "stats_check_period_ms"):
        value, (low, high) = getattr(options, name), _PERIODS_MS
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be between {low} and {high}, got {value}")
    share = options.kv_cache_free_gpu_mem_fraction
    return {
        "engine_dir": str(engine.engine_dir.resolve()),
        "tokenizer_dir": str(engine.model_dir.resolve()),
        "max_tokens_in_paged_kv_cache": str(limits.num_blocks * engine.build.tokens_per_block),
        **({} if share is None else {_SHARE: str(share)}),
        "batch_scheduler_policy": options.batch_scheduler_policy,
        "exclude_input_in_output": str(options.exclude_input_in_output).lower(),
        "cancellation_check_period_ms": str(options.cancellation_check_period_ms),
        "stats_check_period_ms": str(options.stats_check_period_ms),
        "max_prompt_tokens": str(limits.max_prompt_tokens),
        "max_prompt_bytes": str(limits.max_prompt_bytes),
        "max_output_tokens": str(limits.max_output_tokens),
        "max_requests": str(limits.max_requests),
    }


def memory_share_of(parameters: dict[str, str]) -> float | None:
    """What a repository's parameters say of the GPU's memory, see ``RepositoryOptions``."""
    return float(parameters[_SHARE]) if _SHARE in parameters else None
