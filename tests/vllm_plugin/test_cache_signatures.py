"""Signatures out of vLLM's cache: the kernel, on the host, over caches as GPU backends have them, and over others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plugins.kernels_on_host import SignaturesOnHost
from tolerances import SIGNATURE_ERROR

from trtllm_memshare.errors import UserError
from trtllm_memshare.search import page_signer
from trtllm_memshare.vllm import cache_signatures
from trtllm_memshare.vllm.cache_signatures import CacheSignatures, open_signatures
from trtllm_memshare.vllm.redundancy import ValueSignatures

BLOCKS, LAYERS, HEADS, DIM, SPARE = 6, 5, 2, 32, 3


class OnCuda(torch.Tensor):
    """A cache that says it is on a CUDA device."""

    is_cuda = True


class Layer:
    """An attention layer; ``packed``: as the CPU backend fills the same shape, V of a head behind all of its K."""

    num_kv_heads, head_size = HEADS, DIM

    def __init__(self, cache, packed=False):
        self.kv_cache, self.packed = cache.as_subclass(OnCuda), packed
        self.impl = SimpleNamespace(do_kv_cache_update=self.update)

    def update(self, layer, key, value, kv_cache, slot_mapping):
        plain = kv_cache.as_subclass(torch.Tensor)
        blocks, heads, size, _ = plain.shape
        if self.packed:
            keys, values = plain.view(blocks, heads, 2 * size, DIM).split(size, dim=2)
        else:
            keys, values = plain.split(DIM, dim=-1)
        for slot, k, v in zip(slot_mapping.tolist(), key, value, strict=True):
            keys[slot // size, :, slot % size], values[slot // size, :, slot % size] = k, v


def make_layers(size: int, packed: bool = False) -> list[Layer]:
    """Caches ``[blocks, heads, tokens, 2 * head size]``; in memory blocks, layers, tokens, heads."""
    pool = torch.zeros(BLOCKS, LAYERS, size, HEADS, 2 * DIM, dtype=torch.bfloat16).transpose(2, 3)
    return [Layer(torch.zeros_like(pool[:, i]).contiguous() if packed else pool[:, i], packed) for i in range(LAYERS)]


def make_runner(has_full_graphs: bool = True) -> SimpleNamespace:
    mode = SimpleNamespace(has_full_cudagraphs=lambda: has_full_graphs)
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode))
    return SimpleNamespace(device=torch.device("cuda"), vllm_config=config)


@pytest.mark.parametrize("parts", [1, 2])  # a backend may cut the scheduler's blocks
def test_the_kernel_signs_what_the_backend_wrote(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(page_signer, "CudaSignatures", lambda *given: SignaturesOnHost(*given, tmp_path))
    size, layers = 16, make_layers(16 // parts)
    num_blocks = BLOCKS // parts
    found = open_signatures(make_runner(), layers, num_blocks * size, size, num_blocks - 1)
    assert isinstance(found, CacheSignatures)
    assert found.description == "the kernel, on the host"
    beside = ValueSignatures(layers, num_blocks * size, size, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        value = torch.randn(num_blocks * size, HEADS, DIM, generator=generator).bfloat16()
        layer.impl.do_kv_cache_update(
            layer, value, value, layer.kv_cache, torch.randperm(len(value), generator=generator)
        )
    for blocks in ([num_blocks - 1, 0], []):
        got, expected = (torch.from_numpy(source.of_blocks(blocks)) for source in (found, beside))
        torch.testing.assert_close(got, expected, **SIGNATURE_ERROR)


def test_a_cache_of_another_order_leaves_it_to_pytorch_with_a_warning(monkeypatch, caplog):
    taken = []
    monkeypatch.setattr(cache_signatures, "ValueSignatures", lambda *given: taken.append(given))
    reference = page_signer.ReferencePageSigner
    monkeypatch.setattr(page_signer, "CudaSignatures", lambda *given: reference(*given, "a test"))
    layers = make_layers(16, packed=True)
    open_signatures(make_runner(has_full_graphs=False), layers, BLOCKS * 16, 16, SPARE)
    assert len(taken) == 1
    (record,) = caplog.records
    assert "not from vLLM's cache: V that was written is not what is read there, by up to 0." in record.getMessage()
    with pytest.raises(UserError, match=r"nor beside full CUDA graphs \(give --compilation-config"):
        open_signatures(make_runner(), layers, BLOCKS * 16, 16, SPARE)


def test_a_cache_of_another_form_is_not_touched(caplog):
    layers = make_layers(16)
    for layer in layers:
        layer.kv_cache = [layer.kv_cache]
    with pytest.raises(UserError, match=r"a layer's cache must be \[blocks, 2, tokens, 64\], got \[\]"):
        open_signatures(make_runner(), layers, BLOCKS * 16, 16, SPARE)
