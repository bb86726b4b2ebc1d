"""Block tables without null entries: what attention reads is what is kept, in order, wherever the others lie.

The fakes have what vLLM 0.32's ``AttentionGroup`` and ``CommonAttentionMetadata`` have of it (read on 30 November
2026); the real ones run in ``test_engine.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.skipped_entries import SkippedEntries, check_skipping, without_entries

SIZE = 32
WIDTH = 40  # blocks; a sort that is not stable keeps the order of fewer than 17


@dataclass
class Metadata:
    block_table_tensor: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    max_query_len: int = 1
    seq_lens_cpu_upper_bound: torch.Tensor | None = None


class Group:
    def __init__(self, backend: str, threshold: int = 1, support: str = "SINGLE_ONLY") -> None:
        self.backend = SimpleNamespace(get_name=lambda: backend)
        self.builder = SimpleNamespace(
            reorder_batch_threshold=threshold, query_len_support=SimpleNamespace(name=support),
            supports_update_block_table=backend == "FLASH_ATTN",
        )  # fmt: skip

    def get_metadata_builder(self) -> SimpleNamespace:
        return self.builder

    def build_metadata(self, common_attn_metadata: Metadata, ubatch_idx: int = 0, **kwargs: Any) -> tuple:
        return common_attn_metadata, ubatch_idx, kwargs

    def build_metadata_for_cudagraph_capture(self, common_attn_metadata: Metadata, ubatch_idx: int = 0) -> tuple:
        return common_attn_metadata, ubatch_idx


def make_runner(*backends: str, has_graphs: bool | None = None, **model: Any) -> Any:
    """``has_graphs``: whether CUDA graphs hold attention, where there are any."""
    told = SimpleNamespace(**{"rswa_window": None, "is_mm_prefix_lm": False, **model})
    mode = None if has_graphs is None else SimpleNamespace(has_full_cudagraphs=lambda: has_graphs)
    groups = [[*map(Group, backends or ["CPU_ATTN", "CPU_ATTN"])]]
    return SimpleNamespace(
        device=torch.device("cpu"), attn_groups=groups, model_config=told,
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode)), max_num_reqs=6,
    )  # fmt: skip


def make_layers(alibi_slopes: Any = None) -> list[Any]:
    return [SimpleNamespace(impl=SimpleNamespace(alibi_slopes=alibi_slopes))]


LATENTS = [SimpleNamespace(impl=SimpleNamespace(), kv_lora_rank=512)]


def make_metadata() -> Metadata:
    """Two requests of 75 and 40 tokens; 0 and 9 are null pages, and one lies where the second row ends."""
    table = torch.tensor([[7, 0, 5, 0, 9], [3, 4, 9, 0, 9]], dtype=torch.int32)
    return Metadata(table, torch.tensor([75, 40], dtype=torch.int32), 75)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, WIDTH * SIZE), st.sets(st.integers(0, WIDTH - 1))), min_size=1, max_size=4))
def test_what_is_left_are_the_other_entries_in_their_order(requests):
    table = torch.zeros((len(requests), WIDTH), dtype=torch.int32)  # 0 is a null page, and behind each row's end
    lengths = torch.tensor([length for length, _ in requests], dtype=torch.int32)
    expected = []
    for row, (length, gone) in enumerate(requests):
        full, used = length // SIZE, -(-length // SIZE)
        table[row, :used] = torch.arange(10, 10 + used)
        null = sorted(page for page in gone if page < full)
        table[row, null] = torch.tensor([page % 2 for page in null], dtype=torch.int32)
        expected.append(([10 + page for page in range(used) if page not in null], length - SIZE * len(null)))
    found, left = without_entries(table, lengths, torch.tensor([0, 1], dtype=torch.int32), SIZE)
    assert found.shape == table.shape
    assert found.dtype == left.dtype == torch.int32
    for row, (blocks, length) in enumerate(expected):
        assert found[row, : len(blocks)].tolist() == blocks
        assert left[row] == length


@pytest.mark.parametrize("has_graphs", [None, False])
def test_metadata_is_replaced_only_while_a_request_has_null_entries(has_graphs):
    runner = make_runner(has_graphs=has_graphs)
    skipped = SkippedEntries(runner, SIZE)
    build = runner.attn_groups[0][0].build_metadata
    metadata = make_metadata()
    assert build(metadata, 1, num_accepted_tokens=2) == (metadata, 1, {"num_accepted_tokens": 2})
    skipped.take_null_blocks([0, 9])
    skipped.follow({"a": {1: 0}}, set())
    shorter, *others = build(metadata, 1)
    assert others == [1, {}]
    assert shorter.block_table_tensor[:, :2].tolist() == [[7, 5], [3, 4]]
    assert shorter.seq_lens.tolist() == [43, 40]
    assert shorter.block_table_tensor.shape == metadata.block_table_tensor.shape  # some kernels ask for it
    assert torch.equal(runner.attn_groups[0][1].build_metadata(metadata)[0].seq_lens, shorter.seq_lens)
    # Slots are worked out from these, and a sampler reads the lengths.
    assert torch.equal(metadata.block_table_tensor, make_metadata().block_table_tensor)
    assert torch.equal(metadata.seq_lens, make_metadata().seq_lens)
    skipped.end_step()
    assert build(metadata)[0] is metadata  # a dummy, which vLLM runs between two steps
    skipped.follow({}, {"b"})
    assert build(metadata)[0] is not metadata
    skipped.follow({}, {"a"})
    assert build(metadata)[0] is metadata
    skipped.follow({"a": {1: 0}}, {"a"})  # it ended in the step in which it gave up
    assert build(metadata)[0] is metadata


def test_where_graphs_hold_attention_it_reads_tables_of_our_own_from_the_capture_on():
    """They are what a step must be read by, with null entries and without, and vLLM's own are as they were."""
    runner = make_runner(has_graphs=True)
    skipped = SkippedEntries(runner, SIZE)
    layers, other = runner.attn_groups[0]
    dummies = Metadata(torch.zeros(4, 5, dtype=torch.int32), torch.full((4,), 9, dtype=torch.int32), 5 * SIZE)
    captured = layers.build_metadata_for_cudagraph_capture(dummies, 0)[0]
    table, lengths = captured.block_table_tensor, captured.seq_lens
    assert lengths.tolist() == [9] * 4
    assert table.stride() == dummies.block_table_tensor.stride()
    skipped.take_null_blocks([0, 9])
    for names, row, length in (({}, [7, 0, 5], 75), ({"a": {1: 0}}, [7, 5], 43)):
        skipped.follow(names, ())
        metadata = make_metadata()
        # Two requests where the graph has room for four: vLLM has rows of zeros for the others.
        metadata.block_table_tensor = torch.cat((metadata.block_table_tensor, torch.zeros(2, 5, dtype=torch.int32)))
        metadata.seq_lens = torch.tensor([75, 40, 0, 0], dtype=torch.int32)
        whole = metadata.block_table_tensor.clone()
        for group in (layers, other):  # both read the same tables in a step
            found = group.build_metadata(metadata)[0]
            assert found.block_table_tensor.data_ptr() == table.data_ptr()
            assert found.seq_lens.data_ptr() == lengths.data_ptr()
            assert table[0, : len(row)].tolist() == row
            assert table[1, :2].tolist() == [3, 4]
            assert lengths.tolist() == [length, 40, 0, 0]
        assert torch.equal(metadata.block_table_tensor, whole)
        assert metadata.seq_lens.tolist() == [75, 40, 0, 0]
        skipped.end_step()
    layers.build_metadata(make_metadata())  # a dummy between two steps
    assert lengths.tolist() == [75, 40, 0, 0]


@pytest.mark.parametrize(
    ("runner", "layers", "message"),
    [
        (make_runner(), make_layers(torch.ones(4)), "ALiBi"),
        (make_runner(rswa_window=64), make_layers(), "sliding windows"),
        (make_runner(is_mm_prefix_lm=True), make_layers(), "bidirectional"),
        (make_runner("FLASH_ATTN", "FLASHINFER"), make_layers(), "CPU_ATTN, FLASH_ATTN, TRITON_ATTN, got FLASHINFER"),
        (SimpleNamespace(device=torch.device("cpu")), make_layers(), "build_metadata"),
        (make_runner("FLASHMLA_SPARSE"), LATENTS, r"CPU_MLA, .*, got FLASHMLA_SPARSE \(.* or serve this model without"),
        (make_runner("TRITON_ATTN"), LATENTS, "got TRITON_ATTN"),
        (make_runner("CPU_MLA"), make_layers(), r"got CPU_MLA \(.* or set null_entries to read"),
    ],
)
def test_other_attention_is_refused_by_name(runner, layers, message):
    with pytest.raises(UserError, match=message):
        check_skipping(runner, layers)


@pytest.mark.parametrize(
    ("group", "is_counted"),
    [
        (Group("FLASHMLA", 128, "UNIFORM"), True),
        (Group("FLASH_ATTN_MLA", 512, "VARLEN"), False),  # takes any lengths together
        (Group("TRITON_MLA", 1, "UNIFORM"), False),
        (Group("FLASH_ATTN", 128, "UNIFORM"), False),
    ],
)
@pytest.mark.parametrize("has_graphs", [False, True])
def test_what_latent_attention_counts_on_the_host_is_shorter_too(group, is_counted, has_graphs):
    """Where one that reads a text stands first, others with gaps take the path that counts there."""
    runner = make_runner(has_graphs=has_graphs)
    runner.attn_groups = [[group]]
    skipped = SkippedEntries(runner, SIZE)
    skipped.take_null_blocks([0, 9])
    skipped.follow({"a": {1: 0}}, ())
    for longest in (1, 29):
        metadata = make_metadata()
        metadata.max_query_len, metadata.seq_lens_cpu_upper_bound = longest, metadata.seq_lens.clone()
        shorter = group.build_metadata(metadata)[0]
        assert shorter.seq_lens.tolist() == [43, 40]
        counted = [43, 40] if is_counted and longest > 1 else [75, 40]
        assert shorter.seq_lens_cpu_upper_bound.tolist() == counted
        assert metadata.seq_lens_cpu_upper_bound.tolist() == [75, 40]  # vLLM reads it once more


def test_backends_of_latent_attention_are_those_of_its_layers():
    check_skipping(make_runner("CPU_MLA"), LATENTS)
    check_skipping(make_runner("CPU_ATTN"), make_layers())


def test_beside_sliding_windows_the_one_group_is_looked_at_and_nobody_is_sent_to_read():
    """What is refused there has no other way with null entries: null pages are not read beside windows."""
    runner = make_runner("FLEX_ATTENTION")
    runner.attn_groups += make_runner("CPU_ATTN").attn_groups
    check_skipping(runner, make_layers(), 1)
    runner.model_config.is_mm_prefix_lm = True
    for group, message in (
        (0, r"got FLEX_ATTENTION \(choose one by --attention-backend, or serve this model without MemShare\)"),
        (
            1,
            r"bidirectional prefixes \(for text alone give --language-model-only, or serve this model without MemShare",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_skipping(runner, make_layers(), group)


def test_layers_in_two_groups_that_share_metadata_are_refused():
    """Model runner V1 gives one's metadata to the other, with vLLM's own table: only lengths would be shorter."""
    for backend, reuses_tables in (("CPU_ATTN", True), ("FLASH_ATTN", False)):
        check_skipping(make_runner(backend, backend), make_layers(), 0, reuses_tables)
    check_skipping(make_runner("FLASH_ATTN"), make_layers(), 0, True)
    with pytest.raises(
        UserError, match=r"needs one attention group for all .*, got 2 \(set VLLM_USE_V2_MODEL_RUNNER=1"
    ):
        check_skipping(make_runner("FLASH_ATTN", "FLASH_ATTN"), make_layers(), 0, True)
