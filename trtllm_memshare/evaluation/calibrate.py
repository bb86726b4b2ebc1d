"""Calibration: the most aggressive setting that stays within an accuracy budget on the user's own data.

A ladder of settings is first read teacher-forced, which is cheap and says what each saves; from the largest saving
down each then answers the problems on its own, until one stays within the budget. Nothing is random: the same engine
and data give the same setting. What no rung of the ladder names stays as the engine has it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.arms import Arm
from trtllm_memshare.evaluation.benchmark_options import check_output_file
from trtllm_memshare.evaluation.curve import CurveOptions, FidelityCurve
from trtllm_memshare.evaluation.document import make_report, publish, write_report
from trtllm_memshare.evaluation.session import Session
from trtllm_memshare.runners.engines import check_replaceable, load_engine, replace_memshare
from trtllm_memshare.search.config import MemShareConfig, make_config, parse_config

LADDER: dict[str, dict[str, Any]] = {
    "runs of 16 with gaps": {"min_run_tokens": 16, "max_gap_tokens": 4},
    "defaults": {},
    "copies settled for 32 tokens": {"settled_tokens": 32},
    "copies settled for 64 tokens": {"settled_tokens": 64},
    "copies settled for 128 tokens": {"settled_tokens": 128},
    "copies settled for 256 tokens": {"settled_tokens": 256},
    "copies settled for 256 tokens, distance 0.25": {"settled_tokens": 256, "max_distance": 0.25},
    "copies settled for 512 tokens, distance 0.25": {"settled_tokens": 512, "max_distance": 0.25},
}
"""Settings tried. What one rung names and another does not has its default there; the rest is the engine's own."""


@dataclass(frozen=True)
class Calibration:
    """``config``: to be written; ``entry``: its figures; ``tried``: all entries, in the order they were tried."""

    name: str
    config: MemShareConfig
    entry: dict[str, Any]
    tried: list[dict[str, Any]]


def calibrate(
    session: Session,
    max_accuracy_drop: float,
    ladder: dict[str, dict[str, Any]] | None = None,
    is_sure: bool = False,
    replay_problems: int = 100,
    base: MemShareConfig | None = None,
) -> Calibration:
    """Finds the setting of ``ladder`` that saves most memory within the budget.

    Args:
      ladder: settings by name, laid over ``base``; None = ``LADDER``.
      max_accuracy_drop: largest loss of accuracy against the full cache, in [0, 1).
      is_sure: hold the far end of the paired 95 % interval against the budget instead of the measured loss.
      replay_problems: problems on which savings are compared at equal text; 0 = on the answers of each setting, which
        all of them then have to write.
      base: see ``choose_base``; None = the engine's own settings. If it is in shadow, so is what comes of it.

    Raises:
      UserError: no answers, a budget out of range, or no setting within it.
    """
    if not 0 <= max_accuracy_drop < 1:
        raise UserError(f"--max-accuracy-drop must be at least 0 and below 1, got {max_accuracy_drop} (0.01 = 1 point)")
    if not session.has_answers:
        raise UserError("calibration needs an answer in every line of the data set, got lines without one (add them)")
    curve = FidelityCurve(session, CurveOptions(replay_problems=replay_problems, against=("full",)))
    curve.measure(Arm("full", make_config("off")))
    base = choose_base(session.engine.memshare) if base is None else base
    rungs = LADDER if ladder is None else ladder
    searched = {key: MemShareConfig.model_fields[key].default for settings in rungs.values() for key in settings}
    # What sharing does is measured while it is done: shadow comes back in what is written.
    own = {**base.model_dump(), **searched, "shadow": False}
    arms = {name: Arm(name, parse_config({**own, **settings}, name)) for name, settings in rungs.items()}
    answered: dict[str, dict[str, Any]] = {}
    if replay_problems:
        savings = {name: curve.read(arm)["memory_saved"] for name, arm in arms.items()}
    else:
        answered = {name: curve.measure(arm) for name, arm in arms.items()}
        savings = {name: entry["free"]["memory_saved"] for name, entry in answered.items()}
    tried: list[dict[str, Any]] = []
    for name in sorted(arms, key=lambda n: -savings[n]):  # stable: of equals the one that stands first
        entry = answered.get(name) or curve.measure(arms[name])
        tried.append(entry)
        test = entry["paired"]["full"]
        loss = -(test["interval"][0] if is_sure else test["change"])
        if loss <= max_accuracy_drop + 1e-12 and savings[name] > 0:
            return Calibration(name, arms[name].config.model_copy(update={"shadow": base.shadow}), entry, tried)
    least = tried[-1]["paired"]["full"]
    raise UserError(
        f"no setting loses at most {max_accuracy_drop:g} of accuracy on {len(session.items)} problems, the mildest one "
        f"loses {-least['change']:.4f} (95 % interval {-least['interval'][1]:.4f} to {-least['interval'][0]:.4f}); the "
        f"engine is left as it was (give more problems, or a larger --max-accuracy-drop)"
    )


def choose_base(engine: MemShareConfig, preset: str | None = None) -> MemShareConfig:
    """The settings over which rungs are laid: the engine's own; ``aligned`` in another one if ``preset`` says so.

    Raises:
      UserError: an engine of another preset, and nobody who asked to replace it.
    """
    if engine.preset == "aligned":
        return engine
    if preset is None:
        raise UserError(
            f"calibrate writes settings of preset aligned, got an engine of preset {engine.preset} (give --preset "
            f"aligned to replace all of its settings)"
        )
    return make_config(preset, shadow=engine.shadow)


def describe_changes(old: MemShareConfig, new: MemShareConfig) -> str:
    """Each setting that differs, one in a line, as ``name: old -> new``."""
    before, after = old.model_dump(), new.model_dump()
    changed = [f"  {key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]
    return "\n".join(["changes in the engine's settings:", *changed]) if changed else "the engine has these settings"


def describe(calibration: Calibration, max_accuracy_drop: float, num_problems: int) -> str:
    """What was found and how sure it is, in plain sentences."""
    entry, test = calibration.entry, calibration.entry["paired"]["full"]
    low, high = test["interval"]
    figures, texts = (
        (entry["replay"], "at equal text") if "replay" in entry else (entry["free"], "over its own answers")
    )
    lines = [
        f"chosen: {calibration.name}, {calibration.config.model_dump(exclude_defaults=True)}",
        f"saves {figures['memory_saved']:.1%} of the KV memory per request {texts} and frees "
        f"{entry['free']['shared_block_fraction']:.1%} of the generated blocks",
        f"accuracy {entry['free']['accuracy']:.2%}, {test['change']:+.2%} against the full cache: {test['lost']} lost "
        f"and {test['gained']} gained of {num_problems}; 95 % interval of the change {low:+.2%} to {high:+.2%}",
    ]
    if -low <= max_accuracy_drop:
        lines.append(f"the whole interval lies within the budget of {max_accuracy_drop:.2%}")
    else:
        lines.append(
            f"not certain: a loss beyond the budget of {max_accuracy_drop:.2%} is within the interval; more problems "
            f"narrow it"
        )
    if calibration.config.shadow:
        lines.append("the engine stays in shadow: it searches and reports, and shares nothing")
    if len(calibration.tried) > 1:
        lines.append(
            f"{len(calibration.tried)} settings were tried on these problems until one fitted, which flatters it a "
            f"little: confirm it on others"
        )
    return "\n".join(lines)


def main(command: str, arguments: list[str]) -> None:
    """``python -m trtllm_memshare calibrate``: calibrates an engine and writes its memshare.json."""
    parser = argparse.ArgumentParser(
        prog=f"memshare {command}",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--engine-dir", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True, help="JSON lines with answers")
    parser.add_argument("--max-accuracy-drop", type=float, required=True, help="share of problems, 0.01 = 1 point")
    parser.add_argument("--sure", action="store_true", help="the whole 95 %% interval must lie within the budget")
    parser.add_argument("--num-problems", type=int, help="first lines of the data set only")
    parser.add_argument(
        "--replay-problems",
        type=int,
        default=100,
        help="problems on which savings are compared, 0 = on the answers of each setting",
    )
    parser.add_argument("--keep-dir", type=Path, help="folder in which results are kept for a later run")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--preset",
        choices=("aligned",),
        help="calibrate an engine of another preset too: all of its settings are replaced, but for shadow",
    )
    parser.add_argument("--dry-run", action="store_true", help="report, leave the engine as it is")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args(arguments)
    check_output_file("--output-json", options.output_json)
    engine = load_engine(options.engine_dir)
    base = choose_base(engine.memshare, options.preset)
    if not options.dry_run:
        check_replaceable(options.engine_dir)
    session = Session(options.engine_dir, options.dataset, options.num_problems, options.device, options.keep_dir)
    found = calibrate(
        session, options.max_accuracy_drop, is_sure=options.sure, replay_problems=options.replay_problems, base=base
    )
    print(describe(found, options.max_accuracy_drop, len(session.items)))
    print(describe_changes(engine.memshare, found.config))
    report = make_report(
        {
            "engine_dir": str(options.engine_dir),
            "dataset": str(options.dataset),
            "num_problems": len(session.items),
            "max_accuracy_drop": options.max_accuracy_drop,
            "sure": options.sure,
            "chosen": found.name,
            "settings": found.config.model_dump(),
            "tried": found.tried,
        },
        " ".join(["python -m trtllm_memshare", command, *arguments]),
    )
    if options.output_json is not None:
        write_report(report, options.output_json)
    try:
        if not options.dry_run:
            replace_memshare(options.engine_dir, found.config)
            print(f"written: {options.engine_dir / 'memshare.json'}")
    finally:  # what took hours is told, whatever becomes of the engine
        publish(report, None)
