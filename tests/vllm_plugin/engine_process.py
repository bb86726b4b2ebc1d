"""One vLLM engine in a process of its own, for tests: prints what it did as one JSON line.

``python engine_process.py plain|memshare|skip|aliases|refused MODEL NULL_PAGES``; ``skip`` leaves null entries out of
attention, also where there are no null pages; ``aliases`` is the published method; ``refused`` takes settings as JSON,
and what is not to work, and tells how the start ends. A second engine in one process is not something vLLM promises, so
each arm has its own.

``gpu_choices.py`` starts it with vLLM's other model runner.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR",
)  # fmt: skip

import numpy as np
import torch
from prometheus_client import REGISTRY
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm_plugin.gpu_choices import RUNNER, attend_in_triton, read_as_graphs_do, schedule_asynchronously
from vllm_plugin.masked_forward import log_probabilities
from vllm_plugin.shadow import Shadow

from trtllm_memshare.engine.null_page import stored_keys
from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm import cache_signatures, probe

if "-async" in RUNNER:
    schedule_asynchronously()
if "-triton" in RUNNER:
    attend_in_triton()
if "-graphs" in RUNNER:
    read_as_graphs_do()
NUM_BLOCKS, BLOCK_SIZE, MAX_LENGTH = 44, 32, 512
_Event = tuple[int, list[int], dict[int, int]]  # tokens computed then, pages forgotten by then, pages aliased by then
_NEVER = 10**9
DTYPE = "float32"
MORE: dict[str, Any] = {}  # arguments of an engine that other programs add
STORED = torch.float8_e4m3fn if "-fp8" in RUNNER else None
HAS_SCALES = "-scales" in RUNNER
# As a checkpoint whose KV cache alone is quantized says it (compressed-tensors).
QUANTIZED = {
    "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": ["re:.*"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
}  # fmt: skip


def make_engine(model: str, null_pages: str, num_ranks: int = 1, num_blocks: int = NUM_BLOCKS, **memshare: Any) -> LLM:
    ours = {}
    if null_pages:
        memshare["null_pages"] = null_pages
    if memshare:
        ours = {
            "scheduler_cls": "trtllm_memshare.vllm.scheduler.MemShareScheduler",
            "worker_cls": "trtllm_memshare.vllm.worker.MemShareWorker",
            "additional_config": {"memshare": {"protected_tokens": 64, **memshare}},
        }
    if HAS_SCALES:
        ours["hf_overrides"] = {"quantization_config": QUANTIZED}
    return LLM(
        model, dtype=DTYPE, max_model_len=MAX_LENGTH, enforce_eager=True, max_num_seqs=10, block_size=BLOCK_SIZE,
        num_gpu_blocks_override=num_blocks, max_num_batched_tokens=128, disable_log_stats=False, seed=0,
        tensor_parallel_size=num_ranks, kv_cache_dtype="auto" if STORED is None else "fp8", **MORE, **ours,
    )  # fmt: skip


def generate(llm: LLM, prompts: list[list[int]], lengths: list[int], **sampling: Any) -> list[Any]:
    sampling = {"temperature": 0, "ignore_eos": True, **sampling}
    parameters = [SamplingParams(max_tokens=n, **sampling) for n in lengths]
    return llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)


def texts(seed: int, count: int, length: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, 70) for _ in range(length)] for _ in range(count)]


def with_room(
    llm: LLM, lengths: Sequence[int] = (150, 170, 190), sampled_length: int = 120, prompt_length: int = 40
) -> list[list[int]]:
    """Three requests that never fill the pool; with sampling from a seed too."""
    greedy = generate(llm, texts(1, 3, prompt_length), list(lengths))
    sampled = generate(llm, texts(2, 3, prompt_length), [sampled_length] * 3, temperature=1.0, seed=7)
    return [list(o.outputs[0].token_ids) for o in (*greedy, *sampled)]


def under_pressure(
    llm: LLM,
    model_dir: str,
    null_pages: str | None,
    lengths: Sequence[int] = tuple(300 + 10 * i for i in range(6)),
    off_lengths: Sequence[int] = (300, 300),
) -> dict[str, Any]:
    """Log-probabilities of vLLM against a masked forward pass that sees the same pages retired at the same tokens.

    ``null_pages`` None: a pass that leaves them out. ``lengths`` of answers, ``off_lengths`` of those whose requests
    keep everything.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    # By request, a stretch from the start or from each preemption: the first token sampled in it, what went in it when.
    stretches: dict[str, list[tuple[int, list[_Event]]]] = {}
    told: dict[str, dict[int, float]] = {}
    retire = scheduler.relief._retire

    def watched(request: Any, pages: list[int], *rest: Any) -> None:
        known = scheduler.relief.pages(request.request_id)
        whole = [p for p in range(known.first_generated, len(known._surprisal)) if p - 1 not in known.retired]
        told.setdefault(request.request_id, {}).update({p: float(known._surprisal[p]) for p in whole})
        retire(request, pages, *rest)
        _, events = stretches.setdefault(request.request_id, [(0, [])])[-1]
        events.append((request.num_computed_tokens, list(known.forgotten), dict(known.aliased)))

    def watched_loss(name: str) -> None:
        stretches.setdefault(name, [(0, [])]).append((scheduler.requests[name].num_tokens, []))
        lose_blocks(name)

    scheduler.relief._retire, lose_blocks = watched, scheduler.relief.lose_blocks
    scheduler.relief.lose_blocks = watched_loss
    prompts, off_prompts = texts(3, len(lengths), 40), texts(6, len(off_lengths), 40)
    outputs = generate(llm, prompts, list(lengths), logprobs=0)
    retired_before, episodes = scheduler.relief.totals.retired, scheduler.relief.episodes
    over = {"episodes": episodes.num, "is_active": episodes.is_active,
            "gauge": REGISTRY.get_sample_value("memshare_pressure")}  # fmt: skip
    off = generate(llm, off_prompts, list(off_lengths), logprobs=0, extra_args={"memshare": False})
    scheduler.relief._retire, scheduler.relief.lose_blocks = retire, lose_blocks
    retired_from = {name for name, parts in stretches.items() if any(events for _, events in parts)}
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    pages = {"keys": None, "bands": torch.tensor([0, MAX_LENGTH])}
    if null_pages is not None:
        pages = load_file(Path(null_pages) / "null_pages.safetensors")
        if STORED is not None:
            pages["keys"] = stored_keys(pages["keys"], STORED).float()
    scales = checkpoint_scales(model_dir) if HAS_SCALES else None
    worst = {"as read": 0.0, "once": 0.0, "all": 0.0}
    differences: list[float] = []
    for output, prompt in zip(outputs, prompts, strict=True):
        answer = output.outputs[0]
        tokens = prompt + list(answer.token_ids)
        name = next((n for n in stretches if _is(output.request_id, n)), "")
        said = torch.tensor([next(iter(step.values())).logprob for step in answer.logprobs])
        for page, nats in told.get(name, {}).items():
            start = page * BLOCK_SIZE - len(prompt)
            differences.append(abs(nats + float(said[start : start + BLOCK_SIZE].sum())))
        parts = stretches.get(name, [(0, [])])
        ends = [start - len(prompt) for start, _ in parts[1:]] + [len(said)]
        for arm in worst:
            errors, first = [], 0
            for (_, events), end in zip(parts, ends, strict=True):
                gone, seen = _seen(len(tokens), events)
                if arm != "as read":
                    seen = None if arm == "all" else seen.clamp_max(1)
                if arm == "all":
                    gone = torch.full_like(gone, _NEVER)
                with torch.no_grad():
                    logs = log_probabilities(
                        reference, tokens, gone, pages["keys"], pages["bands"].long(), seen, STORED, scales
                    )
                logs = logs[len(prompt) - 1 : -1].gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
                error = (said - logs).abs()
                # With async scheduling one more token is on its way when its request is preempted, and is kept.
                error[:first] = error[end + 1 :] = torch.inf
                errors.append(error)
                first = end
            worst[arm] = max(worst[arm], float(torch.stack(errors).amin(0).max()))
    return {
        "difference": worst["as read"], "difference_if_nothing_were_retired": worst["all"],
        "difference_if_donors_counted_once": worst["once"], "aliased": scheduler.relief.totals.retired_aliased,
        "retired": retired_before, "requests_retired_from": len(retired_from),
        "off_retired": any(_is(o.request_id, n) for o in off for n in retired_from),
        "preemptions": sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"),
        "band_moves": scheduler.relief.totals.band_moves, "over": over,
        "pages_with_surprisal": int(np.isfinite(differences).sum()),
        "surprisal_difference": float(np.nanmax([0.0, *differences])),
        "retired_again": scheduler.relief.totals.retired_again,
    }  # fmt: skip


def _seen(count: int, events: list[_Event]) -> tuple[torch.Tensor, torch.Tensor]:
    """``retired_from`` and ``counts`` of ``log_probabilities`` after these events."""
    retired_from, counts = torch.full((count,), _NEVER), torch.ones(count, count)
    for position, forgotten, aliased in events:
        for page in forgotten:
            tokens_of_page = slice(page * BLOCK_SIZE, (page + 1) * BLOCK_SIZE)
            retired_from[tokens_of_page] = retired_from[tokens_of_page].clamp_max(position)
        counts[position:] = 1
        for page, donor in aliased.items():
            counts[position:, page * BLOCK_SIZE : (page + 1) * BLOCK_SIZE] = 0
            counts[position:, donor * BLOCK_SIZE : (donor + 1) * BLOCK_SIZE] += 1
    return retired_from, counts


def checkpoint_scales(model_dir: str) -> torch.Tensor:
    """Scales of K and V as the checkpoint has them, float32 ``[layers, 2]``."""
    weights = load_file(Path(model_dir) / "model.safetensors")
    count = sum(name.endswith(".k_scale") for name in weights)
    names = [[f"model.layers.{index}.self_attn.{x}_scale" for x in "kv"] for index in range(count)]
    return torch.stack([torch.cat([weights[name] for name in pair]) for pair in names])


def _is(outside: str, inside: str) -> bool:
    """Whether the engine's name of a request is that of its caller; vLLM appends characters of its own."""
    return inside == outside or inside.startswith(f"{outside}-")


def schedules(llm: LLM, count: int, most: int = 16, longest: int = 300) -> dict[str, Any]:
    """Random schedules on the real model runner: its tables are held against the scheduler's and against the shadow.

    ``most``: requests that are there at once, ``longest``: tokens of an answer and steps of a schedule.
    """
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    scheduler, worker = core.scheduler, core.model_executor.driver_worker.worker
    runner = worker.model_runner
    shadow = Shadow(BLOCK_SIZE, scheduler.blocks.null_block_ids)
    specs = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
    full = next(i for i, spec in enumerate(specs) if getattr(spec, "sliding_window", 0) is None)
    is_window = [getattr(spec, "sliding_window", None) is not None for spec in specs]
    begun: set[str] = set()
    execute = worker.execute_model

    def tables(name: str, length: int) -> list[list[int]]:
        if RUNNER.startswith("V2"):
            rows = runner.block_tables.block_tables[full].gpu
            return [rows[runner.req_states.req_id_to_index[name], :length].tolist()]
        batch = runner.input_batch
        row = batch.block_table[full].block_table.np[batch.req_id_to_index[name], :length].tolist()
        return [row, list(runner.requests[name].block_ids[full])]

    def tokens_of(request: Any) -> list[int]:
        if not RUNNER.startswith("V2"):
            return list(request.all_token_ids)
        states = runner.req_states  # with async scheduling only the runner has the newest
        return states.all_token_ids.gpu[states.req_id_to_index[request.request_id]].tolist()

    def watched(output: Any) -> Any:
        result = execute(output)
        for name, computed in output.num_scheduled_tokens.items():
            if name not in begun:
                begun.add(name)
                shadow.begin(name)
            request = scheduler.requests[name]
            blocks = scheduler.kv_cache_manager.get_block_ids(name)
            held = blocks[full]
            windows = [(specs[g].sliding_window, table) for g, table in enumerate(blocks) if is_window[g]]
            assert all(table == held for table in tables(name, len(held))), f"tables of {name} differ"
            stop = request.num_computed_tokens
            pages = scheduler.relief.pages(name)
            gone, aliased = set(pages.retired), dict(pages.aliased)
            shadow.step(name, tokens_of(request), stop - computed, stop, held, gone, aliased, windows)
        return result

    worker.execute_model = watched
    for seed in range(count):
        draw = random.Random(seed)
        answers: list[list[int]] = []
        live: dict[str, list[int]] = {}
        for step in range(draw.randint(longest // 2, longest)):
            chance = draw.random()
            if chance < 0.3 and len(live) < most:
                prompt = [draw.randrange(2, 70) for _ in range(draw.randint(1, longest // 2))]
                if answers and draw.random() < 0.6:
                    prompt = draw.choice(answers)[: draw.randint(1, longest)] + prompt[: draw.choice([0, 20])]
                extra = draw.choice([None, None, {"min_kept": 0.0}, {"memshare": False}])
                parameters = SamplingParams(
                    temperature=0, max_tokens=draw.randint(1, longest), ignore_eos=True, extra_args=extra
                )
                name = f"s{seed}-{step}"
                engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
                live[name] = prompt
            elif chance < 0.31 and live:
                name = draw.choice(sorted(live))
                engine.abort_request([name])
                del live[name]
            elif chance < 0.314:
                engine.reset_prefix_cache(reset_running_requests=True)
            else:
                _take(engine, live, answers)
        while engine.has_unfinished_requests():
            _take(engine, live, answers)
        assert scheduler.blocks.num_free == scheduler.blocks.num_blocks, f"blocks leaked in schedule {seed}"
    worker.execute_model = execute
    return {"reads": shadow.reads, "null_reads": shadow.null_reads, "reads_of_others": shadow.reads_of_others,
            "alias_reads": shadow.alias_reads, "window_reads": shadow.window_reads,
            "idle": scheduler.reset_prefix_cache()}  # fmt: skip


def _take(engine: Any, live: dict[str, list[int]], answers: list[list[int]]) -> None:
    for output in engine.step():
        if output.finished and output.request_id in live:
            answers.append(live.pop(output.request_id) + list(output.outputs[0].token_ids))


def refusal(model: str, null_pages: str, settings: dict[str, Any]) -> str | None:
    """The error with which an engine's construction ends; None if it serves."""
    try:
        make_engine(model, null_pages, **settings)
    except UserError as error:
        return str(error)
    return None


def main() -> None:
    arm, model, null_pages = sys.argv[1:4]
    if arm == "plain":
        result: dict[str, Any] = {"with_room": with_room(make_engine(model, ""))}
    elif arm == "refused":
        if "signatures" in sys.argv[5:]:
            cache_signatures._ERROR = -1.0
        if "aliases" in sys.argv[5:]:
            probe._WALKERS = ("TRITON_ATTN",)
        result = {"refused": refusal(model, null_pages, json.loads(sys.argv[4]))}
    elif arm == "skip":
        llm = make_engine(model, null_pages, min_kept=0.25, need=sys.argv[4], null_entries="skip")
        result = {"with_room": with_room(llm)}
        result["pressure"] = under_pressure(llm, model, None)
        result["schedules"] = schedules(llm, int(sys.argv[5]))
        generate(llm, texts(9, 1, 20), [4])  # workers hear of who ended with the next step
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        result["still_skipped"] = len(worker._skipped._names)
    elif arm == "aliases":
        llm = make_engine(model, null_pages, min_kept=0.25, need="nearest-earlier", retired_becomes="alias")
        result = {"pressure": under_pressure(llm, model, null_pages)}
        result["schedules"] = schedules(llm, int(sys.argv[4]))
    else:
        llm = make_engine(model, null_pages, min_kept=0.25, need=sys.argv[4])
        totals = llm.llm_engine.engine_core.engine_core.scheduler.relief.totals
        result = {"with_room": with_room(llm), "retired_with_room": totals.retired}
        result["pressure"] = under_pressure(llm, model, null_pages)
        result["schedules"] = schedules(llm, int(sys.argv[5]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
