"""Masked replay: one pass over a whole text for each arm, in place of one step for each token.

A page that is retired at position t is a set of keys that queries from t on do not see; an alias adds ln m to its
donor's logits. Every arm is held against the full cache position by position. The pass over a text of 2,048 tokens
takes seconds on one core where the executor takes a minute, and does the same: a test ties the two.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from trtllm_memshare.evaluation.head_retirement import HeadChoicePass, HeadRetirements
from trtllm_memshare.evaluation.masked_attention import IMPLEMENTATION, LayerPass, MaskedPass, RoundedPass, open_pass
from trtllm_memshare.evaluation.page_facts import CollectingPass, TextFacts
from trtllm_memshare.evaluation.retirement import NEVER, NO_DONOR, Retirements

_ROWS = 32  # positions whose distributions are worked on at a time: 32 * 49,152 * 4 bytes = 6 MB


@dataclass(frozen=True)
class FullPass:
    """What the full cache makes of a text.

    Attributes:
      ids: int64 ``[tokens]``; this and every other tensor on the model's device.
      losses: float32 ``[tokens]``, -log p of each token; 0 for the first.
      facts: of its pages.
      hidden: float32 ``[tokens, hidden_size]``, what the output head reads.
      probabilities: bfloat16 ``[tokens, vocab_size]``, of each position's next token.
      best: int64 ``[tokens]``, the most likely next token.
      states: of each layer K (after RoPE) and V, float32 ``[kv_heads, tokens, head_dim]``.
    """

    ids: torch.Tensor
    losses: np.ndarray
    facts: TextFacts
    hidden: torch.Tensor
    probabilities: torch.Tensor
    best: torch.Tensor
    states: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Change:
    """What an arm changes at each position of a text, against the full cache: float32 ``[tokens - 1]``.

    Index i is the prediction of token i + 1.

    Attributes:
      loss: change of -log p of the token that stands there, in nats.
      divergence: KL(full || arm) of the distributions, in nats.
      agrees: whether both find the same token most likely.
    """

    loss: np.ndarray
    divergence: np.ndarray
    agrees: np.ndarray


class MaskedReplay:
    """Reads texts with a model of transformers.

    Args:
      model_dir: a checkpoint directory.
      compute: ``float32``, or ``bfloat16``: products of the linear layers in bfloat16, everything between in float32.
      device: ``cpu`` or a CUDA device. What a text of 8,192 tokens takes there with SmolLM2-135M, beside 0.5 GB of
        weights: 0.8 GB of probabilities, 0.4 GB of K and V, 0.2 GB of their units, 0.3 GB of an arm's masks, and 0.1 GB
        for what a chunk of queries sees. Nothing is ``[tokens, tokens]`` for each head.
    """

    def __init__(self, model_dir: Path, compute: str = "float32", device: str = "cpu") -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=torch.float32,
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        self.model.to(device).eval()
        self._bf16 = compute == "bfloat16"
        head = self.model.get_output_embeddings().weight
        self._head = head.detach()
        self._fast_head = self._head.bfloat16() if self._bf16 else self._head

    @torch.inference_mode()
    def read(self, ids: list[int], tokens_per_block: int) -> FullPass:
        """The full cache's pass."""
        tokens = torch.tensor(ids, device=self.model.device)
        config = self.model.config
        collect = CollectingPass(
            len(ids), config.num_hidden_layers, tokens_per_block, self.model.model.rotary_emb.inv_freq.float()
        )
        hidden = self._hidden(tokens, torch.arange(len(ids)), collect)
        losses, best = np.zeros(len(ids), np.float32), torch.zeros_like(tokens)
        probabilities = torch.empty(len(ids), config.vocab_size, dtype=torch.bfloat16, device=tokens.device)
        for start in range(0, len(ids), _ROWS):
            log_p = (hidden[start : start + _ROWS] @ self._head.T).log_softmax(-1)
            stop = start + len(log_p)
            best[start:stop] = log_p.argmax(-1)
            targets = tokens[start + 1 : stop + 1]
            losses[start + 1 : start + 1 + len(targets)] = -log_p[torch.arange(len(targets)), targets].cpu().numpy()
            probabilities[start:stop] = log_p.exp()
        return FullPass(tokens, losses, collect.facts(losses), hidden, probabilities, best, collect.states)

    @torch.inference_mode()
    def change(
        self, full: FullPass, retirements: Retirements | HeadRetirements, stored: torch.dtype | None = None
    ) -> Change:
        """An arm's pass. Positions before the first retirement are the full cache's own and are not computed again.

        Args:
          stored: type of the arm's cache; None: the one of ``full``, float32. All positions are computed with another.
        """
        count = len(full.ids) - 1
        change = Change(np.zeros(count, np.float32), np.zeros(count, np.float32), np.ones(count, bool))
        first = retirements.first if stored is None else 0
        if first is None or first >= count:
            return change
        arm = open_pass(retirements, len(full.ids), first, full.states)
        if stored is not None:
            arm = RoundedPass(arm, stored)
        moved = self._hidden(full.ids[first:], torch.arange(first, count + 1), arm) - full.hidden[first:]
        for start in range(first, count, _ROWS):
            stop = min(start + _ROWS, count)
            # The head is linear: its product with the small difference keeps bfloat16 exact enough.
            difference = moved[start - first : stop - first].to(self._fast_head.dtype)
            shift = (difference @ self._fast_head.T).float()
            p = full.probabilities[start:stop].float()
            total = p.sum(-1)
            arm_p = p * shift.exp()
            log_norm = (arm_p.sum(-1) / total).log()
            own = shift[torch.arange(stop - start), full.ids[start + 1 : stop + 1]]
            change.loss[start:stop] = (log_norm - own).cpu().numpy()
            change.divergence[start:stop] = (log_norm - (p * shift).sum(-1) / total).cpu().numpy()
            change.agrees[start:stop] = (arm_p.argmax(-1) == full.best[start:stop]).cpu().numpy()
        return change

    @torch.inference_mode()
    def choose_by_head(
        self, full: FullPass, num_prompt_tokens: int, min_kept: float, protected_tokens: int
    ) -> HeadRetirements:
        """What each layer and KV head gives up on its own, token by token; one pass. See ``HeadChoicePass``."""
        count = len(full.ids)
        choice = HeadChoicePass(count, num_prompt_tokens, full.facts.tokens_per_block, min_kept, protected_tokens)
        self._hidden(full.ids, torch.arange(count), choice)
        return choice.retirements()

    @torch.inference_mode()
    def answers(
        self,
        full: FullPass,
        retirements: Retirements,
        branches: list[list[int]],
        stored: torch.dtype | None = None,
    ) -> list[torch.Tensor]:
        """Logits of continuations of a text, each read after what an arm left of it.

        Args:
          branches: token ids of each continuation.
          stored: see ``change``; of the continuations' own tokens too.

        Returns:
          Of each, float32 ``[len(branch), vocab_size]``; row i is the prediction of what follows token i.
        """
        count = len(full.ids)
        first = count if retirements.first is None else min(retirements.first, count)
        first = first if stored is None else 0
        lengths = [len(branch) for branch in branches]
        arm: LayerPass = MaskedPass(retirements, count, first, full.states, lengths)
        if stored is not None:
            arm = RoundedPass(arm, stored)
        tokens = torch.cat([full.ids[first:].cpu(), *map(torch.tensor, branches)])
        positions = torch.cat([torch.arange(first, count), *(torch.arange(count, count + n) for n in lengths)])
        hidden = self._hidden(tokens, positions, arm)[count - first :]
        return list((hidden @ self._head.T).split(lengths))

    @torch.inference_mode()
    def logits(self, ids: list[int], retirements: Retirements) -> torch.Tensor:
        """An arm's logits at every position, computed from the start: float32 ``[tokens, vocab_size]``."""
        arm = MaskedPass(retirements, len(ids))
        return self._hidden(torch.tensor(ids), torch.arange(len(ids)), arm) @ self._head.T

    def _hidden(self, tokens: torch.Tensor, positions: torch.Tensor, layer_pass: LayerPass) -> torch.Tensor:
        """The last layer's output after its norm, float32 ``[tokens, hidden_size]``."""
        device = self.model.device
        with self._autocast():
            result = self.model.model(
                input_ids=tokens[None].to(device),
                position_ids=positions[None].to(device),
                use_cache=False,
                memshare_pass=layer_pass,
            )
        return result.last_hidden_state[0].float()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._bf16)


def nothing_retired(num_tokens: int, tokens_per_block: int) -> Retirements:
    """The full cache."""
    num_pages = num_tokens // tokens_per_block
    return Retirements(tokens_per_block, np.full(num_pages, NEVER, np.int64), np.full(num_pages, NO_DONOR, np.int32))
