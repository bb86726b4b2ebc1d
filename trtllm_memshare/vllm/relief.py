"""Pressure over vLLM's running requests: who gives up which blocks, and when.

Knows vLLM's requests by the attributes named in ``HostRequest`` and its blocks through ``VllmBlocks``; imports nothing
of vLLM, so it runs over stand-ins too.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.search.episodes import Episodes
from trtllm_memshare.search.need import find_need, page_need
from trtllm_memshare.search.pressure import PressureView, Watermarks, choose_pages, floor_room
from trtllm_memshare.search.relief_faults import ReliefFaults
from trtllm_memshare.search.types import Matcher
from trtllm_memshare.vllm.blocks import VllmBlocks
from trtllm_memshare.vllm.host_request import HostRequest, given_id
from trtllm_memshare.vllm.page_report import WORKERS_FACTS
from trtllm_memshare.vllm.pages import RequestPages
from trtllm_memshare.vllm.relief_totals import ReliefTotals
from trtllm_memshare.vllm.request_options import RequestOptions
from trtllm_memshare.vllm.update import MemShareUpdate

_ASKED_EARLIER = 0.8  # of the high watermark
_FARTHEST = 2.0  # more than any distance of two pages
LOG = logging.getLogger("vllm.memshare")  # under vLLM's own logger, whose handlers show it

_Choice = list[tuple[str, list[int], int, dict[int, int]]]  # request, pages, how many stand again, donors


class Relief:
    """Retires pages of running requests for room in the pool.

    Args:
      config: settings of pressure.
      blocks: the scheduler's blocks, null pages taken.
      bands: int32 ``[num_bands + 1]``, first position of each band and the end of the last.
      make_matcher: stage 1 for a request, given its number of prompt tokens.

    Attributes:
      totals: what was done so far.
      episodes: when pages were retired.
      faults: errors that were caught; after one nothing is retired until the next step, and vLLM preempts.
    """

    def __init__(
        self, config: MemShareConfig, blocks: VllmBlocks, bands: np.ndarray, make_matcher: Callable[[int], Matcher]
    ) -> None:
        self.totals = ReliefTotals()
        self.episodes, self.faults = Episodes(blocks.num_blocks, config.low_watermark, LOG), ReliefFaults(LOG)
        self._config = config
        self._blocks = blocks
        self._bands = bands
        self._make_matcher = make_matcher
        self._watermarks = Watermarks(config.high_watermark, config.low_watermark)
        facts = find_need(config.need).facts
        self._asks = bool(WORKERS_FACTS.intersection(facts))
        self._max_aliases = config.max_aliases if "distance" in facts else 0
        self._aliases = config.retired_becomes == "alias"
        # Answers come one or two steps late, so workers are asked before the high watermark is reached.
        self._ask_below = (1 - _ASKED_EARLIER * config.high_watermark) * blocks.num_blocks
        self._pages: dict[str, RequestPages] = {}
        self._faults_before = 0  # those before this step

    def add(self, request_id: str, num_prompt_tokens: int, options: RequestOptions) -> None:
        """A request has arrived."""
        matcher, size = self._make_matcher(num_prompt_tokens), self._blocks.block_size
        self._pages[request_id] = RequestPages(
            num_prompt_tokens, size, options, matcher, self._max_aliases, self._aliases
        )

    def remove(self, request_id: str) -> None:
        """A request has ended; vLLM has freed its blocks."""
        pages = self._pages.pop(request_id, None)
        if pages is not None:
            self.totals.drop_entries(pages)
        if not self._pages:  # nobody runs or waits, so no step follows that could say so
            self.episodes.end(self._num_used(), self.totals.retired)

    def lose_blocks(self, request_id: str) -> None:
        """A request was preempted; vLLM has freed its blocks."""
        pages = self._pages[request_id]
        self.totals.drop_entries(pages)
        pages.lose_blocks()

    def pages(self, request_id: str) -> RequestPages:
        """What is known of a request's pages."""
        return self._pages[request_id]

    def givable(self, request: HostRequest) -> tuple[list[int], set[int]]:
        """Pages that a request may give up, and those whose text stands again, some of which may be shared."""
        pages, num_computed = self._pages[request.request_id], request.num_computed_tokens
        pages.see_tokens(request.all_token_ids)
        repeats = pages.repeated(num_computed)  # first: it brings up to date what is protected
        return self._blocks.owned(request.request_id, pages.first_generated, pages.retirable_end(num_computed)), repeats

    def begin_step(self, running: Iterable[HostRequest], update: MemShareUpdate, wanted_by_waiting: int = 0) -> None:
        """Before vLLM schedules: relief at the high watermark, and pages of resumed requests that had gone before.

        Args:
          running: requests whose prompt, and what they had generated before a pause, is computed.
          update: gets the entries that change; modified.
          wanted_by_waiting: blocks that a waiting request, which missed some in the last step, needs in all.
        """
        running, self._faults_before = list(running), self.faults.num
        self.episodes.look(self._num_used(), self.totals.retired)
        for request in running:
            pages = self._pages[request.request_id]
            if pages.to_retire_again:
                self._retire_again(request, pages, update)
        if self._asks and self._blocks.num_free < self._ask_below:
            for request in running:
                with self.faults.caught():  # one by one, as in _choose
                    self._ask(request, update)
        wanted = sum(self._blocks.num_wanted(request.num_computed_tokens) for request in running)
        is_short = wanted > self._blocks.num_free
        self.make_room(running, wanted, update, force=False)
        self.totals.pauses_avoided += is_short and wanted <= self._blocks.num_free
        if wanted_by_waiting and wanted + wanted_by_waiting > self._blocks.num_free:  # running ones take theirs first
            self.make_room(running, wanted + wanted_by_waiting, update, urgent=False)

    def make_room(
        self,
        running: Iterable[HostRequest],
        num_wanted: int,
        update: MemShareUpdate,
        force: bool = True,
        urgent: bool = True,
    ) -> int:
        """Retires pages until ``num_wanted`` blocks can be taken, and on to the low watermark if possible.

        Args:
          num_wanted: blocks that are about to be taken.
          force: ``num_wanted`` are needed whatever the watermarks say.
          urgent: and somebody would be preempted, so pages go too that no other one can stand in for. Otherwise
            ``num_wanted`` come free, or nothing goes.

        Returns:
          Blocks that went back to the pool.
        """
        free, total = self._blocks.num_free, self._blocks.num_blocks
        count = self._watermarks.pages_to_free(total - free, num_wanted, total)
        if force:
            count = max(count, num_wanted - free)
        if count <= 0 or self.faults.num > self._faults_before:
            return 0
        by_id = {request.request_id: request for request in running}
        at_least = num_wanted - free if force and not urgent else 0  # for who waits all that is missing, or nothing
        choice: _Choice = []
        with self.faults.caught():  # what is read here is taken up anew by the next call, wherever it stopped
            choice = self._choose(by_id.values(), count, force, force and urgent, at_least)
        freed = 0
        # An error in here ends the engine: tables of the scheduler and the workers could differ, or name free blocks.
        for name, going, num_repeats, donors in choice:
            self.totals.retired_repeats += num_repeats
            self._retire(by_id[name], going, donors, update)
            self.totals.retired_aliased += len(self._pages[name].aliased.keys() & set(going))
            freed += len(going)
        if freed:
            self.episodes.relieved(total - free, len(by_id), self.totals.retired)
        self.totals.retired += freed
        return freed

    def _choose(self, running: Iterable[HostRequest], count: int, force: bool, urgent: bool, at_least: int) -> _Choice:
        """Who gives which pages up, nobody where all could not give ``at_least`` together; changes no block."""
        views = dict[str, PressureView]()
        for request in running:
            with self.faults.caught():  # one by one: what is wrong with one request does not keep the others' pages
                if (view := self._view(request, force, urgent, count)) is not None:
                    views[str(view.request_id)] = view
        choice: _Choice = []
        if sum(view.most for view in views.values()) < at_least:
            return choice
        for request_id, chosen in choose_pages(list(views.values()), count, self._config.spread):
            view, going = views[str(request_id)], chosen.tolist()
            num_repeats = int(view.repeated[np.searchsorted(view.pages, chosen)].sum())
            choice.append((str(request_id), going, num_repeats, self._pages[str(request_id)].donors(going)))
        return choice

    def cross_bands(self, request_id: str, newest_position: int, update: MemShareUpdate) -> None:
        """Moves a request's null entries when this step's newest token lies in another band than they do."""
        pages = self._pages.get(request_id)
        if pages is None or not pages.forgotten:
            return
        band = self._band(newest_position)
        if band == pages.band:
            return
        self._move_band(request_id, pages, band, update)
        self.totals.band_moves += 1

    def _view(self, request: HostRequest, force: bool, urgent: bool, limit: int) -> PressureView | None:
        """What a request could give up now, ``limit`` pages at most; None if nothing. See ``make_room``.

        Args:
          force: look again where there was nothing before.
        """
        pages = self._pages[request.request_id]
        if not pages.options.memshare:
            return None
        full = pages.num_full(request.num_computed_tokens)
        if full <= pages.exhausted_at and not force:
            return None
        room = floor_room(full, pages.num_retired, pages.options.min_kept)
        owned, repeats = self.givable(request)
        if not owned or (room == 0 and repeats.isdisjoint(owned)):
            pages.exhausted_at = full
            return None
        array = np.array(owned, np.int32)
        draws = np.random.default_rng([self._config.control_seed, zlib.crc32(given_id(request.request_id).encode())])
        need = page_need(self._config.need, pages.facts(array, draws, min(room, limit)))
        alone = np.isposinf(need)  # no earlier page would be read in its place
        if not urgent:
            room = min(room, int((~alone).sum()))
        elif alone.any():  # what it stands for would go with it, so those that stand for little go first
            need = np.where(alone, _FARTHEST + pages.stand_for(array), need).astype(np.float32)
        repeated = np.array([page in repeats for page in owned])
        return PressureView(request.request_id, array, need, repeated, room)  # type: ignore[arg-type]  # any name will do

    def _retire(
        self, request: HostRequest, logical_blocks: list[int], donors: Mapping[int, int], update: MemShareUpdate
    ) -> None:
        """Gives blocks up; the newest token whose query the entries will meet is the first one not computed yet.

        Args:
          donors: the earlier block nearest to each that has one; read in its place if the settings say so.
        """
        name, num_computed = request.request_id, request.num_computed_tokens
        pages = self._pages[name]
        self.totals.drop_entries(pages)
        aliases = donors if self._aliases else {}
        for entry, block_id in self._blocks.let_stand_in(name, aliases, num_computed).items():
            update.set(name, entry, block_id)
        forgotten = [page for page in logical_blocks if page not in aliases]
        if forgotten:
            band = self._band(num_computed)
            if pages.forgotten and band != pages.band:
                self._move_band(name, pages, band, update)
            changed = self._blocks.retire(name, forgotten, band, num_computed)
            self._note(name, pages, changed, band, update)
        pages.note_retired(logical_blocks, donors)
        self.totals.add_entries(pages)

    def _ask(self, request: HostRequest, update: MemShareUpdate) -> None:
        pages = self._pages[request.request_id]
        full = pages.first_generated + pages.num_full(request.num_computed_tokens)
        if pages.options.memshare and full > pages.num_asked:
            first = max(pages.first_generated, pages.num_asked)
            # Entries that are retired at this point have nothing to say.
            owned = self._blocks.held(request.request_id, first, full)
            if owned:
                update.asked[request.request_id] = owned
            pages.num_asked = full

    def _retire_again(self, request: HostRequest, pages: RequestPages, update: MemShareUpdate) -> None:
        again, donors = dict[int, int | None](), dict[int, int]()
        with self.faults.caught():
            full = pages.first_generated + pages.num_full(request.num_computed_tokens)
            owned, held = (
                set(those(request.request_id, pages.first_generated, full))
                for those in (self._blocks.owned, self._blocks.held)
            )
            again = {page: donor for page, donor in pages.to_retire_again.items() if page in owned}
            donors = {page: donor for page, donor in again.items() if donor is not None and donor in held}
            pages.to_retire_again = {}
        if again:
            self._retire(request, list(again), donors, update)
            self.totals.retired_again += len(again)

    def _move_band(self, request_id: str, pages: RequestPages, band: int, update: MemShareUpdate) -> None:
        self._blocks.move_band(request_id, pages.forgotten, band)
        self._note(request_id, pages, pages.forgotten, band, update)

    def _note(
        self, request_id: str, pages: RequestPages, logical_blocks: Iterable[int], band: int, update: MemShareUpdate
    ) -> None:
        block_id = self._blocks.null_block_ids[band]
        for logical in logical_blocks:
            update.set(request_id, logical, block_id)
        pages.band = band

    def _band(self, position: int) -> int:
        return int(np.searchsorted(self._bands[1:-1], position, "right"))

    def _num_used(self) -> int:
        return self._blocks.num_blocks - self._blocks.num_free
