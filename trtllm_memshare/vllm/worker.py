"""vLLM's worker with null pages: writes them once the scheduler has named their blocks, and lets block tables follow.

``--worker-cls`` names ``MemShareWorker``. Its base is the worker that vLLM would take on this platform.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.null_pages import write_null_pages
from trtllm_memshare.vllm.probe import runner_form
from trtllm_memshare.vllm.settings import load_settings
from trtllm_memshare.vllm.update import ATTRIBUTE, MemShareUpdate, apply_to_v1_runner, apply_to_v2_runner

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

    _apply: Any = None

    def execute_model(self, scheduler_output: Any) -> Any:
        """vLLM's; before it the tables take over what changed. A step without our scheduler's update is an error."""
        update: MemShareUpdate | None = getattr(scheduler_output, ATTRIBUTE, None)
        if update is None:
            raise UserError(
                "MemShareWorker needs MemShareScheduler beside it, got a step of another scheduler (give both "
                "--scheduler-cls and --worker-cls, or use memshare vllm)"
            )
        if update.null_blocks is not None:
            self._write_null_pages(update.null_blocks)
        if update.null_entries:
            self._apply(self.model_runner, update)
        return super().execute_model(scheduler_output)

    def _write_null_pages(self, block_ids: list[int]) -> None:
        form = runner_form(self.model_runner, vllm.__version__)
        self._apply = apply_to_v1_runner if form == "V1" else apply_to_v2_runner
        settings = load_settings(self.vllm_config.additional_config, os.environ)
        write_null_pages(
            self.model_runner,
            settings.options.null_pages,
            block_ids,
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
        )
