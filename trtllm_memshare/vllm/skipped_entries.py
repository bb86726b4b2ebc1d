"""Attention without the null entries: each step's kernels get block tables that name only what a request keeps.

Keys carry their rotation and a null page lies before every query that could see it, so attention over the entries that
are left, with lengths that are shorter by the others, is attention over what was kept: exactly, where a null page only
comes close. Nothing is read for what was given up. Where a token is written stays as it was, since slots are worked out
from the whole table before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm import TESTED
from trtllm_memshare.vllm.latents import keeps_latents

_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""VLLM's attention backends that read lengths where the tables are. FlashInfer counts pages by lengths on the host."""

_MLA_BACKENDS = ("CPU_MLA", "TRITON_MLA", "FLASHMLA", "FLASH_ATTN_MLA", "CUTLASS_MLA", "FLASHINFER_MLA")
"""Those of multi-head latent attention. What their prefill path reads they count on the host."""

_PREFIXES = "bidirectional prefixes"
_BUILD, _CAPTURE = "build_metadata", "build_metadata_for_cudagraph_capture"


def without_entries(
    table: torch.Tensor, lengths: torch.Tensor, entries: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block tables and lengths without some blocks, in order; all on one device.

    Example: blocks of 32 tokens, a row of 7, 0, 5 and 75 tokens, without block 0 -> 7, 5 and 43 tokens.

    Args:
      table: int32 ``[requests, blocks]``; what lies behind a request's last block may be anything.
      lengths: int32 ``[requests]``, tokens.
      entries: int32 ``[n]``, blocks to leave out; each is full where it stands.
      block_size: tokens of a block.

    Returns:
      A new table and new lengths, of the same shapes and types.
    """
    places = torch.arange(table.shape[1], device=table.device, dtype=lengths.dtype)
    is_left_out = torch.isin(table, entries) & (places * block_size < lengths[:, None])
    order = is_left_out.to(torch.int8).argsort(dim=1, stable=True)
    return table.gather(1, order), lengths - block_size * is_left_out.sum(1, dtype=lengths.dtype)


class SkippedEntries:
    """Gives a model runner's attention the shorter tables, in steps in which a request has null entries.

    VLLM's own tables and lengths are never changed: other groups and the sampler read them. Attention of this group
    reads tables of our own instead, of the shape of vLLM's, which some kernels take for granted, and at one address.
    Where CUDA graphs hold whole steps it reads them from the capture on, and every step copies vLLM's there. Otherwise
    a step in which nobody has null entries, or a dummy run, gets vLLM's as they are.

    Args:
      runner: vLLM's model runner before it captures graphs, of which ``check_skipping`` is told; its attention groups
        are modified.
      block_size: tokens of the scheduler's blocks.
      group: the KV cache group that gives pages up.
    """

    def __init__(self, runner: Any, block_size: int, group: int = 0) -> None:
        self._runner, self._block_size, self._has_graphs = runner, block_size, has_whole_graphs(runner)
        self._null_blocks: torch.Tensor | None = None
        self._names: set[str] = set()
        self._is_step = False
        self._own: tuple[torch.Tensor, torch.Tensor] | None = None
        self._on_host = any(map(_counts_on_host, runner.attn_groups[group]))
        for layers in runner.attn_groups[group]:
            for name in (_BUILD, _CAPTURE) if self._has_graphs else (_BUILD,):
                setattr(layers, name, self._shortened(getattr(layers, name)))

    def take_null_blocks(self, null_blocks: Sequence[int]) -> None:
        """Takes the blocks that null entries name, once the scheduler has told; what they hold does not matter."""
        self._null_blocks = torch.tensor(null_blocks, dtype=torch.int32, device=self._runner.device)

    def follow(self, with_null_entries: Iterable[str], ended: Iterable[str]) -> None:
        """Takes what changes before a step: requests that give pages up, and those that have ended."""
        self._names.update(with_null_entries)
        self._names.difference_update(ended)
        self._is_step = True

    def end_step(self) -> None:
        """The model has run, or is queued to; what vLLM runs until the next step is dummies."""
        self._is_step = False

    def _shortened(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def build_metadata(common_attn_metadata: Any, *arguments: Any, **keywords: Any) -> Any:
            return build(self._given(common_attn_metadata), *arguments, **keywords)

        return build_metadata

    def _given(self, metadata: Any) -> Any:
        shorter = self._shorten(metadata)
        if shorter is metadata and not self._has_graphs:
            return metadata
        if self._own is None:
            rows, table = self._runner.max_num_reqs, metadata.block_table_tensor
            self._own = table.new_zeros((rows, table.shape[1])), metadata.seq_lens.new_zeros(rows)
        table, lengths = (own[: len(metadata.seq_lens)] for own in self._own)
        width = self._width(metadata)
        table[:, :width].copy_(shorter.block_table_tensor[: len(table), :width])
        lengths.copy_(shorter.seq_lens)
        return replace(shorter, block_table_tensor=table, seq_lens=lengths)

    def _width(self, metadata: Any) -> int:
        """Rows are as wide as the longest request that may come; nobody looks behind this step's longest."""
        return -(-int(metadata.max_seq_len) // self._block_size)

    def _shorten(self, metadata: Any) -> Any:
        """A step's metadata without null entries, in tables that end with its longest request."""
        if self._null_blocks is None or not (self._names and self._is_step):
            return metadata
        table = metadata.block_table_tensor[: len(metadata.seq_lens), : self._width(metadata)]
        shorter, lengths = without_entries(table, metadata.seq_lens, self._null_blocks, self._block_size)
        if self._on_host and metadata.max_query_len > 1:
            left_out = (metadata.seq_lens - lengths).cpu()  # the device is waited for, in a step that reads a text
            on_host = metadata.seq_lens_cpu_upper_bound
            metadata = replace(metadata, seq_lens_cpu_upper_bound=on_host - left_out.to(on_host.dtype))
        return replace(metadata, block_table_tensor=shorter, seq_lens=lengths)


def has_whole_graphs(runner: Any) -> bool:
    """Whether CUDA graphs hold attention too, and so the addresses that it reads."""
    mode = runner.vllm_config.compilation_config.cudagraph_mode
    return mode is not None and bool(mode.has_full_cudagraphs())


def _counts_on_host(layers: Any) -> bool:
    """Whether lengths of requests that have gaps are read on the host.

    Whose text is read in pieces has no gaps. But FlashMLA wants requests of one length in its decode path, of up to 128
    tokens, and with model runner V1 one whose last piece is as short may stand first: those behind it, of one token and
    with gaps, then take the prefill path.
    """
    if layers.backend.get_name() not in _MLA_BACKENDS:
        return False
    builder = layers.get_metadata_builder()
    return bool((builder.reorder_batch_threshold or 1) > 1 and builder.query_len_support.name == "UNIFORM")


def check_skipping(runner: Any, layers: Sequence[Any], group: int = 0, reuses_tables: bool = False) -> None:
    """Looks at what reads the tables of one group of vLLM's model runner.

    Args:
      reuses_tables: the runner gives one attention group's metadata to another with other tables, past what makes them
        shorter, where their builder can do so.

    Raises:
      UserError: a model or a vLLM with which attention without null entries would be another attention.
    """
    groups, parts = getattr(runner, "attn_groups", None), (_BUILD, _CAPTURE)
    if not groups or not all(callable(getattr(one, part, None)) for one in groups[group] for part in parts):
        raise UserError(
            f"null_entries skip builds on attention groups with {' and '.join(parts)}, got a {type(runner).__name__} "
            f"without (set null_entries to read, with null_pages; it was tested with vLLM {TESTED})"
        )
    has_others, is_mla = len(groups) > 1, any(map(keeps_latents, layers))
    way_out = "set null_entries to read, with null_pages"
    if has_others or is_mla:  # for which null pages are not made
        way_out = "serve this model without MemShare"
    served = _MLA_BACKENDS if is_mla else _BACKENDS
    others = {one.backend.get_name() for one in groups[group]}.difference(served)
    if others:
        raise UserError(
            f"null_entries skip works with vLLM's attention backends {', '.join(served)}, got "
            f"{', '.join(sorted(others))} (choose one by --attention-backend, or {way_out})"
        )
    count = len(groups[group])
    if (
        reuses_tables
        and count > 1
        and any(one.get_metadata_builder().supports_update_block_table for one in groups[group])
    ):
        raise UserError(
            f"null_entries skip with model runner V1 needs one attention group for all layers of full attention, got "
            f"{count} (set VLLM_USE_V2_MODEL_RUNNER=1, or {way_out})"
        )
    model = runner.model_config
    told = {
        "ALiBi": any(getattr(layer.impl, "alibi_slopes", None) is not None for layer in layers),
        "reference sliding windows": getattr(model, "rswa_window", None) is not None,
        _PREFIXES: bool(getattr(model, "is_mm_prefix_lm", False)),
    }
    for feature, present in told.items():
        if present:
            text_alone = "for text alone give --language-model-only, or " if feature == _PREFIXES else ""
            raise UserError(
                f"null_entries skip needs attention that takes positions from keys alone, got a model with {feature} "
                f"({text_alone}{way_out})"
            )
