"""The search as an engine of its own, ``memshare.engine``, that runs after an untouched model engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trtllm_memshare.runners.tensorrt.bindings import AS_STORED, UNDO_ROPE
from trtllm_memshare.runners.tensorrt.device import Device, Mark, check_alignment
from trtllm_memshare.runners.tensorrt.staging import Staging
from trtllm_memshare.runners.tensorrt.step_inputs import pair_arrays
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.trtllm.engine.io_table import DISTANCES, memshare_io
from trtllm_memshare.trtllm.engine.spec import EngineSpec


@dataclass(frozen=True)
class SeparateDistances:
    """Sums on their way to the host."""

    sums: torch.Tensor
    started: Mark
    arrived: Mark

    def read(self) -> tuple[np.ndarray, float]:
        """See ``Distances.read``; valid until the search after next."""
        self.arrived.wait()
        return self.sums.numpy(), self.arrived.seconds_since(self.started)


class SeparateEngineSearch:
    """Runs ``MemShareBlockSearch`` alone over a pool.

    Args:
      plan: TensorRT's ``ICudaEngine`` of ``memshare.engine``.
      spec: of the model's engine, with ``max_pairs`` of the search.
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``.
      inv_freq: float32 ``[head_dim / 2]``.
    """

    def __init__(self, plan: Any, spec: EngineSpec, pool: torch.Tensor, device: Device, inv_freq: torch.Tensor) -> None:
        self._device, self._plan, self._table = device, plan, memshare_io(spec)
        self.max_pairs, self.description = spec.max_pairs, "MemShareBlockSearch in memshare.engine"
        self._context = plan.create_execution_context()
        if self._context is None:
            raise RuntimeError("TensorRT made no execution context for memshare.engine: not enough device memory")
        self._staging = Staging(device, 3 * spec.max_pairs * spec.tokens_per_block, num_arrays=3)
        values = {
            "memshare_hidden": torch.zeros(1),
            "memshare_pool_pointers": torch.tensor([pool.data_ptr()], dtype=torch.int64),
            "memshare_num_blocks": torch.tensor([pool.shape[0]], dtype=torch.int32),
            UNDO_ROPE: inv_freq.cpu().float(),
            AS_STORED: torch.zeros(len(inv_freq)),
        }
        self._fixed: dict[str, torch.Tensor] = {}
        for name, value in values.items():
            source = device.host_tensor(tuple(value.shape), value.dtype).copy_(value)
            self._fixed[name] = device.device_tensor(tuple(value.shape), value.dtype)
            device.copy(self._fixed[name], source)
            device.mark().wait()
        shape = (spec.max_pairs, spec.num_layers, 4)
        self._distances = device.device_tensor(shape, torch.float32)
        self._sums = [device.host_tensor(shape, torch.float32) for _ in range(2)]

    def compare(self, pairs: PairBatch) -> SeparateDistances:
        """Enqueues copy in, the engine and copy out, after the step that wrote the pool."""
        started = self._device.mark()
        packed = self._staging.pack(pair_arrays(pairs), {})
        self._staging.upload(packed)
        inv_freq = self._fixed[UNDO_ROPE if pairs.undo_rope else AS_STORED]
        fixed = {**self._fixed, "memshare_inv_freq": inv_freq, DISTANCES: self._distances}
        names = ["memshare_hidden", *(t.name for t in self._table)]
        for name in names:
            address = packed.addresses.get(name) or fixed[name].data_ptr()
            shape = packed.shapes.get(name) or tuple(fixed[name].shape)
            if name != DISTANCES and not self._context.set_input_shape(name, shape):
                raise RuntimeError(f"TensorRT refused shape {list(shape)} of {name}")
            if not self._context.set_tensor_address(name, check_alignment(name, address)):
                raise RuntimeError(f"TensorRT refused the address of {name}")
        if not self._context.execute_async_v3(self._device.stream):
            raise RuntimeError("TensorRT did not enqueue the search; its log says why")
        sums = self._sums[packed.set_index][: len(pairs)]
        self._device.copy(sums, self._distances[: len(pairs)])
        return SeparateDistances(sums, started, self._device.mark())
