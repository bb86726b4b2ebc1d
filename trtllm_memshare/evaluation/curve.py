"""The fidelity curve: each arm's answers and distributions against the full cache's, and the memory that it held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.arms import Arm
from trtllm_memshare.evaluation.benchmark_options import MOST_REQUESTS, check_number
from trtllm_memshare.evaluation.session import Generation, Session
from trtllm_memshare.evaluation.statistics import mcnemar, paired_interval, wilson_interval
from trtllm_memshare.search.config import make_config


@dataclass(frozen=True)
class CurveOptions:
    """What is measured.

    Attributes:
      replay_problems: how many problems are read teacher-forced; 0 = none, None = all.
      free_running: whether arms answer on their own too. False: the full cache alone does, if it has to write what
        the arms are to read.
      match: name of the arm whose memory budgets are matched to.
      against: names of the arms that all others are tested against in pairs.
    """

    replay_problems: int | None = 100
    free_running: bool = True
    match: str = "aligned"
    against: tuple[str, ...] = ("full", "aligned")

    def __post_init__(self) -> None:
        check_number("--replay-problems", self.replay_problems, 0, MOST_REQUESTS)


def measure_curve(
    session: Session, arms: list[Arm], options: CurveOptions, note: Callable[[list[dict[str, Any]]], None] | None = None
) -> list[dict[str, Any]]:
    """Measures the full cache and every arm.

    Args:
      arms: without the full cache, which is always measured first.
      note: called with the entries so far after each arm.

    Returns:
      one entry per arm, the full cache first: ``settings``; ``right`` as a string of 0 and 1 in the order of the
      problems; figures of the free run under ``free``; of the teacher-forced one under ``replay``; under ``paired``
      one test per arm of ``options.against``.

    Raises:
      UserError: free-running accuracy without answers; a budget to match to an arm that is not there.
    """
    if options.free_running and not session.has_answers:
        raise UserError(
            "accuracy needs an answer in every line of the data set, got lines without one (add them, or set "
            "--no-accuracy for teacher-forced scores alone)"
        )
    full = Arm("full", make_config("off"))
    ordered = sorted(arms, key=lambda arm: arm.budget is not None)  # stable: those that wait for a match go last
    if any(arm.budget for arm in arms) and options.match not in [arm.name for arm in arms]:
        raise UserError(
            f"budgets are matched to the memory of {options.match}, got arms without it (add it to --arms, name "
            f"another with --match, or give the budget, for example streaming:streaming_window_tokens=256)"
        )
    curve = FidelityCurve(session, options)
    entries: list[dict[str, Any]] = []
    for arm in tqdm([full, *ordered], desc="arms", unit="arm"):
        entries.append(curve.measure(arm))
        if note is not None:
            note(entries)
    order = {name: i for i, name in enumerate(["full", *(arm.name for arm in arms)])}
    entries.sort(key=lambda entry: order[entry["arm"]])
    return entries


class FidelityCurve:
    """The full cache's results, which every later arm is compared with."""

    def __init__(self, session: Session, options: CurveOptions) -> None:
        self._session, self._options = session, options
        self._entries: dict[str, dict[str, Any]] = {}
        self._read: dict[str, dict[str, Any]] = {}
        self._answers: list[str] = []
        self._outputs: list[list[int]] = []
        self._scripts: list[list[int]] = []
        self._spans: list[tuple[int, int]] = []

    def measure(self, arm: Arm) -> dict[str, Any]:
        """Runs one arm; the first must be the full cache."""
        session, is_full = self._session, not self._entries
        if not is_full:
            matched = self._entries.get(self._options.match)
            if matched is not None:
                held = matched["free" if "free" in matched else "replay"]["block_steps_per_request"]
                arm = arm.with_memory_of(self._spans, held, session.tokens_per_block)
        entry: dict[str, Any] = {"arm": arm.name, "settings": arm.config.model_dump(exclude_defaults=True)}
        generation = None
        if self._options.free_running or (is_full and not session.has_outputs):
            generation = session.generate(arm.name, arm.config)
        if generation is not None and self._options.free_running:
            self._add_answers(entry, generation, is_full)
        if is_full:
            self._take_scripts(generation)
        if self._scripts:
            entry["replay"] = self.read(arm)
        for name in self._options.against:
            if name in self._entries and "right" in entry:
                entry.setdefault("paired", {})[name] = compare(self._entries[name]["right"], entry["right"])
        self._entries[arm.name] = entry
        return entry

    def read(self, arm: Arm) -> dict[str, Any]:
        """Teacher-forced figures of one arm; read once, then remembered."""
        if arm.name not in self._read:
            figures = self._session.read(arm.config, self._scripts)
            add_saving(figures, self._read.get("full", figures))
            self._read[arm.name] = figures
        return self._read[arm.name]

    def _take_scripts(self, generation: Generation | None) -> None:
        """What the arms will read: the data set's own outputs, or else what the full cache has just generated."""
        items, wanted = self._session.items, self._options.replay_problems
        count = len(items) if wanted is None else min(wanted, len(items))
        if self._session.has_outputs:
            self._scripts = [ids for item in items[:count] if (ids := item.output_ids)]
        elif generation is not None:
            self._scripts = generation.token_ids[:count]
        outputs = generation.token_ids if generation is not None and self._options.free_running else self._scripts
        self._spans = [(len(item.input_ids), len(ids)) for item, ids in zip(items, outputs, strict=False)]

    def _add_answers(self, entry: dict[str, Any], generation: Generation, is_full: bool) -> None:
        items, answers = self._session.items, self._session.answers(generation)
        if is_full:
            self._answers, self._outputs = answers, generation.token_ids
        right = "".join("01"[a == item.answer] for a, item in zip(answers, items, strict=True))
        count = len(items)
        entry["right"] = right
        entry["free"] = {
            "accuracy": right.count("1") / count,
            "interval": wilson_interval(right.count("1"), count),
            "same_answer_as_full": sum(a == b for a, b in zip(answers, self._answers, strict=True)) / count,
            "same_tokens_as_full": sum(map(list.__eq__, generation.token_ids, self._outputs)) / count,
            **generation.figures,
        }
        add_saving(entry["free"], entry["free"] if is_full else self._entries["full"]["free"])


def add_saving(figures: dict[str, Any], full: dict[str, Any]) -> None:
    """Adds the share of the full cache's block-steps per request that an arm does without."""
    figures["memory_saved"] = 1 - figures["block_steps_per_request"] / full["block_steps_per_request"]


def compare(base: str, other: str) -> dict[str, Any]:
    """McNemar's test and the interval of the change from ``base`` to ``other``, both strings of 0 and 1."""
    pairs = list(zip(base, other, strict=True))
    lost, gained = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return {
        "lost": lost,
        "gained": gained,
        "change": (gained - lost) / len(pairs),
        "interval": paired_interval(lost, gained, len(pairs)),
        "p_value": mcnemar(lost, gained),
    }


def pool_reports(documents: list[dict[str, Any]]) -> dict[str, str]:
    """Right answers of each arm over the problems of all reports, as strings of 0 and 1.

    Args:
      documents: as ``benchmarks/fidelity.py`` writes them. Arms count that all of them have, with the same settings.

    Raises:
      UserError: two reports on one data set, whose problems would count twice, or no arm in common.
    """
    datasets = [document["dataset"] for document in documents]
    if len(set(datasets)) < len(datasets):
        raise UserError(f"pooled reports must be on different data sets, got {', '.join(datasets)} (leave one out)")
    pooled: dict[str, str] = {}
    for entry in documents[0]["arms"]:
        same = [
            [e for e in d["arms"] if (e["arm"], e["settings"]) == (entry["arm"], entry["settings"])] for d in documents
        ]
        if all(same) and all("right" in found[0] for found in same):
            pooled[entry["arm"]] = "".join(found[0]["right"] for found in same)
    if not pooled:
        raise UserError(
            "the reports have no arm with answers and the same settings in common (measure the same --arms)"
        )
    return pooled
