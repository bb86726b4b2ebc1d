"""What vLLM says after pages were retired, against a masked replay of the same texts that never saw those pages.

Requests run through vLLM in a pool too small for them. Which page went when is noted. Then transformers reads each text
with those pages masked from then on, and the log-probabilities of the tokens that vLLM sampled are compared. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_memshare.errors import UserError, run_command_line
from trtllm_memshare.evaluation.machine import describe_machine
from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.evaluation.retirement import NEVER, NO_DONOR, Retirements
from trtllm_memshare.vllm import SCHEDULER_CLASS, WORKER_CLASS

_BLOCK_SIZE = 32
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--null-pages", type=Path, default=Path("models/smollm2-null"), help="of vllm calibrate")
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_math500.jsonl"))
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--answer-tokens", type=int, default=224)
    parser.add_argument("--min-kept", type=float, default=0.25)
    parser.add_argument("--need", default="redundancy")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    os.environ.update(_ENVIRONMENT)
    texts, retirements = _through_vllm(options)
    replay = MaskedReplay(options.model_dir)
    worst = worst_unmasked = 0.0
    loss, divergence, count = 0.0, 0.0, 0
    for text, retired in zip(texts, retirements, strict=True):
        ids, said = text["prompt"] + text["answer"], torch.tensor(text["log_probabilities"])
        for arm in (retired, _nothing(len(ids))):
            logs = replay.logits(ids, arm).log_softmax(-1)[len(text["prompt"]) - 1 : -1]
            expected = logs.gather(1, torch.tensor(text["answer"])[:, None])[:, 0]
            difference = float((said - expected).abs().max())
            if arm is retired:
                worst = max(worst, difference)
            else:
                worst_unmasked = max(worst_unmasked, difference)
        change = replay.change(replay.read(ids, _BLOCK_SIZE), retired)
        loss, divergence = loss + float(change.loss.sum()), divergence + float(change.divergence.sum())
        count += len(change.loss)
    result = {
        "model": options.model_dir.name, "requests": len(texts), "answer_tokens": options.answer_tokens,
        "min_kept": options.min_kept, "need": options.need, "block_size": _BLOCK_SIZE,
        "pages_retired": int(sum((r.retired_at != NEVER).sum() for r in retirements)),
        "largest_difference_from_masked_replay": worst, "largest_difference_if_nothing_were_masked": worst_unmasked,
        "loss_change_nats_per_token": loss / count, "divergence_nats_per_token": divergence / count,
        "date": str(date.today()), "machine": describe_machine(),
    }  # fmt: skip
    if options.output_json:
        options.output_json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _through_vllm(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Retirements]]:
    """Texts with what vLLM said of them, and which of their pages went when."""
    from vllm import LLM, SamplingParams

    rows = [json.loads(line) for line in options.traces.read_text().splitlines()[: options.requests]]
    longest = -(-(64 + options.answer_tokens) // _BLOCK_SIZE)  # blocks of a request
    llm = LLM(
        str(options.model_dir), dtype="float32", enforce_eager=True, max_num_seqs=options.requests, seed=0,
        max_model_len=longest * _BLOCK_SIZE, block_size=_BLOCK_SIZE, disable_log_stats=False,
        num_gpu_blocks_override=options.requests * (longest - 2), enable_prefix_caching=False,
        scheduler_cls=SCHEDULER_CLASS, worker_cls=WORKER_CLASS,
        additional_config={"memshare": {
            "null_pages": str(options.null_pages), "min_kept": options.min_kept, "need": options.need,
            "protected_tokens": 32, "high_watermark": 0.7, "low_watermark": 0.6, "admission": "vllm"}},
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler
    noted: dict[str, list[tuple[int, list[int]]]] = {}
    original = scheduler.relief._retire

    def note(request: Any, pages: list[int], update: Any) -> None:
        noted.setdefault(request.request_id, []).append((request.num_computed_tokens, list(pages)))
        original(request, pages, update)

    scheduler.relief._retire = note
    prompts = [tokenizer(row["problem"])["input_ids"][:64] for row in rows]
    parameters = SamplingParams(temperature=0, max_tokens=options.answer_tokens, ignore_eos=True, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    preempted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    if any(preempted):
        raise UserError(f"nobody may be preempted here, got {preempted} (a resumed request computes its text anew)")
    texts, retirements = [], []
    for output, prompt in zip(outputs, prompts, strict=True):
        answer = output.outputs[0]
        ids = [*prompt, *answer.token_ids]
        retired = _nothing(len(ids))
        name = next((n for n in noted if n.partition("-")[0] == output.request_id), None)
        for position, pages in noted.get(name or "", []):
            retired.retired_at[pages] = position
        said = [next(iter(step.values())).logprob for step in answer.logprobs]
        texts.append({"prompt": prompt, "answer": list(answer.token_ids), "log_probabilities": said})
        retirements.append(retired)
    return texts, retirements


def _nothing(num_tokens: int) -> Retirements:
    pages = -(-num_tokens // _BLOCK_SIZE)
    return Retirements(_BLOCK_SIZE, np.full(pages, NEVER), np.full(pages, NO_DONOR, np.int32))


if __name__ == "__main__":
    run_command_line(main)
