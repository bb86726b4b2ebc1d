"""What an engine's names are bound to: fixed tensors made once, the step's packed inputs, and the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.runners.tensorrt.device import Device, check_alignment
from trtllm_memshare.runners.tensorrt.staging import PackedInputs
from trtllm_memshare.trtllm.engine.io_table import DISTANCES, PERF_KNOBS, IoTensor, io_table
from trtllm_memshare.trtllm.engine.spec import EngineSpec

UNDO_ROPE, AS_STORED = "undo_rope", "as_stored"
_INV_FREQ = "memshare_inv_freq"


@dataclass(frozen=True)
class Outputs:
    """Device tensors at full size. ``last``: logits, or the hidden states that a pipeline rank hands on."""

    last: torch.Tensor
    distances: torch.Tensor | None


class Bindings:
    """Holds every tensor whose address an engine is given, so that none is freed while a step may read it.

    Args:
      spec: of the engine.
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      inv_freq: float32 ``[head_dim / 2]``.
      all_reduce_workspace: int64 ``[7 * tp_size + 3]`` with tensor parallelism, else None.
    """

    def __init__(
        self,
        device: Device,
        spec: EngineSpec,
        pool: torch.Tensor,
        inv_freq: torch.Tensor,
        all_reduce_workspace: torch.Tensor | None = None,
    ) -> None:
        self._device, self._spec, self.table = device, spec, io_table(spec)
        layers = spec.num_layers
        host = {
            "host_max_attention_window_sizes": np.full(layers, spec.max_seq_len, np.int32),
            "host_sink_token_length": np.zeros(1, np.int32),
            "host_kv_cache_pool_pointers": np.array([[pool.data_ptr(), 0]], np.int64),
            "host_kv_cache_pool_mapping": np.stack([np.zeros(layers), np.arange(layers)], 1).astype(np.int32),
            # Knob 0 lets attention of one request use several thread blocks, as TensorRT-LLM does by default.
            "host_runtime_perf_knobs": np.array([1] + [-1] * (PERF_KNOBS - 1), np.int64),
            "host_context_progress": np.zeros(1, np.int64),
        }
        self._fixed = {name: self._on_host(values) for name, values in host.items()}
        if all_reduce_workspace is not None:
            self._fixed["all_reduce_workspace"] = all_reduce_workspace
        self._fixed["cache_indirection"] = device.device_tensor((spec.max_batch_size, 1, spec.max_seq_len), torch.int32)
        if not spec.is_first_pp_rank:
            shape = (spec.max_num_tokens, spec.hidden_size)
            self._fixed["hidden_states_input"] = device.device_tensor(shape, getattr(torch, spec.dtype))
        self._frequencies: dict[str, torch.Tensor] = {}
        if spec.max_pairs:
            self._fixed.update(
                memshare_pool_pointers=self._on_device(np.array([pool.data_ptr()], np.int64)),
                memshare_num_blocks=self._on_device(np.array([pool.shape[0]], np.int32)),
            )
            values = inv_freq.cpu().numpy().astype(np.float32)
            # Without frequencies nothing is turned: K is compared as it is stored.
            self._frequencies = {UNDO_ROPE: self._on_device(values), AS_STORED: self._on_device(values * 0)}
        largest = {"num_tokens": spec.max_num_tokens, "batch": spec.max_batch_size, "pairs": spec.max_pairs}
        made = {
            t.name: device.device_tensor(t.shape(largest), getattr(torch, t.dtype)) for t in self.table if t.is_output
        }
        self._fixed.update(made)
        distances = made.pop(DISTANCES, None)
        self.outputs = Outputs(next(iter(made.values())), distances)

    def bind(self, context: Any, batch: StepBatch, packed: PackedInputs) -> None:
        """Gives a context the shapes and addresses of one step.

        Args:
          context: TensorRT's ``IExecutionContext``.
          packed: the step's arrays.

        Raises:
          RuntimeError: the context refuses a shape or an address.
        """
        sizes = {
            "num_tokens": len(batch.input_ids),
            "batch": len(batch.chunk_lengths),
            "max_blocks": batch.block_offsets.shape[3],
            "pairs": packed.shapes.get("memshare_new_rows", (0,))[0],
        }
        for tensor in self.table:
            address = packed.addresses.get(tensor.name) or self._fixed_tensor(tensor, batch).data_ptr()
            shape = tensor.shape(sizes)
            if not tensor.is_output and not context.set_input_shape(tensor.name, shape):
                raise RuntimeError(f"TensorRT refused shape {list(shape)} of {tensor.name}")
            if not context.set_tensor_address(tensor.name, check_alignment(tensor.name, address)):
                raise RuntimeError(f"TensorRT refused the address of {tensor.name}")

    def _fixed_tensor(self, tensor: IoTensor, batch: StepBatch) -> torch.Tensor:
        if tensor.name == _INV_FREQ:
            return self._frequencies[rope_mode(batch)]
        return self._fixed[tensor.name]

    def _on_host(self, values: np.ndarray) -> torch.Tensor:
        source = torch.from_numpy(values)
        target = self._device.host_tensor(tuple(source.shape), source.dtype)
        return target.copy_(source)

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        source = self._on_host(values)
        target = self._device.device_tensor(tuple(source.shape), source.dtype)
        self._device.copy(target, source)
        self._device.mark().wait()  # the source goes out of scope
        return target


def rope_mode(batch: StepBatch) -> str:
    """Which frequencies a batch's pairs are compared with."""
    return UNDO_ROPE if batch.pairs is None or batch.pairs.undo_rope else AS_STORED
