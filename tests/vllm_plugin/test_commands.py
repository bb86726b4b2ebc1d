"""``vllm serve`` and ``vllm bench`` behind our options; the program itself is a stand-in that prints its arguments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from run_program import run_program
from safetensors.torch import save_file

import trtllm_memshare
from trtllm_memshare.engine import null_page_build
from trtllm_memshare.engine.load import load_decoder
from trtllm_memshare.engine.null_page import NullPageRefused, NullPageSet
from trtllm_memshare.engine.null_page_build import calibrate_checkpoint
from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm import commands
from trtllm_memshare.vllm.commands import engine_arguments, main
from trtllm_memshare.vllm.settings import CONFIG_VARIABLE

MODEL = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"


def test_vllms_arguments_get_classes_and_settings(tmp_path):
    (tmp_path / "m.json").write_text('{"min_kept": 0.75}')
    line = engine_arguments(
        ["serve", "model", "--memshare-config", str(tmp_path / "m.json"), f"--null-pages={tmp_path}",
         "--additional-config", '{"x": 1}', "--port", "1"]
    )  # fmt: skip
    assert line[:4] == ["serve", "model", "--port", "1"]
    options = dict(zip(line[4::2], line[5::2], strict=True))
    assert options["--scheduler-cls"] == "trtllm_memshare.vllm.scheduler.MemShareScheduler"
    assert options["--worker-cls"] == "trtllm_memshare.vllm.worker.MemShareWorker"
    assert json.loads(options["--additional-config"]) == {
        "x": 1, "memshare": {"min_kept": 0.75, "null_pages": str(tmp_path)}
    }  # fmt: skip


def test_no_option_is_needed():
    line = engine_arguments(["serve", "model"])
    assert line[:2] == ["serve", "model"]
    assert json.loads(line[-1]) == {"memshare": {}}


def test_a_model_without_a_null_page_hears_of_the_other_way(tmp_path, monkeypatch):
    def refuse(*_):
        raise NullPageRefused("no null page is found for layer 0", "do this")

    monkeypatch.setattr(null_page_build, "calibrate_checkpoint", refuse)
    with pytest.raises(UserError, match=r"layer 0 \(vllm serve without --null-pages serves it\)"):
        main("vllm", ["calibrate", "m", "--max-model-len", "64", "--output", str(tmp_path)])


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["serve", "--help"], ["bench", "throughput", "--help"]])
def test_help_says_what_comes_out_without_vllm(arguments, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    main("vllm", arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("usage: memshare vllm {serve,bench,calibrate} ...")
    assert "--null-pages" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "m", "--null-entries", "read"], "read needs null_pages, .* got none .*vllm calibrate MODEL"),
        (["serve", "m", "--null-entries", "drop"], "the command line.*null_entries"),
        (["serve", "m", "--null-pages", "x", "--worker-cls=y"], "--worker-cls is set by MemShare"),
        (["serve", "m", "--null-pages", "x", "--additional-config", '{"memshare": {}}'], "has memshare already"),
        (["serve", "m", "--null-pages"], "--null-pages needs a value"),
        (["serve", "m", "--null-pages", "--max-model-len", "512"], "--null-pages needs a value"),
        (["serve", "m", "--null-entries", "skip", "--scheduler_cls", "y"], "--scheduler-cls is set by MemShare"),
        (["serve", "m", "--null-entries", "skip", "--scheduler-c", "y"], "--scheduler-cls is set by MemShare"),
        (
            ["serve", "m", "--null-entries", "skip", "--additional_config.x", "1"],
            "one JSON object .*got --additional-con",
        ),
        (["serve", "m", "--memshare-config", "/none"], "the file of --memshare-config"),
    ],
)
def test_conflicts_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        engine_arguments(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheduler_cls: mine.Scheduler", "sets scheduler_cls, which is set by MemShare"),
        ("port: 1\nadditional-config: {x: 1}", r"sets additional-config, .*\(give it as --additional-config JSON\)"),
    ],
)
def test_what_vllms_file_of_options_sets_is_not_replaced_without_a_word(tmp_path, text, message):
    path = tmp_path / "vllm.yaml"
    path.write_text("port: 1\n")
    line = ["serve", "m", "--null-entries=skip", "--config", str(path)]
    assert engine_arguments(line)[:4] == ["serve", "m", "--config", str(path)]
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        engine_arguments(line)


def test_an_option_with_underscores_is_the_same_option():
    line = engine_arguments(["serve", "m", "--null_entries=skip", "--additional_config", '{"x": 1}'])
    assert json.loads(line[-1]) == {"x": 1, "memshare": {"null_entries": "skip"}}
    assert line[:2] == ["serve", "m"]


def test_the_beginning_of_an_option_is_the_same_option():
    line = engine_arguments(["serve", "m", "--null-entries=skip", "--additional-conf", '{"x": 1}'])
    assert json.loads(line[-1]) == {"x": 1, "memshare": {"null_entries": "skip"}}


def save_null_pages(folder, num_positions, calibrated_on=None):
    bands = torch.tensor([0, num_positions], dtype=torch.int32)
    save_file({"keys": torch.zeros(1, 1, 1, 2), "bands": bands}, folder / "null_pages.safetensors", calibrated_on)


def test_null_pages_that_cannot_serve_are_refused_before_vllm_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_program", lambda: pytest.fail("vLLM is about to start"))
    with pytest.raises(UserError, match=r"must name a folder with null_pages.safetensors, got /none \(calibrate"):
        main("vllm", ["serve", "m", "--null-pages", "/none"])
    with pytest.raises(UserError, match=r"must name a folder with null_pages.safetensors, got .*calibrate the model"):
        main("vllm", ["bench", "latency", "--null-pages", str(tmp_path)])
    save_null_pages(tmp_path, 512)
    (tmp_path / "m.json").write_text(json.dumps({"null_pages": str(tmp_path)}))
    with pytest.raises(UserError, match="covers positions below 512, max_model_len is 513"):
        main("vllm", ["serve", "m", "--memshare-config", str(tmp_path / "m.json"), "--max_model_len=513"])


@pytest.mark.parametrize("line", [["serve", str(MODEL)], ["bench", "latency", "--model", str(MODEL)]])
def test_null_pages_of_another_model_are_refused_before_vllm_starts(tmp_path, monkeypatch, line):
    monkeypatch.setattr(commands, "_program", lambda: pytest.fail("vLLM is about to start"))
    save_null_pages(tmp_path, 512, {"weights": "0" * 32})
    with pytest.raises(UserError, match="must be calibrated on the weights of"):
        main("vllm", [*line, "--null-pages", str(tmp_path)])


def test_the_variable_names_a_settings_file_too(tmp_path, monkeypatch):
    (tmp_path / "m.json").write_text('{"min_kept": 0.9, "null_entries": "skip"}')
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "m.json"))
    assert json.loads(engine_arguments(["serve", "m"])[-1])["memshare"]["min_kept"] == 0.9
    (tmp_path / "n.json").write_text('{"min_kept": 0.7, "null_entries": "skip"}')
    line = engine_arguments(["serve", "m", "--memshare-config", str(tmp_path / "n.json")])
    assert json.loads(line[-1])["memshare"]["min_kept"] == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-model-len", "64", "--kv-cache-dtype", "blah"], "element type must be one of auto, .* got blah"),
        (["--max-model-len", "64", "--dtype", "save"], "got save"),  # a name that torch has
        (["--max-model-len", "0"], "must be from 1 to 16777216, got 0"),
        (["--max-model-len", "-64"], "must be from 1 to 16777216, got -64"),
    ],
)
def test_null_pages_of_no_type_or_no_positions_are_refused_before_the_model_is_read(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        main("vllm", ["calibrate", "no-such-model", "--output", str(tmp_path), *options])


def test_null_pages_of_auto_have_the_checkpoints_type(monkeypatch):
    model = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"
    types = []
    found = NullPageSet(torch.ones(1, 4, 2, 32), np.array([0, 64], np.int32), torch.zeros(1, 4, 4))
    monkeypatch.setattr(
        null_page_build, "calibrate_null_pages", lambda *arguments: types.append(arguments[-1]) or found
    )
    for name in ("auto", "bfloat16"):
        calibrate_checkpoint(model, 64, name)
    assert types == [load_decoder(model)[0].dtype, torch.bfloat16]
    assert types[0] != torch.bfloat16


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(UserError, match=r"needs serve, bench or calibrate, got server .did you mean serve"):
        main("vllm", ["server"])


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        (["serve", "m"], True),
        (["bench", "startup"], True),
        (["bench", "serve"], False),
        (["bench", "sweep", "startup"], False),
    ],
)
def test_the_program_gets_the_line_and_a_folder_for_metrics(tmp_path, monkeypatch, command, ours):
    (tmp_path / "m.json").write_text('{"min_kept": 0.9}')
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "m.json"))
    save_null_pages(tmp_path, 64)
    text = '#!/bin/sh\necho "$@"\necho "metrics $PROMETHEUS_MULTIPROC_DIR"\necho "file $VLLM_MEMSHARE_CONFIG"\nexit 3\n'
    ran = run_program(tmp_path, "vllm", text, "vllm", *command, *(["--null-pages", str(tmp_path)] if ours else []))
    out, problem = ran.communicate()
    assert ran.returncode == 3, problem
    assert ("--scheduler-cls" in out) == ("min_kept" in out) == ours
    assert ("file /" in out) != ours  # a sweep's servers read it
    assert ("--middleware" in out) == (command[0] == "serve")
    assert ("metrics /" in out) == (command[0] == "serve")
