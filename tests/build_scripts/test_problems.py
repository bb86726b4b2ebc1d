"""The task: its arithmetic, its slips, its split, its tokenizer and its data sets."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from build_scripts.tiny_reasoner.datasets import SIZES, write_datasets
from build_scripts.tiny_reasoner.problems import (
    HARD_DIGITS,
    MAX_TOTAL,
    REPETITIVE_DIGITS,
    Problem,
    parse_answer,
    sample_problem,
    transcript,
)
from build_scripts.tiny_reasoner.tokenizer import EOS, build_tokenizer, encode_fast
from build_scripts.tiny_reasoner.training import model_config

SAMPLES = [sample_problem(random.Random(i), 2 + i % 7, held_out=i % 2 == 0) for i in range(200)]
OPERATION = re.compile(r"^(?:From )?(\d+) (\+|-|add|take) (\d+): .*(?:so|Now) (\d+)\.$")


def operations(text: str) -> list[tuple[int, int, int]]:
    """(total before, signed term, total after) of every worked line."""
    found = [m.groups() for m in map(OPERATION.match, text.splitlines()) if m]
    return [(int(a), int(b) if sign in ("+", "add") else -int(b), int(c)) for a, sign, b, c in found]


@pytest.mark.parametrize("index", range(0, 200, 5))
def test_every_line_of_a_transcript_without_slips_is_right(index):
    problem = SAMPLES[index]
    text = transcript(problem, random.Random(0))
    rows = operations(text)
    assert len(rows) == (len(problem.terms) - 1) * (1 + len(problem.check_styles))
    assert all(before + term == after and 0 <= after <= MAX_TOTAL for before, term, after in rows)
    for left, sign, right, carry, result in re.findall(r"(\d)([+-])(\d)(?:[+-](1))?=(\d+b?)", text):
        value = int(left) + int(sign + "1") * (int(right) + int(carry or 0))
        assert result == (f"{value % 10}b" if value < 0 else str(value))
    assert "slipped" not in text
    assert parse_answer(text) == problem.answer


def test_slips_are_made_and_mended():
    slipped = 0
    for index, problem in enumerate(SAMPLES):
        text = transcript(problem, random.Random(index), slip_rate=1.0)
        assert parse_answer(text) == problem.answer
        wrong = [row for row in operations(text) if row[0] + row[1] != row[2]]
        assert len(wrong) <= 1
        assert all(0 <= after <= MAX_TOTAL for _, _, after in operations(text))
        if wrong:
            slipped += 1
            assert "I slipped." in text
    assert slipped > 100


def test_the_split_is_disjoint_and_hard_problems_are_never_restated():
    rng = random.Random(1)
    assert {sample_problem(rng, 4, held_out=side).is_held_out for side in (True,) * 20} == {True}
    assert {sample_problem(rng, 4, held_out=side).is_held_out for side in (False,) * 20} == {False}
    assert all("R" not in sample_problem(rng, 3, held_out=True, digits=HARD_DIGITS).check_styles for _ in range(20))
    assert {sample_problem(rng, 3, held_out=True, digits=REPETITIVE_DIGITS).check_styles for _ in range(20)} == {"RRRR"}
    with pytest.raises(ValueError, match="between 2 and 8, got 9"):
        sample_problem(rng, 9, held_out=True)


def test_fast_encoding_is_the_tokenizer_and_round_trips():
    tokenizer = build_tokenizer(4096)
    for index in range(0, 200, 20):
        text = SAMPLES[index].prompt + transcript(SAMPLES[index], random.Random(0), 1.0) + EOS
        ids = encode_fast(text)
        assert tokenizer(text)["input_ids"] == ids.tolist()
        assert tokenizer.decode(ids) == text


def test_the_longest_transcript_fits_the_model():
    longest = max(
        len(p.prompt) + len(transcript(p, random.Random(0), 1.0))
        for p in (sample_problem(random.Random(i), 8, held_out=False) for i in range(300))
    )
    assert longest < model_config().max_position_embeddings


def test_committed_data_sets_are_what_the_script_writes(tmp_path):
    committed = Path(__file__).parents[2] / "benchmarks" / "data"
    prompts = []
    for name, path in write_datasets(tmp_path).items():
        assert path.read_bytes() == (committed / f"{name}.jsonl").read_bytes()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == SIZES[name]
        for row in rows:
            numbers = re.findall(r"([+-]?) ?(\d+)", row["prompt"])
            problem = Problem(tuple(int(sign + digits) for sign, digits in numbers))
            assert problem.prompt == row["prompt"]
            assert row["answer"] == str(problem.answer)
            assert problem.is_held_out
        prompts += [row["prompt"] for row in rows]
    assert len(set(prompts)) == sum(SIZES.values())


def test_parse_answer_needs_the_end_of_the_reasoning():
    assert parse_answer("<think>\nThe answer is 5.") is None
    assert parse_answer("</think>\n5") == 5
    assert parse_answer("</think>\nfive") is None
    assert np.array_equal(encode_fast("</think>"), [3])
