"""What a text brings within reach, by token ids alone."""

from __future__ import annotations

from trtllm_memshare.evaluation.reach import count_in_phase_copies


def test_only_generated_blocks_that_agree_slot_by_slot_count_and_one_of_each_text_stays():
    text = list(range(10, 18))
    in_phase = text + [1] * 8 + text + [2] * 8 + text
    assert count_in_phase_copies([0] * 8, in_phase, 8) == (2, 5)
    assert count_in_phase_copies(text, in_phase, 8) == (2, 5)  # a copy in the prompt is none
    assert count_in_phase_copies([0] * 5, in_phase, 8) == (0, 4)  # at another phase each holds parts of two
    shifted = text + [1] * 5 + text + [2] * 3 + [3] * 8
    assert count_in_phase_copies([0] * 8, shifted, 8) == (0, 4)
