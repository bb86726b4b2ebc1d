"""The entry point of vLLM's plugin group ``vllm.general_plugins``: vLLM calls ``register`` in each of its processes.

With ``VLLM_MEMSHARE_CONFIG=FILE`` set, plain ``vllm serve MODEL`` runs with MemShare; without it nothing happens.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm import SCHEDULER_CLASS, TESTED, WORKER_CLASS
from trtllm_memshare.vllm.settings import CONFIG_VARIABLE, load_settings

LOG = logging.getLogger("vllm.memshare")
_METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def register() -> None:
    """Makes vLLM take MemShare's classes where the user chose none; checks the settings at once.

    Raises:
      UserError: wrong settings, or a vLLM without the two options.
    """
    if not os.environ.get(CONFIG_VARIABLE):
        return
    load_settings({}, os.environ)
    from vllm.engine.arg_utils import EngineArgs

    choose_classes(EngineArgs)


def choose_classes(engine_args: type) -> None:
    """Wraps ``create_engine_config`` of vLLM's ``EngineArgs``, once; modifies the class.

    Raises:
      UserError: it has no such method or options.
    """
    fields = getattr(engine_args, "__dataclass_fields__", {})
    original = getattr(engine_args, "create_engine_config", None)
    if original is None or not {"scheduler_cls", "worker_cls"} <= set(fields):
        raise UserError(
            f"this vLLM's EngineArgs has no scheduler_cls and worker_cls (MemShare was tested with vLLM {TESTED})"
        )
    if getattr(original, "chooses_memshare", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *arguments: Any, **keywords: Any) -> Any:
        chosen = (self.scheduler_cls, self.worker_cls)
        if chosen not in ((None, "auto"), (SCHEDULER_CLASS, WORKER_CLASS)):
            raise UserError(
                f"{CONFIG_VARIABLE} asks for MemShare, got scheduler_cls {chosen[0]} and worker_cls {chosen[1]} "
                f"(unset one)"
            )
        self.scheduler_cls, self.worker_cls = SCHEDULER_CLASS, WORKER_CLASS
        _look_at_metrics(*arguments, **keywords)
        return original(self, *arguments, **keywords)

    create_engine_config.chooses_memshare = True  # type: ignore[attr-defined]
    engine_args.create_engine_config = create_engine_config  # type: ignore[attr-defined]


def _look_at_metrics(usage_context: Any = None, headless: bool = False, *_: Any, **__: Any) -> None:
    """Warns a server whose ``/metrics`` would not have ours; Prometheus has read the variable by now."""
    is_server = getattr(usage_context, "value", usage_context) == "OPENAI_API_SERVER" and not headless
    if is_server and not os.environ.get(_METRICS_VARIABLE):
        LOG.warning(
            "/metrics will have no memshare_*: they are counted in the engine core's process, got no %s (set it to an "
            "empty folder, or use memshare vllm serve)",
            _METRICS_VARIABLE,
        )
