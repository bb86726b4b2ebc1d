"""A block of vLLM's pool to try a cache's form on, before anybody is served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def trial_block(layers: list[Any], num_blocks: int) -> Iterator[int]:
    """The pool's last block, for writing into; what lay there is put back.

    A cache of another form than one tensor of blocks is left as it is: whoever tries it out refuses it.

    Args:
      layers: vLLM's attention layers, caches in place.
      num_blocks: of the scheduler's pool; a backend may have cut each into several of its own.
    """
    caches = [layer.kv_cache for layer in layers if isinstance(layer.kv_cache, torch.Tensor)]
    parts = [cache.shape[0] // num_blocks if cache.ndim else 0 for cache in caches]
    own = [cache[-count:] for cache, count in zip(caches, parts, strict=True) if count]
    before = [block.clone() for block in own]
    try:
        yield num_blocks - 1
    finally:
        with torch.inference_mode():  # caches that were made in it may be written in it only
            for block, numbers in zip(own, before, strict=True):
                block.copy_(numbers)
