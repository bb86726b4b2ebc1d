"""Where vLLM's own backends put K and V, in vLLM's own views of a cache, is where pages are read; needs vLLM.

The last kernel of GPU backends, which scatters rows into the views that it is given, is a loop here: it would want a
GPU.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheTensor,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from trtllm_memshare.search.nearest_page import relative_distances_of_rows
from trtllm_memshare.vllm.cache_pages import open_cache_pages
from trtllm_memshare.vllm.cache_signatures import CacheSignatures, PlacedSignatures, open_signatures

BLOCKS, LAYERS, HEADS, SIZE, DIM = 6, 5, 2, 16, 32
FP8 = torch.float8_e4m3fn


def scatter(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, *scales):
    """``reshape_and_cache_flash`` over caches ``[blocks, tokens, KV heads, head size]``."""
    size = key_cache.shape[1]
    for rows, cache, scale in zip((key, value), (key_cache, value_cache), scales, strict=True):
        if kv_cache_dtype == "fp8":
            rows, cache = (rows.float() / scale).to(FP8).view(torch.uint8), cache.view(torch.uint8)
        for row, slot in zip(rows, slot_mapping.tolist(), strict=True):
            cache[slot // size, slot % size] = row


@pytest.mark.parametrize("kernel_block_size", [SIZE, SIZE // 2])
@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    ("module", "name", "kv_cache_dtype"),
    [
        ("flash_attn", "FlashAttentionImpl", "auto"),
        ("flash_attn", "FlashAttentionImpl", "fp8"),
        ("flex_attention", "FlexAttentionImpl", "auto"),
        ("triton_attn", "TritonAttentionImpl", "auto"),
        ("triton_attn", "TritonAttentionImpl", "fp8"),
    ],
)
def test_v_of_every_backend_and_layout(monkeypatch, module, name, kv_cache_dtype, layout, kernel_block_size):
    backend = importlib.import_module(f"vllm.v1.attention.backends.{module}")
    monkeypatch.setattr(backend, "reshape_and_cache_flash", scatter, raising=False)
    monkeypatch.setattr(backend, "triton_reshape_and_cache_flash", scatter, raising=False)
    monkeypatch.setattr(torch.ops._C_cache_ops, "reshape_and_cache_flash", scatter, raising=False)
    dtype = torch.uint8 if kv_cache_dtype == "fp8" else torch.bfloat16
    spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=HEADS, head_size=DIM, dtype=dtype)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    total = LAYERS * BLOCKS * spec.page_size_bytes
    placed = KVCacheTensor(total, [str(i) for i in range(LAYERS)], layer_stride, block_stride)
    raw = torch.zeros(total, dtype=torch.int8)
    try:
        caches = create_kv_cache_views(raw, spec, BLOCKS, layout, placed, kernel_block_size)
    except ValueError as error:
        pytest.skip(f"vLLM itself does not cut blocks in this layout: {error}")
    impl = SimpleNamespace(
        attn_type="decoder", head_size=DIM, kv_cache_dtype=kv_cache_dtype, _is_per_token_head_quant=False,
        fp8_dtype=FP8, _set_kv_ptr_range=False,
    )  # fmt: skip
    impl.do_kv_cache_update = getattr(backend, name).do_kv_cache_update.__get__(impl)
    layers = [
        SimpleNamespace(
            num_kv_heads=HEADS, head_size=DIM, impl=impl, kv_cache=cache, kv_cache_dtype=kv_cache_dtype,
            dtype=torch.bfloat16, _k_scale=torch.tensor(0.03 * (i + 1)), _v_scale=torch.tensor(0.07 * (i + 1)),
        )
        for i, cache in enumerate(caches)
    ]  # fmt: skip
    assert isinstance(open_signatures(torch.device("cuda"), layers, BLOCKS, SIZE, BLOCKS - 1), CacheSignatures)
    compare_pages(layers, SIZE)


@pytest.mark.parametrize(("isa", "dtype"), [("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)])
def test_pages_of_the_cpu_backend_whatever_instructions_it_packs_for(isa, dtype):
    backend = importlib.import_module("vllm.v1.attention.backends.cpu_attn").CPUAttentionBackendImpl
    impl = SimpleNamespace(attn_type="decoder", kv_cache_dtype="auto")
    impl.do_kv_cache_update = backend.do_kv_cache_update.__get__(impl)
    layers = [
        SimpleNamespace(
            num_kv_heads=HEADS, head_size=DIM, impl=impl, isa=isa, kv_cache_dtype="auto", dtype=dtype,
            _k_scale_float=1.0, _v_scale_float=1.0,
            kv_cache=torch.zeros(BLOCKS, HEADS, 32, 2 * DIM, dtype=dtype),
        )
        for _ in range(LAYERS)
    ]  # fmt: skip
    rows = torch.zeros(1, HEADS, DIM, dtype=dtype)
    try:
        impl.do_kv_cache_update(layers[0], rows, rows, layers[0].kv_cache, torch.tensor([0]))
    except RuntimeError as error:  # the part of its build that a CPU without AVX-512 loads
        if "Unsupported CPU attention configuration" not in str(error):
            raise
        pytest.skip(f"vLLM itself does not pack for {isa} on this CPU: {error}")
    assert isinstance(open_signatures(torch.device("cpu"), layers, BLOCKS, 32, BLOCKS - 1), PlacedSignatures)
    compare_pages(layers, 32)


def compare_pages(layers, size: int) -> None:
    """Distances of two pages are those of what the backend wrote into them."""
    rows = [torch.randn(2 * size, HEADS, DIM).to(layers[0].dtype) for _ in ("key", "value")]
    pages = open_cache_pages(layers, size, BLOCKS - 1)
    for layer in layers:  # blocks 0 and 1
        layer.impl.do_kv_cache_update(layer, *rows, layer.kv_cache, torch.arange(2 * size))
    expected = max(relative_distances_of_rows(p[:1], p[1:]).item() for p in (r.float().view(2, -1) for r in rows))
    rounding = 0.02 if layers[0].kv_cache_dtype == "fp8" else 1e-4
    assert pages.distances([1], [0]).item() == pytest.approx(expected, rel=rounding)
