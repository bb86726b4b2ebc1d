"""LLM options of the wrapped commands: what is laid over the user's own, by route, and where the file is afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_program import ROOT, run_program
from trtllm_pytorch.fake_llm_args import make_llm_args

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.compression_config import allow_algorithm
from trtllm_memshare.trtllm.pytorch.llm_options import merge_options
from trtllm_memshare.trtllm.pytorch.wrap import main

COMMANDS = {"serve": ["MODEL"], "bench": ["-m", "MODEL", "throughput", "--eos_id", "2"]}
OURS = {
    "kv_cache_config": {"use_kv_cache_manager_v2": True, "enable_block_reuse": False},
    "kv_cache_compression_config": {"algorithm": "memshare"},
}
COPY = """#!/bin/sh
while [ "$1" != --extra_llm_api_options ]; do shift; done
cp "$2" {folder}/seen.yaml
echo "$2" > {folder}/where
[ -z "$TRTLLM_MEMSHARE_STATS_FILE" ] || echo '{{}}' > "$TRTLLM_MEMSHARE_STATS_FILE"
"""


@pytest.fixture(params=COMMANDS)
def wrapped(request, tmp_path, monkeypatch):
    """Runs a command with settings and, unless None, a file of LLM options; what TensorRT-LLM's program reads."""
    program = tmp_path / f"trtllm-{request.param}"
    program.write_text(COPY.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    def run(settings, options=None, name="--config"):
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        arguments = [*COMMANDS[request.param], "--memshare-config", str(tmp_path / "settings.json")]
        if options is not None:
            (tmp_path / "user.yaml").write_text(yaml.safe_dump(options))
            arguments += [name, str(tmp_path / "user.yaml")]
        with pytest.raises(SystemExit) as done:
            main(request.param, arguments)
        assert done.value.code == 0
        assert not Path((tmp_path / "where").read_text().strip()).exists()
        if options is not None:
            assert yaml.safe_load((tmp_path / "user.yaml").read_text()) == options
        return yaml.safe_load((tmp_path / "seen.yaml").read_text())

    return run


FRAMEWORK = {"preset": "pressure", "route": "framework"}


def test_route_framework_gets_its_options_without_a_file(wrapped, capfd):
    seen = wrapped(FRAMEWORK)
    assert {key: seen[key] for key in OURS} == OURS
    added = [line for line in capfd.readouterr().out.splitlines() if "added to the LLM options" in line]
    assert len(added) == 1
    assert "kv_cache_config.use_kv_cache_manager_v2=true" in added[0]
    assert "kv_cache_compression_config.algorithm=memshare" in added[0]


@pytest.mark.parametrize("name", ["--config", "--extra_llm_api_options"])
def test_options_of_the_users_file_are_kept_beside_them(wrapped, name):
    seen = wrapped(FRAMEWORK, {"max_batch_size": 4, "kv_cache_config": {"dtype": "fp8"}}, name)
    assert seen["max_batch_size"] == 4
    assert seen["kv_cache_config"] == {"dtype": "fp8", **OURS["kv_cache_config"]}
    assert seen["kv_cache_compression_config"] == OURS["kv_cache_compression_config"]


def test_equal_options_of_the_user_are_not_said_to_be_added(wrapped, capfd):
    seen = wrapped(FRAMEWORK, OURS)
    assert {key: seen[key] for key in OURS} == OURS
    added = next(line for line in capfd.readouterr().out.splitlines() if "added to the LLM options" in line)
    assert "kv_cache" not in added
    wrapped(FRAMEWORK, seen)
    assert "memshare: added to the LLM options: nothing\n" in capfd.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kv_cache_config": {"use_kv_cache_manager_v2": False}},
            r"kv_cache_config\.use_kv_cache_manager_v2 must be true for route framework, got false \(remove it from",
        ),
        ({"kv_cache_config": {"use_kv_cache_manager_v2": "auto"}}, "use_kv_cache_manager_v2 must be true .*, got auto"),
        ({"kv_cache_config": {"enable_block_reuse": True}}, "enable_block_reuse must be false for route framework"),
        (
            {"kv_cache_compression_config": {"algorithm": "triattention"}},
            "algorithm must be memshare for route framework, got triattention .*, or take route overlay",
        ),
        ({"kv_cache_compression_config": "memshare"}, "kv_cache_compression_config must be a mapping of options, got"),
        ({"kv_cache_config": {"host_cache_size": 0}}, "KVCacheManagerV2 without a host tier"),
        ({"attn_backend": "FLASHINFER"}, "attn_backend must be TRTLLM to share, got FLASHINFER"),
    ],
)
def test_options_that_contradict_route_framework_are_refused(tmp_path, monkeypatch, command, options, message):
    (tmp_path / "settings.json").write_text(json.dumps(FRAMEWORK))
    (tmp_path / "user.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.setenv("TRTLLM_MEMSHARE_CONFIG", str(tmp_path / "settings.json"))
    with pytest.raises(UserError, match=message):
        main(command, [*COMMANDS[command], "--config", str(tmp_path / "user.yaml")])


@pytest.mark.parametrize("settings", [{"preset": "aligned"}, {"preset": "pressure", "null_pages": "/null"}])
def test_on_the_overlay_both_options_are_the_users(wrapped, settings):
    seen = wrapped(settings)
    assert seen["kv_cache_config"] == {"enable_block_reuse": False}
    assert "kv_cache_compression_config" not in seen
    own = {"use_kv_cache_manager_v2": False, "enable_block_reuse": True}
    assert wrapped(settings, {"kv_cache_config": own})["kv_cache_config"] == own


def test_tensorrt_llms_arguments_take_what_is_added():
    module = make_llm_args("refuses others")
    assert allow_algorithm(module)
    added = merge_options({}, "framework")["kv_cache_compression_config"]
    taken = module.TorchLlmArgs(model="m", kv_cache_compression_config=added).kv_cache_compression_config
    assert (taken.algorithm, taken.changes_physical_kv_length) == ("memshare", True)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_file_goes_when_the_command_is_stopped(tmp_path, command, number):
    (tmp_path / "settings.json").write_text(json.dumps(FRAMEWORK))
    script = COPY.format(folder=tmp_path) + "echo ready >&2\nexec sleep 60\n"
    variables = {"TRTLLM_MEMSHARE_CONFIG": str(tmp_path / "settings.json")}
    ran = run_program(tmp_path, f"trtllm-{command}", script, command, *COMMANDS[command], **variables)
    while (line := ran.stderr.readline()) != "ready\n":
        assert line, ran.stdout.read()
    options_file = Path((tmp_path / "where").read_text().strip())
    assert options_file.is_file()
    ran.send_signal(number)
    ran.communicate(timeout=30)
    assert ran.returncode == 128 + number
    assert not options_file.parent.exists()


def test_a_signal_before_the_program_runs_leaves_no_file(tmp_path):
    code = """
import os, signal, tempfile
from trtllm_memshare.child_process import exit_on_sigterm
exit_on_sigterm()
with tempfile.TemporaryDirectory(dir=os.environ["FOLDER"]):
    os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {"PYTHONPATH": str(ROOT), "FOLDER": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_signal_while_the_program_is_being_started_reaches_it(tmp_path):
    code = """
import os, signal, subprocess, sys
from trtllm_memshare import child_process

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        super().__init__(*arguments, **keywords)

subprocess.Popen = Popen
sys.exit(child_process.run_to_end(["sleep", "60"], os.environ))
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/bin:/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=30, check=False)
    assert done.returncode == 128 + signal.SIGTERM


def test_options_are_laid_over_the_users_and_conflicts_are_named():
    merged = merge_options({"max_batch_size": 8, "kv_cache_config": {"enable_block_reuse": True, "dtype": "fp8"}})
    assert merged["attn_backend"] == "TRTLLM"
    assert merged["kv_cache_config"] == {"enable_block_reuse": True, "dtype": "fp8"}
    assert merged["scheduler_config"] == {"capacity_scheduler_policy": "MAX_UTILIZATION"}
    assert merged["max_batch_size"] == 8
    assert merge_options({"kv_cache_config": None})["kv_cache_config"] == {"enable_block_reuse": False}
    v2 = {"use_kv_cache_manager_v2": True}
    assert merge_options({"kv_cache_config": {**v2, "host_cache_size": 1 << 30}})
    with pytest.raises(UserError, match="KVCacheManagerV2 without a host tier"):
        merge_options({"kv_cache_config": {**v2, "host_cache_size": 0}})
    with pytest.raises(UserError, match="offload to the host with KVCacheManager"):
        merge_options({"kv_cache_config": {"use_kv_cache_manager_v2": False, "host_cache_size": 1}})
    with pytest.raises(UserError, match="kv_cache_config must be a mapping of options, got 'fp8'"):
        merge_options({"kv_cache_config": "fp8"})
    for backend in ("_autodeploy", "tensorrt"):
        with pytest.raises(UserError, match=f"backend must be pytorch to share, got {backend}"):
            merge_options({"backend": backend})
    with pytest.raises(UserError, match="attn_backend must be TRTLLM to share, got FLASHINFER"):
        merge_options({"attn_backend": "FLASHINFER"})
    with pytest.raises(UserError, match=r"scheduler_config\.capacity_scheduler_policy must be MAX_UTILIZATION"):
        merge_options({"scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"}})
