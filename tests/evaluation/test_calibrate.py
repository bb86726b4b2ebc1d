"""Calibration: the most aggressive setting within the budget, the same each time, written where the engine reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trtllm_memshare.__main__ import main
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.calibrate import LADDER, calibrate, describe
from trtllm_memshare.evaluation.session import Session
from trtllm_memshare.runners.engines import load_engine, replace_memshare
from trtllm_memshare.search.config import make_config

WILD = {"min_run_tokens": 8, "shingle_tokens": 4, "protected_tokens": 0, "protected_steps": 0, "accept_all": True}
MILD = {**WILD, "protected_tokens": 96}
NOTHING = {"protected_tokens": 400}
RUNGS = {"mild": MILD, "wild": WILD, "nothing": NOTHING}


@pytest.fixture(scope="module")
def session(engine_dir, answered, tmp_path_factory) -> Session:
    """Keeps what it has generated and read."""
    return Session(engine_dir, answered, device="cpu", keep_dir=tmp_path_factory.mktemp("kept"))


def test_a_wide_budget_takes_the_largest_saving_and_a_narrow_one_climbs_down(session, engine_dir, answered):
    wide = calibrate(session, 0.999, RUNGS)
    assert (wide.name, len(wide.tried)) == ("wild", 1)
    assert wide.config == make_config("aligned", **WILD)
    assert wide.entry["paired"]["full"]["lost"] > 0
    lost_share = -wide.entry["paired"]["full"]["change"]
    narrow = calibrate(session, lost_share / 2, RUNGS)
    assert narrow.name == "mild"
    assert len(narrow.tried) == 2
    assert -narrow.entry["paired"]["full"]["change"] <= lost_share / 2
    afresh = Session(engine_dir, answered, device="cpu")
    assert calibrate(afresh, lost_share / 2, RUNGS).entry == narrow.entry
    assert "2 settings were tried" in describe(narrow, lost_share / 2, 8)


def test_no_setting_within_the_budget_is_said(session):
    with pytest.raises(UserError, match=r"no setting loses at most 0 of accuracy on 8 problems, the mildest one loses"):
        calibrate(session, 0.0, {"wild": WILD})
    with pytest.raises(UserError, match="no setting loses"):  # saves nothing: not worth writing
        calibrate(session, 0.5, {"nothing": NOTHING})
    with pytest.raises(UserError, match="no setting loses"):  # 8 problems cannot make sure of one point
        calibrate(session, 0.01, {"mild": MILD}, is_sure=True)
    with pytest.raises(UserError, match="must be at least 0 and below 1, got 1"):
        calibrate(session, 1.0, RUNGS)


def test_without_a_replay_savings_are_compared_on_the_answers_themselves(session):
    found = calibrate(session, 0.999, RUNGS, replay_problems=0)
    assert (found.name, len(found.tried)) == ("wild", 1)
    assert "replay" not in found.entry
    saved = f"saves {found.entry['free']['memory_saved']:.1%} of the KV memory per request over its own answers"
    assert saved in describe(found, 0.999, 8)
    with pytest.raises(UserError, match=r"--replay-problems must be between 0 and \d+, got -3"):
        calibrate(session, 0.999, RUNGS, replay_problems=-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output-json", "."], "--output-json must name a file, got the directory ."),
        (["--num-problems", "0"], "--num-problems must be positive, got 0"),
    ],
)
def test_what_cannot_work_is_refused_before_the_engine_is_changed(engine_dir, answered, tmp_path, options, message):
    engine = Path(shutil.copytree(engine_dir, tmp_path / "engine"))
    base = ["calibrate", "--engine-dir", str(engine), "--dataset", str(answered), "--device", "cpu"]
    before = (engine / "memshare.json").read_text()
    with pytest.raises(UserError, match=message):
        main([*base, "--max-accuracy-drop", "0.99", *options])
    assert (engine / "memshare.json").read_text() == before


def test_the_command_writes_the_engine_s_settings(engine_dir, answered, tmp_path, capsys, monkeypatch):
    engine = Path(shutil.copytree(engine_dir, tmp_path / "engine"))
    report = tmp_path / "report.json"
    monkeypatch.setattr("trtllm_memshare.evaluation.calibrate.LADDER", {"wild": WILD})
    base = ["calibrate", "--engine-dir", str(engine), "--dataset", str(answered), "--device", "cpu"]
    base += ["--num-problems", "4", "--max-accuracy-drop", "0.99"]
    main([*base, "--dry-run"])
    assert load_engine(engine).memshare == make_config("aligned")
    main([*base, "--output-json", str(report)])
    document = json.loads(report.read_text())
    assert load_engine(engine).memshare == make_config("aligned", **WILD)
    assert document["settings"] == load_engine(engine).memshare.model_dump()
    assert document["command"].startswith("python -m trtllm_memshare calibrate --engine-dir")
    assert "95 % interval of the change" in capsys.readouterr().out
    assert not [p for p in engine.iterdir() if p.name.startswith(".memshare")]


def with_settings(engine_dir: Path, tmp_path: Path, config) -> Path:
    engine = Path(shutil.copytree(engine_dir, tmp_path / "engine"))
    return replace_memshare(engine, config).engine_dir


def test_what_no_rung_names_stays_as_the_owner_chose_it(engine_dir, answered, tmp_path, capsys, monkeypatch):
    chosen = {"max_aliases": 5, "search_interval": 3, "shadow": True}
    engine = with_settings(engine_dir, tmp_path, make_config("aligned", min_run_tokens=48, **chosen))
    monkeypatch.setattr("trtllm_memshare.evaluation.calibrate.LADDER", {"wild": WILD})
    base = ["calibrate", "--engine-dir", str(engine), "--dataset", str(answered), "--device", "cpu"]
    main([*base, "--num-problems", "4", "--max-accuracy-drop", "0.99"])
    assert load_engine(engine).memshare == make_config("aligned", **WILD, **chosen)
    printed = capsys.readouterr().out
    assert "the engine stays in shadow" in printed
    assert "  min_run_tokens: 48 -> 8\n" in printed
    assert "  max_aliases:" not in printed
    assert "  shadow:" not in printed


def test_an_engine_of_another_preset_is_replaced_only_if_asked_for(engine_dir, answered, tmp_path, capsys, monkeypatch):
    before = make_config("pressure", retired_becomes="dropped", min_kept=0.3)
    engine = with_settings(engine_dir, tmp_path, before)
    monkeypatch.setattr("trtllm_memshare.evaluation.calibrate.LADDER", {"wild": WILD})
    base = ["calibrate", "--engine-dir", str(engine), "--dataset", str(answered), "--device", "cpu"]
    base += ["--num-problems", "4", "--max-accuracy-drop", "0.99"]
    with pytest.raises(UserError, match=r"got an engine of preset pressure \(give --preset aligned to replace all of"):
        main(base)
    assert load_engine(engine).memshare == before
    main([*base, "--preset", "aligned"])
    assert load_engine(engine).memshare == make_config("aligned", **WILD)
    printed = capsys.readouterr().out
    for change in ("preset: pressure -> aligned", "min_kept: 0.3 -> 0.5", "protected_tokens: 128 -> 0"):
        assert f"  {change}\n" in printed


def test_a_second_calibration_searches_the_same_rungs(session):
    """What the first one wrote is no part of them, or a smaller budget could not undo it."""
    first = calibrate(session, 0.999, RUNGS)
    again = calibrate(session, 0.999, RUNGS, base=first.config)
    assert again == first


def refuse(*arguments):
    raise UserError("the disk refuses")


def test_a_disk_that_refuses_the_engine_loses_no_report(engine_dir, answered, tmp_path, capsys, monkeypatch):
    report = tmp_path / "report.json"
    monkeypatch.setattr("trtllm_memshare.evaluation.calibrate.LADDER", {"wild": WILD})
    monkeypatch.setattr("trtllm_memshare.evaluation.calibrate.replace_memshare", refuse)
    base = ["calibrate", "--engine-dir", str(engine_dir), "--dataset", str(answered), "--device", "cpu"]
    with pytest.raises(UserError, match="the disk refuses"):
        main([*base, "--num-problems", "2", "--max-accuracy-drop", "0.99", "--output-json", str(report)])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == json.loads(report.read_text())
    assert "written:" not in printed


@pytest.mark.parametrize(
    ("closed", "message"),
    [
        ("engine", r"engine .*engine cannot be given other settings: no right to write to it \(.*set --dry-run\)"),
        ("kept", r"--keep-dir cannot be written: .*kept.json: no right to write to"),
    ],
)
def test_a_closed_folder_is_found_out_first(engine_dir, answered, tmp_path, monkeypatch, closed, message):
    engine = Path(shutil.copytree(engine_dir, tmp_path / "engine"))
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != closed)
    monkeypatch.setattr("trtllm_memshare.evaluation.session.load_model", refuse)  # before the model is there
    base = ["calibrate", "--engine-dir", str(engine), "--dataset", str(answered), "--max-accuracy-drop", "0.99"]
    with pytest.raises(UserError, match=message):
        main([*base, "--keep-dir", str(tmp_path / "kept")])


@pytest.mark.parametrize("kept", ["", '{"token_ids": [[1, 2', "[1]", '{"token_ids": []}'])
def test_a_damaged_result_of_an_earlier_run_is_named(engine_dir, answered, tmp_path, kept):
    session = Session(engine_dir, answered, 1, "cpu", tmp_path)
    session.generate("full", make_config("off"))
    (path,) = tmp_path.iterdir()
    path.write_text(kept)
    with pytest.raises(UserError, match=rf"{path} is damaged: .* \(delete it, and it is measured again\)"):
        session.generate("full", make_config("off"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_tokens": 10**9}, "line 2: prompt and output must fit max_seq_len 512, got"),
        ({"prompt": None, "input_ids": [4, 10**6]}, r"line 2: input_ids\[1\] must be"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_with_its_line(engine_dir, tmp_path, changes, message):
    path, row = tmp_path / "data.jsonl", {"task_id": 0, "prompt": "Q: 1 + 2 = ?\n", "output_tokens": 8, "answer": "3"}
    path.write_text("".join(json.dumps(line) + "\n" for line in (row, {**row, **changes})))
    with pytest.raises(UserError, match=message):
        Session(engine_dir, path, device="cpu")


def test_answers_are_needed(engine_dir, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"task_id": 0, "prompt": "Q: 1 + 2 = ?\\n", "output_tokens": 8}\n')
    with pytest.raises(UserError, match="calibration needs an answer in every line"):
        calibrate(Session(engine_dir, path, device="cpu"), 0.1)


def test_every_rung_is_a_valid_setting():
    for settings in LADDER.values():
        assert make_config("aligned", **settings).preset == "aligned"
