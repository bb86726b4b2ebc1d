"""What sharing cannot work with, read from the config.json of a TensorRT-LLM engine."""

from __future__ import annotations

from typing import Any

from trtllm_memshare.errors import UserError, quote

_REUSE = ("enable_block_reuse", "enable_kv_cache_reuse")  # of KvCacheConfig, and of Triton's backend


def check_engine_config(config: dict[str, Any], where: str) -> None:
    """Refuses an engine whose cache does more than sharing knows of.

    Args:
      config: config.json: version, pretrained_config, build_config.
      where: names the file in errors.

    Raises:
      UserError: beam search, speculative decoding, a window, block reuse, or no paged cache, packed input or chunks.
    """
    build, model = config["build_config"], config["pretrained_config"]
    plugins = build["plugin_config"]
    _check(build.get("max_beam_width", 1) == 1, where, f"max_beam_width {build.get('max_beam_width')}", "1",
           "beams share blocks of their own: build with --max_beam_width 1")  # fmt: skip
    mode = build.get("speculative_decoding_mode")
    drafts = build.get("max_draft_len") or 0
    _check(drafts == 0 and mode in (None, 1, "NONE"), where, f"max_draft_len {drafts} and mode {mode}",
           "no speculative decoding", "rejected drafts rewrite blocks: build without it")  # fmt: skip
    window = _find(model, ("sliding_window", "max_attention_window", "max_attention_window_size"))
    length = build.get("max_seq_len") or 0
    windows = [w for w in (window if isinstance(window, list) else [window]) if w]
    _check(all(isinstance(w, int) for w in windows), where, f"an attention window {quote(window)}", "tokens",
           "the engine directory is damaged: build the engine again")  # fmt: skip
    slides = [w for w in windows if w < length]
    used = model.get("use_sliding_window", True)
    _check(not (slides and used), where, f"an attention window of {slides} tokens", f"max_seq_len {length}",
           "a window rewrites blocks that sharing relies on: build without it")  # fmt: skip
    _check(not plugins.get("streamingllm"), where, "streamingllm", "full attention",
           "it rewrites blocks that sharing relies on: build without --streamingllm")  # fmt: skip
    reuse = [key for key in _REUSE if _find(config, (key,))]
    _check(not reuse, where, f"{' and '.join(reuse)} on", "KV-cache reuse off",
           "a shared block holds other tokens than its hash says: set enable_block_reuse to false")  # fmt: skip
    kind = str(build.get("kv_cache_type") or "PAGED").rpartition(".")[2].upper()
    _check(kind == "PAGED" and plugins.get("paged_kv_cache") is not False, where, f"kv_cache_type {kind}", "PAGED",
           "build with --kv_cache_type paged")  # fmt: skip
    _check(plugins.get("remove_input_padding", True), where, "remove_input_padding off", "packed input",
           "build with --remove_input_padding enable")  # fmt: skip
    _check(plugins.get("use_paged_context_fmha", True), where, "use_paged_context_fmha off",
           "it on, since prompts and paused requests are computed in chunks",
           "build with --use_paged_context_fmha enable, without int8 KV cache or fp8 KV on plain weights")  # fmt: skip
    _check(not build.get("gather_context_logits"), where, "gather_context_logits on", "logits of last tokens",
           "build without it")  # fmt: skip


def _check(holds: bool, where: str, got: str, expected: str, remedy: str) -> None:
    if not holds:
        raise UserError(f"{where} has {got}, expected {expected} ({remedy})")


def _find(document: Any, keys: tuple[str, ...]) -> Any:
    """The first true value under one of the keys, at any depth."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key in keys and value:
                return value
            if found := _find(value, keys):
                return found
    return None
