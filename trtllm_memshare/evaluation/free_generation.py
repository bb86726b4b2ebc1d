"""Free-running generation under arms that forget: what a model writes on, beside what it writes with its whole cache.

The requests of an arm are in flight at once in the real executor, in a pool with room for all of them. Arms of the
preset ``pressure`` are asked before every step for all that they may give up, so that each request stands at its floor
throughout, as in the masked replay; what goes is the product's choice.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from trtllm_memshare.evaluation.real_rows import RowFile
from trtllm_memshare.evaluation.real_texts import TokenText
from trtllm_memshare.runners.protocol import Runner
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.search.config import MemShareConfig, make_config, parse_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import RequestResult, SamplingParams

PAGE_TOKENS = 16
FULL = "full"
_HELD = {"high_watermark": 1.0, "low_watermark": 1.0}  # the pool itself presses nobody
ARMS: dict[str, MemShareConfig] = {
    FULL: make_config("off"),
    "aligned": make_config("aligned"),
    "surprisal-led-signature": make_config("pressure", need="surprisal-led-redundancy", **_HELD),
    "surprisal-led-recency-signature": make_config("pressure", **_HELD),
    "redundancy-signature": make_config("pressure", need="redundancy", **_HELD),
    "redundancy-recency-signature": make_config("pressure", need="redundancy-recency", **_HELD),
    "random-once": make_config("pressure", need="random", **_HELD),
    "paper-alias": make_config("pressure", need="nearest-earlier", retired_becomes="alias", **_HELD),
    "paper-null": make_config("pressure", need="nearest-earlier", **_HELD),
    "streaming": make_config("pressure", need="age", **_HELD),
    "attention-redundancy-signature": make_config("pressure", need="attention-redundancy", **_HELD),
}
"""By the names of the other tables; exact repeats go first in all but the paper's, as the product has it."""
DECODINGS: dict[str, dict[str, float]] = {"greedy": {}, "sampled": {"temperature": 0.6, "top_p": 0.95}}
"""Sampled as DeepSeek-R1's model card asks for. A text has one seed, the same for all arms."""


def arm_config(arm: str, min_kept: float) -> MemShareConfig:
    """An arm's settings with ``min_kept`` as its floor; arms without pressure have none.

    Raises:
      UserError: a share out of range.
    """
    config = ARMS[arm]
    if not config.pressure:
        return config
    return parse_config({**config.model_dump(), "min_kept": min_kept}, "memshare settings")


class HeldExecutor(Executor):
    """An executor whose requests give up before every step whatever they may, down to their floors."""

    def step(self) -> None:
        if self.pressure is not None:
            self.pressure.free_for_running(self.manager.pool.num_blocks, self._scheduler.running)
        super().step()


@dataclass(frozen=True)
class Length:
    """Tokens that a request begins with, which are never given up, and tokens that it writes at most."""

    prompt: int = 256
    output: int = 1024

    def blocks(self, num_requests: int) -> int:
        """Blocks of a pool in which all of them run to their ends."""
        return num_requests * (-(-(self.prompt + self.output) // PAGE_TOKENS) + 1)


def compute_generations(
    model: Any,
    boundaries: BoundaryTokens,
    stop_token_ids: tuple[int, ...],
    texts: list[TokenText],
    arms: list[str],
    length: Length,
    rows: RowFile,
    may_go_on: Callable[[], bool] = lambda: True,
    min_kept: float = 0.5,
) -> None:
    """Computes the rows that are not there yet, one an arm, text and decoding, all of an arm at once.

    Args:
      model: of ``load_model``.
      texts: of ``length.prompt`` tokens each.
      arms: names in ``ARMS``; the full cache comes first whether named or not, since the others are held against it.
      rows: where rows are, and go. Those of the full cache keep their tokens.
      may_go_on: asked before each arm.
      min_kept: floor of the arms of the preset ``pressure``, a share of the pages that a request has written.
    """
    requests = [(text, decoding) for text in texts for decoding in DECODINGS]
    runner: TorchRunner | None = None
    for arm in dict.fromkeys([FULL, *arms]):
        missing = [(t, d) for t, d in requests if row_key(arm, t, d, length, min_kept) not in rows]
        if not missing:
            continue
        if not may_go_on():
            return
        runner = runner or TorchRunner(model, length.blocks(len(requests)), PAGE_TOKENS)
        results = generate(runner, arm_config(arm, min_kept), boundaries, stop_token_ids, missing, length, arm)
        full = {(r["text"], r["decoding"], r["tokens"]): r["token_ids"] for r in rows.rows if r["arm"] == FULL}
        for (text, decoding), result in zip(missing, results, strict=True):
            key = row_key(arm, text, decoding, length, min_kept)
            theirs = None if arm == FULL else full[key["text"], decoding, key["tokens"]]
            rows.add({**key, **generation_row(text, result, theirs)})


def generate(
    runner: Runner,
    config: MemShareConfig,
    boundaries: BoundaryTokens,
    stop_token_ids: tuple[int, ...],
    requests: list[tuple[TokenText, str]],
    length: Length,
    label: str = "",
) -> list[RequestResult]:
    """Lets all requests write on at once; each is a text and the name of a decoding."""
    limit = length.prompt + length.output
    executor = HeldExecutor(runner, config, boundaries, limit, len(requests), len(requests) * length.prompt)
    handles = [
        executor.submit(
            text.ids,
            SamplingParams(
                length.output,
                seed=zlib.crc32(text.trace.name.encode()),
                stop_token_ids=stop_token_ids,
                **DECODINGS[decoding],  # type: ignore[arg-type]
            ),
        )
        for text, decoding in requests
    ]
    with tqdm(total=length.output, desc=label, unit="step", mininterval=5) as bar:
        while executor.has_work:
            executor.step()
            bar.update()
    executor.manager.check_integrity()
    return [handle.result() for handle in handles]


def row_key(arm: str, text: TokenText, decoding: str, length: Length, min_kept: float) -> dict[str, Any]:
    """What a row is found again by."""
    return {
        "text": text.trace.name,
        "arm": arm,
        "min_kept": min_kept if ARMS[arm].pressure else 1.0,
        "tokens_per_block": PAGE_TOKENS,
        "tokens": length.prompt + length.output,
        "decoding": decoding,
    }


def generation_row(text: TokenText, result: RequestResult, full_ids: list[int] | None) -> dict[str, Any]:
    """What is counted of one continuation.

    Args:
      full_ids: what the full cache wrote after the same prompt; None = this is it, and the row keeps its tokens.
    """
    ids, sharing = result.token_ids, result.stats.sharing
    row = {
        "model": text.trace.model,
        "problem": text.trace.problem[:120],
        "prompt_tokens": len(text.ids),
        "length": len(ids),
        "ended": result.finish_reason == "stop",
        "repeated": round(repeated_share(text.ids, ids), 4),
        "distinct_2": round(distinct_share(ids, 2), 4),
        "distinct_4": round(distinct_share(ids, 4), 4),
        "kept": round(1 - sharing.retired_blocks / max(1, sharing.generated_blocks), 4),
        "differs_at": None if full_ids is None else first_difference(ids, full_ids),
    }
    return {**row, "token_ids": ids} if full_ids is None else row


def repeated_share(prompt: list[int], output: list[int], count: int = 8) -> float:
    """Share of the output's runs of ``count`` tokens that stood before, in the prompt or earlier in the output.

    Example: runs of 2 in 1 2 1 2 3 after the prompt 2 3: 1 2, 2 1, 1 2 (again), 2 3 (in the prompt): 0.5.
    """
    seen, repeated = set(_runs(prompt, count)), 0
    runs = _runs(output, count)
    for run in runs:
        repeated += run in seen
        seen.add(run)
    return repeated / max(1, len(runs))


def distinct_share(ids: list[int], count: int) -> float:
    """Different runs of ``count`` tokens, as a share of all (distinct-n); it falls with length. 1 without a run."""
    runs = _runs(ids, count)
    return len(set(runs)) / len(runs) if runs else 1.0


def first_difference(ids: list[int], others: list[int]) -> int | None:
    """Place of the first token that differs, or that only one of them has; None if they are equal."""
    for place, (ours, theirs) in enumerate(zip(ids, others, strict=False)):
        if ours != theirs:
            return place
    return None if len(ids) == len(others) else min(len(ids), len(others))


def _runs(ids: list[int], count: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + count]) for i in range(len(ids) - count + 1)]
