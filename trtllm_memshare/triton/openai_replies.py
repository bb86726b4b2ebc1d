"""Answers of the OpenAI-compatible endpoint, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from typing import Any

from trtllm_memshare.triton.events import TextEvent
from trtllm_memshare.triton.reasoning import ThinkSplitter
from trtllm_memshare.triton.token_bytes import token_bytes


class Replies:
    """Turns the events of one HTTP request into OpenAI's objects.

    Args:
      model: name that the answers carry.
      tokenizer: shows single tokens where log-probabilities are wanted.
      num_sequences: answers to each prompt.
      chat: chat completions, else text completions.
      log_probs: whether they are wanted.
      starts_inside: see ``ThinkSplitter``; chat only.
    """

    def __init__(
        self, model: str, tokenizer: Any, num_sequences: int, chat: bool, log_probs: bool, starts_inside: bool = False
    ) -> None:
        self._tokenizer, self._num_sequences, self._chat, self._log_probs = tokenizer, num_sequences, chat, log_probs
        self._starts_inside = starts_inside
        kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        self._head = {"id": f"{kind[0]}-{uuid.uuid4().hex}", "object": kind[1], "created": int(time.time())}
        self._head["model"] = model
        self._splitters: dict[int, ThinkSplitter] = {}
        self._num_prompt_tokens = dict[int, int]()
        self._num_output_tokens = self._num_retired_pages = 0

    def chunk(self, prompt: int, event: TextEvent) -> dict[str, Any]:
        """A piece of a stream."""
        index = prompt * self._num_sequences + event.sequence_index
        is_first = index not in self._splitters
        choice: dict[str, Any] = {"index": index, "finish_reason": event.finish_reason or None}
        choice["logprobs"] = self._log_probs_of(event)
        thoughts, answer = self._take(prompt, index, event)
        if self._chat:
            choice["delta"] = {
                **({"role": "assistant"} if is_first else {}),
                **({"reasoning_content": thoughts} if thoughts else {}),
                **({"content": answer} if answer or is_first else {}),
            }
        else:
            choice["text"] = event.text
        name = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": name, "choices": [choice]}

    def whole(self, answers: list[tuple[int, TextEvent]]) -> dict[str, Any]:
        """The one object of an answer that is not streamed. ``answers``: which prompt, and a whole sequence."""
        choices = []
        for prompt, event in answers:
            index = prompt * self._num_sequences + event.sequence_index
            choice: dict[str, Any] = {"index": index, "finish_reason": event.finish_reason}
            choice["logprobs"] = self._log_probs_of(event)
            thoughts, answer = self._take(prompt, index, event)
            if self._chat:
                choice["message"] = {"role": "assistant", "content": answer, "reasoning_content": thoughts or None}
            else:
                choice["text"] = event.text
            choices.append(choice)
        return {**self._head, "choices": sorted(choices, key=lambda c: c["index"]), "usage": self.usage()}

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk behind the last one, if the client asked for it."""
        name = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": name, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all sequences, and the blocks that sharing gave back."""
        prompt = sum(self._num_prompt_tokens.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": prompt + self._num_output_tokens,
            "memshare": {"retired_pages": self._num_retired_pages},
        }

    def _take(self, prompt: int, index: int, event: TextEvent) -> tuple[str, str]:
        if event.finish_reason:
            self._num_prompt_tokens[prompt] = event.figures["num_input_tokens"]
            self._num_output_tokens += event.figures["num_output_tokens"]
            self._num_retired_pages += event.figures["memshare_retired_pages"]
        splitter = self._splitters.setdefault(index, ThinkSplitter(self._starts_inside))
        return splitter.push(event.text, bool(event.finish_reason))

    def _log_probs_of(self, event: TextEvent) -> dict[str, Any] | None:
        if not self._log_probs:
            return None
        of_tokens = token_bytes(self._tokenizer)
        found = [of_tokens.of(token) for token in event.token_ids]
        texts = [
            self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if piece is None
            else piece.decode(errors="replace")
            for token, piece in zip(event.token_ids, found, strict=True)
        ]
        if not self._chat:
            return {"tokens": texts, "token_logprobs": event.log_probs, "top_logprobs": None, "text_offset": None}
        content = [
            {"token": t, "logprob": p, "bytes": None if b is None else list(b), "top_logprobs": []}
            for t, p, b in zip(texts, event.log_probs, found, strict=True)
        ]
        return {"content": content, "refusal": None}
