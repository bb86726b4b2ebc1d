"""What requests hold when they have given up all that they may: what admission under pressure counts.

A waiting request gets in when everybody, brought down to the floor, could go on for some tokens more::

    pool  | floors now | growth of the next lookahead_tokens of each | free |

How long requests will become is not known, and need not be. Looking ahead to their ends lets in so few that requests/s
and the first token of the others suffer more than a pause costs (docs/pressure_figures.md). Where nobody may be paused,
what each asked for counts, and the most that all hold at any one step: those that end make room for the others.
"""

from __future__ import annotations

import numpy as np

from trtllm_memshare.search.config import MemShareConfig


def most_protected(config: MemShareConfig) -> int:
    """Most recent tokens of a request that may be protected, see ``BlockMatcher.protected_from``.

    What steps protect depends on the text, which is not written yet.
    """
    return max(config.protected_tokens, config.max_protected_tokens if config.protected_steps else 0)


def blocks_at_floors(
    num_tokens: np.ndarray,
    num_prompt_tokens: np.ndarray,
    min_kept: np.ndarray,
    protected_tokens: int,
    tokens_per_block: int,
    num_free_to_go: np.ndarray | int = 0,
    num_shared: np.ndarray | int = 0,
) -> int:
    """Blocks that requests hold together at given lengths, each at its floor.

    Args:
      num_tokens: int ``[n]``, prompt and generated tokens of each request.
      num_prompt_tokens: int ``[n]``, how many of them are prompt.
      min_kept: float ``[n]``, share of its generated pages that each keeps.
      protected_tokens: most recent tokens, which stay.
      tokens_per_block: of a page.
      num_free_to_go: int ``[n]``, pages that each has given up, or may whatever its floor is, as repeats may.
      num_shared: int ``[n]``, pages of its prompt that another of them holds too, who is the one that counts them.

    Example: 100 tokens of prompt in pages of 32 are 4 pages; of 30 generated pages 15 stay, one is being written: 20.
    With 18 of the 30 given up as repeats it is 4 + 30 - 18 + 1 = 17.
    """
    held = _held_at_floors(num_tokens, num_prompt_tokens, min_kept, protected_tokens, tokens_per_block, num_free_to_go)
    return int((held - num_shared).sum())


def peak_at_floors(
    num_tokens: np.ndarray,
    num_left: np.ndarray,
    num_steps: np.ndarray,
    num_prompt_tokens: np.ndarray,
    min_kept: np.ndarray,
    protected_tokens: int,
    tokens_per_block: int,
    num_free_to_go: np.ndarray | int = 0,
    num_shared: np.ndarray | int = 0,
) -> int:
    """Most blocks that requests hold together at any step until the last has ended, each at its floor.

    Args:
      num_tokens: int ``[n]``, prompt and generated tokens of each request now.
      num_left: int ``[n]``, how many more each writes, one a step from now on or later.
      num_steps: int ``[n]``, steps after which each has ended; at least ``num_left``.
      num_shared: as in ``blocks_at_floors``; of those that share pages, one that ends last is who counts them.
      others: see ``blocks_at_floors``.

    Example: two requests of which one ends, with 10 blocks, before the other has grown from 2 to 10 hold less than 20.
    """
    steps = np.unique(num_steps)[:, None]  # what requests hold grows until one ends, so its last step is a peak
    lengths = num_tokens + np.minimum(steps, num_left)
    held = _held_at_floors(lengths, num_prompt_tokens, min_kept, protected_tokens, tokens_per_block, num_free_to_go)
    return int(((held - num_shared) * (num_steps >= steps)).sum(1).max(initial=0))


def _held_at_floors(
    num_tokens: np.ndarray,
    num_prompt_tokens: np.ndarray,
    min_kept: np.ndarray,
    protected_tokens: int,
    tokens_per_block: int,
    num_free_to_go: np.ndarray | int,
) -> np.ndarray:
    prompt = -(-num_prompt_tokens // tokens_per_block)
    # A block more than the protected tokens fill, since the protection need not begin with a block.
    protected = -(-protected_tokens // tokens_per_block) + 1
    generated = np.maximum(0, num_tokens // tokens_per_block - prompt)
    stays = np.maximum(np.ceil(min_kept * generated - 1e-9).astype(np.int64), np.minimum(generated, protected))
    # And the block that is being written.
    return np.minimum(-(-num_tokens // tokens_per_block) - num_free_to_go, prompt + stays + 1)
