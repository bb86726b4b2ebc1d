"""What a model says when retired pages read as null pages: a plain forward pass over one text, and the reference.

Qwen2 and Llama shapes, and any other without null pages. Query ``t`` sees key ``j`` as it is, or, once ``j``'s page is
retired, as the null page's key with a value of zero; ``dropped`` leaves such keys out altogether, which is what a
calibrated null page amounts to. A key that stands for others too counts so many times. Layers with sliding windows see
all that these reach.
"""

from __future__ import annotations

from typing import Any

import torch

_KNOWN = ("Qwen2ForCausalLM", "LlamaForCausalLM")


def log_probabilities(
    model: Any,
    tokens: list[int],
    retired_from: torch.Tensor,
    null_keys: torch.Tensor | None,
    bands: torch.Tensor,
    counts: torch.Tensor | None = None,
    stored: torch.dtype | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities after each token, float32 ``[tokens, vocabulary]``.

    Args:
      model: a Hugging Face causal model.
      retired_from: int64 ``[tokens]``, first query that sees token ``j`` as retired; beyond the text: never.
      null_keys: float32 ``[bands, layers, kv_heads, head_dim]``; None leaves retired keys out.
      bands: int64 ``[bands + 1]``, first positions.
      counts: ``[query, key]``, how often each query sees each key; None: once. 0 = not at all, another one is in its
        place.
      stored: type of the cache that K and V lie in; None: that of the model.
      scales: ``[layers, K and V]``, what lies in such a cache times this is K or V; None: 1.
    """
    config, body = model.config, model.model
    count = len(tokens)
    position = torch.arange(count)
    causal = position[None] <= position[:, None]  # [query, key]
    gone = retired_from[None] <= position[:, None]
    if type(model).__name__ not in _KNOWN:
        assert null_keys is None
        assert counts is None or bool((counts == 1).all())
        return _by_transformers(model, tokens, torch.zeros(count, count).masked_fill(~causal | gone, -torch.inf))
    band = torch.searchsorted(bands[1:-1].contiguous(), position, right=True)
    hidden = body.embed_tokens(torch.tensor([tokens]))
    cos, sin = body.rotary_emb(hidden, position[None])
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    for index, layer in enumerate(body.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        shape = (count, -1, attention.head_dim)
        query = _rotate(attention.q_proj(normed)[0].view(shape), cos[0], sin[0]).transpose(0, 1)
        key = _rotate(attention.k_proj(normed)[0].view(shape), cos[0], sin[0]).transpose(0, 1)
        value = attention.v_proj(normed)[0].view(shape).transpose(0, 1)
        if stored is not None:
            by = torch.ones(2) if scales is None else scales[index]
            key, value = ((x / scale).to(stored).float() * scale for x, scale in zip((key, value), by, strict=True))
        key, value = (x.repeat_interleave(heads // groups, 0) for x in (key, value))
        if _is_sliding(config, index):  # nothing is given up here
            near = causal & (position[:, None] - position[None] < config.sliding_window)
            read = torch.nn.functional.scaled_dot_product_attention(query, key, value, near, scale=attention.scaling)
            hidden = _finish(layer, hidden, read.transpose(0, 1))
            continue
        logits = query @ key.transpose(1, 2) * attention.scaling
        if null_keys is None:
            logits = logits.masked_fill(gone, -torch.inf)
        else:
            null = null_keys[band, index].repeat_interleave(heads // groups, 1).transpose(0, 1)  # [heads, query, dim]
            logits = torch.where(gone, (query * null).sum(-1, keepdim=True) * attention.scaling, logits)
        if counts is not None:
            logits = logits + counts.log()
        weights = logits.masked_fill(~causal, -torch.inf).softmax(-1).masked_fill(gone, 0.0)
        hidden = _finish(layer, hidden, (weights @ value).transpose(0, 1))
    return model.lm_head(body.norm(hidden))[0].log_softmax(-1)


def _by_transformers(model: Any, tokens: list[int], mask: torch.Tensor) -> torch.Tensor:
    """The same for any model, by transformers' own code: its layers of full attention are given the mask."""

    def given(module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        return arguments, {**keywords, "attention_mask": mask[None, None]}

    layers = [layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn")]
    hooks = [layer.register_forward_pre_hook(given, with_kwargs=True) for layer in layers]
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits.log_softmax(-1)


def _is_sliding(config: Any, index: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    return kinds is not None and kinds[index] == "sliding_attention"


def _finish(layer: Any, hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    hidden = hidden + layer.self_attn.o_proj(read.reshape(1, len(read), -1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[:, None] + turned * sin[:, None]
