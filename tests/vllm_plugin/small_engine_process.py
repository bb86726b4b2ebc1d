"""One small vLLM engine in a process of its own, for tests: prints what it did as one JSON line.

``python gpu_choices.py small_engine_process.py ARM MODEL NULL_PAGES RANKS SCHEDULES``, ``ARM`` one of those below or
``plain``; in ``preempted`` the pool is too short for two requests, in ``windows`` the model has sliding windows in some
of its layers. Fewer requests and shorter ones than in ``engine_process``: for model runner V2, each of whose kernels is
interpreted, and for two ranks, which wait for one another. Where attention is interpreted too texts are half as long
once more, in smaller blocks.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm_plugin import engine_process
from vllm_plugin.engine_process import LLM, RUNNER, make_engine, schedules, under_pressure, with_room

engine_process.MAX_LENGTH = 256
_IN_TRITON = "-triton" in RUNNER
_NEED = "surprisal-led-redundancy-recency"
_SETTINGS: dict[str, Any] = {"min_kept": 0.25, "protected_tokens": 32, "admission": "vllm"}
if _IN_TRITON:
    engine_process.BLOCK_SIZE, engine_process.MAX_LENGTH = 16, 144
    _SETTINGS["protected_tokens"] = 16
_ARMS: dict[str, dict[str, Any]] = {
    "read": {"need": _NEED},
    "skip": {"need": _NEED, "null_entries": "skip"},
    "preempted": {"need": _NEED, "null_entries": "skip"},
    "aliases": {"need": "nearest-earlier", "retired_becomes": "alias"},
    "windows": {"need": _NEED, "null_entries": "skip"},
}


def short_room(llm: LLM) -> list[list[int]]:
    return with_room(llm, (30, 40, 50), 30)


def main() -> None:
    arm, model, null_pages, *numbers = sys.argv[1:]
    num_ranks, num_schedules = map(int, numbers)
    num_blocks = {"preempted": 12, "windows": 20 if _IN_TRITON else 19}.get(arm, 15 if _IN_TRITON else 13)
    if arm == "plain":
        llm = make_engine(model, "", num_ranks, 19)
        result: dict[str, Any] = {"with_room": short_room(llm)}
    else:
        llm = make_engine(model, null_pages, num_ranks, num_blocks, **_SETTINGS, **_ARMS[arm])
        result = {} if _IN_TRITON else {"with_room": short_room(llm)}
        masked = None if "null_entries" in _ARMS[arm] else null_pages
        lengths = ((95, 100), (20,)) if _IN_TRITON else ((200, 210), (60,))
        result["pressure"] = under_pressure(llm, model, masked, *lengths)
        if num_schedules:
            result["schedules"] = schedules(llm, num_schedules, most=10, longest=120)
    core = llm.llm_engine.engine_core.engine_core
    result["elements"] = core.vllm_config.cache_config.cache_dtype
    if num_ranks == 1:
        runner = core.model_executor.driver_worker.worker.model_runner
        layers = [layer for _, layer in sorted(runner.compilation_config.static_forward_context.items())]
        result["scales"] = [[float(layer._k_scale), float(layer._v_scale)] for layer in layers]
        result["runner"], result["attention"] = type(runner).__module__, runner.attn_groups[0][0].backend.get_name()
    result["is_v2"] = core.vllm_config.use_v2_model_runner
    result["is_async"] = core.batch_queue is not None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
