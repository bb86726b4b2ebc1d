"""How much of each generated page stands again later in its request, from V as it lies in the pool.

V carries no position, so nothing has to be turned. Of three layers, projected to 64 numbers a token and normalised, it
ranks pages nearly as un-rotated K of all layers does. Everything stays on the pool's device; one small tensor comes
back when pressure asks. A page is looked at once, and costs one product with the tokens before it.
"""

from __future__ import annotations

import numpy as np
import torch

_WIDTH, _NUM_LAYERS, _AT_ONCE = 64, 3, 64


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
        self._requests: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode()
    def of(self, request_id: int, first: int, blocks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Redundancy of pages in [-1, 1], float32 ``[len(wanted)]``: mean largest cosine with a later resident token.

        Args:
          request_id: whose pages.
          first: logical page at which generated tokens begin.
          blocks: int ``[n]``, pool page of each full logical page from ``first`` on; -1 where it was given up.
          wanted: int ``[m]``, logical pages to tell of.
        """
        size = self._pool.shape[4]
        nothing = torch.zeros((0, _WIDTH), device=self._pool.device), torch.zeros(0, device=self._pool.device)
        known_first, signatures, nearest = self._requests.get(request_id, (first, *nothing))
        if known_first != first or len(signatures) > len(blocks) * size:
            signatures, nearest = nothing
        for start in range(len(signatures) // size, len(blocks), _AT_ONCE):
            new = self._signatures(blocks[start : start + _AT_ONCE])
            cosines = new @ torch.cat([signatures, new]).T
            later = torch.ones_like(cosines, dtype=torch.bool).tril(len(signatures) - 1)  # column before row
            best = cosines.masked_fill(~later, -1.0).amax(0)
            nearest = torch.maximum(torch.cat([nearest, torch.full((len(new),), -1.0, device=new.device)]), best)
            signatures = torch.cat([signatures, new])
        self._requests[request_id] = first, signatures, nearest
        pages = nearest.view(-1, size).mean(1)
        return pages[torch.from_numpy(wanted - first).long().to(pages.device)].float().cpu().numpy()

    def forget(self, request_id: int) -> None:
        self._requests.pop(request_id, None)

    def _signatures(self, blocks: np.ndarray) -> torch.Tensor:
        """float32 ``[len(blocks) * tokens_per_block, width]``, normalised; zeros for pages that were given up."""
        index = torch.from_numpy(np.maximum(blocks, 0)).long().to(self._pool.device)
        values = torch.cat([self._pool[index, layer, 1] for layer in self._layers], 1).float()
        values = values.permute(0, 2, 1, 3).flatten(2) @ self._projection
        values[torch.from_numpy(blocks < 0).to(values.device)] = 0
        return torch.nn.functional.normalize(values.flatten(0, 1), dim=-1)
