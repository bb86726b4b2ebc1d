"""Null pages of a manager of TensorRT-LLM: taken from its pool for good, written, and named by rows of the block table.

A null page is a page that no query attends to (``engine.null_page``): V is 0, and K of each KV head points away from
all queries of a band of positions. TensorRT-LLM's manager hands the pages out as those of a made-up request, by the
call with which it makes its own warm-up requests; that request never runs and is never freed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_memshare.cache.null_pages import NullPages
from trtllm_memshare.engine.null_page import stored_keys
from trtllm_memshare.engine.null_page_files import KEYS_FILE, read_null_pages
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.backends import CacheBackend

log = logging.getLogger("trtllm_memshare")

NULL_REQUEST = 2**61 - 1
"""Id of the made-up request; TensorRT-LLM counts its own from 1 and pads CUDA graphs with ids at the top of 64 bits."""


class NullKeys:
    """What is written into the pages of one rank.

    Attributes:
      keys: float32 ``[num_bands, num_layers, local KV heads, head_dim]``, K after the rotation, of every token.
      bands: int, where bands begin and where the last one ends, in tokens.
    """

    def __init__(self, keys: torch.Tensor, bands: list[int]) -> None:
        self.keys, self.bands = keys, bands

    @classmethod
    def read(cls, folder: Path, shape: torch.Size, mapping: Any, max_seq_len: int) -> NullKeys:
        """From the file that calibration wrote, cut to this rank's heads and to the positions that can occur.

        Args:
          folder: an engine directory, or any folder with ``null_pages.safetensors``.
          shape: of the pool.
          mapping: TensorRT-LLM's, of the ranks.
          max_seq_len: longest sequence that is served.

        Raises:
          UserError: no file, a damaged one, another model's, or pages for fewer positions.
        """
        path = folder / KEYS_FILE
        if not path.is_file():
            raise UserError(f"no null pages in {folder} (make them with memshare null-pages MODEL)")
        keys, borders, _ = read_null_pages(path, "make them again with memshare null-pages MODEL")
        bands = borders.tolist()
        total = keys.shape[2]
        expected = [len(bands) - 1, shape[1], "KV heads", shape[5]]
        if (len(keys), keys.shape[1], keys.shape[3]) != (len(bands) - 1, shape[1], shape[5]) or (
            -(-total // mapping.tp_size) != shape[3]
        ):
            raise UserError(
                f"null pages of {path} must be {expected} for the model that is served, {shape[3]} KV heads on each of "
                f"{mapping.tp_size} ranks, got {list(keys.shape)} (calibrate that model)"
            )
        if bands[-1] < max_seq_len:
            raise UserError(
                f"null pages of {path} reach to position {bands[-1]}, got max_seq_len {max_seq_len} (calibrate for "
                f"more positions, or lower max_seq_len)"
            )
        count = next(i for i, end in enumerate(bands[1:], 1) if end >= max_seq_len)
        # More ranks than heads: a head is on several of them.
        first = mapping.rank % mapping.tp_size * total // mapping.tp_size
        return cls(keys[:count, :, first : first + shape[3]], bands[: count + 1])


class NullRows:
    """Null pages of one manager.

    Args:
      manager: TensorRT-LLM's.
      backend: of the manager.
      null_keys: of this rank.

    Attributes:
      pages: for this project's own manager: virtual block b is the page of band b.
      entries: int32 ``[num_pools, 2, num_bands]``, what rows of the block table hold for them; None until taken.
    """

    def __init__(self, manager: Any, backend: CacheBackend, null_keys: NullKeys) -> None:
        self._manager, self._backend, self._keys = manager, backend, null_keys
        self.pages = NullPages(list(range(len(null_keys.keys))), null_keys.bands)
        if len(self.pages.blocks) > backend.max_blocks_per_seq:
            raise UserError(
                f"null pages for {len(self.pages.blocks)} bands need a block table of as many entries, got "
                f"{backend.max_blocks_per_seq} (raise max_seq_len)"
            )
        self.entries: torch.Tensor | None = None

    @property
    def num_pages(self) -> int:
        """Pages of the pool that are taken."""
        return len(self.pages.blocks)

    def check_room(self, max_seq_len: int) -> None:
        """Raises UserError if the pool does not hold the longest request beside the null pages, which stay in it.

        TensorRT-LLM lets requests in by the whole pool: one that is longer than the rest would wait for ever (V1), or
        end the executor as a deadlock (main's V2). One page more is for the request that pads CUDA graphs.
        """
        num_blocks, size = self._backend.pool.shape[0], self._backend.pool.shape[4]
        most = (num_blocks - self.num_pages - 1) * size
        if max_seq_len > most:
            raise UserError(
                f"max_seq_len must be at most {most} beside {self.num_pages} null pages in a KV cache of {num_blocks} "
                f"blocks of {size} tokens, got {max_seq_len} (lower max_seq_len, give the cache more memory, or set "
                f"null_entries to skip)"
            )

    def take(self, num_promised: int = 0) -> bool:
        """Takes and writes the pages; False if the manager has no room for them now, or gives some that hold text.

        Args:
          num_promised: pages that the scheduler has counted on for this iteration and the manager is yet to hand out.

        To be called where nothing of TensorRT-LLM runs that expects an empty manager, on the forward passes' stream.

        Raises:
          RuntimeError: the manager gave another number of pages than was asked for.
        """
        count, pool = len(self.pages.blocks), self._backend.pool
        if self._backend.num_free_pages() < count + num_promised:
            return False  # V1 would hand out what there is, keep it for nobody, and raise
        tokens = count * pool.shape[4]
        made = self._manager.add_dummy_requests([NULL_REQUEST], token_nums=[tokens], prepare_resource=True)
        if not made:
            return False
        if made[0].context_current_position > 0:  # V1 found a prompt of the same made-up tokens: pages of somebody
            self._manager.free_resources(made[0])
            return False
        try:
            pages = self._backend.pages(NULL_REQUEST)
            if len(pages) != count or len(set(pages)) != count:
                raise RuntimeError(f"{count} null pages were asked for, the KV cache manager gave {pages}")
            self._write(pages)
            self.entries = self._backend.entries(NULL_REQUEST, count)
        except Exception:
            self._manager.free_resources(made[0])  # nobody would ever name them
            raise
        log.info("MemShare took %d null pages, one for each band up to position %d", count, self.pages.bands[-1])
        return True

    def write_again(self) -> None:
        """Writes the pages anew: TensorRT-LLM may have let go of what its pool held, as it does when it sleeps."""
        self._write(self._backend.pages(NULL_REQUEST))

    def _write(self, pages: list[int]) -> None:
        pool = self._backend.pool
        for page, keys in zip(pages, self._keys.keys, strict=True):
            pool[page, :, 0] = stored_keys(keys, pool.dtype).to(pool.device)[:, :, None]
            pool[page, :, 1] = torch.zeros((), device=pool.device).to(pool.dtype)

    def place(self, row: np.ndarray, table: np.ndarray, is_null: np.ndarray) -> int:
        """Lets entries of a row read null pages, which follow the entries of the request's own row; modifies ``row``.

        Args:
          row: int ``[width]``, positions.
          table: int32 ``[n]``, virtual block of each logical one.
          is_null: bool ``[n]``.

        Returns:
          By how many entries the row is shorter than the text: none.
        """
        row[: len(table)][is_null] = len(row) + table[is_null]
        return 0
