"""A loop inside a text: how much memory it holds, and what becomes of the text around it."""

from __future__ import annotations

from typing import Any

import numpy as np

from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.evaluation.recorded_runner import retire_by_preset
from trtllm_memshare.evaluation.retirement import Retirements
from trtllm_memshare.evaluation.stay_reasons import Inquiry
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.steps import BoundaryTokens

PAGE_TOKENS = 16


def measure_loop(
    replay: MaskedReplay,
    ids: list[int],
    num_prompt_tokens: int,
    passage: list[int],
    boundaries: BoundaryTokens,
    config: MemShareConfig,
    before: int,
    loop: int,
) -> dict[str, Any]:
    """Pages held and change of the loss when ``passage`` fills ``loop`` tokens behind the first ``before`` of a text.

    Args:
      ids: the text, token ids; what is behind ``before`` follows the loop.
      config: what shares or forgets; under the preset ``pressure`` the request stands at its floor throughout.
      before, loop: tokens, multiples of a page.

    Returns:
      Counts of pages and changes of the loss; ``first_half_stays`` and ``second_half_stays`` say of the pages of the
      loop's halves that are there at its end how many stay for which reason, see ``Inquiry``.
    """
    repeated = (passage * (loop // len(passage) + 1))[:loop]
    written = [*ids[:before], *repeated, *ids[before:]]
    full = replay.read(written, PAGE_TOKENS)
    inquiry = Inquiry(before + loop)
    retirements = retire_by_preset(config, full, num_prompt_tokens, replay.model, boundaries, inquiry)
    loss = replay.change(full, retirements).loss
    held = [_held(retirements, end) for end in range(0, len(written) + 1, PAGE_TOKENS)]
    begin, end = before // PAGE_TOKENS, (before + loop) // PAGE_TOKENS
    middle = (begin + end) // 2
    return {
        "passage_tokens": len(passage),
        "pages_before": held[begin],
        "pages_written_in_loop": end - begin,
        "pages_held_halfway": held[middle],
        "pages_held_at_its_end": held[end],
        "first_half_stays": inquiry.count(begin, middle),
        "second_half_stays": inquiry.count(middle, end),
        "loss_change_before": round(float(loss[num_prompt_tokens : before - 1].mean()), 5),
        "loss_change_in_loop": round(float(loss[before - 1 : before + loop - 1].mean()), 5),
        "loss_change_after": round(float(loss[before + loop - 1 :].mean()), 5),
    }


def _held(retirements: Retirements, num_tokens: int) -> int:
    """Pages in memory when so many tokens are written."""
    written = num_tokens // retirements.tokens_per_block
    return written - int((np.asarray(retirements.retired_at[:written]) <= num_tokens).sum())
