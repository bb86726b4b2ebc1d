"""What attention gets of the tables of each step where null entries are skipped, checked over any schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from trtllm_memshare.vllm.skipped_entries import SkippedEntries


@dataclass
class StepTables:
    """What is read of vLLM's ``CommonAttentionMetadata``."""

    block_table_tensor: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int


class StepAttention:
    """The attention of one worker. ``num_skipped``: entries that it was spared."""

    def __init__(self, null_blocks: list[int], block_size: int, max_num_reqs: int, max_model_len: int) -> None:
        self._null, self._size, self._width = set(null_blocks), block_size, -(-max_model_len // block_size)
        backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
        group = SimpleNamespace(build_metadata=lambda metadata: metadata, backend=backend)
        compilation = SimpleNamespace(cudagraph_mode=None)
        runner = SimpleNamespace(
            device=torch.device("cpu"), attn_groups=[[group]], max_num_reqs=max_num_reqs,
            vllm_config=SimpleNamespace(compilation_config=compilation),
        )  # fmt: skip
        self._skipped = SkippedEntries(runner, block_size)
        self._skipped.take_null_blocks(null_blocks)
        self._build = group.build_metadata
        self.num_skipped = 0

    def follow(self, with_null_entries: Iterable[str], ended: Iterable[str]) -> None:
        """As the worker does, before a step."""
        self._skipped.follow(with_null_entries, ended)

    def check(self, requests: list[tuple[list[int], int]]) -> None:
        """No null entry is read in this step, and all others are, in their order.

        Args:
          requests: block ids and length in tokens, of each request in the batch.
        """
        longest = max((length for _, length in requests), default=0)
        table = torch.zeros(len(requests), self._width, dtype=torch.int32)
        for row, (blocks, _) in zip(table, requests, strict=True):
            row[: len(blocks)] = torch.tensor(blocks[: len(row)], dtype=torch.int32)
        lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
        given = self._build(StepTables(table, lengths, longest))
        rows = zip(given.block_table_tensor.tolist(), given.seq_lens.tolist(), requests, strict=True)
        for row, left, (blocks, length) in rows:
            entries = blocks[: -(-length // self._size)]
            kept = [block for block in entries if block not in self._null]
            assert row[: -(-left // self._size)] == kept, f"attention reads {row}, kept are {kept} of {blocks}"
            assert left == length - self._size * (len(entries) - len(kept))
            self.num_skipped += len(entries) - len(kept)
