"""One arm of a comparison with vLLM: the engine itself on its clock, or its scheduler alone, counted in steps."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.cache_forms import FORMS, CacheForm
from trtllm_memshare.evaluation.step_model import GpuModel, ModelledTimes
from trtllm_memshare.evaluation.vllm_work import VllmWork

_MAX_IDLE_STEPS = 2  # in a row; then nothing will ever change


def run_engine(work: VllmWork, arm: str, admission: str, blocks: int) -> dict[str, Any]:
    """Serves the work with vLLM's engine in this process; all requests are there at the start.

    Returns:
      Figures of the run, and ``answers``, token ids in the order of the requests.

    Raises:
      UserError: an answer has not its trace's length.
    """
    from vllm import LLM, SamplingParams

    from trtllm_memshare.evaluation.vllm_replay import Replay

    llm = LLM(
        **work.engine_arguments(), **work.arm_arguments(arm, admission), num_gpu_blocks_override=blocks,
        disable_log_stats=False, seed=0, logits_processors=[Replay] if work.replay else None,
    )  # fmt: skip
    engine: Any = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=2), use_tqdm=False)  # warm-up
    for index, (prompt, _) in enumerate(work.requests):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, SamplingParams(**work.sampling(index)))
    clock, cpu = time.perf_counter(), time.process_time()
    ends, cpu_ends, answers, steps, in_flight, own_ends = [], [], dict[int, list[int]](), 0, 0, 0
    while engine.has_unfinished_requests():
        steps += 1
        outputs = engine.step()
        in_flight += len(scheduler.running)
        for output in outputs:
            if output.finished:
                ends.append(time.perf_counter() - clock)
                cpu_ends.append(time.process_time() - cpu)
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
                own_ends += output.outputs[0].finish_reason == "stop"
    lengths = [len(answers[i]) for i in range(len(work.requests))]
    if not work.free and lengths != [length for _, length in work.requests]:
        raise UserError(f"answers must have their traces' lengths, got {lengths}")
    if work.replay and [answers[i] for i in range(len(work.requests))] != work.texts:
        raise UserError("answers must be the traces' texts, got others")
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return {
        "blocks": blocks, "seconds": ends[-1], "cpu_seconds": cpu_ends[-1], "steps": steps,
        "mean_in_flight": in_flight / steps, "preemptions": metrics["vllm:num_preemptions"],
        "prompt_tokens": metrics["vllm:prompt_tokens"], "answer_tokens": sum(lengths),
        "answer_lengths": lengths, "own_ends": own_ends,
        "latency": {q: float(np.percentile(ends, int(q[1:]))) for q in ("p50", "p99")},
        "cpu_latency": {q: float(np.percentile(cpu_ends, int(q[1:]))) for q in ("p50", "p99")},
        "retired": _num_retired(scheduler), "retired_aliased": _num_retired(scheduler, "retired_aliased"),
        "retired_repeats": _num_retired(scheduler, "retired_repeats"),
        "loss_nats_per_token": sum(Replay.nats.values()) / sum(lengths) if work.replay else None,
        "answers_hash": hashlib.sha256(json.dumps(sorted(answers.items())).encode()).hexdigest()[:16],
        "all_free": _is_all_free(scheduler), "answers": [answers[i] for i in range(len(work.requests))],
    }  # fmt: skip


def make_groups(work: VllmWork, form: CacheForm) -> list[Any]:
    """vLLM's KV cache groups of a model of this form, for this work."""
    from vllm.engine.arg_utils import EngineArgs

    return form.groups(EngineArgs(**work.engine_arguments()).create_engine_config(), work.block_size)


def run_scheduler(
    work: VllmWork, arm: str, admission: str, blocks: int, groups: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Schedules the work to its end without a model; requests write the texts of their traces.

    Args:
      blocks: of the pool.
      groups: what ``make_groups`` makes; None: full attention alone.

    Returns:
      Counts of the schedule, and its steps by the model of a GPU's, see ``evaluation.step_model``: ``modelled_gpu``
      charges nothing for null entries, ``modelled_gpu_null_read`` as much as for others. VLLM's kernels read the null
      page for each, which stays in their cache, so they are in between.

    Raises:
      UserError: nobody can go on, since the pool is too small for one request.
    """
    from vllm import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    scheduler = _make_scheduler(work, arm, admission, blocks, groups or make_groups(work, FORMS["full"]))
    clocks = times, times_read = ModelledTimes(GpuModel()), ModelledTimes(GpuModel())
    for index, (prompt, length) in enumerate(work.requests):
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        scheduler.add_request(
            Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=sampling, pooling_params=None)
        )
        for clock in clocks:
            clock.submit(str(index))
    steps = in_flight = computed = preempted = idle = 0
    ends = list[int]()
    while scheduler.requests:
        output = scheduler.schedule()
        steps += 1
        in_flight += len(output.num_scheduled_tokens)
        computed += output.total_num_scheduled_tokens
        preempted += len(output.preempted_req_ids or ())
        names = list(output.num_scheduled_tokens)
        idle = 0 if names else idle + 1
        if idle > _MAX_IDLE_STEPS:
            raise UserError(f"a pool of {blocks} blocks is too small for one request (give fewer --parts)")
        sampled = [_next_token(work, scheduler.requests[name]) for name in names]
        places = {n: i for i, n in enumerate(names)}
        if names:
            use, num_tokens = scheduler.kv_cache_manager.usage, output.total_num_scheduled_tokens
            times.step(num_tokens, use)
            times_read.step(num_tokens, use + _num_retired(scheduler, "null_entries") / _num_usable(scheduler))
        before = set(scheduler.requests)
        scheduler.update_from_output(
            output, ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=sampled)
        )
        ended = before.difference(scheduler.requests)
        for clock in clocks:
            for name in (n for n, tokens in zip(names, sampled, strict=True) if tokens):
                clock.has_token(name)
            for name in ended:
                clock.end(name)
        ends += [steps] * len(ended)
    return {
        "blocks": blocks, "steps": steps, "mean_in_flight": in_flight / steps, "preemptions": preempted,
        "tokens_computed": computed, "p50_steps": float(np.percentile(ends, 50)),
        "p99_steps": float(np.percentile(ends, 99)), "retired": _num_retired(scheduler),
        "modelled_gpu": times.summary(), "modelled_gpu_null_read": times_read.summary(),
        "all_free": _is_all_free(scheduler),
    }  # fmt: skip


def _next_token(work: VllmWork, request: Any) -> list[int]:
    """The next one of a request's text; nothing while it still reads what it has."""
    if request.is_prefill_chunk:
        return []
    return [work.texts[int(request.request_id)][request.num_output_tokens]]


def _make_scheduler(work: VllmWork, arm: str, admission: str, blocks: int, groups: Sequence[Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.structured_output import StructuredOutputManager

    ours = work.arm_arguments(arm, admission)
    if arm not in ("vllm", "random"):
        # Which pages go, and what is read in their place, does not change how many.
        ours["additional_config"]["memshare"] |= {"need": "age", "retired_becomes": "null"}
    config = EngineArgs(**work.engine_arguments(), **ours, max_num_batched_tokens=2048).create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    kind = config.scheduler_config.get_scheduler_cls() if arm != "vllm" else Scheduler
    return kind(
        vllm_config=config, kv_cache_config=KVCacheConfig(blocks, [], list(groups)),
        structured_output_manager=StructuredOutputManager(config), log_stats=False,
        block_size=math.lcm(*(group.kv_cache_spec.block_size for group in groups)),
    )  # fmt: skip


def _num_retired(scheduler: Any, total: str = "retired") -> int:
    relief = getattr(scheduler, "relief", None)
    return getattr(relief.totals, total) if relief else 0


def _num_usable(scheduler: Any) -> int:
    return int(scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1  # without vLLM's own null block


def _is_all_free(scheduler: Any) -> bool:
    return bool(scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == _num_usable(scheduler))
