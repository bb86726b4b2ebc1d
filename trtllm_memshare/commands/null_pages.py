"""``memshare null-pages MODEL``: what TensorRT-LLM's PyTorch backend and vLLM read under pressure, made once."""

from __future__ import annotations

import argparse

from trtllm_memshare.engine.null_page_build import make_null_pages


def main(command: str, arguments: list[str]) -> None:
    """Makes them, on a GPU if there is one.

    Raises:
      UserError: no such checkpoint, too few positions, or a model that has no null page.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        description="Makes a model's null pages, once, for memshare serve, memshare bench and memshare vllm.",
    )
    parser.add_argument("model", help="folder of a Hugging Face checkpoint")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--max-seq-len", type=int, required=True, help="positions that need a page, in tokens")
    parser.add_argument(
        "--kv-cache-dtype", "--dtype", default="auto", help="element type of the cache (default: that of the weights)"
    )
    options = parser.parse_args(arguments)
    advice = "take --null-entries skip with memshare serve, bench or vllm serve, which needs none"
    make_null_pages(options.model, options.output, options.max_seq_len, options.kv_cache_dtype, advice)
