"""The arms of the study of pages: each is a choice of what goes, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trtllm_memshare.evaluation.page_facts import TextFacts
from trtllm_memshare.evaluation.retirement import (
    Choice,
    Moment,
    Retirements,
    hold_at_floor,
    lowest_need,
    nearest_earlier,
)
from trtllm_memshare.search.need import page_need

_MAX_ALIASES = 8  # as MemShareConfig.max_aliases


@dataclass(frozen=True)
class Arm:
    """How pages are ranked.

    Attributes:
      need: name of the formula in ``search/need.py``.
      compared: what redundancy is measured on: ``k``, ``v`` or ``signature``.
      seed: of the draws, beside the text's own.
      redraw: draw anew each time a page has to go, as the published control does: the old have run the risk more
        often. Else each page keeps one number, which thins out old and new pages alike.
      foresees: attention is that of the queries to come: a bound for rankings, which no engine can serve.
    """

    need: str
    compared: str = "k"
    seed: int = 0
    redraw: bool = False
    foresees: bool = False


FORESEEN = "attention-to-come"
ARMS: dict[str, Arm] = {
    "random": Arm("random", redraw=True),
    "random-once": Arm("random"),
    FORESEEN: Arm("attention", foresees=True),
    "streaming": Arm("age"),
    "snapkv": Arm("attention"),
    "rkv": Arm("recent-attention-redundancy"),
    "attention-redundancy": Arm("attention-redundancy"),
    "attention-redundancy-recency": Arm("attention-redundancy-recency"),
    "redundancy-k": Arm("redundancy"),
    "redundancy-v": Arm("redundancy", "v"),
    "redundancy-signature": Arm("redundancy", "signature"),
    "redundancy-recency-signature": Arm("redundancy-recency", "signature"),
    "surprisal-redundancy": Arm("surprisal-redundancy"),
    "surprisal-redundancy-signature": Arm("surprisal-redundancy", "signature"),
    "surprisal-led-signature": Arm("surprisal-led-redundancy", "signature"),
    "surprisal-led-recency-signature": Arm("surprisal-led-redundancy-recency", "signature"),
    "attention-redundancy-signature": Arm("attention-redundancy", "signature"),
    "attention-surprisal-redundancy": Arm("attention-surprisal-redundancy"),
}
PAIRED = ("paper-alias", "paper-null")
DEFAULT = "surprisal-led-recency-signature"
"""The ranking of the preset ``pressure``."""
ANEW = "random-anew"
"""Random pages, drawn for each question by itself: one lucky draw then counts for one question, not for seven."""


@dataclass(frozen=True)
class Budget:
    """How much of a text is held.

    Attributes:
      min_kept: share of the generated pages that stay.
      protected_tokens: most recent tokens that never go.
    """

    min_kept: float = 0.5
    protected_tokens: int = 128


def retire(
    name: str, budget: Budget, num_prompt_tokens: int, num_tokens: int, facts: TextFacts, text_seed: int
) -> Retirements:
    """What an arm gives up while a text is written.

    Args:
      name: in ``ARMS`` or ``PAIRED``.
      text_seed: of the text, for random draws.
    """
    paired = name in PAIRED
    choose = nearest_earlier(facts.distance, _MAX_ALIASES) if paired else ranking_of(ARMS[name], facts, text_seed)
    retirements = hold_at_floor(
        num_prompt_tokens, num_tokens, facts.tokens_per_block, budget.min_kept, budget.protected_tokens, choose
    )
    return retirements.forgotten() if name == "paper-null" else retirements


def ranking_of(arm: Arm, facts: TextFacts, text_seed: int) -> Choice:
    """How an arm chooses; ``text_seed``: see ``retire``."""
    rng = np.random.default_rng((arm.seed, text_seed))
    draws = rng.random(len(facts.surprisal)).astype(np.float32)

    def ranking(moment: Moment) -> np.ndarray:
        now = rng.random(len(draws)).astype(np.float32) if arm.redraw else draws
        known = facts.at(moment, now, arm.compared)
        if arm.foresees:
            known = replace(known, recent_attention=facts.to_come(moment))
        return page_need(arm.need, known)

    return lowest_need(ranking)
