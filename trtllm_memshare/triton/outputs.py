"""Answers as tensors in TensorRT-LLM's shapes, and the events of several prompts as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from trtllm_memshare.triton.events import TextEvent, TokenEvent
from trtllm_memshare.triton.inputs import TIMES

_PAD = -1  # TensorRT-LLM's, beyond the end of a sequence


def output_tensors(
    tensor: Any,
    answers: list[list[TokenEvent]],
    log_probs: bool,
    batch_index: int | None = None,
    sequence_index: int | None = None,
) -> list[Any]:
    """Tensors of what a response holds.

    Args:
      tensor: Triton's class.
      answers: one or more sequences for each prompt, equally many for all.
      log_probs: whether they were asked for; then they come with every response, with one that has no token too.
      batch_index, sequence_index: which prompt and which of its sequences, where a request has several and each
        response holds one sequence.

    Returns:
      ``text_output`` ``[sequences]`` or ``output_ids`` ``[prompts, sequences, longest]`` padded with -1 and
      ``sequence_length`` ``[prompts, sequences]``; ``finish_reason`` and each figure ``[prompts, sequences]``; if
      log-probabilities were asked for ``cum_log_probs`` ``[prompts, sequences]`` and ``output_log_probs`` ``[prompts,
      sequences, longest]``, beyond the end of a sequence 0.
    """
    flat = [event for row in answers for event in row]
    found = []
    if isinstance(flat[0], TextEvent):
        texts = [event.text for event in flat if isinstance(event, TextEvent)]
        found.append(tensor("text_output", np.array(texts, np.object_)))
    else:
        found.append(tensor("output_ids", _padded([[e.token_ids for e in row] for row in answers], _PAD, np.int32)))
        found.append(tensor("sequence_length", _grid([[len(e.token_ids) for e in row] for row in answers], np.int32)))
    found.append(tensor("finish_reason", _grid([[e.finish_reason for e in row] for row in answers], np.object_)))
    if log_probs:
        sums = [[sum(e.log_probs) for e in row] for row in answers]
        found.append(tensor("cum_log_probs", _grid(sums, np.float32)))
        each = [[e.log_probs for e in row] for row in answers]
        found.append(tensor("output_log_probs", _padded(each, 0.0, np.float32)))
    for name, index in (("batch_index", batch_index), ("sequence_index", sequence_index)):
        if index is not None:
            found.append(tensor(name, np.array([[index]], np.int32)))
    for name in flat[0].figures:
        dtype = np.int64 if name in TIMES else np.int32
        found.append(tensor(name, _grid([[e.figures.get(name, 0) for e in row] for row in answers], dtype)))
    if "total_draft_tokens" in flat[0].figures:
        found.append(tensor("acceptance_rate", _grid([[0.0 for _ in row] for row in answers], np.float32)))
    return found


async def merged(
    prompts: Sequence[AsyncGenerator[TokenEvent, None]],
) -> AsyncGenerator[tuple[int, TokenEvent, bool], None]:
    """Events of several prompts as they come: which prompt, the event, whether it is the last of all.

    An error of one prompt ends all of them.
    """
    queue = asyncio.Queue[tuple[int, TokenEvent | None, BaseException | None]]()

    async def pump(index: int, events: AsyncGenerator[TokenEvent, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    queue.put_nowait((index, event, None))
        except Exception as error:
            queue.put_nowait((index, None, error))

    tasks = [asyncio.create_task(pump(index, events)) for index, events in enumerate(prompts)]
    running = set(range(len(tasks)))
    try:
        while running:
            index, event, error = await queue.get()
            if event is None:
                raise error or RuntimeError("a prompt ended without an answer")
            if event.is_last:
                running.discard(index)
            yield index, event, not running
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def joined(events: list[TokenEvent]) -> TokenEvent:
    """The events of one sequence as one."""
    last = events[-1]
    tokens = [token for event in events for token in event.token_ids]
    log_probs = [value for event in events for value in event.log_probs]
    if isinstance(last, TextEvent):
        text = "".join(event.text for event in events if isinstance(event, TextEvent))
        return TextEvent(tokens, last.sequence_index, last.finish_reason, last.is_last, log_probs, last.figures, text)
    return TokenEvent(tokens, last.sequence_index, last.finish_reason, last.is_last, log_probs, last.figures)


def _grid(values: list[list[Any]], dtype: Any) -> np.ndarray:
    return np.array(values, dtype)


def _padded(values: list[list[list[Any]]], pad: float, dtype: Any) -> np.ndarray:
    longest = max(len(sequence) for row in values for sequence in row)
    found = np.full((len(values), len(values[0]), longest), pad, dtype)
    for i, row in enumerate(values):
        for j, sequence in enumerate(row):
            found[i, j, : len(sequence)] = sequence
    return found
