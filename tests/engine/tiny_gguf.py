"""Writes a small Qwen2 model as a GGUF file with the gguf package: names and metadata as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 2, 64, 96, 4, 2, 260


def write_tiny_gguf(
    path: Path,
    architecture: str = "qwen2",
    leave_out: str = "",
    change: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    seed: int = 0,
) -> Path:
    """Random weights, matrices in Q4_1, vectors in float32.

    Args:
      leave_out: a tensor that is not written; ".bias" leaves out all of that ending.
      change: adds what else the file is to hold.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, "th", "the", "<|endoftext|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3, 3])
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(258)
    writer.add_bos_token_id(258)

    def add(name: str, *shape: int) -> None:
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        if name == leave_out or (leave_out == ".bias" and name.endswith(leave_out)):
            return
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(
                name, quantize(values, gguf.GGMLQuantizationType.Q4_1), raw_dtype=gguf.GGMLQuantizationType.Q4_1
            )

    kv = HIDDEN // HEADS * KV_HEADS
    add("token_embd.weight", VOCAB, HIDDEN)
    add("output.weight", VOCAB, HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name, *shape in (
            ("attn_norm.weight", HIDDEN), ("ffn_norm.weight", HIDDEN),
            ("attn_q.weight", HIDDEN, HIDDEN), ("attn_k.weight", kv, HIDDEN), ("attn_v.weight", kv, HIDDEN),
            ("attn_q.bias", HIDDEN), ("attn_k.bias", kv), ("attn_v.bias", kv),
            ("attn_output.weight", HIDDEN, HIDDEN),
            ("ffn_gate.weight", INNER, HIDDEN), ("ffn_up.weight", INNER, HIDDEN), ("ffn_down.weight", HIDDEN, INNER),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}", *shape)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
