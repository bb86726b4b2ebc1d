"""Killed processes and shutdown on servers of their own: too long for every run, see ``make nightly``."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

import psutil
import pytest
from nightly import only_nightly
from triton_server.conftest import ROOT, Triton, start_triton, stop_triton
from triton_server.test_clients import tensors

QUESTION = "Q: 51 + 142 + 217 - 254 = ?\n"
LONG = "Q: 980 + 9 - 640 - 337 - 11 - 1 = ?\n"

pytestmark = only_nightly  # starts several servers


def how_it_ended(server: Triton, **inputs) -> str:
    """``answered``, the error that the client was told, or ``closed`` if its connection ended first."""
    try:
        last = server.stream(120, **inputs)[-1]
        return last.get("error") or ("answered" if last["finish_reason"] else "closed")
    except urllib.error.HTTPError as error:
        return json.loads(error.read().decode().removeprefix("data:"))["error"]
    except (OSError, HTTPException):
        return "closed"


def test_killed_processes_end_their_requests_and_the_server_comes_back(served_engine, tmp_path):
    server = start_triton(tmp_path, served_engine, launch=("--spare",), kv_cache_blocks=500)
    try:
        for kill in ("tensorrt_llm", "ensemble", "tritonserver"):
            with ThreadPoolExecutor(8) as clients:
                calls = [
                    clients.submit(how_it_ended, server, text_input=LONG, max_tokens=1500, end_id=0) for _ in range(8)
                ]
                server.wait_until(lambda: server.used_blocks() > 0)
                victim = server.server_process() if kill == "tritonserver" else server.model_process(kill)
                victim.kill()
                server.wait_until(lambda: not server.is_ready(), 20)  # red while nothing serves
                ends = {call.result() for call in calls}
            told = "the model tensorrt_llm went away while it worked on this request (send it again)"
            assert ends <= {"closed", told}, ends
            server.wait_until(server.is_ready, 120)
            assert server.generate(text_input=QUESTION, max_tokens=5)["text_output"].startswith("<think>")
        restarts = [v for k, v in server.metrics().items() if k.startswith("memshare_server_restarts")]
        assert restarts == [3.0]  # one crash, one start
        processes = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        server.wait_until(lambda: not any(_runs(p) for p in processes), 10)
    finally:
        if server.process.poll() is None:
            stop_triton(server)


@pytest.mark.parametrize("model", ["tensorrt_llm", "ensemble"])
def test_a_process_that_stands_still_is_noticed_and_replaced(served_engine, tmp_path, model):
    server = start_triton(tmp_path, served_engine, launch=("--max-stall=5",), kv_cache_blocks=500)
    try:
        with ThreadPoolExecutor(1) as clients:
            call = clients.submit(how_it_ended, server, text_input=LONG, max_tokens=1500, end_id=0)
            server.wait_until(lambda: server.used_blocks() > 0)
            server.model_process(model).suspend()
            server.wait_until(lambda: not server.is_ready(), 20)
            assert call.result() == "closed"
        server.wait_until(server.is_ready, 120)
        assert server.generate(text_input=QUESTION, max_tokens=5)["text_output"].startswith("<think>")
        assert f"{model} gave no sign of life for 5 s: the server ends" in server.log.read_text()
    finally:
        stop_triton(server)


BREAKING = """
from pathlib import Path

from trtllm_memshare.runners.torch.runner import TorchRunner


def step(self, inputs, go=TorchRunner.step):
    if Path({flag!r}).exists():
        raise SystemExit("broken by the test")
    return go(self, inputs)


TorchRunner.step = step
"""


def test_a_failed_executor_is_not_ready_and_comes_back(served_engine, tmp_path):
    flag = tmp_path / "broken"

    def edit(repository):
        with (repository / "tensorrt_llm" / "1" / "model.py").open("a") as file:
            file.write(BREAKING.format(flag=str(flag)))

    server = start_triton(tmp_path, served_engine, edit=edit, kv_cache_blocks=500)
    try:
        flag.touch()
        assert "the executor stopped: SystemExit: broken by the test" in how_it_ended(
            server, text_input=LONG, max_tokens=1500
        )
        server.wait_until(lambda: not server.is_ready(), 20)
        flag.unlink()
        server.wait_until(server.is_ready, 120)
        assert server.generate(text_input=QUESTION, max_tokens=5)["text_output"].startswith("<think>")
        assert "the executor has failed" in server.log.read_text()
    finally:
        stop_triton(server)


def test_shutdown_under_load_drains_and_a_full_queue_is_named(served_engine, tmp_path):
    grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    server = start_triton(tmp_path, served_engine, kv_cache_blocks=500, max_queue_size=0)
    with ThreadPoolExecutor(80) as clients:
        calls = [clients.submit(how_it_ended, server, text_input=QUESTION, max_tokens=400) for _ in range(80)]
        server.wait_until(lambda: any(call.done() for call in calls))  # the first to end was refused
        errors, inputs = queue.Queue(), tensors(grpc, text_input=[[QUESTION]], max_tokens=[[5]])
        with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
            client.start_stream(lambda result, error: errors.put(error), headers={"triton_grpc_error": "true"})
            client.async_stream_infer("ensemble", inputs)
            assert errors.get(timeout=60).status() == "StatusCode.UNAVAILABLE"
        server.wait_until(lambda: server.used_blocks() > 100)
        time.sleep(0.5)
        server.process.terminate()
        ends = [call.result() for call in calls]
    assert server.process.wait(90) == 0, server.log.read_text(errors="replace")[-3000:]
    refused = [e for e in ends if e != "answered"]
    assert refused
    assert all("the queue is full: 64 requests are in the system" in e for e in refused)


def test_the_token_model_without_decoupled_answers_plain_infer(served_engine, tmp_path):
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    server = start_triton(tmp_path, served_engine, kv_cache_blocks=500, decoupled=False)
    try:
        with http.InferenceServerClient(f"127.0.0.1:{server.http}") as client:
            inputs = {
                "input_ids": [[5, 6, 7], [5, 6, 0]],
                "input_lengths": [[3], [2]],
                "request_output_len": [[4], [5]],
            }
            answer = client.infer("tensorrt_llm", tensors(http, **inputs))
        assert answer.as_numpy("output_ids").shape == (2, 1, 5)
        assert answer.as_numpy("output_ids")[0, 0, 4] == -1
        assert answer.as_numpy("sequence_length").tolist() == [[4], [5]]
    finally:
        stop_triton(server)


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_short_soak_has_no_faults(served_engine, tmp_path):
    command = [sys.executable, "-m", "benchmarks.triton_soak", "--engine-dir", str(served_engine), "--minutes", "0.5"]
    output = subprocess.run([*command, "--clients", "30", "--crashes", "2"], cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 0, output.stdout[-3000:] + output.stderr[-3000:]
    assert "no faults" in output.stdout


def test_the_cost_of_triton_is_measured_to_its_end(served_engine, tmp_path):
    command = [sys.executable, "-m", "benchmarks.triton_serving", "--engine-dir", str(served_engine), "--repeat", "1"]
    lines = (ROOT / "benchmarks" / "data" / "evaluation.jsonl").read_text().splitlines()[:8]
    few = tmp_path / "few.jsonl"  # this engine takes fewer tokens than the data set asks for
    few.write_text("".join(json.dumps({**json.loads(line), "output_tokens": 64}) + "\n" for line in lines))
    small = ["--dataset", str(few), "--num-requests", "8", "--clients", "4", "--first-tokens", "3"]
    output = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr[-3000:]
    assert json.loads(output.stdout.splitlines()[-1])["cpu_ratio"] > 0
