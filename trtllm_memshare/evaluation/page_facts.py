"""What the full pass over a text shows of its pages: collected once a text, read by the ranking of every arm."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from trtllm_memshare.evaluation.retirement import Moment
from trtllm_memshare.search.nearest_page import relative_distances_of_rows
from trtllm_memshare.search.need import PageFacts
from trtllm_memshare.search.signatures import make_projection

_CHUNK_TOKENS = 256
_RECENT_PAGES = 4  # of 16 tokens: the observation window of SnapKV is 64 queries for its largest budgets


@dataclass(frozen=True)
class TextFacts:
    """Facts of a text of ``tokens`` tokens in whole ``pages``, float32 arrays.

    Attributes:
      attention: ``[pages, pages]``, attention from a query of the first page to all keys of the second, mean over
        queries, heads and layers.
      cosines: by field (``k``: K without its rotation, ``v``, ``signature``): ``[tokens, pages]``, the largest cosine
        of a token with a token of the page; of K and V the mean over layers and KV heads.
      surprisal: ``[pages]``, -log p of the page's tokens, summed, in nats.
      distance: ``[pages, pages]``, relative distance of whole pages in phase, K and V as stored, the larger of the
        two, mean over layers.
    """

    tokens_per_block: int
    attention: np.ndarray
    cosines: dict[str, np.ndarray]
    surprisal: np.ndarray
    distance: np.ndarray

    def at(self, moment: Moment, draws: np.ndarray, compared: str = "k") -> PageFacts:
        """Facts of the pages that may go at this moment.

        Args:
          draws: float32 ``[pages]``, numbers drawn for each page of the text.
          compared: the field whose cosines make redundancy.
        """
        size, pages = self.tokens_per_block, moment.may_go
        now = moment.num_computed // size  # pages that are written
        written = np.arange(now)[:, None]
        received = self.attention[:now][:, pages]
        later = written > pages
        return PageFacts(
            position=pages.astype(np.int32),
            redundancy=self.redundancy(moment, compared),
            attention=(received * later).sum(0) / np.maximum(1, later.sum(0)),
            recent_attention=received[max(0, now - max(1, _RECENT_PAGES * 16 // size)) :].mean(0),
            surprisal=self.surprisal[pages],
            draw=draws[pages],
        )

    def to_come(self, moment: Moment) -> np.ndarray:
        """Attention that each page of ``may_go`` gets from the queries that are not written yet, float32, their sum.

        Nobody who serves knows it.
        """
        return self.attention[moment.num_computed // self.tokens_per_block :][:, moment.may_go].sum(0)

    def merged(self, count: int) -> TextFacts:
        """The facts of pages ``count`` times as long; what is left over at the end belongs to no page."""
        pages = len(self.surprisal) // count
        used, tokens = pages * count, pages * count * self.tokens_per_block
        square = (pages, count, pages, count)
        return TextFacts(
            self.tokens_per_block * count,
            self.attention[:used, :used].reshape(square).sum(3).mean(1),
            {name: c[:tokens, :used].reshape(tokens, pages, count).max(2) for name, c in self.cosines.items()},
            self.surprisal[:used].reshape(pages, count).sum(1),
            np.full((pages, pages), np.nan, np.float32),  # of whole pages in phase: not to be had from shorter ones
        )

    def redundancy(self, moment: Moment, compared: str) -> np.ndarray:
        """See ``PageFacts``: float32 ``[may_go]``."""
        by_page = self.cosines[compared].reshape(-1, self.tokens_per_block, len(self.surprisal))
        cosines = by_page[moment.may_go][:, :, moment.resident]
        earlier = moment.resident <= moment.may_go[:, None]
        return np.where(earlier[:, None], np.float32(-1), cosines).max(2).mean(1)


@dataclass
class CollectingPass:
    """The full cache's pass: attends, keeps K and V, and collects the facts of its pages.

    Args:
      num_tokens: length of the text.
      num_layers: layers of the model.
      tokens_per_block: tokens of a page.
      inv_freq: float32 ``[head_dim / 2]``, to undo the rotation of K; on the device of the pass.
    """

    num_tokens: int
    num_layers: int
    tokens_per_block: int
    inv_freq: torch.Tensor
    states: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        num_pages = self.num_tokens // self.tokens_per_block
        device = self.inv_freq.device
        self._attention = torch.zeros(num_pages, num_pages, device=device)
        self._distance = torch.zeros(num_pages, num_pages, device=device)
        self._units: dict[str, list[torch.Tensor]] = {"k": [], "v": []}
        angle = torch.arange(self.num_tokens, device=device).double()[:, None] * self.inv_freq.double()
        self._cos, self._sin = angle.cos().float(), angle.sin().float()

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See ``LayerPass``."""
        size = self.tokens_per_block
        whole = self.num_tokens // size * size
        kv_heads, num_tokens, head_dim = key.shape
        group = query.shape[0] // kv_heads
        output = torch.empty_like(query)
        step = _CHUNK_TOKENS // size * size
        for start in range(0, num_tokens, step):
            stop = min(start + step, num_tokens)
            rows = query[:, start:stop].reshape(kv_heads, -1, head_dim)
            logits = (rows @ key[:, :stop].transpose(1, 2)).view(kv_heads, group, stop - start, stop)
            hidden = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu(1)
            logits[..., start:].masked_fill_(hidden, float("-inf"))
            weights = logits.softmax(-1)
            output[:, start:stop] = (weights.view(kv_heads, -1, stop) @ value[:, :stop]).view(
                -1, stop - start, head_dim
            )
            last = min(stop, whole)
            if last > start:
                mean = weights[:, :, : last - start, :last].mean((0, 1))  # [queries, keys]
                mean = mean.view((last - start) // size, size, last // size, size).sum(3).mean(1)
                self._attention[start // size : last // size, : last // size] += mean / self.num_layers
        self.states.append((key, value))
        first, second = key[..., : head_dim // 2], key[..., head_dim // 2 :]
        plain = torch.cat([first * self._cos + second * self._sin, second * self._cos - first * self._sin], -1)
        for name, states in (("k", plain), ("v", value)):
            unit = torch.nn.functional.normalize(states, dim=-1) / (self.num_layers * kv_heads) ** 0.5
            self._units[name].append(unit.transpose(0, 1).flatten(1).bfloat16())
        stored = [states[:, :whole].unflatten(1, (-1, size)).transpose(0, 1).flatten(1) for states in (key, value)]
        self._distance += torch.maximum(*(relative_distances_of_rows(s, s) for s in stored)) / self.num_layers
        return output

    def facts(self, losses: np.ndarray) -> TextFacts:
        """The facts, once every layer has attended; ``losses``: float32 ``[tokens]``, -log p of each token."""
        size = self.tokens_per_block
        num_pages = self.num_tokens // size
        whole = num_pages * size
        signature = text_signatures(self._units["v"], self.states[0][0].shape[-1])
        units = {name: torch.cat(layers, 1)[:whole] for name, layers in self._units.items()}
        units["signature"] = signature[:whole].bfloat16()
        cosines = {name: _largest_by_page(unit, size) for name, unit in units.items()}
        surprisal = losses[:whole].reshape(num_pages, size).sum(1)
        return TextFacts(size, self._attention.cpu().numpy(), cosines, surprisal, self._distance.cpu().numpy())


def text_signatures(values: list[torch.Tensor], head_dim: int) -> torch.Tensor:
    """The product's signatures of a text's tokens, float32 ``[tokens, width]``; see ``search/signatures.py``.

    Args:
      values: V of each layer, ``[tokens, kv_heads * head_dim]``, each head's of one common length.
    """
    heads = values[0].shape[1] // head_dim
    projection = make_projection(len(values), heads, head_dim)
    sums = sum(
        torch.einsum("thd,hdw->tw", values[layer].float().unflatten(1, (heads, head_dim)), matrix)
        for layer, matrix in zip(projection.layers.tolist(), projection.matrix.to(values[0].device), strict=True)
    )
    return torch.nn.functional.normalize(torch.as_tensor(sums), dim=-1)


def _largest_by_page(unit: torch.Tensor, size: int) -> np.ndarray:
    """Largest product of each token with a token of each page: ``[tokens, width]`` -> float32 ``[tokens, pages]``."""
    rows = [(unit[i : i + 512] @ unit.T).float().unflatten(1, (-1, size)).amax(2) for i in range(0, len(unit), 512)]
    return torch.cat(rows).cpu().numpy()
