"""``python -m trtllm_memshare explain``: one answer as a self-contained web page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.engine.null_page_files import load_null_pages
from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.evaluation.benchmark_options import check_output_file, parse_setting
from trtllm_memshare.evaluation.story import Story, tell_story
from trtllm_memshare.evaluation.variants import make_variant
from trtllm_memshare.report.explain_page import render
from trtllm_memshare.report.explain_words import describe_story
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.runners.pool_memory import check_pool
from trtllm_memshare.search.config import PRESETS, MemShareConfig
from trtllm_memshare.serving.failures import RequestFailedError
from trtllm_memshare.serving.prompts import PromptFormat, encode_prompt


def main(command: str, arguments: list[str]) -> None:
    """Writes the page.

    Raises:
      UserError: an engine, a prompt or a setting that cannot be used, or a page that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=f"memshare {command}",
        description="Generates one answer and writes a web page that shows what became of each block of its memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--engine-dir", type=Path, required=True)
    parser.add_argument("--prompt", required=True, help="text as the model expects it")
    parser.add_argument("--output", type=Path, default=Path("explain.html"), help="page to write")
    parser.add_argument("--max-new-tokens", type=int, default=2048, help="longest answer, in tokens")
    parser.add_argument(
        "--preset",
        choices=[p for p in PRESETS if p != "off"],
        help="instead of the engine's; under pressure the answer is written in a short pool",
    )
    parser.add_argument(
        "--kv-cache-blocks",
        type=int,
        help="pool of preset pressure, in blocks (default: what the answer of the full cache needs at its floor)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    engine = load_engine(options.engine_dir)
    config = _settle(engine, options.preset, dict(parse_setting(text) for text in options.set))
    if options.output.is_dir() or not options.output.parent.is_dir():
        raise UserError(f"cannot write {options.output}: its folder must exist and it must be a file (set --output)")
    check_output_file("--output", options.output)
    story = explain(engine, config, options.prompt, options.max_new_tokens, options.device, options.kv_cache_blocks)
    try:
        options.output.write_text(render(story, config, engine.bytes_per_block), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {options.output}: {error.strerror} (choose another --output)") from error
    print(describe_story(story))
    print(f"page: {options.output}")


def explain(
    engine: Engine,
    config: MemShareConfig,
    prompt: str,
    max_new_tokens: int,
    device: str = "auto",
    num_blocks: int | None = None,
) -> Story:
    """Generates the answer on the engine.

    Args:
      max_new_tokens: is cut to what fits behind the prompt.
      num_blocks: pool of settings that give up pages under pressure, see ``tell_story``.
    """
    if engine.backend != "torch":
        raise UserError(
            f"explain runs engines of the torch backend, got one of {engine.backend} (build one with --backend torch)"
        )
    if num_blocks is not None:
        if not config.pressure:
            raise UserError(
                f"--kv-cache-blocks is for preset pressure, got it with {config.preset}, which needs no short pool "
                f"(leave it out, or give --preset pressure)"
            )
        check_pool(engine, num_blocks)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir, local_files_only=True)
    # As every other command does it: special tokens once, and no text that cannot be encoded.
    input_ids = encode_prompt(tokenizer, prompt, PromptFormat(), engine.build.max_seq_len) if prompt.strip() else []
    num_prompt_tokens = len(input_ids)
    if not num_prompt_tokens:
        raise UserError(
            f"--prompt must be text that the tokenizer knows, got {quote(prompt)} (ask the model a question)"
        )
    if num_prompt_tokens >= engine.build.max_seq_len:
        raise UserError(
            f"prompt and answer must fit max_seq_len {engine.build.max_seq_len}, got {num_prompt_tokens} prompt tokens "
            f"(shorten the prompt, or build with a larger --max-seq-len)"
        )
    length = min(engine.build.max_seq_len, num_prompt_tokens + max_new_tokens)
    size = engine.build.tokens_per_block
    null_pages = load_null_pages(engine.engine_dir, engine.checkpoint, engine.build.max_seq_len)
    # One request, the block of headroom that the scheduler keeps, and the null pages.
    roomy = -(-length // size) + 2 + (0 if null_pages is None else null_pages.num_bands)
    runner = open_runner(engine, max(roomy, num_blocks or 0), device)
    room, stops, most = length - num_prompt_tokens, engine.stop_token_ids, engine.build.max_num_tokens
    try:
        return tell_story(runner, config, tokenizer, prompt, input_ids, room, length, stops, num_blocks, most)
    except RequestFailedError as error:  # what the engine cannot do with this prompt, in a sentence
        raise UserError(str(error)) from error


def _settle(engine: Engine, preset: str | None, overrides: dict[str, Any]) -> MemShareConfig:
    """The engine's settings, or those of a preset, with changes on top."""
    name = preset or engine.memshare.preset
    if name == "off":
        raise UserError("this engine shares nothing, so there is nothing to explain (give --preset aligned)")
    if preset is None and engine.memshare.shadow and "shadow" not in overrides:
        raise UserError(
            "this engine runs in shadow and gives no memory back, so there is nothing to explain (give --set "
            "shadow=false for what it would give back)"
        )
    config = make_variant(name, engine.memshare, **overrides).config
    if config.shadow or config.control != "none":
        raise UserError(
            f"explain shows what sharing does, got shadow {config.shadow} and control {config.control} (leave both out)"
        )
    return config
