"""The embedded runner: transformers computes the model, the pool and its offsets are TensorRT-LLM's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from trtllm_memshare.cache.offsets import hide_blocks
from trtllm_memshare.engine.load import check_loaded, load_decoder
from trtllm_memshare.engine.null_page import NullPageSet
from trtllm_memshare.engine.rope import longest_sequence
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.null_pages import place_of, write_null_pages
from trtllm_memshare.runners.protocol import StepBatch, StepOutput
from trtllm_memshare.runners.torch.attention import IMPLEMENTATION, PagedStep, paged_attention
from trtllm_memshare.runners.torch.decode_graph import DecodeGraphs
from trtllm_memshare.runners.torch.gather import PageGather
from trtllm_memshare.runners.torch.on_device import on_device
from trtllm_memshare.runners.torch.packed_linear import pack_linears
from trtllm_memshare.runners.torch.page_lists import PageLists, list_pages
from trtllm_memshare.runners.torch.paged_decode import DecodeKind, PagedDecode, choose_decode, flashinfer_kind
from trtllm_memshare.runners.torch.plan import StepPlan, plan_step
from trtllm_memshare.search.block_search import Distances, make_block_search
from trtllm_memshare.search.config import MAX_PAIRS
from trtllm_memshare.search.types import PairBatch

AttentionInterface.register(IMPLEMENTATION, paged_attention)


@dataclass(frozen=True)
class TorchInputs:
    """Inputs of a step: the batch, its addresses, and on a GPU the pages that its generation requests read."""

    batch: StepBatch
    plan: StepPlan
    pages: PageLists | None


def load_model(model_dir: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """A Hugging Face decoder that attends through the pool.

    Args:
      model_dir: a checkpoint directory that ``engine.read_checkpoint`` accepts.
      device: ``cpu`` or a CUDA device. On a CPU large float32 matrices are laid out once, see ``pack_linears``.
      dtype: of the weights, None = as the checkpoint says.

    Raises:
      UserError: there are no weights, as in the directory of a TensorRT engine, or not all of the model's.
    """
    # The dtype is transformers' business: a model that is cast afterwards has its rotary frequencies rounded too.
    options = {} if dtype is None else {"dtype": dtype}
    model, report = load_decoder(model_dir, attn_implementation=IMPLEMENTATION, **options)
    # The build has checked this; a folder that changed since would be served with random numbers.
    check_loaded(model_dir, report, "build the engine again")
    model = model.to(device).eval()
    pack_linears(model)
    return model


class TorchRunner:
    """Runs a Hugging Face decoder with rotary embeddings over a paged pool.

    Args:
      model: from ``load_model``, or another decoder with the attention implementation ``IMPLEMENTATION``.
      num_blocks: physical blocks of the pool.
      tokens_per_block: tokens of one block.
      kv_dtype: element type of the pool, None = the model's.
      fold_aliases: see ``plan_step``; FlashInfer reads every alias.
      null_page_set: null pages to write into the first blocks of the pool, for steps that read them; None = none.
      use_graphs: replay CUDA graphs in pure decode steps where FlashInfer or Triton attends.
      decode: which decode attention, see ``choose_decode``.
      flashinfer: a stand-in for the module, for tests; None = the installed one if the pool is on a GPU.
      new_graph: see ``DecodeGraphs``.

    Attributes:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      inv_freq: float32 ``[rotary_dim / 2]``, radians per token.
      search: what computes stage 2 on it.
      decode_description: what attends for generation requests, and why.
      null_pages: where the null pages are, None = there are none. Steps skip them unless told otherwise.
    """

    skips_entries = True

    def __init__(
        self,
        model: Any,
        num_blocks: int,
        tokens_per_block: int,
        kv_dtype: torch.dtype | None = None,
        fold_aliases: bool = True,
        null_page_set: NullPageSet | None = None,
        use_graphs: bool = True,
        decode: str = "auto",
        flashinfer: Any = None,
        new_graph: Callable[[], Any] | None = None,
    ) -> None:
        self.model = model
        config = model.config
        self.num_layers = config.num_hidden_layers
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.vocab_size = config.vocab_size
        self._num_kv_heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.pool = torch.zeros(
            (num_blocks, self.num_layers, 2, self._num_kv_heads, tokens_per_block, head_dim),
            dtype=kv_dtype or model.dtype,
            device=model.device,
        )
        self._bytes = self.pool.view(torch.uint8)
        self._gather = PageGather(self.pool, model.dtype)
        self._null_page_set = null_page_set
        self.null_pages = None if null_page_set is None else place_of(null_page_set)
        self.reserve_null_pages(True)
        if self.pool.is_cuda:
            # cuDNN's attention plans each new shape for 23 to 37 ms (torch 2.11, sm_90), and here every step has one.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._fold_aliases = fold_aliases
        self._scaling = float(model.model.layers[0].self_attn.scaling)
        self.inv_freq: torch.Tensor = model.model.rotary_emb.inv_freq.float()
        with on_device(self.pool.device):
            self.search = make_block_search(self.pool, self.inv_freq, MAX_PAIRS)
            kind = self._choose(decode, flashinfer)
            self._decode: PagedDecode | None = None if kind.make is None else kind.make(None, 0)
        self.decode_description, self._reads_once = kind.description, kind.reads_once
        self._graphs = self._make_graphs(kind, new_graph) if use_graphs else None

    def reserve_null_pages(self, are_used: bool) -> None:
        """See ``ForgettingRunner``."""
        self._skips_null = self._null_page_set is not None and are_used
        if self._null_page_set is not None and are_used:
            write_null_pages(self.pool, self._null_page_set)

    def prepare(self, batch: StepBatch) -> TorchInputs:
        """Works out addresses on the host.

        Raises:
          UserError: attention is to be observed where another than PyTorch attends, or null pages are to be read and
            there are none.
        """
        if self.null_pages is not None and self._skips_null and not batch.read_null:
            hidden = hide_blocks(batch.block_offsets, self.null_pages.blocks, self.num_layers)
            batch = replace(batch, block_offsets=hidden)
        elif batch.read_null and self.null_pages is None:
            raise UserError(
                "read_null needs null pages, got a runner without any (build the engine with --memshare and "
                "retired_becomes null, or leave out read_null)"
            )
        if batch.observe_attention and self._decode is not None:
            attends = self.decode_description.split(",")[0]
            raise UserError(f"attention weights are not known where {attends} attends (run this control on the CPU)")
        grouped = self._decode is None
        plan = plan_step(
            batch,
            self._num_kv_heads,
            self.tokens_per_block,
            self._fold_aliases,
            grouped,
            self._gather.pages_per_call,
        )
        decodes = not grouped and batch.num_contexts < len(batch.chunk_lengths)
        pages: PageLists | None = None
        if decodes:
            fold = self._reads_once and self._fold_aliases
            pages = list_pages(batch, self.num_layers, self.tokens_per_block, fold)
        return TorchInputs(batch, plan, pages)

    @property
    def reports_attention(self) -> bool:
        """Whether ``StepBatch.observe_attention`` can be followed: weights are known where PyTorch attends."""
        return self._decode is None

    @torch.inference_mode()
    def step(self, inputs: TorchInputs) -> StepOutput:
        """Runs the model once, then stage 2 on the batch's pairs."""
        with on_device(self.pool.device):
            return self._step(inputs)

    def _step(self, inputs: TorchInputs) -> StepOutput:
        batch, plan, pages = inputs.batch, inputs.plan, inputs.pages
        attention: np.ndarray | None = None
        if self._graphs is not None and pages is not None and self._graphs.takes(batch):
            logits = self._graphs.run(batch, plan.write_rows, pages, self._scaling)
        else:
            if self._decode is not None and pages is not None:
                self._decode.plan(pages, self._scaling)
            if self._decode is None:
                self._clear(plan.begun_units // (2 * self.num_layers))
            device = self.pool.device
            ids, positions = (
                torch.from_numpy(a).to(device, torch.int64)[None] for a in (batch.input_ids, batch.position_ids)
            )
            step = PagedStep(self.pool, plan, self.model.dtype, self._decode, self._gather, batch.observe_attention)
            logits = _forward(self.model, ids, positions, step)
            if batch.observe_attention:
                attention = step.block_attention().cpu().numpy()
        distances = None if batch.pairs is None else self.compare(batch.pairs)
        return StepOutput(logits.float(), distances, attention)

    @torch.inference_mode()
    def compare(self, pairs: PairBatch) -> Distances:
        """See ``ComparingRunner``."""
        with on_device(self.pool.device):
            return self.search.compare(pairs)

    def _clear(self, blocks: np.ndarray) -> None:
        """Zeroes blocks before their first token is written.

        PyTorch's attention reads a block whole and gives what is not written no weight; but no weight times a value
        that is not finite, left by a request that ended, would be not finite either. Kernels of our own read no such
        row.
        """
        self._bytes.index_fill_(0, torch.from_numpy(blocks).to(self.pool.device), 0)

    def _choose(self, wanted: str, flashinfer: Any) -> DecodeKind:
        num_heads, dtype = self.model.config.num_attention_heads, self.model.dtype
        if flashinfer is None:
            return choose_decode(self.pool, num_heads, dtype, wanted)
        return flashinfer_kind(flashinfer, "a stand-in for FlashInfer", self.pool, num_heads, dtype)

    def _make_graphs(self, kind: DecodeKind, new_graph: Callable[[], Any] | None) -> DecodeGraphs | None:
        make, config = kind.make, self.model.config
        if make is None or (new_graph is None and not self.pool.is_cuda):
            return None
        tokens = longest_sequence(config.to_dict(), config.max_position_embeddings)
        longest = -(-tokens // self.tokens_per_block)
        self.decode_description += ", CUDA graphs for pure decode steps"
        # Of the model alone: a method would hold the runner, whose pool would stay until a collection of circles.
        forward = functools.partial(_forward, self.model)
        return DecodeGraphs(
            forward, lambda bucket: make(bucket, bucket * longest), self.pool, self.model.dtype, new_graph
        )


def _forward(model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, step: PagedStep) -> torch.Tensor:
    """Logits ``[batch, vocab_size]`` of each sequence's last token."""
    result = model(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=step.last_tokens,
        memshare_step=step,
    )
    logits: torch.Tensor = result.logits[0]
    return logits
