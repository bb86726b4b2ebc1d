"""vLLM's scheduler with pressure: pages are retired before anybody would be preempted.

``--scheduler-cls`` names ``MemShareScheduler``; with async scheduling it makes a ``MemShareAsyncScheduler``. What
changes against vLLM's own: relief before each step and where an allocation fails, admission, and what the workers
are told. Everything else, order, budgets and preemption as the last resort, is vLLM's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.matchers import make_matcher_factory
from trtllm_memshare.vllm import TESTED
from trtllm_memshare.vllm.admission import FloorAdmission
from trtllm_memshare.vllm.blocks import VllmBlocks
from trtllm_memshare.vllm.boundaries import boundary_tokens
from trtllm_memshare.vllm.metrics import Metrics
from trtllm_memshare.vllm.model_length import fit_model_length
from trtllm_memshare.vllm.null_pages import load_bands
from trtllm_memshare.vllm.probe import check_classes, check_release, check_scheduler
from trtllm_memshare.vllm.relief import Relief
from trtllm_memshare.vllm.request_options import RequestOptions, parse_request_options
from trtllm_memshare.vllm.settings import load_settings
from trtllm_memshare.vllm.update import ATTRIBUTE, REPORTS, MemShareUpdate

logger = init_logger("vllm.memshare")


class MemShareScheduler(Scheduler):
    """Scheduler for vLLM. Takes vLLM's arguments.

    Raises:
      UserError: wrong settings, a vLLM or a feature that is not supported, or a pool too small for null pages.
    """

    def __new__(cls, vllm_config: Any, *arguments: Any, **keywords: Any) -> MemShareScheduler:
        """Follows vLLM's choice of async scheduling."""
        if cls is MemShareScheduler and vllm_config.scheduler_config.async_scheduling:
            return super().__new__(MemShareAsyncScheduler)
        return super().__new__(cls)

    def __init__(self, vllm_config: Any, kv_cache_config: KVCacheConfig, *arguments: Any, **keywords: Any) -> None:
        if not check_release(vllm.__version__):
            logger.warning("MemShare was tested with vLLM %s, this is vLLM %s", TESTED, vllm.__version__)
        check_classes(vllm.__version__, Scheduler, KVCacheManager, BlockPool)
        self.settings = load_settings(vllm_config.additional_config, os.environ)
        config, options = self.settings.memshare, self.settings.options
        bands = load_bands(options.null_pages, vllm_config.model_config.max_model_len)
        if fit_model_length(vllm_config, kv_cache_config, len(bands) - 1):
            length = vllm_config.model_config.max_model_len
            logger.info("MemShare: auto-fit max_model_len beside null pages: %d", length)
            bands = load_bands(options.null_pages, length)
        super().__init__(vllm_config, kv_cache_config, *arguments, **keywords)
        full = check_scheduler(self, vllm.__version__)
        has_aliases = config.retired_becomes == "alias"
        self.blocks = VllmBlocks(self.kv_cache_manager, full, len(bands) - 1, self.max_model_len, has_aliases)
        boundaries = boundary_tokens(vllm_config.model_config, config.protected_steps)
        factory = make_matcher_factory(config, self.blocks.block_size, boundaries)
        self.relief = Relief(config, self.blocks, bands, factory)
        self._admission = FloorAdmission(self.relief, self.blocks, config, options.admission)
        if has_aliases:
            # A donor has as many references as entries. VLLM before 0.32 looked for a prefix that all running requests
            # share, to read it once for all, by blocks with as many references as there are requests.
            none = [0] * len(self.kv_cache_config.kv_cache_groups)
            self.kv_cache_manager.get_num_common_prefix_blocks = lambda running_request_id: none
        group = self.kv_cache_config.kv_cache_groups[full]
        self._metrics = Metrics(group.kv_cache_spec.page_size_bytes * len(group.layer_names))
        self._wanted_by_waiting = 0
        self._untold = True  # no step has named the null pages to the workers yet
        self._update = MemShareUpdate()
        self._settled: list[Request] = []
        self._sessions = set[str]()  # their input comes in chunks, between which they keep their blocks
        self._allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_with_relief
        logger.info(
            "MemShare: %d blocks of %d tokens beside %d that null entries name, min_kept %s, need %s, retired pages "
            "become %s, null entries %s, admission %s",
            self.blocks.num_blocks,
            self.blocks.block_size,
            len(bands) - 1,
            config.min_kept,
            config.need,
            config.retired_becomes,
            options.null_entries,
            options.admission,
        )

    def schedule(self, *arguments: Any, **keywords: Any) -> SchedulerOutput:
        """vLLM's schedule; before it pages are retired at the high watermark, with it goes what workers must know."""
        self._update = MemShareUpdate()
        self._settled = [request for request in self.running if not request.is_prefill_chunk]
        self.relief.begin_step(self._settled, self._update, self._wanted_by_waiting)
        self._wanted_by_waiting = 0
        output = super().schedule(*arguments, **keywords)
        for request_id in output.num_scheduled_tokens:
            # Advanced by the step that was just scheduled: its newest token is the last one computed.
            self.relief.cross_bands(request_id, self.requests[request_id].num_computed_tokens - 1, self._update)
        self._update.keep_only({request.request_id for request in self.running})
        if self._untold:
            self._update.null_blocks, self._untold = self.blocks.null_block_ids, False
        setattr(output, ATTRIBUTE, self._update)
        return output

    def _allocate_with_relief(
        self, request: Request, num_new_tokens: int, *arguments: Any, **keywords: Any
    ) -> KVCacheBlocks | None:
        """Takes the place of ``KVCacheManager.allocate_slots``; None makes vLLM wait or preempt, as before."""
        if request.request_id in self.grammar_compile_error_reqs:
            return None  # refused: it ends with this step, and takes no part in it
        waiting = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        hits: KVCacheBlocks | None = keywords.get("new_computed_blocks")
        found = () if hits is None else hits.blocks
        # The next chunk of a session holds the blocks of those before: it was let in with the first.
        if waiting and request.num_computed_tokens == 0 and not self._admits(request, found):
            return None
        blocks = self._allocate(request, num_new_tokens, *arguments, **keywords)
        if blocks is not None:
            return blocks
        end = max(request.num_tokens if waiting else 0, request.num_computed_tokens + num_new_tokens)
        end = min(end + self.num_lookahead_tokens, self.max_model_len)
        if waiting:
            # It may have hit blocks that are filled in this very step, exactly as long as their owner keeps its pages
            # until then: room for it is made before the next step.
            missing = self.blocks.num_missing(request.request_id, end, found)
            self._wanted_by_waiting = missing + self.kv_cache_manager.watermark_blocks
            return None
        running = [r for r in self._settled if r.status == RequestStatus.RUNNING]
        if self.relief.make_room(running, self.blocks.num_missing(request.request_id, end), self._update) == 0:
            return None
        blocks = self._allocate(request, num_new_tokens, *arguments, **keywords)
        self.relief.totals.pauses_avoided += blocks is not None
        return blocks

    def _admits(self, request: Request, hits: Sequence[Sequence[KVCacheBlock]]) -> bool:
        sessions = [self.requests[request_id] for request_id in self._sessions]
        paused = [s for s in sessions if s.num_computed_tokens > 0 and s.status != RequestStatus.RUNNING]
        with self.relief.faults.caught():
            return self._admission.admits(request, self.running, hits, paused)
        return not self.running

    def add_request(self, request: Request) -> None:
        """vLLM's; a request whose options cannot be used ends with an error, it is not served otherwise."""
        if request.request_id not in self.requests:
            self.relief.add(request.request_id, request.num_prompt_tokens, self._options(request))
            if request.resumable:
                self._sessions.add(request.request_id)
        super().add_request(request)

    def _options(self, request: Request) -> RequestOptions:
        default = self.settings.memshare.min_kept
        if request.sampling_params is None or request.resumable:
            return RequestOptions(False, 1.0)  # pooling; a session's answer becomes part of its next prompt
        try:
            return parse_request_options(request.sampling_params.extra_args, default)
        except UserError as error:
            logger.error("request %s is refused: %s", request.request_id, error)
            self._refuse(request.request_id, error)
            return RequestOptions(False, 1.0)

    def _refuse(self, request_id: str, reason: UserError) -> None:
        """vLLM ends these requests with an error once the step is done, whatever the reason was."""
        refused = self.grammar_compile_error_reqs
        if isinstance(refused, set):
            refused.add(request_id)  # before 0.33: clients read "internal error"
        else:
            from vllm.outputs import RequestError

            refused[request_id] = RequestError(code="validation_error", message=str(reason))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """vLLM's; takes what the workers found out about pages on the way."""
        for request_id, report in getattr(model_runner_output, REPORTS, {}).items():
            if request_id in self.requests:
                with self.relief.faults.caught():  # what is not known is taken for needed most
                    self.relief.pages(request_id).take(report)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _preempt_request(self, request: Request, *arguments: Any, **keywords: Any) -> None:
        super()._preempt_request(request, *arguments, **keywords)
        self.relief.lose_blocks(request.request_id)
        self._admission.forget(request.request_id)

    def _free_request(self, request: Request, *arguments: Any, **keywords: Any) -> Any:
        parameters = super()._free_request(request, *arguments, **keywords)
        self.relief.remove(request.request_id)
        self._sessions.discard(request.request_id)
        self._admission.forget(request.request_id)
        if not self.requests:  # no step follows whose end would show it
            self._metrics.report(self.relief, ())
        return parameters

    def make_stats(self, *arguments: Any, **keywords: Any) -> Any:
        """vLLM's; brings our counters up to date with it."""
        self._metrics.report(self.relief, self.running)
        return super().make_stats(*arguments, **keywords)


class MemShareAsyncScheduler(MemShareScheduler, AsyncScheduler):
    """The same over vLLM's async scheduler: a step is scheduled while the one before it runs.

    Retired blocks are safe to hand out at once: workers run steps in order, so whoever writes them next comes after
    the last step that read them.
    """
