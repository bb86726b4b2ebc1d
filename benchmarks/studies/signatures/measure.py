"""How well signatures rank pages: rank correlation with the exact redundancy, on real traces and a real model."""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
from trtllm_memshare.search.block_distance import rotate
from trtllm_memshare.search.signatures import K, SignatureIndex, V, make_projection, page_signatures

PAGE_TOKENS, LAST_PAGES = 16, 8
"""Tokens of a page; newest pages, which are protected and not ranked."""

FORMS = [(name, field, width) for name, field in (("v", V), ("k", K)) for width in (16, 32, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="of each text (default: %(default)s)")
    parser.add_argument(
        "--output-json", type=Path, default=Path("benchmarks/studies/signatures/results/signatures.json")
    )
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    inv_freq = model.model.rotary_emb.inv_freq
    rows: list[dict[str, Any]] = []
    for text, _ in zip(token_texts(read_traces(), tokenizer, arguments.tokens), range(arguments.texts), strict=False):
        pool = read_into_pool(model, text.ids)
        exact = exact_redundancy(pool, inv_freq)[:-LAST_PAGES]
        row: dict[str, Any] = {"text": text.trace.name, "model": text.trace.model, "pages": len(exact)}
        for name, field, width in FORMS:
            found = redundancy_by_signatures(pool, inv_freq, field, width)[:-LAST_PAGES]
            row[f"{name}_{width}"] = rank_correlation(exact, found)
        rows.append(row)
        print(row, flush=True)
    forms = [f"{name}_{width}" for name, _, width in FORMS]
    figures = {
        "tokens": arguments.tokens,
        "rows": rows,
        "mean": {form: statistics.fmean(r[form] for r in rows) for form in forms},
        "smallest": {form: min(r[form] for r in rows) for form in forms},
    }
    publish(make_report(figures), arguments.output_json)


@torch.inference_mode()
def read_into_pool(model: Any, ids: list[int]) -> torch.Tensor:
    """K as stored and V of a text in whole pages: ``[pages, layers, 2, kv_heads, PAGE_TOKENS, head_dim]``, float32."""
    layers: list[torch.Tensor] = []

    def keep(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        layers.append(torch.stack([key[0], value[0]]))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kwargs["scaling"], enable_gqa=True
        )
        return attended.transpose(1, 2), None

    AttentionInterface.register("memshare_kept", keep)
    model.config._attn_implementation = "memshare_kept"
    model.model(input_ids=torch.tensor([ids]), use_cache=False)
    whole = len(ids) // PAGE_TOKENS * PAGE_TOKENS
    stored = torch.stack(layers)[:, :, :, :whole]  # [layers, 2, kv_heads, tokens, head_dim]
    return stored.unflatten(3, (-1, PAGE_TOKENS)).permute(3, 0, 1, 2, 4, 5).contiguous()


def exact_redundancy(pool: torch.Tensor, inv_freq: torch.Tensor) -> np.ndarray:
    """Mean over a page's tokens of the largest cosine with a token of a later page, float32 ``[pages]``.

    The cosine is that of K without its rotation, mean over all layers and KV heads.
    """
    pages, layers, _, heads, size, _ = pool.shape
    keys = pool[:, :, 0].permute(0, 3, 1, 2, 4).flatten(0, 1)[None]  # [1, tokens, layers, heads, head_dim]
    keys = rotate(keys, -torch.arange(pages * size)[None], inv_freq)[0]
    unit = torch.nn.functional.normalize(keys, dim=-1).flatten(1) / math.sqrt(layers * heads)
    page = torch.arange(pages * size) // size
    cosines = (unit @ unit.T).masked_fill(page[None] <= page[:, None], -1.0)
    return cosines.amax(1).view(-1, size).mean(1).numpy()


def redundancy_by_signatures(pool: torch.Tensor, inv_freq: torch.Tensor, field: int, width: int) -> np.ndarray:
    """The same from the index, as serving has it."""
    pages, layers, _, heads, size, head_dim = pool.shape
    projection, blocks = make_projection(layers, heads, head_dim, width, field), torch.arange(pages)
    signatures = page_signatures(pool, blocks, inv_freq, blocks * size, projection).numpy()
    index = SignatureIndex(size, width)
    for page, of_page in enumerate(signatures):
        index.append(page, of_page)
    return index.redundancy()


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's; no two values are equal in practice."""
    return float(np.corrcoef(first.argsort().argsort(), second.argsort().argsort())[0, 1])


if __name__ == "__main__":
    run_command_line(main)
