"""What vLLM says after pages were retired, against a masked replay of the same texts that never saw those pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.masked_replay import MaskedReplay, nothing_retired
from trtllm_memshare.evaluation.retirement import NEVER, Retirements
from trtllm_memshare.evaluation.vllm_work import plugin_arguments

BLOCK_SIZE = 32
_PROMPT_TOKENS = 64  # of a problem that are used


@dataclass(frozen=True)
class WrittenText:
    """Token ids, vLLM's log-probability of each token of the answer, and what was retired while it was written."""

    prompt: list[int]
    answer: list[int]
    log_probabilities: list[float]
    retired: Retirements


def through_vllm(
    model_dir: Path, null_pages: Path, problems: list[str], answer_tokens: int, **settings: Any
) -> list[WrittenText]:
    """Serves the problems in a pool too small for them and notes which page went when.

    Args:
      settings: of the plugin.

    Raises:
      UserError: a request was preempted; it would compute its text anew.
    """
    from vllm import LLM, SamplingParams

    longest = -(-(_PROMPT_TOKENS + answer_tokens) // BLOCK_SIZE)  # blocks of a request
    llm = LLM(
        str(model_dir), dtype="float32", enforce_eager=True, max_num_seqs=len(problems), seed=0,
        max_model_len=longest * BLOCK_SIZE, block_size=BLOCK_SIZE, disable_log_stats=False,
        num_gpu_blocks_override=len(problems) * (longest - 2), enable_prefix_caching=False,
        **plugin_arguments(
            null_pages, protected_tokens=32, high_watermark=0.7, low_watermark=0.6, admission="vllm", **settings
        ),
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler
    noted: dict[str, list[tuple[int, list[int]]]] = {}
    original = scheduler.relief._retire

    def note(request: Any, pages: list[int], *rest: Any) -> None:
        noted.setdefault(request.request_id, []).append((request.num_computed_tokens, list(pages)))
        original(request, pages, *rest)

    scheduler.relief._retire = note
    prompts = [tokenizer(problem)["input_ids"][:_PROMPT_TOKENS] for problem in problems]
    parameters = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    preempted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    if any(preempted):
        raise UserError(f"nobody may be preempted here, got {preempted} (a resumed request computes its text anew)")
    texts = []
    for output, prompt in zip(outputs, prompts, strict=True):
        answer = output.outputs[0]
        ids = [*prompt, *answer.token_ids]
        retired = nothing_retired(len(ids), BLOCK_SIZE)
        name = next((n for n in noted if n.partition("-")[0] == output.request_id), None)
        for position, pages in noted.get(name or "", []):
            retired.retired_at[pages] = position
        said = [next(iter(step.values())).logprob for step in answer.logprobs]
        texts.append(WrittenText(prompt, list(answer.token_ids), said, retired))
    return texts


def compare_with_replay(texts: list[WrittenText], replay: MaskedReplay) -> dict[str, Any]:
    """How far vLLM's log-probabilities are from a replay in which the retired pages are masked, and what that cost."""
    worst = worst_unmasked = loss = divergence = 0.0
    count = 0
    for text in texts:
        ids = text.prompt + text.answer
        worst = max(worst, _distance(text, replay, text.retired))
        worst_unmasked = max(worst_unmasked, _distance(text, replay, nothing_retired(len(ids), BLOCK_SIZE)))
        change = replay.change(replay.read(ids, BLOCK_SIZE), text.retired)
        written = slice(len(text.prompt) - 1, None)  # of the prompt's tokens nothing can change
        loss += float(change.loss[written].sum())
        divergence += float(change.divergence[written].sum())
        count += len(text.answer)
    return {
        "pages_retired": int(sum((t.retired.retired_at != NEVER).sum() for t in texts)),
        "largest_difference_from_masked_replay": worst, "largest_difference_if_nothing_were_masked": worst_unmasked,
        "loss_change_nats_per_token": loss / count, "divergence_nats_per_token": divergence / count,
    }  # fmt: skip


def _distance(text: WrittenText, replay: MaskedReplay, retired: Retirements) -> float:
    """Largest difference of a token's log-probability, in nats."""
    logs = replay.logits(text.prompt + text.answer, retired).log_softmax(-1)[len(text.prompt) - 1 : -1]
    expected = logs.gather(1, torch.tensor(text.answer)[:, None])[:, 0]
    return float((torch.tensor(text.log_probabilities) - expected).abs().max())
