"""Probes are red when the executor has failed: its own property, ``/health`` of ``memshare serve``, Triton's."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from fakes.asgi import ask
from fakes.counting_runner import CountingRunner
from serving.counting_executor import WAIT, make

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.serving.failures import ExecutorStoppedError
from trtllm_memshare.triton import openai_serve, token_model
from trtllm_memshare.triton.probe import why_not_alive, why_not_ready
from trtllm_memshare.triton.server_process import ServerProcess

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def stop(*_):
    raise SystemExit("broken by the test")


def wait_for(holds) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def exits(monkeypatch):
    """Codes with which the process would have ended."""
    codes: list[int] = []
    for module in (openai_serve, token_model):
        monkeypatch.setattr(module, "_ANSWER_S", 0.01)
    monkeypatch.setattr(openai_serve, "_CHECK_S", 0.01)
    monkeypatch.setattr("os._exit", codes.append)
    return codes


def test_of_the_executor(boundaries):
    runner = CountingRunner()
    with make(boundaries, runner) as executor:
        assert executor.is_alive
        runner.before_step = stop
        with pytest.raises(ExecutorStoppedError):
            executor.submit([5]).result(WAIT)
        assert not executor.is_alive


def test_of_the_executor_whose_step_does_not_end(boundaries):
    runner, reached, go = CountingRunner(), threading.Event(), threading.Event()
    runner.before_step = lambda batch: (reached.set(), go.wait(WAIT))
    with make(boundaries, runner) as executor:
        handle = executor.submit([5])
        assert reached.wait(WAIT)
        executor.max_step_s = 0.0
        assert not executor.is_alive
        executor.max_step_s = 600.0
        assert executor.is_alive
        go.set()
        handle.result(WAIT)


def test_of_memshare_serve(tiny_checkpoint, tmp_path, monkeypatch, exits):
    """The command itself, but for its socket: green, then red, and the process ends for a supervisor to see."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    build_engine(plan_build(BuildOptions(tiny_checkpoint, tmp_path / "engine", build={"max_seq_len": 64})))
    found = []

    def run(server):
        async def use() -> None:
            app = server.config.app
            found.append((await ask(app, "GET", "/health"))[0])
            monkeypatch.setattr(TorchRunner, "step", stop)
            body = json.dumps({"prompt": "Q: 5", "max_tokens": 4}).encode()
            found.append(await ask(app, "POST", "/v1/completions", body))
            found.append((await ask(app, "GET", "/health"))[0])

        asyncio.run(use())
        wait_for(lambda: exits)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        openai_serve.main("memshare serve", ["--engine-dir", str(tmp_path / "engine"), "--kv-cache-blocks", "8"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    before, (status, body), after = found
    assert (before, status, after) == (200, 500, 503)
    assert "the executor stopped: SystemExit: broken by the test" in json.loads(body)["error"]["message"]
    assert exits == [1]


def test_of_triton_s_model_whose_process_ends(boundaries, exits):
    """Triton has no other way to hear of it: a model whose process has ended is not ready."""
    runner, lines = CountingRunner(), []
    with make(boundaries, runner) as executor:
        model = object.__new__(token_model.TokenModel)
        model._executor, model._is_ending = executor, False
        model.pb = SimpleNamespace(Logger=SimpleNamespace(log_error=lines.append))
        model.look()
        runner.before_step = stop
        with pytest.raises(ExecutorStoppedError):
            executor.submit([5]).result(WAIT)
        assert not lines
        model.look()
        model.look()
    wait_for(lambda: exits)
    assert exits == [1]
    assert lines == ["the executor has failed, or its step does not end: its process ends"]


def _became_ready(url: str) -> bool:
    server = object.__new__(ServerProcess)
    server._plan, server.process = SimpleNamespace(ready_url=f"{url}/v2/health/ready"), SimpleNamespace(pid=-1)
    server.ready_at = None
    return server.became_ready()


@pytest.mark.parametrize("proxy", [None, "http://127.0.0.1:9"])
def test_of_the_command_for_containers(monkeypatch, proxy):
    """A proxy for what lies outside is not asked for this machine's own server."""
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib reads the variable once
    if proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.delenv("no_proxy", raising=False)
    answers = {"/v2/health/ready": "", "/v2/health/live": "", "/metrics": 'memshare_seconds_since_step{a="b"} 0.5\n'}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in answers else 400)
            self.end_headers()
            self.wfile.write(answers.get(self.path, "").encode())

        def do_POST(self):
            answers["/index"] = answers.get("/index", json.dumps([{"name": "ensemble", "state": "READY"}]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers["/index"].encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert why_not_ready(url, WAIT) == ""
            assert _became_ready(url)
            assert why_not_alive(url, f"{url}/metrics", 120.0, WAIT) == ""
            answers["/metrics"] = "memshare_seconds_since_step 130.2\n"
            assert why_not_alive(url, f"{url}/metrics", 120.0, WAIT) == "the executor is in one step for 130 s"
            answers["/index"] = json.dumps([{"name": "ensemble", "state": "READY"}, {"name": "tensorrt_llm"}])
            assert why_not_ready(url, WAIT) == "models are not ready: tensorrt_llm"
            del answers["/v2/health/ready"]
            assert why_not_ready(url, WAIT).startswith("the server is not ready: HTTP Error 400")
        finally:
            server.shutdown()
    assert why_not_ready(url, WAIT).startswith("the server is not ready: ")
    assert why_not_alive(url, f"{url}/metrics", 120.0, WAIT).startswith("the server does not answer: ")
