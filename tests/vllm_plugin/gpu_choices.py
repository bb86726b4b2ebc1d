"""What vLLM 0.32 chooses on a GPU, on the CPU: model runner V2, and async scheduling.

``MEMSHARE_TEST_RUNNER`` is V1 or V2, followed by ``-async`` for async scheduling, and by ``-in-place`` if tables and
lengths are to be changed where they are, as on a GPU. ``python gpu_choices.py PROGRAM ARGUMENTS`` starts a program with
that model runner, before it imports vLLM.

V2's own kernels are written in Triton, whose wheel has no backend for the CPU: its interpreter runs them here, one
program after the other. Both choices are vLLM's own code, unchanged; read on 30 November 2026.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from types import SimpleNamespace
from typing import Any

RUNNER = os.environ.get("MEMSHARE_TEST_RUNNER", "V1")


def choose_runner() -> None:
    """Before vLLM is imported."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(RUNNER.startswith("V2")))
    if RUNNER.startswith("V1"):
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import backends

    # vLLM asks whether there is a backend for the CPU that it could compile kernels with; nothing is compiled.
    backends.backends.clear()
    backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def schedule_asynchronously() -> None:
    """vLLM switches async scheduling off on a CPU as it checks a configuration: it is switched on afterwards."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *arguments: Any, **keywords: Any) -> Any:
        config = original(self, *arguments, **keywords)
        config.scheduler_config.async_scheduling = True
        return config

    EngineArgs.create_engine_config = create_engine_config


if __name__ == "__main__":
    choose_runner()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
