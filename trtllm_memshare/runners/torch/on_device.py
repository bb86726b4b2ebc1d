"""Makes a pool's device the current one, which is a thread's own and 0 in a new thread."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a CUDA device is the current one; nothing for another device.

    Operators of PyTorch find the device of their tensors. Triton, FlashInfer, CUDA graphs, new streams and new events
    take the current one: beside a pool on another device they would launch there, or order nothing.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
