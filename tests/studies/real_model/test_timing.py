"""What the whole study takes is counted over the very commands of ``all.sh``."""

from __future__ import annotations

import json

from benchmarks.studies.real_model.timing import RESULTS, kind_of, number_of_rows, parts

SCRIPT = """
rankings="full
  random"
decisive="random snapkv"
split benchmarks/results/real_model.jsonl table
split $results/recall.jsonl recall --arms $rankings aligned
study loops
study loops --variant pressure --output $results/loops_pressure.json
study generation --texts 8 --arms full
study table --compute float32 --texts 1 --output $results/float32.jsonl
study summarize --page docs/real_model.md
"""


def test_every_command_that_makes_results_is_found():
    found = [(path.name, words) for path, words in parts(SCRIPT)]
    assert found[0] == ("real_model.jsonl", ["table"])
    assert found[1] == ("recall.jsonl", ["recall", "--arms", "full", "random", "aligned"])
    names = ["loops.json", "loops_pressure.json", "generation.jsonl", "float32.jsonl"]
    assert [name for name, _ in found[2:]] == names
    assert found[3][1][:3] == ["loops", "--variant", "pressure"]


def test_the_files_of_all_sh_are_those_that_are_committed():
    script = (RESULTS.parent / "all.sh").read_text(encoding="utf-8")
    assert all(path.is_file() for path, _ in parts(script))


def test_rows_are_counted_by_kind_or_by_the_texts_of_the_command(tmp_path):
    path, row = tmp_path / "rows.jsonl", {"arm": "random", "min_kept": 0.5, "tokens": 2048}
    path.write_text(
        "".join(json.dumps({**row, "text": i}) + "\n" for i in range(3)) + json.dumps({"arm": "full"}) + "\n"
    )
    assert number_of_rows(path, ["table"], kind_of(row)) == 3
    assert number_of_rows(path, ["table", "--texts", "20"], kind_of(row)) == 20
