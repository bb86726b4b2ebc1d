"""Gives up pages when the pool runs short, so that nobody is paused who still holds more than its floor.

The scheduler asks at three points: before every step, whether the next one would pass the high watermark; when a
running request finds no block; and when the next waiting request does not fit. With room in the pool nothing is given
up, nothing is searched, and tokens are those of the full cache. An error of ours leaves relief out until the next step
(``search.relief_faults``): requests wait and are paused then as with the full cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.cache.sequence import GivablePages
from trtllm_memshare.cache.stand_ins import NO_DONORS
from trtllm_memshare.errors import UserError
from trtllm_memshare.ranks.agreement import RankAgreement
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.search.config import MemShareConfig, check_for_executor
from trtllm_memshare.search.episodes import Episodes
from trtllm_memshare.search.need import find_need, page_need
from trtllm_memshare.search.pressure import PressureView, Watermarks, choose_pages, floor_room
from trtllm_memshare.search.relief_faults import ReliefFaults
from trtllm_memshare.serving.floor_admission import FloorAdmission, share_kept
from trtllm_memshare.serving.page_facts import PageLedger
from trtllm_memshare.serving.redundancy_source import open_source
from trtllm_memshare.serving.request import Phase, RequestState, SamplingParams
from trtllm_memshare.serving.statistics import PressureStatus, Stopwatch

Choice = list[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class Retirement:
    """Pages that one request gave up at one time, for whoever watches. ``need`` is NaN where it was not asked for."""

    request_id: int
    pages: np.ndarray
    repeated: np.ndarray
    need: np.ndarray


@dataclass
class PressureStats:
    """Totals since the start.

    Attributes:
      retired_pages: pages given up, by reason: ``repeated`` or ``needed_least``.
      num_pauses_avoided: times that running requests needed pages which were not free, and got them without a pause.
      num_admitted: times that a waiting request was let in on pages that others gave up.
    """

    retired_pages: dict[str, int] = field(default_factory=lambda: {"repeated": 0, "needed_least": 0})
    num_pauses_avoided: int = 0
    num_admitted: int = 0


class Pressure:
    """Retires pages over all running requests.

    Args:
      manager: the cache.
      config: watermarks, floor, need, spread.
      ledger: facts about pages.
      bytes_per_block: memory of one block over all layers, for the statistics.
      agree: with several ranks, gives every rank the choice of the first one; every rank calls it at the same points.

    Attributes:
      stats: totals.
      episodes: when pages were given up.
      faults: errors that were caught.
      observes_attention, observes_tokens: whether it is to be told what attention blocks get, how likely tokens were.
      watch: called with every retirement, or None.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        config: MemShareConfig,
        ledger: PageLedger,
        bytes_per_block: int = 0,
        agree: Callable[[Choice], Choice] | None = None,
    ) -> None:
        self._manager, self._config, self._ledger = manager, config, ledger
        self._agree, self._bytes_per_block = agree, bytes_per_block
        self._marks = Watermarks(config.high_watermark, config.low_watermark)
        self.stats = PressureStats()
        self.episodes = Episodes(manager.pool.num_usable, config.low_watermark)
        self.faults = ReliefFaults(are_fatal=agree is not None)
        self._watch = Stopwatch()
        self.observes_attention, self.observes_tokens = ledger.observes_attention, ledger.observes_tokens
        self.watch: Callable[[Retirement], None] | None = None
        self._finds_repeats = find_need(config.need).finds_repeats
        self._is_exhausted = False  # the last relief did not reach the low watermark
        self._faults_before = 0  # those before this step
        self._unknown: set[int] = set()  # requests whose facts stopped half-way: they give nothing up any more
        self._admission = FloorAdmission(manager, config, self._finds_repeats)

    def blocks_at_floor(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Blocks that one request holds at its longest end, with all given up that may go."""
        return self._admission.blocks_of_one(num_prompt_tokens, params)

    def before_step(self, running: Sequence[RequestState]) -> None:
        """Keeps the next step of the running requests below the high watermark, or brings use to the low one."""
        with self._watch:
            manager, pool = self._manager, self._manager.pool
            self._faults_before = self.faults.num
            self.episodes.look(pool.num_used, self._num_retired())
            wanted = count = 0
            if self._marks.pages_to_free(pool.num_used, len(running), pool.num_usable):  # if all took one, as few do
                wanted = sum(s.phase is Phase.GENERATION and manager.fills_last_block(s.request_id) for s in running)
                count = self._marks.pages_to_free(pool.num_used, wanted, pool.num_usable)
            if not count:
                self._is_exhausted = False
                return
            is_short = wanted > pool.num_free
            # With all requests at their floors a page here and there would be had at every step: then only for need.
            if self._is_exhausted and not is_short:
                return
            self._is_exhausted = self._retire(count, running, is_short) < count and not self._has_failed()
            self.stats.num_pauses_avoided += is_short and wanted <= pool.num_free

    def free_for_running(self, num_blocks: int, running: Sequence[RequestState]) -> bool:
        """Frees blocks that a running request has not found; False if all are at their floors."""
        with self._watch:
            freed = self._retire(num_blocks, running, is_urgent=True) >= num_blocks
        self.stats.num_pauses_avoided += freed
        return freed

    def free_for_waiting(self, num_blocks: int, running: Sequence[RequestState]) -> bool:
        """Frees blocks to admit a request, all of them or none."""
        with self._watch:
            freed = self._retire(num_blocks, running, all_or_none=True) >= num_blocks
        self.stats.num_admitted += freed
        return freed

    def observe_tokens(self, states: list[RequestState], log_probs: Callable[[], torch.Tensor]) -> None:
        """Takes what was just chosen, see ``PageSurprisal.note``; ``log_probs`` works them out."""
        with self._watch, self.faults.caught():
            self._ledger.observe_tokens(states, log_probs)

    def observe_attention(self, attention: np.ndarray | None) -> None:
        """Takes one step's attention per block, float32 ``[num_blocks]``, or None."""
        if attention is None:  # in most steps of most settings
            return
        pool = self._manager.pool
        with self._watch, self.faults.caught():
            self._ledger.observe_attention(attention, pool.generation, pool.ref_count > 0)

    def fits(self, state: RequestState, running: Sequence[RequestState], is_certain: bool) -> bool:
        """See ``FloorAdmission.fits``; after an error only who would be alone."""
        with self._watch, self.faults.caught():
            return self._admission.fits(state, running, is_certain)
        return not running

    def status(self, running: Sequence[RequestState], num_resumed: int) -> PressureStatus:
        """Counts of this moment; ``num_resumed``: the cache's. Safe from any thread, since it only reads."""
        at_floor = retired_now = 0
        for state in running:
            generated, retired = self._manager.page_counts(state.request_id)
            retired_now += self._manager.num_given_up(state.request_id)
            at_floor += retired > 0 and floor_room(generated, retired, share_kept(state.params, self._config)) == 0
        stats = self.stats
        return PressureStatus(
            is_active=self.episodes.is_active,
            retired_pages={**stats.retired_pages, "resumed": num_resumed},
            num_episodes=self.episodes.num,
            num_pauses_avoided=stats.num_pauses_avoided,
            num_admitted=stats.num_admitted,
            num_at_floor=at_floor,
            retired_now=retired_now,
            bytes_saved_now=retired_now * self._bytes_per_block,
            num_failed_reliefs=self.faults.num,
        )

    def forget(self, request_id: int, is_last: bool = False) -> None:
        """Drops what is known of a request that ended; ``is_last``: nobody else runs or waits."""
        self._ledger.forget(request_id)
        self._unknown.discard(request_id)
        if is_last:  # no step follows that could say so
            self.episodes.end(self._manager.pool.num_used, self._num_retired())

    @property
    def seconds(self) -> float:
        """Time spent on all of it so far."""
        return self._watch.seconds

    def _num_retired(self) -> int:
        return sum(self.stats.retired_pages.values())

    def _has_failed(self) -> bool:
        """Whether this step had an error: relief is left out until the next one, not tried for each request anew."""
        return self.faults.num > self._faults_before

    def _retire(
        self, num_blocks: int, running: Sequence[RequestState], is_urgent: bool = False, all_or_none: bool = False
    ) -> int:
        """Gives up pages of running requests, at most ``num_blocks``; returns how many blocks that freed.

        Those of infinite need go only where it is urgent: somebody would be paused otherwise.
        """
        views: dict[int, PressureView] = {}
        donors: dict[int, Mapping[int, int]] = {}
        choice: Choice = []
        if self._has_failed():
            return 0
        with self.faults.caught():  # what is read here is taken up anew by the next call, wherever it stopped
            views = self._views(num_blocks, running, is_urgent, all_or_none)
            if self._config.retired_becomes == "alias":
                donors = {request_id: self._ledger.donors(request_id) for request_id in views}
            choice = choose_pages(list(views.values()), num_blocks, self._config.spread)
        if self._agree is not None and views:
            choice = self._agree(choice)
        if choice:
            self.episodes.relieved(self._manager.pool.num_used, len(running), self._num_retired())
        return self._carry_out(choice, views, donors)

    def _views(
        self, num_blocks: int, running: Sequence[RequestState], is_urgent: bool, all_or_none: bool
    ) -> dict[int, PressureView]:
        """What each request could give up, by request; empty if that is nothing, or ``all_or_none`` and not enough."""
        givable = self._givable(running)
        if not givable or (all_or_none and sum(most for *_, most in givable.values()) < num_blocks):
            return {}
        self._ledger.catch_up(list(givable))
        views = {}
        for request_id, (pages, room, most) in givable.items():
            with self.faults.caught():
                blocks = self._manager.block_table(request_id)[pages.pages]
                facts = self._ledger.facts(request_id, pages.pages, blocks, min(most, num_blocks))
                need = page_need(self._config.need, facts)
                room = room if is_urgent else min(room, int((~np.isposinf(need)).sum()))
                views[request_id] = PressureView(request_id, pages.pages, need, pages.repeated, room)
        return {} if all_or_none and sum(view.most for view in views.values()) < num_blocks else views

    def _givable(self, running: Sequence[RequestState]) -> dict[int, tuple[GivablePages, int, int]]:
        """Requests that could give anything up: what, their room above the floor, how many may go."""
        found = dict[int, tuple[GivablePages, int, int]]()
        for state in running:
            if state.phase is not Phase.GENERATION or not state.params.memshare or state.request_id in self._unknown:
                continue
            with self.faults.caught():  # one by one: what is wrong with one request does not keep the others' pages
                pages = self._manager.givable_pages(state.request_id, self._finds_repeats)
                room = floor_room(pages.num_generated, pages.num_retired, share_kept(state.params, self._config))
                if most := pages.most(room):
                    found[state.request_id] = pages, room, most
        return found

    def _carry_out(self, choice: Choice, views: dict[int, PressureView], donors: dict[int, Mapping[int, int]]) -> int:
        freed = 0
        for request_id, pages in choice:
            # An error in here ends everything: entries could name blocks that are free, which others would write.
            freed += self._manager.retire(request_id, pages, donors.get(request_id, NO_DONORS))
            self._unknown.add(request_id)
            with self.faults.caught():
                self._ledger.retired(request_id, pages)
                self._unknown.discard(request_id)
            view = views[request_id]
            chosen = np.searchsorted(view.pages, pages)
            repeated = view.repeated[chosen]
            self.stats.retired_pages["repeated"] += int(repeated.sum())
            self.stats.retired_pages["needed_least"] += int((~repeated).sum())
            if self.watch is not None:
                self.watch(Retirement(request_id, pages, repeated, view.need[chosen]))
        return freed


def open_pressure(
    manager: KVCacheManager, config: MemShareConfig, runner: Runner, agreement: RankAgreement | None = None
) -> Pressure | None:
    """Pressure as the settings ask for it, or None.

    Raises:
      UserError: need reads what cannot be known here, or shadow is asked for.
    """
    if not config.pressure:
        return None
    check_for_executor(config)
    need, source = find_need(config.need), open_source(config, manager, runner, agreement is not None)
    if "attention" in need.facts and not getattr(runner, "reports_attention", False):
        raise UserError(
            f"need {config.need} reads attention, got a runner whose kernels do not report it (take "
            f"surprisal-led-redundancy-recency, redundancy, age or random, or the torch runner on a CPU)"
        )
    ledger = PageLedger(need, manager.tokens_per_block, manager.pool.num_blocks, config.control_seed, source)
    pool = getattr(runner, "pool", None)
    bytes_per_block = int(pool[0].nbytes) if isinstance(pool, torch.Tensor) else 0
    agree = None if agreement is None else lambda choice: agreement.same_choice(choice, manager.state_digest())
    return Pressure(manager, config, ledger, bytes_per_block, agree)
