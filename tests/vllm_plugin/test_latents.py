"""Caches of multi-head latent attention: what is written there and what signatures read, over a stand-in of a layer.

The stand-in has what vLLM 0.32's ``MLAAttention`` and its backends have of it (read on 30 November 2026). The real ones
run in ``test_engine_latents.py``.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plugins.kernels_on_host import SignaturesOnHost
from tolerances import SIGNATURE_ERROR

from trtllm_memshare.errors import UserError
from trtllm_memshare.search import page_signer
from trtllm_memshare.search.signatures import page_signatures
from trtllm_memshare.vllm.cache_elements import elements, rounded, write_elements
from trtllm_memshare.vllm.cache_pages import open_cache_pages
from trtllm_memshare.vllm.cache_signatures import open_signatures
from trtllm_memshare.vllm.latents import key_and_value_shapes, pieces_of_latents

BLOCKS, LAYERS, SIZE, KEY, SPARE = 6, 4, 16, 64, 3
CPU, CUDA, FP8 = torch.device("cpu"), torch.device("cuda"), torch.float8_e4m3fn


class OnCuda(torch.Tensor):
    """A cache that says it is on a CUDA device."""

    is_cuda = True


class LatentLayer:
    """A layer over ``[blocks, tokens, latent then key]``. It has no ``dtype``, and one scale."""

    num_kv_heads, qk_rope_head_dim = 1, KEY

    def __init__(self, rank=512, dtype=torch.bfloat16, scale=0.03, swapped=False):
        self.kv_lora_rank, self.head_size, self.swapped = rank, rank + KEY, swapped
        self.kv_cache = torch.zeros(BLOCKS, SIZE, rank + KEY, dtype=dtype).as_subclass(OnCuda)
        self.kv_cache_dtype = "fp8" if dtype is torch.uint8 else "auto"
        self._k_scale = torch.tensor(scale)
        self.impl = SimpleNamespace(do_kv_cache_update=self.update)

    def update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale):
        assert kv_c_normed.dtype is k_pe.dtype
        assert kv_c_normed.shape == (len(slot_mapping), self.kv_lora_rank)
        assert k_pe.shape == (len(slot_mapping), 1, KEY)
        assert kv_cache_dtype == self.kv_cache_dtype
        parts = [k_pe[:, 0], kv_c_normed] if self.swapped else [kv_c_normed, k_pe[:, 0]]
        rows = torch.cat(parts, -1)
        if kv_cache_dtype == "fp8":
            rows = (rows.float() / k_scale).to(FP8).view(torch.uint8)
        kv_cache.as_subclass(torch.Tensor).view(-1, rows.shape[1])[slot_mapping] = rows


def make_layers(device, **more):
    layers = [LatentLayer(**more) for _ in range(LAYERS)]
    if device == CPU:
        for layer in layers:
            layer.kv_cache = layer.kv_cache.as_subclass(torch.Tensor)
    return layers


TYPES = [torch.bfloat16, torch.float32, torch.uint8]


@pytest.mark.parametrize("dtype", TYPES)
def test_latents_and_keys_arrive_as_they_are(dtype):
    layer = LatentLayer(dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    shapes = key_and_value_shapes(layer)
    assert shapes == ((1, KEY), (4, 128))
    key, value = (rounded(layer, torch.randn(SIZE, *shape, generator=generator)) for shape in shapes)
    write_elements(layer, key, value, torch.arange(SIZE, 2 * SIZE))
    there = elements(layer, layer.kv_cache).as_subclass(torch.Tensor)
    assert torch.equal(there[1, :, :512].float(), value.float().flatten(1))
    assert torch.equal(there[1, :, 512:].float(), key[:, 0].float())
    assert not there[0].float().any()
    assert torch.equal(pieces_of_latents(layer, there)[1].float(), value.float().transpose(0, 1))


@pytest.mark.parametrize(
    ("rank", "dtype", "device"),
    [
        (512, torch.bfloat16, CUDA),
        (512, torch.uint8, CUDA),
        (96, torch.bfloat16, CUDA),
        *((512, t, CPU) for t in TYPES),
    ],
)
def test_latents_are_signed_by_the_kernel_and_by_pytorch(tmp_path, monkeypatch, rank, dtype, device):
    monkeypatch.setattr(page_signer, "CudaSignatures", lambda *given: SignaturesOnHost(*given, tmp_path))
    layers = make_layers(device, rank=rank, dtype=dtype)
    found = open_signatures(device, layers, BLOCKS, SIZE, SPARE)
    assert found.description.startswith("the kernel" if device == CUDA else "PyTorch")
    written = []
    for layer in layers:
        key, value = (torch.randn(BLOCKS * SIZE, *shape) for shape in key_and_value_shapes(layer))
        value = rounded(layer, value)
        write_elements(layer, rounded(layer, key), value, torch.arange(BLOCKS * SIZE))
        written.append(value.as_subclass(torch.Tensor).float().unflatten(0, (BLOCKS, SIZE)).transpose(1, 2))
    chosen = [written[index] for index in found.projection.layers.tolist()]
    blocks, none = torch.tensor([5, 0]), torch.zeros(2)
    expected = page_signatures(chosen, blocks, torch.empty(0), none, found.projection)
    torch.testing.assert_close(found.of_blocks(np.array([5, 0])), expected, **SIGNATURE_ERROR)


def test_a_cache_of_another_form_is_refused_by_name():
    """Latents that lie elsewhere are seen by what was written; a packed cache, as of fp8_ds_mla, by its shape."""
    layers = make_layers(CPU, swapped=True)
    with pytest.raises(UserError, match=r"V that was written is not what is read there.*\(choose need surprisal"):
        open_signatures(CPU, layers, BLOCKS, SIZE, SPARE)
    for layer in layers:
        layer.kv_cache = torch.zeros(BLOCKS, SIZE, 656, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"must be \[blocks, tokens, 576\], got \[6, 16, 656\]"):
        open_signatures(CPU, layers, BLOCKS, SIZE, SPARE)


def test_pages_of_latents_are_not_compared_whole():
    with pytest.raises(UserError, match=r"nearest-earlier compares pages.*got \[6, 16, 576\] \(take redundancy\)"):
        open_cache_pages(make_layers(CPU), SIZE, SPARE)
