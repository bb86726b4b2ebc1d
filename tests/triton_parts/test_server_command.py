"""Which server is found, and with which options it starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton import server as triton_server
from trtllm_memshare.triton.server import Ports, Server, find_server, server_command, server_environment


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "repository" / "model").mkdir(parents=True)
    (tmp_path / "repository" / "model" / "config.pbtxt").touch()
    return tmp_path / "repository"


def test_a_folder_without_a_model_is_refused(tmp_path, repository):
    server, runtime = Server(Path("tritonserver"), (), (), ""), tmp_path / "runtime"

    def start(folder):
        return server_command(server, folder, Ports(), "127.0.0.1", runtime, 90, [])

    engine = tmp_path / "engine"
    (engine / "model").mkdir(parents=True)
    (engine / "config.json").touch()
    for folder in (engine, engine / "model", tmp_path):
        with pytest.raises(UserError, match=f"must hold at least one model, got {folder} with none"):
            start(folder)
    assert start(repository)[1].endswith("/repository")
    (engine / "model" / "1").mkdir()  # Triton completes the configuration of some models itself
    assert start(engine)


def test_the_server_listens_on_loopback_unless_told_otherwise(tmp_path, repository):
    executable = tmp_path / "tritonserver"
    executable.touch()
    server = find_server(executable)
    runtime = tmp_path / "runtime"
    command = server_command(server, repository, Ports(1, 2, 3), "127.0.0.1", runtime, 90, ["--log-verbose=1"])
    assert [a for a in command if "address" in a] == [f"--{n}-address=127.0.0.1" for n in ("http", "grpc", "metrics")]
    assert command[-1] == "--log-verbose=1"
    assert "--exit-timeout-secs=90" in command
    assert not any("restricted" in a or "control-mode" in a for a in command)  # no key, and nothing to lock
    environment = server_environment(server, repository, runtime)
    assert environment["PATH"].split(":")[0] == str(Path(os.sys.executable).parent)
    with pytest.raises(UserError, match=r"no model repository at .*/nothing"):
        server_command(server, tmp_path / "nothing", Ports(), "127.0.0.1", runtime, 90, [])
    with pytest.raises(UserError, match="--model-control-mode belongs to the launcher"):
        server_command(server, repository, Ports(), "127.0.0.1", runtime, 90, ["--model-control-mode=explicit"])


def test_a_missing_server_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--tritonserver must name the server's executable, got .*/nothing"):
        find_server(tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(triton_server, "find_spec", lambda name: None)
    monkeypatch.setattr(triton_server, "_if_file", lambda path: None)
    with pytest.raises(UserError, match="no tritonserver on PATH and no nvidia-pytriton wheel"):
        find_server()
