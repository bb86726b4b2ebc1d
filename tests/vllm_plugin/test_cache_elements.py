"""What lies in an fp8 cache of vLLM, and keys of null pages as it can hold them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.cache_elements import check_null_keys, elements, rounded, write_elements
from trtllm_memshare.vllm.null_pages import attention_layers, write_null_pages

FP8 = torch.float8_e4m3fn
SCALES = st.floats(1e-3, 100)
BLOCKS, SIZE, HEADS, DIM = 3, 16, 2, 32


class FullAttentionSpec:
    """As vLLM's is called."""


def nearest(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Elements as operators of GPUs make them."""
    return (rows.float() / scale).to(FP8)


def cut_off(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Elements as vLLM's operator for CPUs makes them, which leaves digits out (``cpu_attn_fp8.hpp``, 30 Nov 2026)."""
    numbers = rows.float() * (1 / scale)
    near = numbers.to(FP8)
    is_larger = near.float().abs() > numbers.abs()
    return (near.view(torch.uint8) - is_larger.to(torch.uint8)).view(FP8)


def a_layer(
    scale: float | list[float] = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    kv_cache_dtype: str = "fp8",
    to_elements: Callable[..., torch.Tensor] = nearest,
) -> SimpleNamespace:
    """An attention layer over ``[blocks, heads, tokens, 2 * head size]``, with a stand-in of a backend's operator."""
    is_fp8 = kv_cache_dtype != "auto"

    def update(layer, key, value, kv_cache, slot_mapping):
        assert key.dtype is value.dtype is dtype
        rows = torch.cat([key, value], -1)
        if is_fp8:
            both = zip((key, value), (layer._k_scale, layer._v_scale), strict=True)
            rows = torch.cat([to_elements(r, scale.view(-1, 1)).view(torch.uint8) for r, scale in both], -1)
        for slot, row in zip(slot_mapping.tolist(), rows, strict=True):
            kv_cache[slot // SIZE, :, slot % SIZE] = row

    return SimpleNamespace(
        kv_cache=torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM, dtype=torch.uint8 if is_fp8 else dtype),
        kv_cache_dtype=kv_cache_dtype, dtype=dtype, impl=SimpleNamespace(do_kv_cache_update=update),
        _k_scale=torch.tensor(scale), _v_scale=torch.tensor(scale) / 3, num_kv_heads=HEADS, head_size=DIM,
    )  # fmt: skip


@pytest.mark.parametrize("to_elements", [nearest, cut_off])
@settings(deadline=None, max_examples=50)
@given(
    SCALES | st.lists(SCALES, min_size=HEADS, max_size=HEADS) | st.lists(SCALES, min_size=1, max_size=1),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 99),
)
def test_elements_arrive_unchanged_whatever_the_scale(to_elements, scale, dtype, seed):
    layer = a_layer(scale, dtype, to_elements=to_elements)
    key, value = rounded(layer, torch.randn(2, SIZE, HEADS, DIM, generator=torch.Generator().manual_seed(seed)))
    write_elements(layer, key, value, torch.arange(SIZE, 2 * SIZE))
    there = elements(layer, layer.kv_cache)[1].float()
    assert torch.equal(there, torch.cat([key, value], -1).float().transpose(0, 1))


def a_runner(layers: list[SimpleNamespace]) -> SimpleNamespace:
    names = [f"model.layers.{i}.attn" for i in range(len(layers))]
    group = SimpleNamespace(layer_names=names, kv_cache_spec=FullAttentionSpec())
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=dict(zip(names, layers, strict=True)))
        ),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
        cache_config=SimpleNamespace(block_size=SIZE), device=torch.device("cpu"),
    )  # fmt: skip


def test_a_null_page_is_as_long_as_an_fp8_cache_can_hold_it():
    keys = torch.randn(2, 2, HEADS, DIM, generator=torch.Generator().manual_seed(3))  # two bands, two layers
    layers = [a_layer(0.5), a_layer(kv_cache_dtype="auto")]
    write_null_pages(a_runner(layers), keys, [2, 1])
    for band, block in enumerate((2, 1)):
        eight, plain = (elements(layer, layer.kv_cache)[block].float() for layer in layers)
        assert not eight[..., DIM:].any()
        assert not plain[..., DIM:].any()
        torch.testing.assert_close(plain[..., :DIM], keys[band, 1][:, None].expand(-1, SIZE, -1), rtol=2**-8, atol=0)
        longest = keys[band, 0] * (448 / keys[band, 0].abs().amax(-1, keepdim=True))
        torch.testing.assert_close(eight[..., :DIM], longest[:, None].expand(-1, SIZE, -1), rtol=2**-4, atol=2**-9)
    assert not any(layer.kv_cache[0].any() for layer in layers)


def test_layers_that_read_another_ones_cache_are_none_of_its_own():
    """VLLM lists them with the group of the layer that they read (Gemma 3n; read on 30 November 2026)."""
    layers = [a_layer() for _ in range(4)]
    layers[2].kv_sharing_target_layer_name, layers[3].kv_sharing_target_layer_name = "model.layers.1.attn", None
    assert attention_layers(a_runner(layers)) == [layers[0], layers[1], layers[3]]


def test_a_scale_with_which_keys_are_shorter_than_calibrated_is_refused():
    keys = 30 * torch.randn(2, 2, HEADS, DIM, generator=torch.Generator().manual_seed(4))
    for_fp8 = (keys * (448 / keys.abs().amax(-1, keepdim=True))).to(FP8).float()
    check_null_keys(for_fp8, [a_layer(), a_layer(1.5)])
    check_null_keys(1000 * keys, [a_layer(kv_cache_dtype="auto")] * 2)
    check_null_keys(keys, [a_layer(), a_layer()])  # 448 is more than any of them has
    with pytest.raises(
        UserError, match=r"fp8 cache with a K scale of 0.5 must .* of layer 1 .* holds 0.50 of that .*leave"
    ):
        check_null_keys(for_fp8, [a_layer(), a_layer(0.5)])
    with pytest.raises(UserError, match=r"K scale of 0.25 must .* of layer 0 .* holds 0.25 of that"):
        check_null_keys(for_fp8, [a_layer([2.0, 0.25]), a_layer()])
    with pytest.raises(UserError, match=r"of layer 0 .*calibrate with --kv-cache-dtype fp8"):
        check_null_keys(100 * keys, [a_layer(), a_layer()])
