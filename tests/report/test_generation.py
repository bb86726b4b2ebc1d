"""Tables of free-running generation: arms are paired with the full cache text by text."""

from __future__ import annotations

from trtllm_memshare.report.generation import generation_table


def row(text, arm, length, differs_at=None, decoding="greedy", tokens=1280, min_kept=0.5):
    return {
        "tokens": tokens,
        "text": text,
        "problem": text,
        "arm": arm,
        "min_kept": 1.0 if arm == "full" else min_kept,
        "decoding": decoding,
        "length": length,
        "ended": length < 1024,
        "repeated": length / 1024,
        "distinct_2": 1.0,
        "distinct_4": 0.5,
        "kept": 1.0 if arm == "full" else 0.5,
        "differs_at": differs_at,
    }


ROWS = [
    *(row(f"t{i}", "full", length) for i, length in enumerate((100, 200, 1024))),
    row("t0", "paper-alias", 110, 30),
    row("t1", "paper-alias", 230),
    row("t1", "paper-alias", 200, min_kept=0.62),
    row("t0", "full", 1024, decoding="sampled"),
    *(row(f"t{i}", arm, 256, tokens=512) for i in range(4) for arm in ("full", "streaming")),
]


def test_an_arm_is_held_against_the_full_cache_on_its_own_texts_of_the_longest_run():
    lines = generation_table(ROWS, "greedy").splitlines()
    assert len(lines) == 5
    assert lines[2] == "| full cache |  | 3 | 100% | 2 | 441 | |  | 0.43 | |  | 0.50 |  |"
    assert lines[3].startswith("| `paper`, aliased | 62% | 1 | 50% | 1 | 200 | +0 ± ")
    assert lines[4].startswith(
        "| `paper`, aliased | 50% | 2 | 50% | 2 | 170 | +20 ± 10 | 0.500 | 0.17 | +0.02 ± 0.01 | 0.500 |"
    )
    assert lines[4].endswith("| 30 / 30 / never |")
    assert len({line.count("|") for line in lines}) == 1


def test_decodings_stand_apart():
    assert generation_table(ROWS, "sampled").count("\n") == 2
