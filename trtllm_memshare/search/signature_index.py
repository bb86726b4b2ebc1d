"""Redundancy of pages by their signatures, of all requests in flight together, kept up to date as pages come and go.

Signatures stay where the pool is, and requests are looked at together: a product for all of them costs a GPU one launch
where one for each would cost hundreds, and a CPU fewer calls. Only pages that may go some day need to be here, so
not those of the prompt: whatever is later is generated too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trtllm_memshare.search.signatures import WIDTH

PAGES_AT_ONCE = 256
"""Pages that are signed together."""

_FIRST_SLOTS = 64
_NOBODY = 0  # a slot that is no page's: fills batches up, and is the nearest of tokens that have none
_MOST_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 24}  # products, and signatures beside each other for them: 8 and 64 MiB

Span = tuple[Hashable, np.ndarray, np.ndarray]
"""Pages of one request: its id, logical pages, int32 ``[n]``, ascending, and their physical blocks, int ``[n]``."""

_Orphans = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Slots of later pages; of each token its slot, how many of those are not later than its page, its place in it."""


@dataclass
class _Request:
    """Resident pages, ascending; the slot of each; the newest page ever taken; slots of pages that went since."""

    pages: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    slots: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    known: int = -1
    gone: list[int] = field(default_factory=list)


class SignatureIndex:
    """Of each resident page how closely its tokens are met by those of later resident pages of its request.

    A request that is paused keeps its pages here; they come back with the same text. A page costs one product with the
    tokens before it. Tokens whose nearest one was in a page that went are looked at again, once somebody asks.
    Memory: ``4 * width + 12`` bytes a token of the most pages that were resident together, or of twice as many; at work
    some 8 MiB, on a GPU 64, or what one page of a request takes. An error leaves all as it was or as it should be.

    Args:
      tokens_per_page: tokens of a page.
      width: numbers of a signature.
      device: of the signatures.
    """

    def __init__(self, tokens_per_page: int, width: int = WIDTH, device: torch.device | str = "cpu") -> None:
        self._size, self._width, self._device = tokens_per_page, width, torch.device(device)
        self._most = _MOST_NUMBERS["cuda" if self._device.type == "cuda" else "cpu"]
        self._requests: dict[Hashable, _Request] = {}
        # By slot: signatures; of each token the largest cosine with a later one, -1 where there is none; whose slot.
        self._rows = torch.zeros((_FIRST_SLOTS, tokens_per_page, width), device=self._device)
        self._best = torch.full((_FIRST_SLOTS, tokens_per_page), -1.0, device=self._device)
        self._nearest = torch.full((_FIRST_SLOTS, tokens_per_page), _NOBODY, device=self._device)
        self._free = list(range(_FIRST_SLOTS - 1, _NOBODY, -1))
        self._means: np.ndarray | None = None  # by slot

    def num_pages(self, request_id: Hashable) -> int:
        """One more than the newest page that was taken, 0 where none was."""
        request = self._requests.get(request_id)
        return 0 if request is None else request.known + 1

    @torch.inference_mode()
    def catch_up(
        self, spans: Sequence[Span], sign: Callable[[np.ndarray], torch.Tensor], at_once: int | None = None
    ) -> None:
        """Takes pages that are not known yet, all requests together.

        Args:
          spans: full pages; a request comes once.
          sign: signatures of physical blocks, float32 ``[blocks, tokens_per_page, width]``, normalised.
          at_once: most blocks that it gets together; None = ``PAGES_AT_ONCE``.
        """
        new = list[Span]()
        for name, pages, blocks in spans:
            is_new = pages >= self.num_pages(name)
            new.append((name, pages[is_new], blocks[is_new]))
        for batch in in_batches(new, at_once or PAGES_AT_ONCE):
            self.extend([(name, pages) for name, pages, _ in batch], sign(np.concatenate([b for *_, b in batch])))

    @torch.inference_mode()
    def extend(self, new: Sequence[tuple[Hashable, np.ndarray]], signatures: torch.Tensor) -> None:
        """Takes pages that were filled.

        Args:
          new: requests, each once, and their logical pages, int32 ``[n]``; ascending. Those that were taken before are
            passed over: their text is the same, as after a pause.
          signatures: ``[all pages, tokens_per_page, width]``, normalised, in this order; NaN is like nothing.
        """
        expected = (sum(len(pages) for _, pages in new), self._size, self._width)
        if tuple(signatures.shape) != expected:
            raise ValueError(f"{expected[0]} pages need signatures {list(expected)}, got {list(signatures.shape)}")
        self._settle()
        waiting = list[tuple[Hashable, np.ndarray, torch.Tensor]]()
        for name, pages in new:
            rows, signatures = signatures[: len(pages)], signatures[len(pages) :]
            start = int(np.searchsorted(pages, self.num_pages(name)))
            if start < len(pages):
                waiting.append((name, np.asarray(pages[start:], np.int32), rows[start:]))
        while waiting:  # a request with more new pages than fit comes again, after what it had before
            parts = [(*part, min(len(part[1]), self._room(part[0]))) for part in waiting]
            for batch in self._together(parts, [(len(self._of(n).pages) + k, k * self._size) for n, _, _, k in parts]):
                self._take([(name, pages[:count], rows[:count]) for name, pages, rows, count in batch])
            waiting = [(n, pages[count:], rows[count:]) for n, pages, rows, count in parts if count < len(pages)]

    def forget(self, request_id: Hashable, pages: np.ndarray) -> None:
        """Takes out pages that are resident no more; those that are unknown or gone already are passed over."""
        request = self._of(request_id)
        goes = np.zeros(request.known + 1, bool)
        goes[pages[pages <= request.known]] = True
        gone = goes[request.pages]
        if np.count_nonzero(gone):
            self._means = None
            request.gone += request.slots[gone].tolist()
            request.pages, request.slots = request.pages[~gone], request.slots[~gone]

    def drop(self, request_id: Hashable) -> None:
        """Takes out a request that ended, or one whose pages have other numbers now."""
        if (request := self._requests.pop(request_id, None)) is not None:
            self._free += [*request.slots.tolist(), *request.gone]

    @torch.inference_mode()
    def redundancy(self, request_id: Hashable) -> np.ndarray:
        """Redundancy of each page, float32 ``[num_pages]`` by logical page.

        Mean over a page's tokens of the largest cosine with a token of any later resident page; -1 for the last one;
        NaN for pages that were never taken, such as the prompt's, or have gone.
        """
        if self._means is None:
            self._settle()
            self._means = self._best.mean(1).cpu().numpy()
        request, result = self._of(request_id), np.full(self.num_pages(request_id), np.nan, np.float32)
        result[request.pages] = self._means[request.slots]
        return result

    def _of(self, request_id: Hashable) -> _Request:
        return self._requests.get(request_id) or _Request()

    def _room(self, request_id: Hashable) -> int:
        """New pages of one request whose products with its resident ones fit; at least one."""
        resident, beside = len(self._of(request_id).pages), self._width / self._size
        root = math.hypot(resident - beside, 2 * math.sqrt(self._most) / self._size)
        return max(1, int((root - resident - beside) / 2))  # (resident + k) * (k + beside) <= most / size^2

    def _together(self, items: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> Iterator[list[Any]]:
        """Batches of items, of like shape, whose products fit once each is as large as the largest of its batch.

        Args:
          shapes: pages of each item, and tokens that theirs are multiplied with.
        """
        batch, most = list[Any](), (0, 0)
        for place in sorted(range(len(items)), key=shapes.__getitem__, reverse=True):
            largest = max(most[0], shapes[place][0]), max(most[1], shapes[place][1])
            numbers = largest[0] * self._size * (largest[1] + self._width)
            if batch and (len(batch) + 1) * numbers > self._most:
                yield batch
                batch, largest = [], shapes[place]
            batch.append(items[place])
            most = largest
        if batch:
            yield batch

    def _take(self, batch: list[tuple[Hashable, np.ndarray, torch.Tensor]]) -> None:
        """All of the pages, none of which was taken before, or none, where memory is short."""
        counts = [len(pages) for _, pages, _ in batch]
        total = sum(counts)
        while len(self._free) < total:
            self._grow()
        slots = np.array(self._free[-total:], np.int64)
        own = np.split(slots, np.cumsum(counts)[:-1])
        before = [self._of(name) for name, *_ in batch]
        resident = [np.append(request.slots, new) for request, new in zip(before, own, strict=True)]
        (table, is_there), (newest, is_new) = _padded(resident), _padded(own)
        ends = np.array([len(request.slots) for request in before])[:, None] + np.arange(newest.shape[1])
        is_earlier = self._on_device((np.arange(table.shape[1]) < ends[..., None]) & is_new[..., None])
        places, of_pages = map(self._on_device, (table[is_there], np.flatnonzero(is_there)))
        at, table_at, newest_at = map(self._on_device, (slots, table, newest))

        self._rows.index_copy_(0, at, torch.cat([rows for *_, rows in batch]).to(self._device, torch.float32))
        self._best.index_fill_(0, at, -1.0)
        products = _at(self._rows, newest_at).flatten(1, 2) @ _at(self._rows, table_at).flatten(1, 2).transpose(1, 2)
        met = products.view(*newest.shape, self._size, -1).amax(2).view(*newest.shape, -1, self._size)
        met = met.nan_to_num_(-torch.inf).masked_fill_(~is_earlier[..., None], -torch.inf)
        best, which = met.max(1)  # [requests, pages, tokens]
        nearest = newest_at.gather(1, which.flatten(1)).view_as(which)
        best, nearest = (_at(found.flatten(0, 1), of_pages) for found in (best, nearest))
        known = _at(self._best, places)
        nearest = torch.where(best > known, nearest, _at(self._nearest, places))
        best = torch.maximum(best, known)
        self._nearest.index_copy_(0, places, nearest)  # from here on nothing takes memory
        self._best.index_copy_(0, places, best)

        del self._free[-total:]
        self._means = None
        for (name, pages, _), request, together in zip(batch, before, resident, strict=True):
            request.pages, request.slots = np.append(request.pages, pages), together
            request.known = int(pages[-1])
            self._requests[name] = request

    def _settle(self) -> None:
        """Looks again for what is nearest to tokens whose nearest one was in a page that went."""
        touched = [request for request in self._requests.values() if request.gone]
        if not touched:
            return
        gone = np.zeros(len(self._rows), bool)
        gone[[slot for request in touched for slot in request.gone]] = True
        slots = np.concatenate([request.slots for request in touched])
        is_orphan = _at(self._on_device(gone), _at(self._nearest, self._on_device(slots)))
        rows, tokens = is_orphan.nonzero().cpu().numpy().T
        pieces, shapes, start = list[_Orphans](), list[tuple[int, int]](), 0
        for request in touched:
            first, last = np.searchsorted(rows, (start, start + len(request.slots)))
            while first < last:
                place = int(rows[first]) - start  # what lies before it is nobody's later page
                later = request.slots[place + 1 :]
                count = max(1, len(later))
                stop = min(last, first + max(self._size, self._most // (count * self._size) - self._width))
                pieces.append((later, slots[rows[first:stop]], rows[first:stop] - start - place, tokens[first:stop]))
                shapes.append((count, int(stop - first)))
                first = stop
            start += len(request.slots)
        for batch in self._together(pieces, shapes):
            self._look_again(batch)
        for request in touched:
            self._free += request.gone
            request.gone = []
        self._means = None

    def _look_again(self, batch: list[_Orphans]) -> None:
        """Of each token among the later pages of its request that are there."""
        (table, is_there), (owners, is_orphan) = (_padded([piece[i] for piece in batch]) for i in range(2))
        first, tokens = (_padded([piece[i] for piece in batch])[0] for i in (2, 3))  # its first later page's place
        is_later = (np.arange(table.shape[1])[:, None] >= first[:, None]) & is_there[..., None]
        orphans = owners * self._size + tokens
        table_at, orphans_at = map(self._on_device, (table, orphans))
        at, valid = map(self._on_device, (orphans[is_orphan], np.flatnonzero(is_orphan)))
        products = _at(self._rows, table_at).flatten(1, 2) @ _at(self._rows.flatten(0, 1), orphans_at).transpose(1, 2)
        met = products.view(*table.shape, self._size, -1).amax(2)  # [requests, pages, orphans]
        best, which = met.nan_to_num_(-torch.inf).masked_fill_(~self._on_device(is_later), -torch.inf).max(1)
        nearest = torch.where(best > -torch.inf, table_at.gather(1, which), _NOBODY)
        best, nearest = (_at(found.flatten(), valid) for found in (best.clamp_(min=-1.0), nearest))
        self._nearest.view(-1).index_copy_(0, at, nearest)
        self._best.view(-1).index_copy_(0, at, best)

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _grow(self) -> None:
        more = len(self._rows)
        rows, best, nearest = (
            torch.full((2 * more, *old.shape[1:]), fill, dtype=old.dtype, device=self._device)
            for old, fill in ((self._rows, 0), (self._best, -1), (self._nearest, _NOBODY))
        )
        rows[:more], best[:more], nearest[:more] = self._rows, self._best, self._nearest
        self._rows, self._best, self._nearest = rows, best, nearest  # all or none, where memory is short
        self._free[:0] = range(2 * more - 1, more - 1, -1)


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``values[places]`` by whole rows, which is several times as fast on a CPU."""
    return values.index_select(0, places.flatten()).view(*places.shape, *values.shape[1:])


def _padded(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays under each other, filled up with ``_NOBODY``, int64 ``[arrays, longest]``; which entries are theirs."""
    lengths = np.array([len(array) for array in arrays])
    is_there = np.arange(max(1, lengths.max())) < lengths[:, None]
    table = np.full(is_there.shape, _NOBODY, np.int64)
    table[is_there] = np.concatenate(arrays)
    return table, is_there


def in_batches(spans: Sequence[Span], most: int) -> Iterator[list[Span]]:
    """Cuts spans into lists of ``most`` pages together, the last one of what is left; empty spans are left out.

    Example: spans of 3 and 4 pages, at most 5 at once -> the 3 and the first 2 of the 4; the other 2.
    """
    batch, room = list[Span](), most
    for name, pages, blocks in spans:
        while len(pages):
            batch.append((name, pages[:room], blocks[:room]))
            taken = len(batch[-1][1])
            pages, blocks, room = pages[taken:], blocks[taken:], room - taken
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch
