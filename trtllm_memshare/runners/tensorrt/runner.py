"""The TensorRT runner: in-flight batches through a TensorRT-LLM engine, without TensorRT-LLM's executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from trtllm_memshare.engine.null_page import NullPageSet
from trtllm_memshare.runners.null_pages import null_page_blocks, place_of
from trtllm_memshare.runners.protocol import Described, StepBatch, StepOutput
from trtllm_memshare.runners.tensorrt.bindings import Bindings
from trtllm_memshare.runners.tensorrt.decode_graphs import DecodeGraphs
from trtllm_memshare.runners.tensorrt.device import Device, Mark
from trtllm_memshare.runners.tensorrt.staging import PackedInputs, Staging
from trtllm_memshare.runners.tensorrt.step_inputs import check_batch, device_arrays, host_arrays, pad_for_graph
from trtllm_memshare.search.block_search import Distances
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.trtllm.engine.spec import EngineSpec


class SeparateSearch(Described, Protocol):
    """A search that runs after the engine instead of inside it."""

    @property
    def max_pairs(self) -> int:
        """Most pairs of one search."""

    def compare(self, pairs: PairBatch) -> Distances:
        """Enqueues the comparison."""


@dataclass(frozen=True)
class EmbeddedSearch:
    """The plugin inside the model's engine."""

    description: str = "MemShareBlockSearch inside the engine (its device time is part of the step's)"


@dataclass(frozen=True)
class NoSearch:
    """An engine that was built without MemShare."""

    description: str = "none (the engine was built without --memshare)"


@dataclass(frozen=True)
class TensorRTInputs:
    """A prepared step. ``batch``: as asked for; ``run``: as the engine gets it, padded for a graph or not."""

    batch: StepBatch
    run: StepBatch
    packed: PackedInputs
    uses_graph: bool


@dataclass(frozen=True)
class EngineDistances:
    """Sums on their way to the host; ``seconds`` of the search alone are not known inside an engine and read 0."""

    sums: torch.Tensor
    arrived: Mark

    def read(self) -> tuple[np.ndarray, float]:
        """See ``Distances.read``; valid until the step after next."""
        self.arrived.wait()
        return self.sums.numpy(), 0.0


class TensorRTRunner:
    """Drives one rank's engine; computes a step per call, like the torch runner.

    Args:
      engine: TensorRT's ``ICudaEngine``, checked against ``io_table(spec)`` by ``check_engine_io``.
      spec: what it was built for.
      num_blocks: blocks of the pool.
      device: where the pool lies and the engine runs.
      inv_freq: float32 ``[head_dim / 2]``, the model's rotary frequencies.
      search: makes a search beside the engine from the pool; None = the plugin inside it, if it has one.
      use_graphs: replay CUDA graphs in pure decode steps, see ``DecodeGraphs``.
      all_reduce_workspace: see ``Bindings``.
      null_page_set: null pages of this rank's layers and heads, written into the first blocks of the pool; None = none.

    Attributes:
      null_pages: where they are, or None. TensorRT-LLM's kernels read entries at them like any other.
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, this rank's layers and heads.
      kept_alive: memory that inputs point into and that nobody else holds.
    """

    skips_entries = reports_attention = False

    def __init__(
        self,
        engine: Any,
        spec: EngineSpec,
        num_blocks: int,
        device: Device,
        inv_freq: torch.Tensor,
        search: Callable[[torch.Tensor], SeparateSearch] | None = None,
        use_graphs: bool = False,
        all_reduce_workspace: torch.Tensor | None = None,
        null_page_set: NullPageSet | None = None,
    ) -> None:
        self.spec, self._engine, self._device = spec, engine, device
        self.kept_alive: Any = None
        self.num_layers, self.num_blocks = spec.num_layers, num_blocks
        self.tokens_per_block, self.vocab_size = spec.tokens_per_block, spec.vocab_size
        self.pool = device.device_tensor(
            (num_blocks, spec.num_layers, 2, spec.num_kv_heads, spec.tokens_per_block, spec.head_dim),
            getattr(torch, spec.kv_dtype),
        )
        self._null_page_set = null_page_set
        self.null_pages = None if null_page_set is None else place_of(null_page_set)
        self.reserve_null_pages(True)
        self._separate = search(self.pool) if search is not None else None
        self.search: Described = self._separate or (EmbeddedSearch() if spec.max_pairs else NoSearch())
        self._max_pairs = self._separate.max_pairs if self._separate is not None else spec.max_pairs
        self._bindings = Bindings(device, spec, self.pool, inv_freq, all_reduce_workspace)
        table = 2 * spec.max_batch_size * spec.max_blocks_per_seq
        elements = 2 * spec.max_num_tokens + 7 * spec.max_batch_size + 2 * table
        self._staging = Staging(device, elements + 3 * spec.max_pairs * spec.tokens_per_block, num_arrays=16)
        sums = (max(1, spec.max_pairs), spec.num_layers, 4)
        self._sums = [device.host_tensor(sums, torch.float32) for _ in range(2)]
        # TensorRT-LLM's own scheduler never cuts a prompt inside a block, so its kernels are not asked to either.
        self.chunk_unit_size = spec.tokens_per_block
        self._contexts = [_new_context(engine, i, device.stream) for i in range(engine.num_optimization_profiles)]
        self._graphs: DecodeGraphs | None = None
        if use_graphs:
            # Holds nothing of this object: the pool must go when the runner does, not when cycles are looked for.
            self._graphs = DecodeGraphs(
                device, spec, lambda tokens: _new_context(engine, _profile(engine, spec, tokens), device.stream)
            )
        self.decode_description = f"TensorRT-LLM's attention plugin on {device.description}"
        if use_graphs:
            self.decode_description += ", CUDA graphs for pure decode steps"

    def reserve_null_pages(self, are_used: bool) -> None:
        """See ``ForgettingRunner``; copied from pinned memory, as every input goes, while no step runs."""
        if self._null_page_set is None or not are_used:
            return
        blocks = null_page_blocks(self._null_page_set, tuple(self.pool.shape), self.pool.dtype)
        source = self._device.host_tensor(tuple(blocks.shape), blocks.dtype)
        source.copy_(blocks)
        self._device.copy(self.pool[: len(blocks)], source)
        self._device.mark().wait()

    def prepare(self, batch: StepBatch) -> TensorRTInputs:
        """Packs a step's inputs on the host. Two steps may be prepared before the first of them runs.

        Raises:
          UserError, ValueError: see ``check_batch``.
        """
        check_batch(batch, self.spec, self._max_pairs)
        uses_graph = self._graphs is not None and self._graphs.takes(batch)
        run = batch
        if uses_graph and self._graphs is not None:
            run = pad_for_graph(batch, self._graphs.bucket(batch), self.spec)
        packed = self._staging.pack(device_arrays(run, self.spec), host_arrays(run))
        return TensorRTInputs(batch, run, packed, uses_graph)

    def step(self, inputs: TensorRTInputs) -> StepOutput:
        """Enqueues copies, the engine and the copy of its distances; returns before they have run.

        The logits are valid until the next step. On a pipeline rank that is not the last they are empty.
        """
        self._device.begin()
        self._staging.upload(inputs.packed)
        if inputs.uses_graph and self._graphs is not None:
            past = self._staging.host_view(inputs.packed, "host_past_key_value_lengths")
            self._graphs.run(inputs.run, past, lambda context: self._enqueue(inputs, context))
        else:
            self._enqueue(inputs, self._contexts[_profile(self._engine, self.spec, len(inputs.run.input_ids))])
        distances = self._take_distances(inputs)
        self._device.end()
        if not self.spec.is_last_pp_rank:
            return StepOutput(torch.empty((len(inputs.batch.chunk_lengths), 0)), distances)
        logits = self._bindings.outputs.last[: len(inputs.batch.chunk_lengths), : self.vocab_size]
        return StepOutput(logits.float(), distances)

    def _enqueue(self, inputs: TensorRTInputs, context: Any) -> None:
        self._bindings.bind(context, inputs.run, inputs.packed)
        if not context.execute_async_v3(self._device.stream):
            raise RuntimeError("TensorRT did not enqueue the step; its log says why")

    def _take_distances(self, inputs: TensorRTInputs) -> Distances | None:
        pairs = inputs.batch.pairs
        if pairs is None:
            return None
        if self._separate is not None:
            return self._separate.compare(pairs)
        found = self._bindings.outputs.distances
        assert found is not None
        sums = self._sums[inputs.packed.set_index][: len(pairs)]
        self._device.copy(sums, found[: len(pairs)])
        return EngineDistances(sums, self._device.mark())


def _profile(engine: Any, spec: EngineSpec, num_tokens: int) -> int:
    """The first profile that takes that many tokens; engines with several split them by this size."""
    name = "input_ids" if spec.is_first_pp_rank else "hidden_states_input"
    for index in range(engine.num_optimization_profiles):
        if num_tokens <= engine.get_tensor_profile_shape(name, index)[2][0]:
            return index
    raise ValueError(f"no profile of the engine takes {num_tokens} tokens")


def _new_context(engine: Any, profile: int, stream: int) -> Any:
    context = engine.create_execution_context()
    if context is None:
        raise RuntimeError(
            "TensorRT made no execution context: not enough device memory (give fewer blocks, with --kv-cache-blocks)"
        )
    if profile and not context.set_optimization_profile_async(profile, stream):
        raise RuntimeError(f"TensorRT refused optimization profile {profile}")
    return context
