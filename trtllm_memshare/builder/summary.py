"""What an engine is, in words: sizes, what a GiB of its pool holds, and what sharing will do."""

from __future__ import annotations

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.search.config import MemShareConfig

_GIB = 2**30
_WHO_RUNS = {
    True: "runs with: this project's executor and its Triton model; TensorRT-LLM's own executor and Triton's stock "
    "tensorrtllm backend know neither its extra inputs nor how to share",
    False: "runs with: this project's executor and its Triton model; the model's engine is as TensorRT-LLM builds it, "
    "but its own executor does not share",
}
"""By whether the search is inside the engine."""


def summarize(engine: Engine, search_engine: str | None = None) -> str:
    """What the engine is, in words and figures: KV block size, what a GiB holds, what MemShare will do.

    ``search_engine``: where a TensorRT engine's search will run; None = as its record says.
    """
    where = search_engine or (engine.record.search_engine if engine.record is not None else None)
    size, tokens = engine.bytes_per_block, engine.build.tokens_per_block
    per_gib = _GIB // size
    return "\n".join(
        [
            f"engine: {engine.engine_dir} ({engine.checkpoint.architecture}, backend {engine.backend})",
            f"KV cache: {size:,} bytes per block of {tokens} tokens ({engine.kv_dtype}), {per_gib:,} blocks or "
            f"{per_gib * tokens:,} tokens per GiB",
            f"MemShare: {describe_sharing(engine.memshare)}",
            *_null_page_lines(engine),
            *engine.checkpoint.notes,
            *([_WHO_RUNS[where == "embedded"]] if engine.backend == "tensorrt" and engine.memshare.searches else []),
        ]
    )


def _null_page_lines(engine: Engine) -> list[str]:
    """What retired pages become, where that is the null page."""
    if not engine.memshare.forgets:
        return []
    if engine.model_dir != engine.engine_dir / "model":
        return ["null pages: will be calibrated with the build"]
    from trtllm_memshare.engine.null_page_files import describe_null_pages

    described = describe_null_pages(engine.engine_dir)
    if described.startswith("none") and engine.backend == "torch":
        described += "; the torch runner leaves pages that were given up out of attention, which comes to the same"
    return [f"null pages: {described}"]


def describe_sharing(config: MemShareConfig) -> str:
    """One sentence on what a server with these settings does."""
    if config.preset == "off":
        return "off, every request keeps all of its blocks"
    if config.pressure:
        becomes = {"null": "the null page", "alias": "the nearest earlier page", "dropped": "nothing"}
        repeats = "" if config.need == "nearest-earlier" else "exact repeats first, then "
        return (
            f"preset {config.preset} gives nothing up while the pool has room; above {config.high_watermark:.0%} of it "
            f"pages of generated text go until {config.low_watermark:.0%}, {repeats}by {config.need}, "
            f"and become {becomes[config.retired_becomes]}; every request keeps its prompt, its last "
            f"{config.protected_tokens} tokens and {config.min_kept:.0%} of its generated pages"
            f"{', below which only repeats go' if repeats else ''}"
        )
    what = "reports repeats but shares nothing (shadow)" if config.shadow else "shares the blocks of repeats"
    if config.matcher == "runs":
        where = f"runs of at least {config.min_run_tokens} matching tokens at any shift"
    else:
        where = f"similar steps (cosine at least {config.min_step_cosine:g}), block by block"
    kept = "the newer copy stays" if config.direction == "keep-latest" else "the older copy stays"
    if config.accept_all:
        check = "no KV comparison"
    else:
        rotation = "without its rotation" if config.undo_rope else "as stored"
        layers = "every layer" if config.layer_quorum == 1 else f"{config.layer_quorum:.0%} of the layers"
        fields = {"k-and-v": "K and V", "k": "K", "v": "V"}[config.compared]
        if config.layer_vote == "mean":
            layers = "the mean of the layers"
        check = f"{fields} within a relative distance of {config.max_distance:g} in {layers}, K compared {rotation}"
        if config.pool_layers:
            check = (
                f"K and V of all layers together within a relative distance of {config.max_distance:g}, K compared "
                f"{rotation}"
            )
    if not config.count_aliases:
        kept += " and counts once in attention"
    return (
        f"preset {config.preset} {what}: {where}, {check}; {kept}, one block serves at most {config.max_aliases} "
        f"places; the prompt, the last {config.protected_tokens} tokens and the last {config.protected_steps} steps "
        f"are never given up"
    )
