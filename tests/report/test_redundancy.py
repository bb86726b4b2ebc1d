"""Texts from JSON lines, good and bad, and the table of their measures."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.redundancy import measure
from trtllm_memshare.evaluation.texts import read_texts
from trtllm_memshare.report.redundancy import redundancy_table, table_of_document


def test_known_fields_are_found_and_others_are_named(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"reasoning": "first", "text": "no"}, {"text": "second"}, {"reasoning": "third"}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert read_texts(path) == ["first", "second", "third"]
    path.write_text(json.dumps({"text": "no", "output": "yes"}))
    assert read_texts(path, "output") == ["yes"]


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("{oops", None, r"t.jsonl line 2 is not JSON: .* \(one object per line\)"),
        ("3", None, "line 2 must be a JSON object, got int"),
        ('{"texts": "a"}', None, "line 2 has no field reasoning"),
        ('{"texts": "a"}', "text", r"line 2 has no field text \(set --field; did you mean texts\?\)"),
        ('{"text": " "}', None, "line 2: text must be text of at least one word, got ' '"),
        ('{"text": 7}', None, "line 2: text must be text of at least one word, got 7"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, field, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a b"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_texts(path, field)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="no texts at"):
        read_texts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no texts"):
        read_texts(tmp_path / "empty.jsonl")


def test_the_table_shows_every_measure_of_every_column():
    once = " ".join(f"w{i}" for i in range(40))
    measures = {"plain": measure([once]), "twice": measure([f"{once}\n\n{once}"])}
    table = redundancy_table(measures)
    document = {f"texts/{name}.jsonl": asdict(measured) for name, measured in measures.items()}
    assert table_of_document(json.loads(json.dumps(document))) == table
    rows = {line.split("  ")[0]: line.split()[-2:] for line in table.split("\n\n")[0].splitlines()}
    assert rows["measure"] == ["plain", "twice"]
    assert rows["words per text, mean"] == ["40", "80"]
    assert rows["steps per text, mean"] == ["1", "2"]
    assert rows["steps with an earlier step > 0.9, %"] == ["0.0", "50.0"]
    assert rows["32-word windows seen before, %"] == ["0.000", f"{100 * 9 / 49:.3f}"]
    assert rows["words in a repeat of >= 32 words, %"] == ["0.00", "50.00"]
    assert rows["8-word blocks >= 80 % equal, same phase, %"] == ["0.00", "50.00"]
    assert len({len(line) for line in table.split("\n\n")[0].splitlines()}) == 1
