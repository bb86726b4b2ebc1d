"""Reads benchmark data sets: trtllm-bench's JSON lines plus an optional answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, quote, shorten
from trtllm_memshare.json_input import check_known_keys, parse_json_line, read_lines
from trtllm_memshare.serving.prompts import PromptFormat, encode_messages, encode_prompt
from trtllm_memshare.serving.validation import check_prompt

_PROMPTS = ("prompt", "messages", "input_ids", "logits")
_MAX_OUTPUT_TOKENS = 2**31 - 1  # what TensorRT-LLM's requests can say
_KEYS = (*_PROMPTS, "task_id", "output_tokens", "answer", "output", "add_special_tokens")


@dataclass(frozen=True)
class DatasetItem:
    """One request. ``input_ids``: prompt tokens; ``output_tokens``: most tokens to generate.

    ``output_ids``: written text that continues the prompt, for teacher-forced measures; None = there is none.
    ``group``: number that samples of one prompt have in common, None = there is one; ``seed``: of the sampling.
    """

    task_id: int
    input_ids: list[int]
    output_tokens: int
    answer: str | None
    output_ids: list[int] | None = None
    group: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class DatasetLimits:
    """What an engine can run; None = not known.

    ``max_seq_len``: prompt and output together, in tokens; ``vocab_size``: token ids lie below it.
    """

    max_seq_len: int | None = None
    vocab_size: int | None = None


def final_answer(text: str) -> str:
    """What a reasoning model's output says after its reasoning."""
    return text.rpartition("</think>")[2].strip()


def draw_samples(items: list[DatasetItem], count: int) -> list[DatasetItem]:
    """Each item ``count`` times, one after the other, as samples of one prompt, all with a seed of their own."""
    if count == 1:
        return [replace(item, seed=place) for place, item in enumerate(items)]
    return [
        replace(item, group=place, seed=place * count + number)
        for place, item in enumerate(items)
        for number in range(count)
    ]


def read_dataset(
    path: Path,
    tokenizer: Any,
    limit: int | None = None,
    limits: DatasetLimits = DatasetLimits(),
    prompt_format: PromptFormat = PromptFormat(),
) -> list[DatasetItem]:
    """Reads up to ``limit`` lines; each is one object, and all of them are checked before anything runs.

    Keys: ``task_id``, ``output_tokens``, one of ``prompt`` (text), ``messages`` (a conversation for the model's chat
    template), ``input_ids`` and ``logits`` (token ids; trtllm-bench reads both), and if wanted ``answer``, ``output``
    and ``add_special_tokens``. ``output`` is text that continues the prompt; it is cut to ``output_tokens``.

    Args:
      limits: of the engine; a line that it could not run is refused here, with its number.
      prompt_format: how texts become tokens.

    Raises:
      UserError: no such file, an empty file, or a line that is not usable, with its number.
    """
    if not path.is_file():
        raise UserError(f"no data set at {shorten(str(path))} (give --dataset a JSON-lines file)")
    items: list[DatasetItem] = []
    for number, line in read_lines(path, "the data set"):
        if limit is not None and len(items) >= limit:
            break
        items.append(_parse(line, f"{shorten(str(path))} line {number}", tokenizer, limits, prompt_format))
    if not items:
        raise UserError(f"{path} has no requests (each line is one JSON object with task_id, prompt, output_tokens)")
    return items


def _parse(line: str, where: str, tokenizer: Any, limits: DatasetLimits, prompt_format: PromptFormat) -> DatasetItem:
    row = parse_json_line(line, where)
    check_known_keys(row, _KEYS, where)
    output_tokens = row.get("output_tokens")
    if not isinstance(output_tokens, int) or isinstance(output_tokens, bool) or output_tokens < 1:
        raise UserError(f"{where}: output_tokens must be a positive integer, got {quote(output_tokens)}")
    if output_tokens > _MAX_OUTPUT_TOKENS:
        most = f"at most {limits.max_seq_len or _MAX_OUTPUT_TOKENS:,}"
        raise UserError(f"{where}: output_tokens must be {most}, got {quote(output_tokens)} (lower it)")
    task_id = row.get("task_id")
    if not isinstance(task_id, int) or isinstance(task_id, bool):
        raise UserError(f"{where}: task_id must be an integer, got {quote(task_id)}")
    answer, output = row.get("answer"), row.get("output")
    if not isinstance(answer, str | int | float | None) or isinstance(answer, bool):
        raise UserError(f"{where}: answer must be a text or a number, got {quote(answer)} (leave it out if none)")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # JSON's writers add the .0, models do not
    if output is not None and (not isinstance(output, str) or not output):
        raise UserError(
            f"{where}: output must be text that continues the prompt, got {quote(output)} (leave it out if none)"
        )
    try:
        input_ids = _input_ids(row, tokenizer, limits, prompt_format)
        output_ids = None
        if output is not None:
            plain = PromptFormat(add_special_tokens=False)
            output_ids = encode_prompt(tokenizer, output, plain, limits.max_seq_len)[:output_tokens]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if limits.max_seq_len is not None and len(input_ids) + output_tokens > limits.max_seq_len:
        raise UserError(
            f"{where}: prompt and output must fit max_seq_len {limits.max_seq_len}, got {len(input_ids)} + "
            f"{output_tokens} tokens (shorten the prompt, lower output_tokens, or build with a larger --max-seq-len)"
        )
    return DatasetItem(task_id, input_ids, output_tokens, None if answer is None else str(answer), output_ids)


def _input_ids(row: dict[str, Any], tokenizer: Any, limits: DatasetLimits, prompt_format: PromptFormat) -> list[int]:
    given = [key for key in _PROMPTS if row.get(key) is not None]
    if len(given) != 1:
        raise UserError(
            f"needs a prompt: one of {', '.join(_PROMPTS)}, got {' and '.join(given) if given else 'none of them'}"
        )
    value, vocab_size = row[given[0]], limits.vocab_size or len(tokenizer)
    if given[0] in ("input_ids", "logits"):
        return check_prompt(value, vocab_size)
    if given[0] == "messages":
        ids = encode_messages(tokenizer, value, limits.max_seq_len)
    else:
        adds = row.get("add_special_tokens", prompt_format.add_special_tokens)
        if adds is not None and not isinstance(adds, bool):
            raise UserError(f"add_special_tokens must be true or false, got {quote(adds)}")
        ids = encode_prompt(tokenizer, value, replace(prompt_format, add_special_tokens=adds), limits.max_seq_len)
    return check_prompt(ids, vocab_size)
