"""What the whole study takes is counted over the very commands of ``all.sh``."""

from __future__ import annotations

from benchmarks.studies.real_model.timing import RESULTS, parts

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
study summarize --plot docs/real_model.png
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
