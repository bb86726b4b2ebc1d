"""Signatures by CUDA: what compiles and is refused, on every machine; what the kernel computes, where a GPU is."""

from __future__ import annotations

import io

import pytest
import torch
from tolerances import SIGNATURE_ERROR

from trtllm_memshare.search.cuda_signatures import SOURCE, CudaSignatures, SignatureVariant, compile_signatures
from trtllm_memshare.search.kernel_compiler import compile_source, parse_resources
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES, kernel_source
from trtllm_memshare.search.signatures import K, V, fields_of_pool, make_projection, page_signatures

BLOCKS, LAYERS, HEADS, SIZE, DIM = 9, 6, 2, 16, 64
STRIDES = (28 * 2 * 4 * 32 * 128, 32 * 128, 128)
INV_FREQ = (1.0 / 1e6 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)).float()


def make_pool(dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(BLOCKS, LAYERS, 2, HEADS, SIZE, DIM, generator=torch.Generator().manual_seed(2))
    return (values * 40).to(torch.int8) if dtype == torch.int8 else values.to(dtype)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "field"), [("bfloat16", V), ("float8_e4m3fn", K)])
def test_the_kernel_compiles_without_a_gpu_and_does_not_spill(arch, name, field):
    pytest.importorskip("cuda.core", reason="cuda.core is not installed (extra cuda)")
    logs = io.StringIO()
    compile_signatures(SignatureVariant(name, 3, 4, 32, 128, 128, STRIDES, field, 64), arch, logs=logs)
    reports = [part for part in logs.getvalue().split("Compiling entry function")[1:] if f"for '{arch}'" in part]
    assert [part.split("'")[1] for part in reports] == ["page_signatures"]
    resources = parse_resources(reports[0])
    assert resources.spill_bytes == resources.stack_bytes == 0
    assert resources.registers <= 128
    assert resources.shared_bytes <= 48 << 10


@pytest.mark.parametrize("name", ELEMENT_TYPES)
def test_the_form_of_the_plugin_library_does_not_spill(name):
    """Shape, strides and width are learned at launch."""
    pytest.importorskip("cuda.core", reason="cuda.core is not installed (extra cuda)")
    logs, element = io.StringIO(), ("MEMSHARE_ELEMENT", ELEMENT_TYPES[name].cuda_name)
    compile_source(kernel_source(SOURCE), "page_signatures", [element], "sm_90", logs=logs)
    resources = parse_resources(logs.getvalue())
    assert resources.spill_bytes == resources.stack_bytes == 0
    assert resources.registers <= 128


def test_a_pool_on_the_cpu_and_tensors_that_do_not_fit_are_refused():
    projection = make_projection(LAYERS, HEADS, DIM)
    fields = fields_of_pool(make_pool(torch.float16), projection)
    with pytest.raises(ValueError, match="needs a pool on a CUDA device, got cpu"):
        CudaSignatures(fields, INV_FREQ, projection)
    with pytest.raises(ValueError, match=r"must be one of float32, .* got float64"):
        SignatureVariant("float64", 3, 4, 32, 128, 128, STRIDES, V, 64)


def on_gpu(dtype: torch.dtype, field: int, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pool, projection = make_pool(dtype), make_projection(LAYERS, HEADS, DIM, field=field)
    fields = fields_of_pool(pool.cuda(), projection)
    return fields_of_pool(pool, projection), projection, CudaSignatures(fields, INV_FREQ, projection, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in ELEMENT_TYPES], ids=str)
@pytest.mark.parametrize("field", [K, V])
def test_signatures_against_the_specification(dtype, field, tmp_path):
    fields, projection, signatures = on_gpu(dtype, field, tmp_path)
    blocks, positions = torch.tensor([3, 0, 8]), torch.tensor([32000, 8, 1024])
    got = signatures.page_signatures(blocks, positions)
    torch.testing.assert_close(
        got.cpu(), page_signatures(fields, blocks, INV_FREQ, positions, projection), **SIGNATURE_ERROR
    )
    assert torch.equal(signatures.page_signatures(blocks, positions), got)
    assert signatures.page_signatures(blocks[:0], positions[:0]).shape == (0, SIZE, projection.width)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "field"), [("bfloat16", V), ("float8_e4m3fn", K), ("int8", K)])
def test_signatures_small_for_the_sanitizer(name, field, tmp_path):
    """gpu_suite.sh picks it by its name."""
    test_signatures_against_the_specification(getattr(torch, name), field, tmp_path)
