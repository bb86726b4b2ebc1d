"""Options of ``memshare serve --engine-dir`` that cannot hold are refused in one sentence, before a port is opened."""

from __future__ import annotations

import socket

import pytest

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.errors import UserError
from trtllm_memshare.triton import openai_serve

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "bytes").write_bytes(b"\xff\xfe")
    (folder / "syntax").write_text("{% for m in messages %}{{ m.content }}")
    (folder / "refuses").write_text("{{ raise_exception('roles must alternate') }}")
    build_engine(plan_build(BuildOptions(tiny_checkpoint, folder / "engine", build={"max_seq_len": 64})))
    return folder / "engine"


def serve(engine_dir, *options: object) -> None:
    openai_serve.main("memshare serve", ["--engine-dir", str(engine_dir), "--port", "0", *map(str, options)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", 70_000], "--port must be between 0 and 65535, got 70000"),
        (["--port", -1], "--port must be between 0 and 65535, got -1"),
        (["--port", 10**30], "--port must be between 0 and 65535, got 1000000000000000000000000000000"),
        (["--host", ""], r"--host must be an address, got none .127.0.0.1, or 0.0.0.0"),
        (["--host", "a\0b"], r"--host must be an address or a host's name, got 'a.x00b' .127.0.0.1, or 0.0.0.0"),
        (["--host", "é" * 70], r"--host must be an address or a host's name, got 'é{70}'"),
        (["--host", "\ud800"], r"--host must be an address or a host's name, got '.+ud800'"),
        (["--host", "256.1.1.1"], r"--port 0 on 256.1.1.1 cannot be used: "),
        (["--drain-seconds", -1], "--drain-seconds must be between 0 and 86400, got -1"),
        (["--kv-cache-blocks", 0], "--kv-cache-blocks must hold one request of max_seq_len 64: 4 blocks"),
        (["--max-queue-size", -1], "--max-queue-size must not be negative, got -1"),
        (["--chat-template", "bytes"], "--chat-template is not UTF-8 text"),
        (["--chat-template", "syntax"], r"--chat-template .*syntax is no template: Unexpected end of template"),
        (["--chat-template", "nowhere"], "--chat-template cannot be read: .*nowhere: No such file"),
    ],
)
def test_options_that_cannot_hold(engine_dir, monkeypatch, options, message):
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: pytest.fail("it serves"))
    monkeypatch.chdir(engine_dir.parent)
    with pytest.raises(UserError, match=message) as caught:
        serve(engine_dir, *options)
    assert len(str(caught.value)) < 500


def test_a_port_that_is_taken_is_named_before_the_engine_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} on 127.0.0.1 cannot be used: Address already in use"):
            serve(tmp_path / "nowhere", "--port", port)


@pytest.mark.parametrize("key", ["", " \n"])
def test_an_empty_key_does_not_serve_everybody(engine_dir, monkeypatch, key):
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: pytest.fail("it serves"))
    monkeypatch.setenv("MEMSHARE_API_KEY", key)
    with pytest.raises(UserError, match=r"MEMSHARE_API_KEY must hold a key, got an empty one \(set it, or unset it"):
        serve(engine_dir)


def test_a_template_that_refuses_one_conversation_is_served(engine_dir, monkeypatch):
    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: served.append(self.config.port))
    monkeypatch.setattr(openai_serve, "_end_when", lambda has_failed: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    serve(engine_dir, "--chat-template", engine_dir.parent / "refuses")
    assert served == [0]
