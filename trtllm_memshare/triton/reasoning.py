"""Splits what a reasoning model writes into its thoughts and its answer."""

from __future__ import annotations

from trtllm_memshare.triton.detokenizer import overlap

OPEN, CLOSE = "<think>", "</think>"


class ThinkSplitter:
    """Takes text piece by piece. Thoughts are what stands between ``<think>``, at the start, and ``</think>``.

    Some chat templates end with the opening tag, so that the model's text begins inside its thoughts.

    Args:
      starts_inside: whether the prompt ended with the opening tag.
    """

    def __init__(self, starts_inside: bool) -> None:
        self._inside: bool | None = True if starts_inside else None  # None: not known yet
        self._held = ""

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """New thoughts and new answer text; an unfinished tag is held back, unless ``last``."""
        self._held += text
        thoughts = ""
        if self._inside is None:
            begin = self._held.lstrip()
            if begin.startswith(OPEN):
                self._inside, self._held = True, begin[len(OPEN) :]
            elif last or not OPEN.startswith(begin):
                self._inside = False
            else:
                return "", ""
        if self._inside:
            before, tag, after = self._held.partition(CLOSE)
            if not tag:
                keep = 0 if last else overlap(self._held, CLOSE)
                thoughts, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                return thoughts, ""
            self._inside, thoughts, self._held = False, before, after
        answer, self._held = self._held, ""
        return thoughts, answer


def ends_inside(prompt: str) -> bool:
    """Whether a prompt leaves its last ``<think>`` open."""
    return prompt.rfind(OPEN) > prompt.rfind(CLOSE) and prompt.rstrip().endswith(OPEN)
