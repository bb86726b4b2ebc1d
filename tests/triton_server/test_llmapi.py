"""The flavour llmapi: TensorRT-LLM's own Triton model, here a stand-in, with sharing switched on in its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import pytest
import yaml
from triton_server.conftest import ROOT, START_TIMEOUT_S, Triton, free_ports
from trtllm_pytorch.fake_package import write_fake_package

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.llmapi_repository import LlmapiOptions, llmapi_environment, write_llmapi_repository

CONFIG = """
    name: "tensorrt_llm"
    backend: "python"
    max_batch_size: 0
    input [ { name: "text_input" data_type: TYPE_STRING dims: [ -1 ] } ]
    output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
    instance_group [ { count: 1 kind: KIND_CPU } ]
    """

MODEL = """
    import os, sys
    import numpy as np
    import triton_python_backend_utils as pb_utils
    import yaml
    sys.path.insert(0, "$package")

    class TritonPythonModel:
        @classmethod
        def auto_complete_config(cls, config):
            path = os.environ.get("LLM_CONFIG_PATH") or os.path.join(pb_utils.get_model_dir(), "model.yaml")
            wanted = yaml.safe_load(open(path))["triton_config"]
            config.set_model_transaction_policy(dict(decoupled=wanted["decoupled"]))
            return config

        def initialize(self, args):
            from tensorrt_llm._torch.pyexecutor import _util
            self.answer = _util.get_kv_cache_manager_cls.__module__

        def execute(self, requests):
            for request in requests:
                output = pb_utils.Tensor("text_output", np.array([self.answer.encode()], dtype=object))
                sender = request.get_response_sender()
                sender.send(pb_utils.InferenceResponse([output]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    """


@pytest.fixture
def stock_model(tmp_path) -> Path:
    """A folder laid out like TensorRT-LLM's llmapi model, whose answer is who chooses the KV cache manager."""
    package = tmp_path / "package"
    write_fake_package(package)
    model = tmp_path / "llmapi" / "tensorrt_llm"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(textwrap.dedent(CONFIG))
    (model / "1" / "model.py").write_text(textwrap.dedent(MODEL).replace("$package", str(package)))
    (model / "1" / "model.yaml").write_text("model: TinyLlama\ntriton_config: {max_batch_size: 0, decoupled: False}\n")
    return model


def test_a_real_server_runs_the_stock_model_with_sharing_on(stock_model, tmp_path):
    pytest.importorskip("pytriton", reason="nvidia-pytriton, which carries a Triton server, is not installed")
    repository = tmp_path / "repository"
    written = subprocess.run(
        [sys.executable, str(ROOT / "build_scripts" / "build_triton_repo.py"), "--flavour", "llmapi", "--model", "/m",
         "--llmapi-model-dir", str(stock_model), "--output-dir", str(repository)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "TensorRT-LLM's llmapi model over /m" in written.stdout, written.stderr
    http, grpc, metrics = free_ports(3)
    log = tmp_path / "triton.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "build_scripts" / "launch_triton.py"), str(repository),
             f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    triton = Triton(process, http, grpc, metrics, log)
    try:
        triton.wait_until(lambda: triton.is_ready() or process.poll() is not None, START_TIMEOUT_S)
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        body = json.dumps({"text_input": "?"}).encode()
        url = f"http://127.0.0.1:{http}/v2/models/tensorrt_llm/generate_stream"
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
            answers = [json.loads(line[5:])["text_output"] for line in response if line.startswith(b"data:")]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert answers == ["trtllm_memshare.trtllm.pytorch.probe"], log.read_text(errors="replace")[-3000:]
    assert "MemShare found the KV cache manager in its form V1" in log.read_text(errors="replace")


def test_the_llm_options_hold_what_sharing_needs(stock_model, tmp_path):
    user = tmp_path / "options.yaml"
    user.write_text("tensor_parallel_size: 2\nkv_cache_config: {dtype: fp8}\n")
    settings = tmp_path / "settings.json"
    settings.write_text('{"max_aliases": 3}')
    target = tmp_path / "repository"
    options = LlmapiOptions("/m", target, stock_model, user, settings)
    write_llmapi_repository(options)
    document = yaml.safe_load((target / "tensorrt_llm/1/model.yaml").read_text())
    assert document["model"] == "/m"
    assert document["tensor_parallel_size"] == 2
    assert document["kv_cache_config"] == {"dtype": "fp8", "enable_block_reuse": False}
    assert document["triton_config"] == {"max_batch_size": 0, "decoupled": True}
    environment = llmapi_environment(target)
    assert json.loads(Path(environment["TRTLLM_MEMSHARE_CONFIG"]).read_text()) == {"max_aliases": 3}
    assert environment["TRTLLM_MEMSHARE_ENABLE"] == "1"
    assert yaml.safe_load(Path(environment["LLM_CONFIG_PATH"]).read_text()) == document  # TensorRT-LLM's model reads it


def test_the_llm_options_are_those_of_the_route(stock_model, tmp_path):
    settings = tmp_path / "settings.json"
    settings.write_text('{"preset": "pressure", "route": "framework"}')
    document = write_llmapi_repository(LlmapiOptions("/m", tmp_path / "r", stock_model, memshare_config=settings))
    assert document["kv_cache_config"] == {"enable_block_reuse": False, "use_kv_cache_manager_v2": True}
    assert document["kv_cache_compression_config"] == {"algorithm": "memshare"}


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ("attn_backend: FLASHINFER", "{}", "attn_backend must be TRTLLM"),
        ("model: other", "{}", "must not set model"),
        ("- 1", "{}", "must hold a mapping"),
        ("{}", '{"max_alias": 3}', "did you mean max_aliases"),
        (
            "kv_cache_config: {use_kv_cache_manager_v2: false}",
            '{"preset": "pressure", "route": "framework"}',
            "use_kv_cache_manager_v2 must be true for route framework",
        ),
    ],
)
def test_options_that_cannot_hold_leave_nothing_behind(options, settings, message, stock_model, tmp_path):
    (tmp_path / "o.yaml").write_text(options)
    (tmp_path / "s.json").write_text(settings)
    target = tmp_path / "repository"
    with pytest.raises(UserError, match=message):
        write_llmapi_repository(LlmapiOptions("/m", target, stock_model, tmp_path / "o.yaml", tmp_path / "s.json"))
    assert not target.exists()


def test_a_folder_that_is_not_the_stock_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no config.pbtxt in .* \(set --llmapi-model-dir\)"):
        write_llmapi_repository(LlmapiOptions("/m", tmp_path / "repository", tmp_path))


def test_options_of_the_other_flavour_are_refused(tmp_path):
    command = [sys.executable, str(ROOT / "build_scripts" / "build_triton_repo.py"), "--model", "/m"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: --model is no option of --flavour engine (leave it out)\n")
