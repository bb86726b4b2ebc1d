"""Signatures out of vLLM's cache: by the kernel, on the host, over caches as GPUs have them, by PyTorch over others."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plugins.kernels_on_host import SignaturesOnHost
from tolerances import SIGNATURE_ERROR

from trtllm_memshare.errors import UserError
from trtllm_memshare.search import page_signer
from trtllm_memshare.search.signatures import page_signatures
from trtllm_memshare.vllm.cache_signatures import CacheSignatures, PlacedSignatures, open_signatures

BLOCKS, LAYERS, HEADS, DIM, SPARE = 6, 5, 2, 32, 3
FP8 = torch.float8_e4m3fn
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class OnCuda(torch.Tensor):
    """A cache that says it is on a CUDA device."""

    is_cuda = True


class Layer:
    """An attention layer. ``packed``: V of a head behind all of its K, two rows interleaved, as AMX has it on a CPU.

    A cache of bytes is one of fp8, with scales that are the layer's own.
    """

    num_kv_heads, head_size, dtype, scales = HEADS, DIM, torch.bfloat16, 0

    def __init__(self, cache, packed=False):
        self.kv_cache, self.packed = cache.as_subclass(OnCuda), packed
        self.impl = SimpleNamespace(do_kv_cache_update=self.update)
        self.kv_cache_dtype = "fp8" if cache.dtype is torch.uint8 else "auto"
        Layer.scales += 1
        self._k_scale, self._v_scale = torch.tensor(0.03 * Layer.scales), torch.tensor(0.07 * Layer.scales)

    def update(self, layer, key, value, kv_cache, slot_mapping):
        plain = kv_cache.as_subclass(torch.Tensor)
        if self.kv_cache_dtype == "fp8":
            both = zip((key, value), (self._k_scale, self._v_scale), strict=True)
            key, value = ((rows.float() / scale).to(FP8).view(torch.uint8) for rows, scale in both)
        blocks, heads, size, _ = plain.shape
        if self.packed:
            keys, values = plain.view(blocks, heads, 2 * size, DIM).split(size, dim=2)
            values = values.view(blocks, heads, size // 2, DIM, 2)
        else:
            keys, values = plain.split(DIM, dim=-1)
        for slot, k, v in zip(slot_mapping.tolist(), key, value, strict=True):
            block, token = divmod(slot, size)
            keys[block, :, token] = k
            if self.packed:
                values[block, :, token // 2, :, token % 2] = v
            else:
                values[block, :, token] = v


def make_layers(size: int, packed: bool = False, dtype: torch.dtype = torch.bfloat16) -> list[Layer]:
    """Caches ``[blocks, heads, tokens, 2 * head size]``; in memory blocks, layers, tokens, heads."""
    pool = torch.zeros(BLOCKS, LAYERS, size, HEADS, 2 * DIM, dtype=dtype).transpose(2, 3)
    return [Layer(torch.zeros_like(pool[:, i]).contiguous() if packed else pool[:, i], packed) for i in range(LAYERS)]


def fill(layers: list[Layer], size: int, projection) -> list[torch.Tensor]:
    """Writes every slot of the scheduler's blocks in some order; V of the projection's layers, [blocks, heads, tokens,
    head size]."""
    num_blocks = BLOCKS * layers[0].kv_cache.shape[2] // size
    generator = torch.Generator().manual_seed(1)
    written = []
    for layer in layers:
        value = torch.randn(num_blocks * size, HEADS, DIM, generator=generator).bfloat16()
        slots = torch.randperm(len(value), generator=generator)
        layer.impl.do_kv_cache_update(layer, torch.randn_like(value), value, layer.kv_cache, slots)
        if layer.kv_cache_dtype == "fp8":
            value = (value.float() / layer._v_scale).to(FP8).float()
        written.append(value[slots.argsort()].view(num_blocks, size, HEADS, DIM).transpose(1, 2))
    return [written[index] for index in projection.layers.tolist()]


def compare(found, written) -> None:
    for blocks in ([len(written[0]) - 1, 0], []):
        none = torch.zeros(len(blocks))
        expected = page_signatures(written, torch.tensor(blocks), torch.empty(0), none, found.projection)
        torch.testing.assert_close(found.of_blocks(np.array(blocks, np.int64)), expected, **SIGNATURE_ERROR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("parts", [1, 2])  # a backend may cut the scheduler's blocks
def test_the_kernel_signs_what_the_backend_wrote(tmp_path, monkeypatch, parts, dtype):
    monkeypatch.setattr(page_signer, "CudaSignatures", lambda *given: SignaturesOnHost(*given, tmp_path))
    size, layers = 16, make_layers(16 // parts, dtype=dtype)
    found = open_signatures(CUDA, layers, BLOCKS // parts, size, BLOCKS // parts - 1)
    assert isinstance(found, CacheSignatures)
    assert found.description == "the kernel, on the host"
    compare(found, fill(layers, size, found.projection))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("parts", [1, 2])
def test_v_is_found_where_a_cpu_packs_it(parts, dtype):
    layers = make_layers(16 // parts, packed=True, dtype=dtype)
    found = open_signatures(CPU, layers, BLOCKS // parts, 16, BLOCKS // parts - 1)
    compare(found, fill(layers, 16, found.projection))


def test_a_packed_cache_on_a_gpu_is_read_by_pytorch_with_a_warning(monkeypatch, caplog):
    reference = page_signer.ReferencePageSigner
    monkeypatch.setattr(page_signer, "CudaSignatures", lambda *given: reference(*given, "a test"))
    layers = make_layers(16, packed=True)
    with caplog.at_level(logging.WARNING):
        found = open_signatures(CUDA, layers, BLOCKS, 16, SPARE)
    assert isinstance(found, PlacedSignatures)
    (record,) = caplog.records
    assert "PyTorch, V by its places in a block; not V that was written is not what" in record.getMessage()
    compare(found, fill(layers, 16, found.projection))


def test_a_cache_that_changes_numbers_is_refused_by_name():
    layers = make_layers(16)
    for layer in layers:
        update = layer.update
        layer.impl.do_kv_cache_update = lambda a, k, v, c, s, update=update: update(a, k, v / 2, c, s)
    with pytest.raises(UserError, match=r"1024 numbers of V must lie unchanged.*\(choose need surprisal or age\)"):
        open_signatures(CPU, layers, BLOCKS, 16, SPARE)


def test_a_cache_of_another_form_is_not_touched():
    layers = make_layers(16)
    for layer in layers:
        layer.kv_cache = [layer.kv_cache]
    with pytest.raises(
        UserError, match=r"\[blocks, 2, tokens, 64\], got \[\]; a layer's cache must be one tensor of 6"
    ):
        open_signatures(CUDA, layers, BLOCKS, 16, SPARE)
