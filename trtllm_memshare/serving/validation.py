"""One place where everything that a caller can set is checked, before a request is queued.

``Executor.submit`` calls it for Triton, the benchmark and Python alike. What passes can be run: no value is found out
in the middle of a step that other requests share.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.search.config import MemShareConfig
from trtllm_memshare.serving.request import SamplingParams

MIN_TEMPERATURE = 1e-6
"""Below it the most likely token is taken: float32 logits would divide to infinity."""
_MAX_INT = 2**31 - 1
_MAX_SEED = 2**64 - 1
_MAX_GROUP = 2**63 - 1


class QueueFullError(UserError):
    """The executor holds as many requests as it may; the same request can pass later."""


def check_prompt(input_ids: Any, vocab_size: int) -> list[int]:
    """Prompt tokens as Python integers.

    Raises:
      UserError: no list of integers, or one outside the vocabulary; names the first place that is wrong.
    """
    ids = _listed(input_ids, "input_ids must be a list of token ids", " (tokenize the prompt first)")
    if not ids:
        raise UserError("input_ids must hold at least one token, got none (send a prompt)")
    array = np.asarray(ids) if all(type(i) is int for i in ids) else None
    if array is None or array.ndim != 1 or array.dtype.kind != "i":  # rare, and slow: says which one
        return [_token(token, vocab_size, f"input_ids[{place}]") for place, token in enumerate(ids)]
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        place = int(outside.argmax())
        _token(ids[place], vocab_size, f"input_ids[{place}]")
    return ids


def check_params(params: Any, vocab_size: int, config: MemShareConfig | None = None) -> SamplingParams:
    """Parameters that the sampler can follow, with greedy ones spelled as greedy.

    As in TensorRT-LLM a request is greedy at temperature 0, at top_k 1 and at top_p 0. With penalties the last two keep
    the temperature.

    Args:
      config: of the executor; None = any.

    Raises:
      UserError: a value of another type or out of its range, or a floor where the preset has none; names the field.
    """
    if not isinstance(params, SamplingParams):
        raise UserError(f"params must be SamplingParams, got {quote(params)}")
    checked = {
        field.name: CHECKS[field.name](field.name, getattr(params, field.name), vocab_size)
        for field in fields(params)
        if field.name in CHECKS
    }
    is_cold = checked["temperature"] < MIN_TEMPERATURE
    if is_cold or checked["top_k"] == 1 or checked["top_p"] == 0:
        # Where penalties come after the temperature, it decides with them which token is the likeliest.
        keeps = not is_cold and replace(params, **checked).penalizes
        checked.update(temperature=checked["temperature"] if keeps else 0.0, top_k=int(keeps), top_p=1.0)
    if checked["min_new_tokens"] > checked["max_new_tokens"]:
        raise UserError(
            f"min_new_tokens must be at most max_new_tokens {checked['max_new_tokens']}, got "
            f"{checked['min_new_tokens']} (lower it)"
        )
    if checked["min_kept"] is not None and config is not None and not config.pressure:
        raise UserError(
            f"min_kept needs preset pressure, got preset {config.preset} (build the engine with that preset, or leave "
            f"min_kept out)"
        )
    banned = {word[0] for word in checked["bad_words"] if len(word) == 1}
    if len(banned) >= vocab_size:
        raise UserError(f"bad_words ban all {vocab_size} tokens of the vocabulary, which leaves none to generate")
    return replace(params, **checked)


def check_lengths(
    num_prompt: int, max_new_tokens: int, max_seq_len: int, manager: KVCacheManager, at_floor: int | None = None
) -> None:
    """Raises UserError if prompt and output do not fit max_seq_len, or the pool when nobody else is there.

    Args:
      at_floor: blocks that the request holds when it has given up all that it may; None = it gives nothing up.
    """
    total = num_prompt + max_new_tokens
    if total > max_seq_len:
        raise UserError(
            f"prompt and output must fit max_seq_len {max_seq_len}, got {num_prompt} + {max_new_tokens} tokens "
            f"(shorten the prompt, lower max_new_tokens, or build with a larger --max-seq-len)"
        )
    needed = manager.blocks_for(total) if at_floor is None else at_floor
    if needed > manager.pool.num_usable:
        size = f"{manager.tokens_per_block}{'' if at_floor is None else ' at their floor'}"
        raise UserError(
            f"the KV pool is too small for one request: {total} tokens need {needed} blocks of {size}, the pool has "
            f"{manager.pool.num_usable} (set --kv-cache-blocks {needed + manager.pool.num_null} or more)"
        )


def check_group(group: Any) -> int | None:
    """A request's group. Raises UserError if it is neither None nor a number of 63 bits."""
    return None if group is None else _integer("group", group, 0, _MAX_GROUP)


def check_listener(listener: Any) -> None:
    """Raises UserError if nobody could call it."""
    if listener is not None and not callable(listener):
        raise UserError(f"listener must be a function of one argument, got {quote(listener)}")


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool | np.bool_):
        raise UserError(f"{name} must be an integer, got {quote(value)}")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UserError(f"{name} must be an integer, got {quote(value)}") from error
    if not least <= number <= most:
        raise UserError(f"{name} must be between {least} and {most}, got {quote(number)}")
    return number


def _real(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool | np.bool_ | str | bytes) or value is None:
        raise UserError(f"{name} must be a number, got {quote(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} must be a number, got {quote(value)}") from error
    if not (math.isfinite(number) and least <= number <= most):
        raise UserError(f"{name} must be a number between {least:g} and {most:g}, got {number:g}")
    return number


def _token(value: Any, vocab_size: int, name: str) -> int:
    try:
        return _integer(name, value, 0, vocab_size - 1)
    except UserError as error:
        raise UserError(f"{error} (ids of this model lie in the vocabulary 0..{vocab_size - 1})") from error


def _listed(value: Any, what: str, remedy: str = "") -> list[Any]:
    """The elements of something that has a length: a generator need not end, an array may have no dimension."""
    try:
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise TypeError
        len(value)  # type: ignore[arg-type]
        return list(value)
    except Exception as error:  # of the caller's own class
        raise UserError(f"{what}, got {quote(value)}{remedy}") from error


def _tokens(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    tokens = _listed(value, f"{name} must be a list of token ids")
    return tuple(_token(token, vocab_size, f"{name}[{place}]") for place, token in enumerate(tokens))


def _sequences(name: str, value: Any, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    words = _listed(value, f"{name} must be lists of token ids")
    found = tuple(_tokens(f"{name}[{place}]", word, vocab_size) for place, word in enumerate(words))
    if not all(found):
        raise UserError(f"{name}[{found.index(())}] must hold at least one token, got none (leave it out)")
    return found


def _flag(name: str, value: Any, _: int) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} must be True or False, got {quote(value)}")
    return bool(value)


def _between(least: int, most: int) -> Callable[[str, Any, int], int]:
    return lambda name, value, _: _integer(name, value, least, most)


def _within(least: float, most: float) -> Callable[[str, Any, int], float]:
    return lambda name, value, _: _real(name, value, least, most)


def _optional_share(name: str, value: Any, _: int) -> float | None:
    return None if value is None else _real(name, value, 0.0, 1.0)


CHECKS: dict[str, Callable[[str, Any, int], Any]] = {
    "max_new_tokens": _between(1, _MAX_INT),
    "temperature": _within(0.0, 100.0),
    "top_k": _between(0, _MAX_INT),
    "top_p": _within(0.0, 1.0),
    "seed": _between(0, _MAX_SEED),
    "stop_token_ids": _tokens,
    "stop_sequences": _sequences,
    "bad_words": _sequences,
    "min_new_tokens": _between(0, _MAX_INT),
    "repetition_penalty": _within(1e-3, 1e3),
    "presence_penalty": _within(-1e3, 1e3),
    "frequency_penalty": _within(-1e3, 1e3),
    "log_probs": _flag,
    "min_kept": _optional_share,
    "memshare": _flag,
}
"""Check of each field of ``SamplingParams``: name, value, vocabulary size -> value. A test holds them complete."""
