"""`benchmarks/studies/learning_to_copy` on two steps."""

from __future__ import annotations

import functools
import importlib
import json
import sys

from nightly import only_nightly


@only_nightly
def test_every_run_differs_from_the_first_by_what_was_changed(monkeypatch, tmp_path, capsys):
    script = importlib.import_module("benchmarks.studies.learning_to_copy.__main__")
    path = tmp_path / "report.json"
    few = functools.partial(script.TraceTrainingConfig, tokens_per_step=512)
    monkeypatch.setattr(script, "TraceTrainingConfig", few)
    monkeypatch.setattr(sys, "argv", ["learning_to_copy.py", "--num-steps", "2", "--output-json", str(path)])
    script.main()
    report = json.loads(path.read_text())
    assert [len(run["log"]) for run in report["runs"]] == [2] * 4
    losses = [run["log"][-1]["128"] for run in report["runs"]]
    assert len(set(losses)) == 4
    assert all(7 < loss < 9 for loss in losses)  # ln 2,048 = 7.6: nothing has been learned yet
    printed = capsys.readouterr().out
    assert all(f"{run['variant']}  " in printed for run in report["runs"])
