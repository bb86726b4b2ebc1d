"""The signature kernel, run on the host, against float64 and against its specification in PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import types

import numpy as np
import pytest
import torch
from plugins.kernels_on_host import SignatureShape, SignaturesOfLibrary, SignaturesOnHost
from search.float64_reference import page_signatures_float64
from tolerances import SIGNATURE_ERROR, SIGNATURE_FLOAT64_ERROR

from trtllm_memshare.errors import UserError
from trtllm_memshare.search import cuda_signatures, page_signer
from trtllm_memshare.search.cuda_signatures import SignatureVariant
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES
from trtllm_memshare.search.page_signer import make_page_signer
from trtllm_memshare.search.signatures import K, V, fields_of_pool, make_projection, page_signatures
from trtllm_memshare.serving.redundancy_source import ValueRedundancy

BLOCKS, LAYERS = 6, 5
NO_TURN = torch.zeros(0)


def make_pool(dtype, heads, size, dim):
    values = torch.randn(BLOCKS, LAYERS, 2, heads, size, dim, generator=torch.Generator().manual_seed(4))
    return (values * 40).to(torch.int8) if dtype == torch.int8 else values.to(dtype)


def frequencies(rotary: int) -> torch.Tensor:
    return (1.0 / 1e6 ** (torch.arange(0, rotary, 2, dtype=torch.float64) / max(1, rotary))).float()


@pytest.mark.parametrize("name", ELEMENT_TYPES)
@pytest.mark.parametrize(
    ("field", "heads", "size", "dim", "rotary", "width"),
    [
        (K, 2, 16, 64, 64, 64),
        (K, 5, 12, 72, 36, 20),  # turned in part; vectors that four does not divide; a last group of four tokens
        (K, 1, 9, 256, 0, 4),  # as stored
        (V, 3, 32, 128, 0, 64),
    ],
)
def test_error_against_float64(signature_library, tmp_path, name, field, heads, size, dim, rotary, width):
    """Of both forms of the kernel and of the specification, at positions up to 32,000."""
    pool, projection = make_pool(getattr(torch, name), heads, size, dim), make_projection(3, heads, dim, width, field)
    pool[4, :, field, 0, 1] = 0  # a vector of zeros
    blocks, positions = torch.tensor([4, 0, 2]), torch.tensor([32000, 8, 1024])
    taken = fields_of_pool(pool, projection), frequencies(rotary), projection
    exact = page_signatures_float64(taken[0], blocks, taken[1], positions, projection.matrix)
    assert (exact[0, 1] == 0).all() == (heads == 1)  # of all zeros nothing is made
    for signer in (SignaturesOnHost(*taken, tmp_path), SignaturesOfLibrary(*taken, signature_library)):
        assert np.abs(signer.page_signatures(blocks, positions).numpy() - exact).max() < SIGNATURE_FLOAT64_ERROR
    reference = page_signatures(taken[0], blocks, taken[1], positions, projection)
    assert np.abs(reference.numpy() - exact).max() < SIGNATURE_FLOAT64_ERROR


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
def test_signatures_against_the_specification(
    signature_library, tmp_path, name, field, heads, size, dim, rotary, width
):
    """By the kernel that NVRTC compiles for one shape, and by the library's for any: the same bits."""
    pool, projection = (
        make_pool(getattr(torch, name), heads, size, dim),
        make_projection(LAYERS, heads, dim, width, field),
    )
    pool[2, :, field, 0, 1] = 0  # a vector of zeros
    pool[3, :, field, :, 2] = 0  # a token of zeros
    blocks, positions = torch.tensor([3, 0, 2]), torch.tensor([32000, 8, 1024])
    fields = fields_of_pool(pool, projection)
    signer = SignaturesOnHost(fields, frequencies(rotary), projection, tmp_path)
    expected = page_signatures(fields, blocks, frequencies(rotary), positions, projection)
    got = signer.page_signatures(blocks, positions)
    torch.testing.assert_close(got, expected, **SIGNATURE_ERROR)
    assert (got[0, 2] == 0).all()
    signer.library.memshare_run_backwards(1)
    assert torch.equal(signer.page_signatures(blocks, positions), got)
    for_any = SignaturesOfLibrary(fields, frequencies(rotary), projection, signature_library)
    assert torch.equal(for_any.page_signatures(blocks, positions), got)


@pytest.mark.parametrize("order", ["LHBNC", "BLNHC"])
def test_the_order_of_a_pool_in_memory_changes_nothing(tmp_path, order):
    """vLLM's orders of layers, blocks, heads, tokens and content, which is K then V."""
    pool, projection = make_pool(torch.float16, 2, 8, 32), make_projection(LAYERS, 2, 32)
    content = torch.cat(pool.unbind(2), -1).permute(1, 0, 2, 3, 4)  # LBHNC
    places = ["LBHNC".index(letter) for letter in order]
    stored = content.permute(places).contiguous().permute([order.index(letter) for letter in "LBHNC"])
    fields = [stored[layer][..., 32:] for layer in projection.layers]
    expected = page_signatures(fields_of_pool(pool, projection), torch.arange(BLOCKS), NO_TURN, NO_TURN, projection)
    assert torch.equal(page_signatures(fields, torch.arange(BLOCKS), NO_TURN, NO_TURN, projection), expected)
    got = SignaturesOnHost(fields, NO_TURN, projection, tmp_path).page_signatures(
        torch.arange(BLOCKS), torch.zeros(BLOCKS)
    )
    torch.testing.assert_close(got, expected, **SIGNATURE_ERROR)


class OnCuda(torch.Tensor):
    """A pool that says it is on a CUDA device."""

    is_cuda = True


class Pages:
    """Two requests' generated pages, as ``ValueRedundancy`` asks for them."""

    tokens_per_block = 8

    def generated_pages(self, request_id):
        return (1, 4, np.array([0, 2, 5, 1])) if request_id == 7 else (0, 2, np.array([3, 4]))


def test_redundancy_while_serving_is_that_of_the_kernel_where_the_pool_is_on_a_gpu(tmp_path, monkeypatch):
    """The source that pressure asks, once over the kernel and once over PyTorch: the same numbers."""
    pool = make_pool(torch.bfloat16, 2, 8, 64)
    asked = []

    class Kernel(SignaturesOnHost):
        def __init__(self, fields, inv_freq, projection):
            super().__init__(fields, inv_freq, projection, tmp_path)

        def page_signatures(self, block_ids, positions):
            asked.append(block_ids.tolist())
            return super().page_signatures(block_ids, positions)

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
    fields = fields_of_pool(pool, projection)
    assert make_page_signer(fields, NO_TURN, projection).description == "PyTorch reference (the pool is on cpu)"

    def no_cuda_core(*_):
        raise UserError("cuda.core is missing")

    monkeypatch.setattr(page_signer, "CudaSignatures", no_cuda_core)
    signer = make_page_signer(fields_of_pool(pool.as_subclass(OnCuda), projection), NO_TURN, projection)
    assert signer.description == "PyTorch reference (cuda.core is missing)"
    warning = "signatures of pages are computed by PyTorch, not by the CUDA kernel: cuda.core is missing"
    assert [record.getMessage() for record in caplog.records] == [warning]


class OfFirstGpu(OnCuda):
    """Names a device too."""

    @property
    def device(self):
        return torch.device("cuda", 0)


@pytest.mark.parametrize("fault", ["compile", "load"])
def test_a_kernel_that_cannot_be_compiled_or_loaded_leaves_signatures_to_pytorch(monkeypatch, caplog, fault):
    """``CudaSignatures`` itself, on a device that the host plays."""

    class DriverError(Exception):
        """As ``cuda.core``'s, whose type is private and derives from nothing else."""

    def compile_source(*_):
        if fault == "compile":
            raise RuntimeError("invalid architecture")
        return types.SimpleNamespace(get_kernel=refuse)

    def refuse(name):
        raise DriverError("no kernel image is available")

    projection = make_projection(LAYERS, 1, 32)
    fields = fields_of_pool(make_pool(torch.float16, 1, 8, 32).as_subclass(OfFirstGpu), projection)
    to, tensor = torch.Tensor.to, torch.tensor
    core = types.SimpleNamespace(Device=lambda index: types.SimpleNamespace(set_current=lambda: None))
    monkeypatch.setattr(cuda_signatures, "import_cuda_core", lambda: core)
    monkeypatch.setattr(cuda_signatures, "compile_source", compile_source)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, dtype: to(self, dtype))
    monkeypatch.setattr(torch, "tensor", lambda values, dtype, device: tensor(values, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    signer = make_page_signer(fields, NO_TURN, projection)
    said = {
        "compile": "page_signatures does not compile for sm_103, SignatureVariant(",
        "load": "page_signatures for sm_103 cannot be loaded: no kernel image is available",
    }[fault]
    assert signer.description.startswith(f"PyTorch reference ({said}")
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"signatures of pages are computed by PyTorch, not by the CUDA kernel: {said}"
    )


def test_a_block_out_of_the_pool_is_not_read(signature_library, tmp_path):
    pool, projection = make_pool(torch.float32, 1, 8, 32), make_projection(LAYERS, 1, 32, 4)
    taken = fields_of_pool(pool, projection), frequencies(32), projection
    for signer in (SignaturesOnHost(*taken, tmp_path), SignaturesOfLibrary(*taken, signature_library)):
        got = signer.page_signatures(torch.tensor([BLOCKS, 1, -1]), torch.zeros(3))
        assert torch.isnan(got[[0, 2]]).all()
        assert torch.isfinite(got[1]).all()


def test_the_library_refuses_what_no_kernel_takes_and_blames_nobody_else(signature_library):
    """Before any address is read: they are null. No pages are a success, of a shape that there is."""
    good = {"dtype": 2, "num_layers": 3, "num_kv_heads": 2, "tokens_per_block": 16, "head_dim": 64, "width": 64}

    def sign(count=1, **other):
        shape = SignatureShape(**{**good, **other})
        return signature_library.memshare_page_signatures(*[None] * 7, count, ctypes.byref(shape), None)

    for other in (
        {"dtype": 5}, {"dtype": -1}, {"num_layers": 0}, {"num_kv_heads": 0}, {"tokens_per_block": 4},
        {"tokens_per_block": 129}, {"head_dim": 33}, {"head_dim": 258}, {"rotary_dim": 66}, {"rotary_dim": 7},
        {"field": 2}, {"field": -1}, {"width": 0}, {"width": 68}, {"width": 6}, {"count": -1},
    ):  # fmt: skip
        assert sign(**{"count": 0, **other}) == 1, other
    assert signature_library.memshare_page_signatures(*[None] * 7, 1, None, None) == 1
    assert sign(count=0) == 0


def test_every_element_type_has_a_variant_and_what_no_kernel_takes_is_refused():
    pool, projection = make_pool(torch.float32, 2, 8, 32), make_projection(LAYERS, 2, 32)
    fields = fields_of_pool(pool, projection)
    for name in ELEMENT_TYPES:
        macros = dict(SignatureVariant.of([f.to(getattr(torch, name)) for f in fields], 0, projection).macros)
        assert (macros["MEMSHARE_SHAPE"], macros["MEMSHARE_CHOSEN"]) == ("3,2,8,32,0", "1,64")
    assert dict(SignatureVariant.of(fields, 0, projection).macros)["MEMSHARE_STRIDES"] == "5120,256,32"
    with pytest.raises(ValueError, match="width of a signature must be a multiple of 4 and at most 64, got 68"):
        SignatureVariant.of(fields, 0, make_projection(LAYERS, 2, 32, 68))
    for others in (
        fields[:2],
        [*fields[:2], fields[2].half()],
        [f.transpose(2, 3).contiguous().transpose(2, 3) for f in fields],
    ):
        with pytest.raises(ValueError, match="a projection of 3 layers reads as many fields"):
            SignatureVariant.of(others, 0, projection)
