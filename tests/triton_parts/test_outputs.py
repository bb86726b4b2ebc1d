"""Answers as tensors in TensorRT-LLM's shapes."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.triton.events import TextEvent, TokenEvent
from trtllm_memshare.triton.outputs import output_tensors


def arrays(events: list[list[TokenEvent]], log_probs: bool) -> dict[str, np.ndarray]:
    return dict(output_tensors(lambda name, array: (name, array), events, log_probs))


@pytest.mark.parametrize("event", [TokenEvent([], finish_reason="length"), TextEvent([], finish_reason="stop")])
def test_a_last_response_without_tokens_has_log_probs_if_they_were_asked_for(event):
    # NVIDIA's token client reads them from every response.
    found = arrays([[event]], log_probs=True)
    assert found["cum_log_probs"].tolist() == [[0.0]]
    assert found["output_log_probs"].shape == (1, 1, 0)
    assert "cum_log_probs" not in arrays([[event]], log_probs=False)


def test_shorter_sequences_are_padded():
    found = arrays(
        [[TokenEvent([4, 5], 0, "stop", False, [-1.0, -0.5]), TokenEvent([6], 1, "length", True, [-2.0])]], True
    )
    assert found["output_ids"].tolist() == [[[4, 5], [6, -1]]]
    assert found["sequence_length"].tolist() == [[2, 1]]
    assert found["cum_log_probs"].tolist() == [[-1.5, -2.0]]
    assert found["output_log_probs"].tolist() == [[[-1.0, -0.5], [-2.0, 0.0]]]
    assert found["finish_reason"].tolist() == [["stop", "length"]]
