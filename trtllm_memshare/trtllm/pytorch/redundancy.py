"""How much of each generated page stands again later in its request, from V as it lies in the pool.

V carries no position, so nothing has to be turned. Of three layers, projected to 64 numbers a token and normalised, it
ranks pages nearly as un-rotated K of all layers does. Everything stays on the pool's device, where products cost
little; one small tensor comes back when pressure asks. A page is looked at once, and costs one product with the tokens
before it; one that goes has those tokens looked at again that had their nearest in it. Memory: 268 bytes a token, and
some 64 MiB while products are worked out, however long a request is.
"""

from __future__ import annotations

import numpy as np
import torch

_WIDTH, _NUM_LAYERS = 64, 3
_PAGES_AT_ONCE = 64  # that are read from the pool
_MOST_PRODUCTS = 1 << 24  # of tokens with tokens, worked out at once: 64 MiB


class Redundancy:
    """Of the generated pages of every request.

    Args:
      pool: ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]``, live, read only.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        layers = pool.shape[1]
        self._layers = sorted({(2 * i + 1) * layers // (2 * _NUM_LAYERS) for i in range(_NUM_LAYERS)})
        width = len(self._layers) * pool.shape[3] * pool.shape[5]
        self._projection = torch.randn(width, _WIDTH, generator=torch.Generator().manual_seed(0)).to(pool.device)
        self._requests: dict[int, tuple[int, _Pages]] = {}

    @torch.inference_mode()
    def of(self, request_id: int, first: int, blocks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Redundancy of pages in [-1, 1], float32 ``[len(wanted)]``: mean largest cosine with a token of a later page.

        Args:
          request_id: whose pages.
          first: logical page at which generated tokens begin.
          blocks: int ``[n]``, pool page of each full logical page from ``first`` on; -1 where it was given up.
          wanted: int ``[m]``, logical pages to tell of, which are there; the newest gets -1.
        """
        known_first, pages = self._requests.get(request_id, (-1, None))
        if pages is None or known_first != first or pages.count > len(blocks):
            pages = _Pages(self._pool.shape[4], self._pool.device)
            self._requests[request_id] = first, pages
        is_there = blocks >= 0
        pages.lose(~is_there[: pages.count])
        while pages.count < len(blocks):
            stop = pages.count + min(pages.room(), _PAGES_AT_ONCE)
            new = slice(pages.count, stop)
            pages.take(self._signatures(np.maximum(blocks[new], 0)), is_there[new])
        return pages.redundancy(wanted - first)

    def forget(self, request_id: int) -> None:
        self._requests.pop(request_id, None)

    def _signatures(self, blocks: np.ndarray) -> torch.Tensor:
        """float32 ``[len(blocks), tokens_per_block, width]``, normalised."""
        index = torch.from_numpy(blocks).long().to(self._pool.device)
        values = torch.cat([self._pool[index, layer, 1] for layer in self._layers], 1).float()
        return torch.nn.functional.normalize(values.permute(0, 2, 1, 3).flatten(2) @ self._projection, dim=-1)


class _Pages:
    """Pages of one request, by their place: signatures, and what each token is nearest to among later ones.

    Attributes:
      count: pages so far, those that went included.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self.count = size, 0
        self._signatures = torch.zeros((0, size, _WIDTH), device=device)
        self._nearest = torch.zeros((0, size), device=device)  # cosine; -1 = none
        self._place = torch.zeros((0, size), dtype=torch.int64, device=device)  # of the page of that one; -1 = none
        self._is_there = torch.zeros(0, dtype=torch.bool, device=device)
        self._has_gone = np.zeros(0, bool)

    def room(self) -> int:
        """How many pages may come at once for their products to stay within the limit; at least one."""
        return max(1, _MOST_PRODUCTS // self._size**2 // (self.count + _PAGES_AT_ONCE))

    def take(self, signatures: torch.Tensor, is_there: np.ndarray) -> None:
        """Takes the next pages: float32 ``[n, size, width]``, and bool ``[n]`` whether each is there."""
        added, device = len(signatures), signatures.device
        self._has_gone = np.concatenate((self._has_gone, ~is_there))
        self._is_there = torch.cat((self._is_there, torch.from_numpy(is_there).to(device)))
        self._signatures = torch.cat((self._signatures, signatures))
        self._nearest = torch.cat((self._nearest, torch.full((added, self._size), -1.0, device=device)))
        self._place = torch.cat((self._place, torch.full((added, self._size), -1, device=device)))
        count, self.count = self.count, self.count + added
        products = signatures.flatten(0, 1) @ self._signatures.flatten(0, 1).T
        largest = products.view(added, self._size, self.count, self._size).amax(1)
        places = torch.arange(self.count, device=device)
        counts = (places[None] < places[count:, None]) & self._is_there[count:, None]  # later pages that are there
        best, which = largest.masked_fill(~counts[..., None], -1.0).max(0)
        is_nearer = best > self._nearest
        self._nearest = torch.where(is_nearer, best, self._nearest)
        self._place = torch.where(is_nearer, which + count, self._place)

    def lose(self, gone: np.ndarray) -> None:
        """Takes out pages that are no more, bool ``[count]``; those that went before are passed over."""
        if not (gone & ~self._has_gone).any():
            return
        self._has_gone = gone
        device = self._is_there.device
        self._is_there = torch.from_numpy(~gone).to(device)
        # Of tokens that have no nearest, -1, the last page is asked about, which makes no difference to them.
        orphans = (~self._is_there[self._place] & (self._place >= 0) & self._is_there[:, None]).nonzero()
        places = torch.arange(self.count, device=device)
        for part in orphans.split(max(1, _MOST_PRODUCTS // (self.count * self._size))):
            owners, tokens = part.unbind(1)
            products = self._signatures[owners, tokens] @ self._signatures.flatten(0, 1).T
            counts = (places[None] > owners[:, None]) & self._is_there
            largest = products.view(-1, self.count, self._size).amax(2).masked_fill(~counts, -1.0)
            best, which = largest.max(1)
            self._nearest[owners, tokens] = best
            self._place[owners, tokens] = torch.where(best > -1.0, which, -1)

    def redundancy(self, places: np.ndarray) -> np.ndarray:
        """The mean over each page's tokens, float32 ``[n]``."""
        index = torch.from_numpy(places).long().to(self._nearest.device)
        return self._nearest[index].mean(1).cpu().numpy()
