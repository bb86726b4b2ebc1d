"""The curve on a tiny engine: exactness of the full cache, budgets at equal memory, tables, pictures, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_script import run_script
from transformers import AutoModelForCausalLM

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.arms import parse_arm
from trtllm_memshare.evaluation.curve import CurveOptions, compare, measure_curve, pool_reports
from trtllm_memshare.evaluation.session import Session
from trtllm_memshare.report.fidelity import pareto_frontier
from trtllm_memshare.search.config import make_config

ROOT = Path(__file__).parents[2]
LOOSE = "lexical:min_run_tokens=8,shingle_tokens=4,protected_tokens=16,protected_steps=0,search_interval=1"


@pytest.fixture(scope="module")
def session(engine_dir, answered) -> Session:
    return Session(engine_dir, answered, device="cpu")


def measure(session, *arms, **options) -> dict[str, dict]:
    parsed = [parse_arm(text, session.engine.memshare) for text in arms]
    return {entry["arm"]: entry for entry in measure_curve(session, parsed, CurveOptions(**options))}


@pytest.fixture(scope="module")
def curve(session) -> dict[str, dict]:
    arms = ("shadow", "streaming", LOOSE, "snapkv", "rkv", "rkv:budget=share")
    return measure(session, *arms, match=LOOSE, against=("full", LOOSE))


def test_the_full_cache_is_right_by_construction_and_shadow_equals_it(curve):
    for name in ("full", "shadow"):
        assert curve[name]["right"] == "1" * 8
        assert curve[name]["free"]["same_answer_as_full"] == curve[name]["free"]["same_tokens_as_full"] == 1
        assert curve[name]["replay"]["kl_nats"] == curve[name]["replay"]["flipped_token_fraction"] == 0
        assert curve[name]["replay"]["memory_saved"] == 0
    assert curve["shadow"]["paired"]["full"]["p_value"] == 1


def test_sharing_saves_memory_at_a_cost_that_the_scores_see(curve):
    shared = curve[LOOSE]["replay"]
    assert shared["memory_saved"] > 0.1
    assert shared["shared_block_fraction"] > 0.1
    assert shared["kl_nats"] > 0
    lost = curve[LOOSE]["right"].count("0")
    assert curve[LOOSE]["paired"]["full"]["lost"] == lost
    assert curve[LOOSE]["free"]["same_tokens_as_full"] <= 1 - lost / 8


@pytest.mark.parametrize("control", ["streaming", "snapkv", "rkv", "rkv:budget=share"])
def test_controls_hold_as_much_as_the_arm_they_are_matched_to(curve, control):
    held = curve[control]["replay"]["block_steps_per_request"]
    assert held == pytest.approx(curve[LOOSE]["replay"]["block_steps_per_request"], rel=0.15)
    assert curve[control]["replay"]["kl_nats"] > 0


def test_samples_of_one_prompt_share_as_a_group_alone(engine_dir, answered):
    """Two greedy samples are equal; within so small a distance nothing but such a copy is shared."""
    session = Session(engine_dir, answered, 4, device="cpu", samples=2)
    exact = "aligned:protected_tokens=16,protected_steps=0,search_interval=1,max_distance=0.001"
    curve = measure(session, exact, f"{exact},scope=group", match=exact, against=("full",))
    assert curve[exact]["replay"]["shared_block_fraction"] == 0
    grouped = curve[f"{exact},scope=group"]
    assert grouped["replay"]["shared_block_fraction"] > 0.3
    assert grouped["replay"]["memory_saved"] > 0.2
    assert grouped["replay"]["kl_nats"] < 1e-9
    assert grouped["right"] == "1" * 8


def test_samples_have_a_seed_each(engine_dir, answered):
    session = Session(engine_dir, answered, 2, device="cpu", samples=2, temperature=1.5)
    first, second, other, _ = session.generate("full", make_config("off")).token_ids
    assert first != second
    assert first != other
    again = Session(engine_dir, answered, 2, device="cpu", samples=2, temperature=1.5)
    assert again.generate("full", make_config("off")).token_ids[:2] == [first, second]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"samples": 0}, "--samples must be at least 1, got 0"), ({"temperature": -1.0}, "--temperature must be 0")],
)
def test_no_samples_and_no_temperature_are_refused(engine_dir, answered, options, message):
    with pytest.raises(UserError, match=message):
        Session(engine_dir, answered, device="cpu", **options)


def test_perplexity_is_that_of_transformers_on_written_text(engine_dir, session, tmp_path):
    rows = [
        {"task_id": i, "prompt": p, "output_tokens": 40, "output": f"From {i} take 2: so {i}.\n" * 9}
        for i, p in enumerate(("Q: 1 + 2 = ?\n", "Q: 9 - 4 = ?\n"))
    ]
    path = tmp_path / "written.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = Session(engine_dir, path, device="cpu")
    entry = measure(written, free_running=False)["full"]
    assert "free" not in entry
    model = AutoModelForCausalLM.from_pretrained(written.engine.model_dir).eval()
    losses = []
    for item in written.items:
        ids = torch.tensor([item.input_ids + item.output_ids])
        assert len(item.output_ids) == 40  # cut to output_tokens
        with torch.inference_mode():
            log_probs = model(ids).logits[0].log_softmax(-1)
        places = torch.arange(len(item.input_ids), ids.shape[1])
        losses.append(-log_probs[places - 1, ids[0, places]])
    assert entry["replay"]["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)


def test_generations_are_found_again_by_their_settings(engine_dir, answered, tmp_path, monkeypatch):
    first = Session(engine_dir, answered, device="cpu", keep_dir=tmp_path)
    before = measure(first, LOOSE, replay_problems=0)
    assert len(list(tmp_path.iterdir())) == 2
    second = Session(engine_dir, answered, device="cpu", keep_dir=tmp_path)
    monkeypatch.setattr("trtllm_memshare.evaluation.session.run_variant", None)
    assert measure(second, LOOSE, replay_problems=0).keys() == before.keys()
    with pytest.raises(TypeError):  # other settings have to run
        measure(second, LOOSE.replace("=16", "=24"), replay_problems=0)


def test_compare_counts_pairs_in_order():
    test = compare("110010", "100110")
    assert (test["lost"], test["gained"], test["change"], test["p_value"]) == (1, 1, 0, 1)
    assert compare("1111", "0111")["change"] == -0.25


def test_a_budget_needs_something_to_match(session):
    with pytest.raises(UserError, match="budgets are matched to the memory of aligned, got arms without it"):
        measure(session, "streaming")
    given = measure(session, "streaming:streaming_window_tokens=64", replay_problems=0)
    assert given["streaming:streaming_window_tokens=64"]["settings"]["streaming_window_tokens"] == 64


def test_table_picture_and_report_from_the_command_line(engine_dir, answered, tmp_path):
    command = ["--engine-dir", engine_dir, "--dataset", answered]
    options = ["--arms", "aligned", "streaming", "--output-json", tmp_path / "r.json", "--plot", tmp_path / "r.png"]
    done = run_script(ROOT / "benchmarks" / "fidelity.py", *map(str, [*command, *options]))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert [entry["arm"] for entry in report["arms"]] == ["full", "aligned", "streaming"]
    assert json.loads(done.stdout.splitlines()[-1]) == report
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    for entry in report["arms"]:
        assert any(line.startswith(entry["arm"]) for line in done.stdout.splitlines())


def test_accuracy_without_answers_is_refused(engine_dir, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"task_id": 0, "prompt": "Q: 1 + 2 = ?\\n", "output_tokens": 8}\n')
    with pytest.raises(UserError, match="accuracy needs an answer in every line"):
        measure(Session(engine_dir, path, device="cpu"))


def test_reports_are_pooled_by_arm_and_settings():
    def document(dataset: str, **right: str) -> dict:
        return {"dataset": dataset, "arms": [{"arm": a, "settings": {}, "right": r} for a, r in right.items()]}

    first, second = document("a", full="11", aligned="10"), document("b", aligned="00", full="01", random="11")
    assert pool_reports([first, second]) == {"full": "1101", "aligned": "1000"}
    second["arms"][0]["settings"] = {"max_distance": 0.1}
    assert pool_reports([first, second]) == {"full": "1101"}
    with pytest.raises(UserError, match="must be on different data sets, got a, a"):
        pool_reports([first, first])
    with pytest.raises(UserError, match="no arm with answers and the same settings in common"):
        pool_reports([document("a", full="1"), document("b", aligned="1")])


def test_thepareto_frontier_keeps_what_nothing_beats():
    points = [(0.0, 99.0), (30.0, 98.0), (20.0, 97.0), (35.0, 75.0), (30.0, 90.0)]
    assert pareto_frontier(points, is_higher_better=True) == [(0.0, 99.0), (30.0, 98.0), (35.0, 75.0)]
    losses = [(x, 100 - y) for x, y in points]
    assert pareto_frontier(losses, is_higher_better=False) == [(0.0, 1.0), (30.0, 2.0), (35.0, 25.0)]
