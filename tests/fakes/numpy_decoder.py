"""A decoder's forward pass in numpy, over a paged pool reached through addresses and table entries alone.

Llama, Qwen2 and Qwen3 from a Hugging Face checkpoint. Layout of the pool and the address of a block are those of
TensorRT-LLM (kvCacheUtils.h: base of the layer + entry * bytes of one layer's K or V block; inside a block
[num_kv_heads, tokens_per_block, head_dim]; K is stored after RoPE).
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

NULL = np.iinfo(np.int32).max


class Alone:
    """Links of a model that is in one piece. Others add attention over tensor-parallel ranks, and pass hidden states
    from stage to stage, as TensorRT-LLM's engines do inside themselves (allreduce, send and recv of functional.py)."""

    tp_size, tp_rank, pp_size, pp_rank = 1, 0, 1, 0

    def add(self, partial):
        return partial


class NumpyDecoder:
    """One rank's layers and heads. ``links``: to the other ranks."""

    def __init__(self, model_dir, links=None):
        self.links = links or Alone()
        self.config = json.loads((Path(model_dir) / "config.json").read_text())
        self.weights = load_file(Path(model_dir) / "model.safetensors")
        c, tp_size = self.config, self.links.tp_size
        self.dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        self.num_layers = c["num_hidden_layers"] // self.links.pp_size
        self.first_layer = self.num_layers * self.links.pp_rank
        self.is_first, self.is_last = self.links.pp_rank == 0, self.links.pp_rank == self.links.pp_size - 1
        self.heads, self.kv_heads = c["num_attention_heads"] // tp_size, c["num_key_value_heads"] // tp_size
        for name, weight in self.weights.items():
            if ".self_attn." in name and "_norm" not in name:
                axis = 1 if "o_proj" in name else 0
                self.weights[name] = np.array_split(weight, tp_size, axis)[self.links.tp_rank]
        rope = c.get("rope_parameters") or {}
        theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
        self.inv_freq = (1.0 / theta ** (np.arange(0, self.dim, 2) / self.dim)).astype(np.float32)

    def forward(self, step):
        """Logits of each sequence's last token, or hidden states; writes K and V of every token to the pool."""
        w, eps = self.weights, self.config["rms_norm_eps"]
        if self.is_first:
            x = w["model.embed_tokens.weight"][step.input_ids]
        else:
            x = self.links.receive((len(step.position_ids), self.config["hidden_size"]))
        angle = step.position_ids[:, None].astype(np.float64) * self.inv_freq.astype(np.float64)
        cos, sin = np.cos(angle).astype(np.float32)[:, None], np.sin(angle).astype(np.float32)[:, None]
        for layer in range(self.num_layers):
            p = f"model.layers.{self.first_layer + layer}."
            h = _norm(x, w[p + "input_layernorm.weight"], eps)
            q, k, v = (self._project(h, p + f"self_attn.{n}_proj").reshape(len(x), -1, self.dim) for n in "qkv")
            if p + "self_attn.q_norm.weight" in w:
                q, k = (_norm(t, w[p + f"self_attn.{n}_norm.weight"], eps) for t, n in ((q, "q"), (k, "k")))
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            attended = self._attend(layer, q, k, v, step)
            x = x + self.links.add(self._project(attended.reshape(len(x), -1), p + "self_attn.o_proj"))
            h = _norm(x, w[p + "post_attention_layernorm.weight"], eps)
            gate, up = (self._project(h, p + f"mlp.{n}_proj") for n in ("gate", "up"))
            x = x + self._project(gate / (1 + np.exp(-gate)) * up, p + "mlp.down_proj")
        if not self.is_last:
            self.links.send(x)
            return x
        x = _norm(x, w["model.norm.weight"], eps)[step.last_token_ids - 1]
        return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T

    def _project(self, x, name):
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def _attend(self, layer, q, k, v, step):
        out, group = np.empty_like(q), self.heads // self.kv_heads
        start = 0
        for row, (count, length) in enumerate(zip(step.query_lengths, step.lengths, strict=True)):
            part, begin = slice(start, start + count), length - count
            start += count
            positions = np.arange(begin, length)
            for field, states in enumerate((k, v)):
                units = step.unit(layer, step.offsets[row, field, positions // step.size])
                step.units[units, :, positions % step.size] = states[part].astype(step.units.dtype)
            blocks = -(-length // step.size)
            keys, values = (
                step.units[step.unit(layer, step.offsets[row, field, :blocks])]
                .transpose(1, 0, 2, 3)
                .reshape(self.kv_heads, -1, self.dim)[:, :length]
                .astype(np.float32)
                for field in (0, 1)
            )
            query = q[part].reshape(count, self.kv_heads, group, self.dim).transpose(1, 2, 0, 3)
            scores = query @ keys[:, None].transpose(0, 1, 3, 2) * np.float32(self.dim**-0.5)
            scores[..., np.arange(length) > positions[:, None]] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = scores / scores.sum(-1, keepdims=True) @ values[:, None]
            out[part] = mixed.transpose(2, 0, 1, 3).reshape(count, self.heads, self.dim)
        return out


class PagedStep:
    """One step's inputs and the pool as TensorRT-LLM's kernels see it: units of one layer's K or V block."""

    def __init__(self, pool_address, pool_bytes, decoder, size, inputs, kv_dtype):
        self.size, self.num_layers = size, decoder.num_layers
        unit_bytes = decoder.kv_heads * size * decoder.dim * np.dtype(kv_dtype).itemsize
        shape = (pool_bytes // unit_bytes, decoder.kv_heads, size, decoder.dim)
        self.units = array_at(pool_address, kv_dtype, shape)
        self.input_ids, self.last_token_ids = inputs.get("input_ids"), inputs.get("last_token_ids")
        self.offsets, is_generation = inputs["kv_cache_block_offsets"][0], inputs["is_generation"]
        self.query_lengths = np.where(is_generation, 1, inputs["context_lengths"])
        self.lengths = inputs["sequence_length"]
        spans = zip(self.query_lengths, self.lengths, strict=True)
        self.position_ids = np.concatenate([np.arange(n - q, n) for q, n in spans])

    @staticmethod
    def unit(layer, entries):
        return entries + 2 * layer


def array_at(address, dtype, shape):
    """The memory at an address as an array; whoever calls has checked that it is there."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(address), dtype).reshape(shape)


def block_distances(units, num_layers, inputs, size):
    """What MemShareBlockSearch computes, in float64: ``[pairs, num_layers, 4]``."""
    new, old, delta = (inputs[f"memshare_{n}"] for n in ("new_rows", "old_rows", "position_delta"))
    inv_freq = inputs["memshare_inv_freq"].astype(np.float64)
    sums = np.zeros((len(new), num_layers, 4), np.float32)
    for pair in range(len(new)):
        rows = np.flatnonzero(new[pair] >= 0)
        if not len(rows):
            continue
        a, b = new[pair, rows], old[pair, rows]
        angle = delta[pair, rows, None] * inv_freq
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        for layer in range(num_layers):
            for field in (0, 1):
                x, y = (
                    units[r // size * num_layers * 2 + layer * 2 + field, :, r % size].astype(np.float64)
                    for r in (a, b)
                )
                y = _rotate(y, cos, sin) if field == 0 else y
                sums[pair, layer, 2 * field : 2 * field + 2] = ((x - y) ** 2).sum(), (x**2).sum()
    return sums


def _norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True, dtype=np.float32) + np.float32(eps)) * weight


def _rotate(x, cos, sin):
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
