"""What runs before the clock on a GPU: without it the first arm would capture the CUDA graphs of all that follow."""

from __future__ import annotations

from bisect import bisect_left

from trtllm_memshare.evaluation.dataset import DatasetItem
from trtllm_memshare.runners.torch.decode_graph import BUCKETS

_PROMPT_TOKENS = 8
_LEAST_TOKENS = 3  # the prompts' step gives one; the next ones find all requests at once


def warm_up_items(items: list[DatasetItem], in_flight: int) -> list[DatasetItem]:
    """Short requests that end in such an order that the batch takes each size for which a graph is captured.

    Args:
      items: whose prompts are cut; no more requests come of them than there are.
      in_flight: most requests that a benchmark of them has in a batch.
    """
    count = min(len(items), in_flight, BUCKETS[-1])
    top, short = bisect_left(BUCKETS, count), list[DatasetItem]()
    for place, item in enumerate(items[:count]):
        prompt, tokens = item.input_ids[:_PROMPT_TOKENS], _LEAST_TOKENS + top - bisect_left(BUCKETS, place + 1)
        room = len(item.input_ids) + item.output_tokens - len(prompt)  # what is known to fit the engine
        short.append(DatasetItem(place, prompt, min(tokens, room), answer=None))
    return short
