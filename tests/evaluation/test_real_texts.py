"""The committed traces: models, problems, order, and what is cut off."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.real_texts import Trace, read_traces, runaway_trace, token_texts

FOLDER = Path(__file__).parents[2] / "benchmarks" / "data" / "traces"
TRACES = read_traces(FOLDER)


def words(text, **_):
    """A tokenizer whose tokens are words."""
    return {"input_ids": [hash(word) % 1000 for word in text.split()]}


def test_five_models_take_turns():
    assert Counter(t.model for t in TRACES) == {
        "R1-Distill-Qwen-1.5B": 294,
        "DeepSeek-R1": 75,
        "Qwen3-32B": 16,
        "R1-Distill-Llama-8B": 15,
        "R1-Distill-Qwen-7B": 14,
    }
    for start in range(0, 70, 5):
        assert len({t.model for t in TRACES[start : start + 5]}) == 5
    assert len({t.name for t in TRACES}) == len(TRACES)


def test_texts_of_one_problem_carry_one_name_whoever_wrote_them():
    writers = Counter(t.problem for t in TRACES)
    assert writers.most_common(1)[0][1] >= 3
    qwen = [t for t in TRACES if t.model == "Qwen3-32B"]
    r1 = {t.problem: t.prompt for t in TRACES if t.name.startswith("r1-")}
    assert all(t.prompt == r1[t.problem] for t in qwen)
    assert len({t.problem for t in qwen}) == 16


def test_outputs_are_what_was_generated():
    assert all(t.prompt.endswith("<think>\n") for t in TRACES)
    assert not any("<think>" in t.output[:20] or t.output.endswith("<|im_end|>") for t in TRACES)
    assert "math500_0009" not in {t.name.rsplit("-", 1)[-1] for t in TRACES if "7B" in t.model}
    assert len(runaway_trace(FOLDER).output) > 50_000


def test_only_texts_that_are_long_enough():
    short = Trace("a", "p", "m", "two words", "one two three four five six")
    texts = list(token_texts([short], words, 8))
    assert (len(texts[0].ids), texts[0].num_prompt_tokens) == (8, 2)
    assert list(token_texts([short], words, 9)) == []
    assert list(token_texts([short], words, 4)) == []  # half of it would be prompt


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the traces .*r1_aime24.jsonl: No such file"):
        read_traces(tmp_path)
