"""Tables of our own through vLLM's ``AttentionGroup``: a step's and a capture's, of blocks cut for a kernel too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from trtllm_memshare.vllm.skipped_entries import SkippedEntries

WIDTH, ROWS = 8, 4  # blocks and requests that vLLM has room for
NULL = 1


class Recording(AttentionMetadataBuilder):
    """Its metadata is what it is given."""

    def __init__(self) -> None:
        self.reorder_batch_threshold = 1

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        return common_attn_metadata


def make_group(block_size: int, kernel_size: int) -> AttentionGroup:
    """A group whose kernels may read shorter blocks, as ``AttentionGroup.create_metadata_builders`` makes it."""
    group = AttentionGroup(
        SimpleNamespace(get_name=lambda: "FLASHINFER_MLA"), ["a"], SimpleNamespace(block_size=block_size), 0
    )
    group.metadata_builders = [Recording()]
    if kernel_size != block_size:
        parts = block_size // kernel_size
        group.kernel_block_size = kernel_size
        group.kernel_block_table = torch.zeros(1, ROWS, WIDTH * parts, dtype=torch.int32)
        group.kernel_block_offsets = torch.arange(parts, dtype=torch.int32)
    return group


def make_metadata(block_size: int) -> CommonAttentionMetadata:
    """Requests of five blocks, one of them null, and of four; the pool has room for eight."""
    table = torch.zeros(2, WIDTH, dtype=torch.int32)
    table[0, :5] = torch.tensor([10, NULL, 11, 12, 13])
    table[1, :4] = torch.tensor([20, 21, 22, 23])
    lengths = torch.tensor([5 * block_size - 3, 4 * block_size], dtype=torch.int32)
    starts = torch.arange(3, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, num_reqs=2, num_actual_tokens=2,
        max_query_len=1, max_seq_len=int(lengths.max()), block_table_tensor=table,
        slot_mapping=torch.zeros(2, dtype=torch.int64), seq_lens_cpu_upper_bound=lengths,
    )  # fmt: skip


@pytest.mark.parametrize("has_graphs", [False, True], ids=["no-graphs", "graphs"])
@pytest.mark.parametrize(("block_size", "kernel_size"), [(64, 64), (128, 64)])
def test_kernels_get_tables_of_the_shape_that_vllm_gives(block_size, kernel_size, has_graphs):
    """FlashInfer's MLA wants widths of whole 128 tokens, and takes a row's pages from the width, not the stride."""
    group = make_group(block_size, kernel_size)
    mode = SimpleNamespace(has_full_cudagraphs=lambda: has_graphs)
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode))
    runner = SimpleNamespace(device=torch.device("cpu"), attn_groups=[[group]], max_num_reqs=ROWS, vllm_config=config)
    skipped = SkippedEntries(runner, block_size)
    captured = group.build_metadata_for_cudagraph_capture(make_metadata(block_size))
    whole = group.build_metadata(make_metadata(block_size)).block_table_tensor.clone()
    skipped.take_null_blocks([NULL])
    skipped.follow(["a"], ())
    given = group.build_metadata(make_metadata(block_size))
    table, parts = given.block_table_tensor, block_size // kernel_size
    assert table.shape == whole.shape == (2, WIDTH * parts)
    assert table.is_contiguous()
    assert given.seq_lens.tolist() == [4 * block_size - 3, 4 * block_size]
    assert table[0, : 4 * parts].tolist() == [b * parts + i for b in (10, 11, 12, 13) for i in range(parts)]
    assert table[1, : 4 * parts].tolist() == [b * parts + i for b in (20, 21, 22, 23) for i in range(parts)]
    if has_graphs:
        assert captured.seq_lens.data_ptr() == given.seq_lens.data_ptr()
        assert captured.block_table_tensor.data_ptr() == table.data_ptr()
