"""vLLM's worker with pressure: writes null pages once the scheduler has named their blocks, lets block tables follow.

``--worker-cls`` names ``MemShareWorker``. Its base is the worker that vLLM would take on this platform.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.outputs import AsyncModelRunnerOutput

from trtllm_memshare.engine.calibrated_weights import check_weights, find_weights
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.need import find_need
from trtllm_memshare.vllm.cache_elements import check_null_keys
from trtllm_memshare.vllm.cache_pages import open_cache_pages
from trtllm_memshare.vllm.cache_signatures import open_signatures
from trtllm_memshare.vllm.distance_reports import DistanceReports
from trtllm_memshare.vllm.model_runner import ModelRunner, open_runner
from trtllm_memshare.vllm.null_pages import attention_layers, load_keys, null_page_file, write_null_pages
from trtllm_memshare.vllm.page_report import WORKERS_FACTS
from trtllm_memshare.vllm.probe import check_aliases, check_model, check_null_entries, check_served
from trtllm_memshare.vllm.redundancy import PageReports
from trtllm_memshare.vllm.settings import VllmSettings, load_settings
from trtllm_memshare.vllm.skipped_entries import SkippedEntries, check_skipping
from trtllm_memshare.vllm.surprisal import SampledSurprisal
from trtllm_memshare.vllm.trial_block import trial_block
from trtllm_memshare.vllm.update import ATTRIBUTE, REPORTS, MemShareUpdate

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    _WORKERS = {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker", "cuda": "vllm.v1.worker.gpu_worker.Worker"}
    if current_platform.device_type not in _WORKERS:
        raise UserError(
            f"MemShare runs on vLLM's platforms {', '.join(_WORKERS)}, got {current_platform.device_type} (serve "
            f"without MemShare)"
        )
    PlatformWorker = resolve_obj_by_qualname(_WORKERS[current_platform.device_type])


class MemShareWorker(PlatformWorker):
    """A worker whose block tables follow the scheduler's retirements.

    Raises:
      UserError: wrong settings, or a model runner of an unknown form.
    """

    _runner: ModelRunner
    _group = 0
    _reports: PageReports | DistanceReports | None = None
    _answers: dict[str, Any] | None = None
    _null_keys: torch.Tensor | None = None
    _skips = False
    _is_warm = False
    _skipped: SkippedEntries | None = None

    def load_model(self, *arguments: Any, **keywords: Any) -> Any:
        """vLLM's; before it, and not after minutes, what is wrong for this model is refused.

        So are null pages of other weights, or after it where it is what downloads them.
        """
        options = load_settings(self.vllm_config.additional_config, os.environ).options
        check_model(self.vllm_config, options.null_entries)
        is_here = Path(self.model_config.model).is_dir()
        if is_here:
            self._check_weights()
        loaded = super().load_model(*arguments, **keywords)
        if not is_here:
            self._check_weights()
        return loaded

    def _check_weights(self) -> None:
        folder = load_settings(self.vllm_config.additional_config, os.environ).options.null_pages
        if folder is None or self.rank != 0:  # one rank is enough to refuse, and to warn once
            return
        model, cache_dir = self.model_config, self.load_config.download_dir
        check_weights(null_page_file(folder), model.model, find_weights(model.model, model.revision, cache_dir))

    def compile_or_warm_up_model(self, *arguments: Any, **keywords: Any) -> Any:
        """vLLM's; before it what cannot be served is refused, and not with the first request.

        What trials compile belongs to the warm-up. The sampler is watched from its end on: its dummy runs sample too.
        """
        settings = load_settings(self.vllm_config.additional_config, os.environ)
        runner, cache = self.model_runner, self.model_runner.kv_cache_config
        self._group = check_served(self.vllm_config, cache.kv_cache_groups)
        check_null_entries(self.vllm_config, len(cache.kv_cache_groups) > 1, settings.options.null_entries)
        read = self._check_runner(settings)
        layers, block_size = attention_layers(runner), cache.kv_cache_groups[self._group].kv_cache_spec.block_size
        if settings.options.null_pages is not None:
            rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            self._null_keys = load_keys(settings.options.null_pages, layers, rank, size)
            if not self._skips:
                check_null_keys(self._null_keys, layers)
        signatures, surprisal = None, None
        with trial_block(layers, cache.num_blocks) as block:
            if "redundancy" in read:
                signatures = open_signatures(runner.device, layers, cache.num_blocks, block_size, block)
            if "distance" in read:  # no need reads both
                self._reports = DistanceReports(open_cache_pages(layers, block_size, block))
        if self._skips:
            self._skipped = SkippedEntries(runner, block_size, self._group)
        result = super().compile_or_warm_up_model(*arguments, **keywords)
        if "surprisal" in read:
            surprisal = SampledSurprisal(cache.num_blocks * block_size, block_size, runner.device)
            self._runner.watch_sampler(surprisal)
        if read and self._reports is None:
            self._reports = PageReports(signatures, surprisal, block_size)
        self._is_warm = True
        return result

    def _check_runner(self, settings: VllmSettings) -> frozenset[str]:
        """Looks at the model runner; returns which facts of pages the need reads here. Raises UserError."""
        self._runner = open_runner(self.model_runner, vllm.__version__, self._group)
        if settings.memshare.retired_becomes == "alias":
            check_aliases(self.model_runner, self._group)
        self._skips = settings.options.null_entries == "skip"
        if self._skips:
            layers = attention_layers(self.model_runner)
            check_skipping(self.model_runner, layers, self._group, self._runner.reuses_tables)
        if self.model_config.runner_type == "pooling":
            return frozenset()  # its requests sample nothing, and give nothing up
        read = WORKERS_FACTS.intersection(find_need(settings.memshare.need).facts)
        if "surprisal" in read:
            self._runner.check_sampler()
        return read

    def execute_model(self, scheduler_output: Any) -> Any:
        """vLLM's; before it the tables take over what changed. A step without our scheduler's update is an error."""
        update: MemShareUpdate | None = getattr(scheduler_output, ATTRIBUTE, None)
        if update is None and not self._is_warm:
            return super().execute_model(scheduler_output)  # model runner V2 warms up with steps of its own
        if update is None:
            raise UserError(
                "MemShareWorker needs MemShareScheduler beside it, got a step of another scheduler (give both "
                "--scheduler-cls and --worker-cls, or use memshare vllm)"
            )
        if update.null_blocks is not None:
            self._take_null_blocks(update.null_blocks)
        if self._reports is not None and (update.asked or update.null_entries or scheduler_output.finished_req_ids):
            tables = self._runner.tables(update.asked)
            self._answers = self._reports.answer(update, tables, scheduler_output.finished_req_ids)
        if update.null_entries:
            self._runner.apply(update)
        if self._skipped is not None:
            self._skipped.follow(update.null_entries, scheduler_output.finished_req_ids)
        output = super().execute_model(scheduler_output)
        if self._skipped is not None:
            self._skipped.end_step()
        return self._answered(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's second half of a step."""
        return self._answered(super().sample_tokens(grammar_output))

    def _answered(self, output: Any) -> Any:
        """The step's output with the reports that were asked for; an async one gets them when it is read."""
        if output is None or not self._answers:
            return output
        answers, self._answers = self._answers, None
        if isinstance(output, AsyncModelRunnerOutput):
            return _Answered(output, answers)
        output = copy.copy(output)  # vLLM has one output for all empty steps
        setattr(output, REPORTS, answers)
        return output

    def _take_null_blocks(self, null_blocks: list[int]) -> None:
        """With the first step: writes the null pages, if there are any, or has attention leave their blocks out."""
        if self._null_keys is not None:
            write_null_pages(self.model_runner, self._null_keys, null_blocks)
            self._null_keys = None
        if self._skipped is not None:
            self._skipped.take_null_blocks(null_blocks)


class _Answered:
    """An async output that carries reports once it is there; everything else is the output's own."""

    def __init__(self, output: Any, answers: dict[str, Any]) -> None:
        self._output, self._answers = output, answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)

    def get_output(self) -> Any:
        output = self._output.get_output()
        setattr(output, REPORTS, self._answers)
        return output


AsyncModelRunnerOutput.register(_Answered)  # a derived class would owe what releases add to it: 0.33 has a method more
