"""Which pages of a pool are compared with which, as requests grow, give pages up and begin anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_memshare.search.nearest_earlier import NearestEarlier
from trtllm_memshare.search.nearest_page import page_distances

POOL = torch.randn(40, 2, 2, 1, 4, 8, generator=torch.Generator().manual_seed(0))


class Pages:
    """One request's pages, by hand."""

    def __init__(self, first: int, blocks: list[int]) -> None:
        self.first, self.blocks = first, blocks

    def generated_pages(self, request_id: int) -> tuple[int, int, np.ndarray]:
        return self.first, len(self.blocks), np.array(self.blocks)


def check(source: NearestEarlier, pages: Pages, asked: list[int]) -> dict[int, int]:
    """The nearest pair of all, and what was measured, by their definition."""
    source.catch_up([7])
    nearest = source.measure(7, np.array(asked), 1)
    blocks = torch.tensor(pages.blocks)[asked]
    distance = np.where(np.tri(len(asked), k=-1, dtype=bool), page_distances(POOL, blocks, blocks).numpy(), np.inf)
    row, column = np.unravel_index(distance.argmin(), distance.shape)
    assert source.donors(7) == {asked[row]: asked[column]}
    assert nearest[row] == pytest.approx(distance.min(), abs=1e-5)
    return dict(source.donors(7))


def test_new_pages_are_compared_with_those_that_are_there():
    pages = Pages(2, [0, 1, 10, 11, 12, 13])
    source = NearestEarlier(pages, POOL, 8)
    (gone,) = check(source, pages, [2, 3, 4, 5])
    source.retired(7, np.array([gone]))
    pages.blocks[gone] = -1  # nobody reads what stands for it
    pages.blocks += [14, 15]
    check(source, pages, [page for page in range(2, 8) if page != gone])


@pytest.mark.parametrize("anew", [Pages(2, [0, 1, 30, 31, 32]), Pages(1, [0, 30, 31, 32, 33, 34, 35])])
def test_a_request_that_begins_anew_is_looked_at_anew(anew):
    """One that is shorter than before, and one whose prompt is."""
    pages = Pages(2, [0, 1, 10, 11, 12, 13])
    source = NearestEarlier(pages, POOL, 8)
    (gone,) = check(source, pages, [2, 3, 4, 5])
    source.retired(7, np.array([gone]))
    pages.first, pages.blocks = anew.first, anew.blocks
    check(source, pages, list(range(anew.first, len(anew.blocks))))
