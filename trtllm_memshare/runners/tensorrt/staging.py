"""Inputs that change every step: packed into pinned memory on the host, copied to the device in one piece.

One of two pinned sets, with three arrays for the device and one that stays on the host::

    | input_ids | position_ids | kv_cache_block_offsets | host_request_types |
    ^ 256-byte boundaries everywhere                     ^ copied up to here

The host fills one set while the copy of the other may still be on its way. The device side needs no twin: a copy runs
on the engine's own stream, after the step that read what it overwrites.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trtllm_memshare.runners.tensorrt.device import ALIGNMENT, Device, Mark

_STRIDE = ALIGNMENT // 4  # int32 elements


@dataclass
class _Set:
    host: torch.Tensor  # int32, pinned
    serial: int = 0  # of the last step that was packed into it
    copied: Mark | None = None


@dataclass(frozen=True)
class PackedInputs:
    """One step's arrays in a set. ``shapes`` and ``addresses`` by input name; ``num_copied`` in int32 elements."""

    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]
    num_copied: int
    set_index: int
    serial: int


class Staging:
    """Two pinned sets and their place on the device.

    Args:
      device: where to.
      max_elements: int32 elements of the largest step, without gaps; ``num_arrays`` gaps are added.
      num_arrays: most arrays of one step.
    """

    def __init__(self, device: Device, max_elements: int, num_arrays: int) -> None:
        size = max_elements + num_arrays * _STRIDE
        self._device = device
        self._sets = [_Set(device.host_tensor((size,), torch.int32)) for _ in range(2)]
        self._target = device.device_tensor((size,), torch.int32)
        self._serial = 0

    def pack(self, device_arrays: dict[str, np.ndarray], host_arrays: dict[str, np.ndarray]) -> PackedInputs:
        """Copies int32 arrays into the set that was used before last.

        Args:
          device_arrays: inputs read on the device.
          host_arrays: inputs read on the host while the step is enqueued.
        """
        self._serial += 1
        index = self._serial % 2
        chosen = self._sets[index]
        if chosen.copied is not None:
            chosen.copied.wait()
        chosen.serial, start, num_copied = self._serial, 0, 0
        values, addresses = chosen.host.numpy(), {}
        for arrays, base in ((device_arrays, self._target), (host_arrays, chosen.host)):
            for name, array in arrays.items():
                values[start : start + array.size] = array.ravel()
                addresses[name] = base.data_ptr() + 4 * start
                start += -(-array.size // _STRIDE) * _STRIDE
            num_copied = num_copied or start
        shapes = {name: array.shape for name, array in {**device_arrays, **host_arrays}.items()}
        return PackedInputs(shapes, addresses, num_copied, index, self._serial)

    def host_view(self, packed: PackedInputs, name: str) -> np.ndarray:
        """The int32 values of a host input in its set; writing to it changes what the next enqueue reads."""
        chosen = self._sets[packed.set_index].host
        start = (packed.addresses[name] - chosen.data_ptr()) // 4
        return chosen.numpy()[start : start + int(np.prod(packed.shapes[name]))]

    def upload(self, packed: PackedInputs) -> None:
        """Enqueues the copy. Raises RuntimeError if two later steps were packed meanwhile."""
        chosen = self._sets[packed.set_index]
        if chosen.serial != packed.serial:
            raise RuntimeError(
                f"inputs of step {packed.serial} were overwritten by step {chosen.serial}: at most two may be prepared "
                f"ahead of their step"
            )
        used = packed.num_copied
        self._device.copy(self._target[:used], chosen.host[:used])
        chosen.copied = self._device.mark()
