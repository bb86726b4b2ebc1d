"""The signature kernel, run on the host, against its specification in PyTorch."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from plugins.kernels_on_host import compile_for_host
from tolerances import SIGNATURE_ERROR

from trtllm_memshare.errors import UserError
from trtllm_memshare.search import page_signer
from trtllm_memshare.search.cuda_signatures import SignatureVariant
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES
from trtllm_memshare.search.page_signer import make_page_signer
from trtllm_memshare.search.signatures import K, V, make_projection, page_signatures
from trtllm_memshare.serving.redundancy_source import ValueRedundancy

BLOCKS, LAYERS = 6, 5


@pytest.fixture
def run(tmp_path):
    """Compiles for a pool and projection, once, and runs ``page_signatures`` as the reference is called."""
    libraries = {}

    def run(pool, block_ids, inv_freq, positions, projection, backwards=False):
        variant = SignatureVariant.of(pool, 2 * len(inv_freq), projection)
        if variant not in libraries:
            macros = (f"{name}={value}" for name, value in variant.macros)
            libraries[variant] = compile_for_host(tmp_path, "page_signatures.cpp", *macros)
        library = libraries[variant]
        library.memshare_run_backwards(int(backwards))
        out = torch.full((len(block_ids), variant.tokens_per_block, projection.width), -7.0)
        inputs = (block_ids.int(), positions.int(), inv_freq, torch.from_numpy(projection.layers), projection.matrix)
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (pool, *inputs, out)]
        assert library.memshare_page_signatures(addresses[0], BLOCKS, *addresses[1:], len(block_ids)) == 0
        return out

    return run


def make_pool(dtype, heads, size, dim):
    values = torch.randn(BLOCKS, LAYERS, 2, heads, size, dim, generator=torch.Generator().manual_seed(4))
    return (values * 40).to(torch.int8) if dtype == torch.int8 else values.to(dtype)


def frequencies(rotary: int) -> torch.Tensor:
    return (1.0 / 1e6 ** (torch.arange(0, rotary, 2, dtype=torch.float64) / max(1, rotary))).float()


@pytest.mark.parametrize(
    ("name", "field", "heads", "size", "dim", "rotary", "width"),
    [
        ("float32", K, 2, 8, 64, 64, 64),
        ("float16", V, 3, 32, 64, 64, 64),
        ("bfloat16", K, 1, 12, 128, 64, 32),  # part of a head is rotated; a page that eight does not divide
        ("float8_e4m3fn", V, 2, 16, 256, 0, 20),
        ("int8", K, 5, 16, 32, 32, 64),
    ],
)
def test_signatures_against_the_specification(run, name, field, heads, size, dim, rotary, width):
    pool, projection = (
        make_pool(getattr(torch, name), heads, size, dim),
        make_projection(LAYERS, heads, dim, width, field),
    )
    pool[2, :, field, 0, 1] = 0  # a vector of zeros
    pool[3, :, field, :, 2] = 0  # a token of zeros
    blocks, positions = torch.tensor([3, 0, 2]), torch.tensor([32000, 8, 1024])
    expected = page_signatures(pool, blocks, frequencies(rotary), positions, projection)
    got = run(pool, blocks, frequencies(rotary), positions, projection)
    torch.testing.assert_close(got, expected, **SIGNATURE_ERROR)
    assert (got[0, 2] == 0).all()
    assert torch.equal(run(pool, blocks, frequencies(rotary), positions, projection, backwards=True), got)


class OnCuda(torch.Tensor):
    """A pool that says it is on a CUDA device."""

    is_cuda = True


class Pages:
    """Two requests' generated pages, as ``ValueRedundancy`` asks for them."""

    tokens_per_block = 8

    def generated_pages(self, request_id):
        return (1, 4, np.array([0, 2, 5, 1])) if request_id == 7 else (0, 2, np.array([3, 4]))


def test_redundancy_while_serving_is_that_of_the_kernel_where_the_pool_is_on_a_gpu(run, monkeypatch):
    """The source that pressure asks, once over the kernel and once over PyTorch: the same numbers."""
    pool = make_pool(torch.bfloat16, 2, 8, 64)
    asked = []

    class Kernel:
        description = "the kernel, on the host"

        def __init__(self, pool, inv_freq, projection):
            self._arguments = pool.as_subclass(torch.Tensor), inv_freq, projection

        def page_signatures(self, block_ids, positions):
            pool, inv_freq, projection = self._arguments
            asked.append(block_ids.tolist())
            return run(pool, block_ids, inv_freq, positions, projection)

    monkeypatch.setattr(page_signer, "CudaSignatures", Kernel)
    sources = [ValueRedundancy(Pages(), pool.as_subclass(OnCuda)), ValueRedundancy(Pages(), pool)]
    for source in sources:
        source.catch_up([7, 9])
    assert asked == [[2, 5, 1, 3, 4]]  # all requests together
    for request, pages in ((7, np.arange(1, 4)), (9, np.arange(2))):
        kernel, plain = (source.measure(request, pages, len(pages)) for source in sources)
        np.testing.assert_allclose(kernel, plain, rtol=1e-5, atol=1e-6)
        assert plain[0] > 0.1


def test_the_signer_says_why_it_is_the_reference(monkeypatch, caplog):
    pool, projection = make_pool(torch.float16, 1, 8, 32), make_projection(LAYERS, 1, 32)
    assert make_page_signer(pool, frequencies(0), projection).description == "PyTorch reference (the pool is on cpu)"

    def no_cuda_core(*_):
        raise UserError("cuda.core is missing")

    monkeypatch.setattr(page_signer, "CudaSignatures", no_cuda_core)
    signer = make_page_signer(pool.as_subclass(OnCuda), frequencies(0), projection)
    assert signer.description == "PyTorch reference (cuda.core is missing)"
    warning = "signatures of pages are computed by PyTorch, not by the CUDA kernel: cuda.core is missing"
    assert [record.getMessage() for record in caplog.records] == [warning]


def test_a_block_out_of_the_pool_is_not_read(run):
    pool, projection = make_pool(torch.float32, 1, 8, 32), make_projection(LAYERS, 1, 32, 4)
    got = run(pool, torch.tensor([BLOCKS, 1, -1]), frequencies(32), torch.zeros(3), projection)
    assert torch.isnan(got[[0, 2]]).all()
    assert torch.isfinite(got[1]).all()


def test_every_element_type_has_a_variant_and_widths_are_checked():
    for name in ELEMENT_TYPES:
        macros = dict(SignatureVariant(name, 28, 4, 32, 128, 128, 3, V, 64).macros)
        assert macros["MEMSHARE_CHOSEN"] == "3,1,64"
    with pytest.raises(ValueError, match="width of a signature must be a multiple of 4 and at most 64, got 68"):
        SignatureVariant("int8", 28, 4, 32, 128, 128, 3, V, 68)
