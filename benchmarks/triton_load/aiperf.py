"""AIPerf, NVIDIA's load generator, as the load: its command line, and its export read into our figures.

AIPerf has no endpoint type of Triton's own; its ``template`` type writes the body of `generate` and `generate_stream`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError

OWN_ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-aiperf" / "bin" / "aiperf"
_TEMPLATE = '{"text_input": {{ text|tojson }}, "max_tokens": {{ max_tokens }}, "stream": {{ stream|tojson }}}'
_REQUEST_TIMEOUT_S = 600


@dataclass(frozen=True)
class LoadFigures:
    """One load, AIPerf's or our own.

    Attributes:
      req_s: answered requests per second.
      ttft_p50_ms, ttft_p99_ms: time to first token; None if nothing was streamed.
      num_requests, num_errors: answered, and not.
      client_cpu_s: CPU time of the load.
    """

    req_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    num_requests: int
    num_errors: int
    client_cpu_s: float


@dataclass(frozen=True)
class Prompt:
    """One request: its text, and how many tokens to ask for."""

    text: str
    num_tokens: int


@dataclass(frozen=True)
class AiperfLoad:
    """What AIPerf asks, and whom.

    Attributes:
      url: of the server, without a path.
      model: name that requests carry; for Triton the model of the path.
      endpoint: ``chat`` or ``completions`` of the OpenAI-compatible server, or ``triton``.
      tokenizer_dir: AIPerf counts the tokens of the answers itself.
      prompts: asked once each, in their order.
      clients: requests at a time.
      streams: answers come piece by piece; without, there is no time to first token.
      api_key: empty = none.
    """

    url: str
    model: str
    endpoint: str
    tokenizer_dir: Path
    prompts: list[Prompt]
    clients: int
    streams: bool = True
    api_key: str = ""


def find_aiperf() -> Path:
    """The executable that ``make aiperf`` installs, else the one on PATH.

    Raises:
      UserError: there is none.
    """
    if OWN_ENVIRONMENT.is_file():
        return OWN_ENVIRONMENT
    if found := shutil.which("aiperf"):
        return Path(found)
    raise UserError("AIPerf is neither in .venv-aiperf nor on PATH (run make aiperf)")


def aiperf_command(executable: Path, load: AiperfLoad, folder: Path) -> list[str]:
    """Arguments of one run; ``folder`` gets the prompts' file and AIPerf's export."""
    command = [
        str(executable), "profile", "--model", load.model, "--url", load.url,
        "--endpoint-type", "template" if load.endpoint == "triton" else load.endpoint,
        "--tokenizer", str(load.tokenizer_dir), "--input-file", str(folder / "prompts.jsonl"),
        "--custom-dataset-type", "single_turn", "--dataset-sampling-strategy", "sequential",
        "--request-count", str(len(load.prompts)), "--concurrency", str(min(load.clients, len(load.prompts))),
        "--request-timeout-seconds", str(_REQUEST_TIMEOUT_S), "--output-artifact-dir", str(folder),
        "--ui", "none", "--no-server-metrics", "--no-gpu-telemetry", "--workers-max", "1",
        "--record-processor-service-count", "1",
    ]  # fmt: skip
    if load.streams:
        command.append("--streaming")
    if load.api_key:
        command += ["--api-key", load.api_key]
    if load.endpoint == "triton":
        path = f"/v2/models/{load.model}/generate" + ("_stream" if load.streams else "")
        fields = {"payload_template": _TEMPLATE, "response_field": "text_output"}
        command += ["--custom-endpoint", path, "--extra-inputs", json.dumps(fields)]
    return command


def run_aiperf(executable: Path, load: AiperfLoad, folder: Path) -> LoadFigures:
    """Runs AIPerf to its end; its CPU time counts its own start.

    Raises:
      UserError: it failed, which it also does when every request did; the end of its output says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": p.text, "output_length": p.num_tokens}) for p in load.prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    before = _cpu_of_children()
    # With these AIPerf 0.13 takes a folder for a name on the hub.
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    run = subprocess.run(
        aiperf_command(executable, load, folder), capture_output=True, text=True, env=environment, check=False
    )
    export = folder / "profile_export_aiperf.json"
    if run.returncode or not export.is_file():
        raise UserError(
            f"AIPerf ended with {run.returncode} (the end of its output):\n{(run.stdout + run.stderr)[-3000:]}"
        )
    return read_export(json.loads(export.read_text()), _cpu_of_children() - before)


def read_export(document: dict[str, Any], client_cpu_s: float) -> LoadFigures:
    """AIPerf's ``profile_export_aiperf.json`` (schema 1.4) as figures."""
    first = document.get("time_to_first_token", {})
    return LoadFigures(
        document["request_throughput"]["avg"],
        first.get("p50"),
        first.get("p99"),
        int(document["request_count"]["avg"]),
        sum(int(error["count"]) for error in document["error_summary"]),
        round(client_cpu_s, 2),
    )


def _cpu_of_children() -> float:
    """CPU time of all children that have ended, with their own."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
