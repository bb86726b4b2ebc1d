"""Read by each Python that starts with this folder on its path: workers that vLLM spawns run what their engine does.

Nothing that the engine's process has patched reaches them (``gpu_choices``).
"""

from __future__ import annotations

import os
import sys

if "MEMSHARE_TEST_RUNNER" in os.environ and "--multiprocessing-fork" in sys.orig_argv:
    from vllm_plugin.gpu_choices import choose_runner

    choose_runner()
