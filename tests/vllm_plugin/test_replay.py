"""Requests of vLLM's engine that write recorded texts; needs vLLM (``make test-vllm``)."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nightly import only_nightly
from vllm_plugin.engine_runs import MODEL, ROOT, environment

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


def run(arm: str, blocks: int, traces: Path) -> dict[str, object]:
    """It fails by itself unless the answers are the texts."""
    line = [
        sys.executable, str(ROOT / "benchmarks" / "vllm_pressure.py"), "--replay", "--model-dir", MODEL,
        "--traces", str(traces), "--requests", "4", "--in-flight", "4", "--shorter-by", "1", "--longest-answer", "400",
        "--protected-tokens", "32", "--admission", "vllm", "--run-arm", arm, str(blocks),
    ]  # fmt: skip
    from trtllm_memshare.evaluation.vllm_work import ENVIRONMENT

    ran = subprocess.run(line, env=environment(**ENVIRONMENT), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    draw = random.Random(3)
    return [("2 + 3", " ".join(str(draw.randint(0, 999)) for _ in range(90 + 10 * i))) for i in range(4)]


@pytest.fixture(scope="module")
def traces(texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    path.write_text("".join(json.dumps({"problem": p, "reasoning": r}) + "\n" for p, r in texts))
    return path


@pytest.fixture(scope="module")
def with_room(traces):
    return run("vllm", 80, traces)


def test_the_loss_is_the_model_s_own(with_room, texts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    nats = count = 0
    for problem, reasoning in texts:
        prompt, text = tokenizer(problem)["input_ids"], tokenizer(reasoning)["input_ids"][:400]
        with torch.inference_mode():
            log_probs = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        nats -= float(log_probs.gather(1, torch.tensor(text)[:, None]).sum())
        count += len(text)
    assert with_room["loss_nats_per_token"] == pytest.approx(nats / count, rel=1e-3)
    assert with_room["preemptions"] == 0


@only_nightly
def test_preempted_requests_go_on_with_their_texts(with_room, traces):
    alone = run("vllm", 30, traces)
    assert alone["preemptions"] > 0
    assert alone["loss_nats_per_token"] == pytest.approx(with_room["loss_nats_per_token"], rel=1e-3)
    ours = run("0.5-skip", 30, traces)
    assert ours["retired"] > 5
    assert ours["loss_nats_per_token"] > with_room["loss_nats_per_token"]
