"""Elements of vLLM's KV cache: in an fp8 cache what lies there, times a scale of the layer for K or V, is K or V.

VLLM keeps fp8 as bytes, and its backends read them as e4m3. A scale is one number, or one for each KV head.
Signatures of pages bring every head's vectors to length 1, and distances those of every layer, so that scales drop out
(of distances where there is one for each layer). Keys of null pages are as long as elements allow; whether that is long
enough is what the scale decides.
"""

from __future__ import annotations

from typing import Any

import torch

from trtllm_memshare.engine.null_page import stored_keys
from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.latents import keeps_latents

SERVED_TYPES = ("auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3")
"""Of vLLM's names; a checkpoint may ask for one of them where it says ``auto``."""

_FP8 = torch.float8_e4m3fn
_ROUNDING = 1e-3  # of a key's length
_INSIDE = 1 + 2**-6
"""Numbers that are to become an element are written a little larger: the CPU's operator cuts digits off where those of
GPUs round. Elements lie a sixteenth of their size apart, or more."""


def element_type(layer: Any) -> torch.dtype:
    """What an attention layer's cache holds."""
    return _FP8 if layer.kv_cache_dtype.startswith("fp8") else layer.kv_cache.dtype


def rounded(layer: Any, numbers: torch.Tensor) -> torch.Tensor:
    """Numbers that both the model and its cache can hold, as elements on the cache's device, of the same shape."""
    return numbers.to(layer.kv_cache.device, operator_type(layer)).to(element_type(layer))


def operator_type(layer: Any) -> torch.dtype:
    """In which the backend's operator takes K and V: the model's. A layer of MLA does not say it."""
    if not keeps_latents(layer):
        return layer.dtype
    return torch.bfloat16 if element_type(layer) is _FP8 else layer.kv_cache.dtype


def elements(layer: Any, numbers: torch.Tensor) -> torch.Tensor:
    """Numbers out of a layer's cache, or all of it, as elements: a view of the same shape."""
    return numbers.view(element_type(layer))


def write_elements(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Has the backend's own operator put elements into a layer's cache, which is modified.

    Args:
      key, value: ``[tokens, num_kv_heads, head_size]``, numbers that the cache can hold, of any float type and device;
        of MLA see ``latents.key_and_value_shapes``.
      slots: int64 ``[tokens]``, on the cache's device.
    """
    is_mla = keeps_latents(layer)
    rows = []
    for numbers, scale in ((key, "_k_scale"), (value, "_k_scale" if is_mla else "_v_scale")):
        numbers = numbers.to(layer.kv_cache.device, torch.float32)
        if element_type(layer) is _FP8:  # the operator divides by the scale
            numbers = numbers * getattr(layer, scale).view(-1, 1) * _INSIDE
        rows.append(numbers.to(operator_type(layer)))
    if is_mla:
        latents, cache_type = rows[1].flatten(1), layer.kv_cache_dtype
        layer.impl.do_kv_cache_update(latents, rows[0], layer.kv_cache, slots, cache_type, layer._k_scale)
    else:
        layer.impl.do_kv_cache_update(layer, *rows, layer.kv_cache, slots)


def null_key_elements(key: torch.Tensor, layer: Any) -> torch.Tensor:
    """A null page's key, float32 ``[..., head_size]``, as elements of a layer's cache, of their type."""
    return stored_keys(key, element_type(layer))


def check_null_keys(keys: torch.Tensor, layers: list[Any]) -> None:
    """Looks at whether fp8 caches hold null pages' keys as long as they were calibrated.

    Args:
      keys: float32 ``[num_bands, num_layers, num_kv_heads, head_dim]``.
      layers: vLLM's attention layers, first to last, with the scales of their checkpoint.

    Raises:
      UserError: a layer with too small a scale for that.
    """
    for index, layer in enumerate(layers):
        if element_type(layer) is not _FP8:
            continue
        scale = layer._k_scale.to(keys.device).view(-1)
        held = null_key_elements(keys[:, index], layer).float().norm(dim=-1) * scale
        share = float((held / keys[:, index].norm(dim=-1)).min())
        if share < 1 - _ROUNDING:
            least = float(scale.min())
            raise UserError(
                f"an fp8 cache with a K scale of {least:.3g} must hold null pages' keys of layer {index} as long as "
                f"calibrated, it holds {share:.2f} of that (calibrate with --kv-cache-dtype fp8 if the scale is 1 "
                f"or more, else without it; or leave null_pages out)"
            )
