"""One vLLM engine that skips null entries, in a pool in which requests are preempted, in a process of its own.

``python short_pool_process.py short|poisoned MODEL NULL_PAGES NEED``: with null pages, or without and with NaN in the
block that null entries name. Prints what it did as one JSON line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from vllm_plugin.engine_process import LLM, NUM_BLOCKS, generate, make_engine, schedules, texts

from trtllm_memshare.vllm.null_pages import attention_layers


def short_settings(need: str) -> dict[str, Any]:
    becomes = {"retired_becomes": "alias"} if need == "nearest-earlier" else {}
    return {"need": need, "min_kept": 0.5, "admission": "vllm", "null_entries": "skip", **becomes}


def short_pool(llm: LLM) -> dict[str, Any]:
    """Tokens and log-probabilities of requests that are preempted and come back, some of them.

    Prompts that are read in pieces, hits in the prefix cache and random tokens are among them.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted_with_gaps, lose_blocks = 0, scheduler.relief.lose_blocks

    def watched(name: str) -> None:
        nonlocal preempted_with_gaps
        preempted_with_gaps += bool(scheduler.relief.pages(name).retired)
        lose_blocks(name)

    scheduler.relief.lose_blocks = watched
    most_null_entries, schedule = 0, scheduler.schedule

    def scheduled(*arguments: Any) -> Any:
        nonlocal most_null_entries
        output = schedule(*arguments)
        most_null_entries = max(most_null_entries, scheduler.relief.totals.null_entries)
        return output

    scheduler.schedule = scheduled
    prompts = [*texts(4, 6, 40), *texts(5, 3, 180)]
    first = generate(llm, prompts, [300 + 5 * i for i in range(9)], logprobs=0)
    begun = [p + list(o.outputs[0].token_ids[:90]) for p, o in zip(prompts, first, strict=True)][::-1]
    torch.manual_seed(0)  # with seeds of their own vLLM 0.32 cannot read prompts in pieces on a CPU
    again = generate(llm, begun, [200] * 9, logprobs=0, temperature=1.0)
    scheduler.relief.lose_blocks, scheduler.schedule = lose_blocks, schedule
    answers = [output.outputs[0] for output in (*first, *again)]
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    totals = scheduler.relief.totals
    return {
        "tokens": [list(answer.token_ids) for answer in answers],
        "log_probabilities": [[next(iter(step.values())).logprob for step in a.logprobs] for a in answers],
        "preemptions": metrics["vllm:num_preemptions"], "preempted_with_gaps": preempted_with_gaps,
        "cache_hits": metrics["vllm:prefix_cache_hits"], "null_entries": most_null_entries, "retired": totals.retired,
        "retired_again": totals.retired_again,
    }  # fmt: skip


def poison(llm: LLM) -> list[torch.Tensor]:
    """Fills the block that null entries name with NaN, in all layers; returns views of it."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    (block,) = core.scheduler.blocks.null_block_ids
    views = [layer.kv_cache[block] for layer in attention_layers(runner)]
    for view in views:
        assert view.isfinite().all()
        view.fill_(torch.nan)
    return views


def without_null_pages(model: str, need: str) -> dict[str, Any]:
    llm = make_engine(model, "", num_blocks=NUM_BLOCKS - 1, **short_settings(need))
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    block = poison(llm)
    not_finite, compute = 0, worker.model_runner.model.compute_logits

    def watched(*arguments: Any) -> Any:
        nonlocal not_finite
        logits = compute(*arguments)
        not_finite += int((~logits.isfinite()).sum())
        return logits

    worker.model_runner.model.compute_logits = watched
    result = {"short": short_pool(llm), "schedules": schedules(llm, 2), "not_finite": not_finite}
    result["is_untouched"] = all(bool(view.isnan().all()) for view in block)
    # Were one entry read, it would show: the same requests, nothing skipped.
    worker._skipped.follow = lambda *_: None
    worker._skipped._names.clear()
    not_finite = 0
    short_pool(llm)
    return {**result, "not_finite_if_read": not_finite}


def main() -> None:
    arm, model, null_pages, need = sys.argv[1:]
    if arm == "short":
        result = {"short": short_pool(make_engine(model, null_pages, **short_settings(need)))}
    else:
        result = without_null_pages(model, need)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
