"""``memshare serve`` and ``bench`` around TensorRT-LLM's programs; these are stand-ins here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_program import run_program

import trtllm_memshare
from trtllm_memshare.__main__ import main as memshare
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.wrap import main

ROOT = Path(trtllm_memshare.__file__).parents[1]


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("reports", [True, False])
def test_totals_of_a_benchmark_are_kept_where_the_user_wants_them(tmp_path, is_set, reports):
    """And what an earlier run left there is not taken for this one's."""
    mine, report = tmp_path / "mine.json", tmp_path / "report.json"
    mine.write_text('{"iterations": 1}')
    report.write_text('{"performance": 2}')
    text = "#!/bin/sh\n" + 'echo \'{"iterations": 7}\' > "$TRTLLM_MEMSHARE_STATS_FILE"\n' * reports
    options = ["-m", "M", "throughput", "--eos_id", "2", "--report_json", str(report)]
    variables = {"TRTLLM_MEMSHARE_STATS_FILE": str(mine)} if is_set else {}
    ran = run_program(tmp_path, "trtllm-bench", text, "bench", *options, **variables)
    _, problem = ran.communicate()
    assert (ran.returncode == 0) == reports, problem
    assert ("no worker reported sharing" in problem) == (not reports)
    assert json.loads(report.read_text()).get("memshare") == ({"iterations": 7} if reports else None)
    if not is_set:
        assert json.loads(mine.read_text()) == {"iterations": 1}
    elif reports:
        assert json.loads(mine.read_text()) == {"iterations": 7}
    else:
        assert not mine.exists()


def test_a_folder_in_place_of_the_totals_is_named(tmp_path, monkeypatch):
    program = tmp_path / "trtllm-bench"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRTLLM_MEMSHARE_STATS_FILE", str(tmp_path))
    with pytest.raises(UserError, match="STATS_FILE must be a file that can be replaced, got /"):
        main("bench", ["-m", "M", "throughput", "--eos_id", "2"])


@pytest.mark.parametrize("command", ["serve", "bench"])
@pytest.mark.parametrize("option", [["--backend", "tensorrt"], ["--backend=_autodeploy"]])
def test_another_backend_is_refused_by_name(monkeypatch, command, option):
    monkeypatch.setenv("PATH", "")
    name = option[-1].partition("=")[2] or option[-1]
    with pytest.raises(UserError, match=f"--backend must be pytorch to share, got {name}"):
        main(command, ["M", *option])
    with pytest.raises(UserError, match="not on PATH"):
        main(command, ["M", "--backend", "pytorch"])


def test_serving_apart_is_refused_before_its_own_file_is_read(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for subcommand in ("disaggregated", "disaggregated_mpi_worker"):
        with pytest.raises(UserError, match=f"excludes disaggregated serving, got serve {subcommand}"):
            main("serve", [subcommand, "-c", "conf.yaml"])


READ = '#!/bin/sh\ncp "$TRTLLM_MEMSHARE_CONFIG" {folder}/seen.json\necho "$TRTLLM_MEMSHARE_CONFIG" > {folder}/where\n'


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Runs ``memshare serve MODEL`` with more options; the settings that TensorRT-LLM's workers would read."""
    program = tmp_path / "trtllm-serve"
    program.write_text(READ.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    def run(*options):
        with pytest.raises(SystemExit) as done:
            main("serve", ["MODEL", *options])
        assert done.value.code == 0
        assert not Path((tmp_path / "where").read_text().strip()).exists()
        return json.loads((tmp_path / "seen.json").read_text())

    return run


def test_null_pages_are_all_that_pressure_needs(serve, null_pages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(null_pages).parent)
    assert serve("--null-pages", Path(null_pages).name) == {"preset": "pressure", "null_pages": str(null_pages)}
    assert "memshare: preset pressure, null_entries read, min_kept 0.5\n" in capsys.readouterr().out
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"min_kept": 0.75, "null_pages": "of another model"}))
    seen = serve(f"--null-pages={null_pages}", "--memshare-config", str(settings))
    assert seen == {"preset": "pressure", "min_kept": 0.75, "null_pages": str(null_pages)}
    assert json.loads(settings.read_text()) == {"min_kept": 0.75, "null_pages": "of another model"}


def test_skipping_is_asked_for_by_one_option(serve, tmp_path, null_pages, capsys):
    assert serve("--null-entries", "skip") == {"preset": "pressure", "null_entries": "skip"}
    assert "memshare: preset pressure, null_entries skip, min_kept 0.5\n" in capsys.readouterr().out
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"min_kept": 0.75}))
    seen = serve("--null-entries=skip", "--memshare-config", str(settings))
    assert seen == {"preset": "pressure", "min_kept": 0.75, "null_entries": "skip"}
    for options, message in (
        (
            ["--null-entries", "skip", "--null-pages", str(null_pages)],
            r"reads no null pages, got null_pages .*keep one",
        ),
        (["--null-entries", "read"], "preset pressure needs null_pages"),
        (["--null-entries", "skp"], r"^the command line: null_entries input should be .read. or .skip., got"),
        (["--null-entries"], "--null-entries needs a value"),
    ):
        with pytest.raises(UserError, match=message):
            main("serve", ["M", *options])


@pytest.mark.parametrize("command", ["serve", "bench"])
def test_the_help_of_our_own_commands_names_what_the_wrapped_ones_take(command, capsys):
    with pytest.raises(SystemExit):
        memshare([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--null-pages FOLDER" in printed
    assert "--null-entries skip" in printed
    assert "--memshare-config FILE" in printed


@pytest.mark.parametrize(
    ("values", "folder", "message"),
    [
        ({}, "nowhere", r"folder with null_pages.safetensors, got 'nowhere' \(make it with memshare null-pages"),
        ({}, "", "folder with null_pages.safetensors, got ''"),
        ({"preset": "aligned"}, None, r"read by preset pressure, got 'aligned' in the settings \(keep one\)"),
        ({"preset": 5}, None, "read by preset pressure, got 5 in the settings"),
        ({"route": "framework"}, None, "read by route overlay, got 'framework' in the settings"),
        ({"min_kep": 0.5}, None, r"^{settings} has an unknown key min_kep"),
    ],
)
def test_null_pages_that_nothing_would_read_are_refused(values, folder, message, null_pages, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message.format(settings=settings)):
        main(
            "serve",
            ["M", "--null-pages", folder or str(null_pages) * (folder is None), "--memshare-config", str(settings)],
        )
