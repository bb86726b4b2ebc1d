"""The parts of vLLM 0.32's two model runners that are read, one step at a time.

V1 was read on 27 November 2026. V2 (``vllm/v1/worker/gpu``) on 30 November 2026; ``test_model_runners.py`` runs both
for real.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def _flat(chunks: Sequence[Sequence[int]]) -> list[int]:
    return [slot for chunk in chunks for slot in chunk]


class FakeRunnerV1:
    """Rows of a batch, buffers with a copy on the host, and a sampler whose ``forward`` is called."""

    device = torch.device("cpu")

    def __init__(self, **tables: list[int]) -> None:
        self.sampler = SimpleNamespace(forward=self._sample)
        self.query_start_loc = self._buffer(9)
        self.slots = self._buffer(16)
        discarded = torch.zeros(8, dtype=torch.bool)
        self.discard_request_mask = SimpleNamespace(gpu=discarded, np=discarded.numpy())
        self.requests = {name: SimpleNamespace(block_ids=(blocks,)) for name, blocks in tables.items()}
        rows = np.zeros((8, 8), np.int32)
        table = SimpleNamespace(slot_mapping=self.slots, block_table=SimpleNamespace(np=rows))
        self.input_batch = SimpleNamespace(block_table=[table], req_id_to_index={})

    @staticmethod
    def _buffer(length: int) -> Any:
        values = torch.full((length,), 7, dtype=torch.int32)  # left by steps before
        return SimpleNamespace(gpu=values, np=values.numpy())

    def _sample(self, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        if logits.dtype == torch.float32:
            logits.div_(0.01)  # in place, as temperature is applied; others are copied before
        return SimpleNamespace(sampled_token_ids=logits.argmin(-1, keepdim=True).int())

    def step(self, chunks: Sequence[Sequence[int]], logits: torch.Tensor, discarded: bool = False) -> list[int]:
        """``chunks``: slots of each row's tokens; the last ones' queries choose. Returns what each row chose."""
        self.query_start_loc.np[: len(chunks) + 1] = np.cumsum([0, *map(len, chunks)])
        self.slots.np[: len(_flat(chunks))] = _flat(chunks)
        self.discard_request_mask.np[: len(chunks)] = discarded
        return self.sampler.forward(logits, None).sampled_token_ids[:, 0].tolist()


class _SamplerV2:
    def __init__(self) -> None:
        self.sampling_states = "the sampler's own"

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        # A greedy request with top-k: logits are processed in place, whatever their type.
        kept = logits.topk(3).indices
        logits.masked_fill_(torch.ones_like(logits, dtype=torch.bool).scatter(1, kept, False), -torch.inf)
        return SimpleNamespace(sampled_token_ids=kept[:, -1:], num_sampled=input_batch.num_sampled)


class FakeRunnerV2:
    """One row a request, tables on the device, and a sampler that is called itself."""

    device = torch.device("cpu")

    def __init__(self, **tables: list[int]) -> None:
        self.sampler: Any = _SamplerV2()
        self.req_states = SimpleNamespace(req_id_to_index={name: 2 * row + 1 for row, name in enumerate(tables)})
        self.staged: list[tuple[int, int, list[int]]] = []
        rows = torch.full((8, 8), 77, dtype=torch.int32)
        for row, blocks in zip(self.req_states.req_id_to_index.values(), tables.values(), strict=True):
            rows[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        table = SimpleNamespace(gpu=rows, stage_write=lambda *write: self.staged.append(write))
        slots = torch.full((1, 16), 7)  # left by steps before
        self.block_tables = SimpleNamespace(block_tables=[table], slot_mappings=slots)
        self.batch_sharder: Any = None

    def step(self, chunks: Sequence[Sequence[int]], logits: torch.Tensor, discarded: bool = False) -> list[int]:
        """As above."""
        slots = self.block_tables.slot_mappings
        slots[0] = -1  # the kernel pads all that is left
        slots[0, : len(_flat(chunks))] = torch.tensor(_flat(chunks))
        batch = SimpleNamespace(
            num_tokens=len(_flat(chunks)), logits_indices=torch.tensor([*map(len, chunks)]).cumsum(0) - 1,
            num_sampled=torch.full((len(chunks),), int(not discarded), dtype=torch.int32),
        )  # fmt: skip
        return self.sampler(logits, batch).sampled_token_ids[:, 0].tolist()
