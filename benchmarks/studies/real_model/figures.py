"""Single figures of the study, from its rows, for pages that quote them."""

from __future__ import annotations

import numpy as np

from trtllm_memshare.evaluation.page_arms import DEFAULT, Budget
from trtllm_memshare.evaluation.page_study import PRESETS
from trtllm_memshare.evaluation.page_table import BASE, Comparison, Row, Setting, by_problem, compare, recall, select
from trtllm_memshare.evaluation.retirement import hold_at_floor, lowest_need
from trtllm_memshare.evaluation.statistics import holm, ratio_interval, sign_flip
from trtllm_memshare.report.real_model import LABELS


def compared(rows: list[Row], what: str, arm: str, base: str = BASE, kept: float = 0.5, tokens: int = 2048) -> float:
    """A field of ``Comparison`` of two arms on the texts that both have, such as ``ratio`` or ``divergence_p``."""
    return _field(compare(rows, arm, base, Setting(kept, tokens=tokens)), what, arm, base)


def ratio_bound(rows: list[Row], bound: str, arm: str, base: str = BASE, tokens: int = 2048) -> float:
    """The ``low`` or ``high`` end of the 95 % interval of ``ratio``, by a bootstrap over problems."""
    ours, theirs = (select(rows, name, Setting(tokens=tokens)) for name in (arm, base))
    common = [text for text in ours if text in theirs]
    problems = [ours[text]["problem"] for text in common]
    loss, base_loss = (by_problem(problems, [side[t]["loss_change"] for t in common]) for side in (ours, theirs))
    return dict(zip(("low", "high"), ratio_interval(loss, base_loss), strict=True))[bound]


def corrected_p(rows: list[Row], arm: str) -> float:
    """Of an arm's loss against random pages at a half, by Holm's method over all arms of the first table."""
    return _corrected(rows)[arm]


def num_compared(rows: list[Row]) -> int:
    """Arms of the first table that are held against random pages."""
    return len(_corrected(rows))


def _corrected(rows: list[Row]) -> dict[str, float]:
    found = {arm: compare(rows, arm) for arm in LABELS if arm not in (BASE, *PRESETS)}
    p_values = {arm: c.p for arm, c in found.items() if c is not None}
    return dict(zip(p_values, holm(np.array(list(p_values.values()))).tolist(), strict=True))


def unseen(tables: list[list[Row]], what: str, arm: str, tokens: int, base: str = BASE) -> float:
    """The same of longer texts of problems that had no part in choosing the weight of recency beside attention.

    Args:
      tables: rows of the study and of longer texts. The weight was chosen on the study's first texts, which alone have
        rows of ``random-once``.
    """
    study, longer = tables
    seen = {row["problem"] for row in study if row["arm"] == "random-once"}
    return compared([row for row in longer if row["problem"] not in seen], what, arm, base, tokens=tokens)


def beside_short(tables: list[list[Row]], what: str, arm: str, tokens: int) -> float:
    """The same of an arm in longer texts, against itself in the same texts at the study's length."""
    rows = [row for table in tables for row in table]
    return _field(compare(rows, arm, arm, Setting(tokens=tokens), Setting()), what, arm, arm)


def within(rows: list[Row], what: str, arm: str, tokens: int, start: int = 2048) -> float:
    """Change of the loss from token ``start`` on beside that of 512 to 2,047 of the same texts, nats a token.

    Args:
      what: ``early``, ``late``, or ``p`` of no difference, by signs of problems.
    """
    found = select(rows, arm, Setting(tokens=tokens))
    names = [row["problem"] for row in found.values()]
    early, late = (
        by_problem(names, [_mean_between(row, *bounds) for row in found.values()])
        for bounds in ((512, 2048), (start, tokens))
    )
    return sign_flip(late - early) if what == "p" else float({"early": early, "late": late}[what].mean())


def _mean_between(row: Row, start: int, stop: int) -> float:
    pairs = [pair for bucket, pair in row["by_position"].items() if start <= int(bucket) < stop]
    return float(np.sum([total for total, _ in pairs]) / np.sum([count for _, count in pairs]))


def longer_pages(rows: list[Row], what: str, arm: str, size: int, base: str | None = None) -> float:
    """The same of an arm with pages of ``size`` tokens, against ``base`` (None = itself) with pages of 16."""
    base = base or arm
    return _field(compare(rows, arm, base, Setting(tokens_per_block=size), Setting()), what, arm, base)


def loss_in_pages(tables: list[list[Row]], arm: str, size: int, tokens: int = 4096, kept: float = 0.5) -> float:
    """Mean change of the loss in pages of ``size`` tokens, in the last table's texts, nats a token."""
    texts = {row["text"] for row in tables[-1]}
    found = select([row for table in tables for row in table], arm, Setting(kept, size, tokens))
    return float(np.mean([row["loss_change"] for text, row in found.items() if text in texts]))


def held_in_pages(rows: list[Row], size: int, kept: float = 0.5) -> float:
    """Share of the generated tokens that a floor leaves in pages of ``size`` tokens: mean over the texts of the rows.

    Which pages go changes nothing: the oldest, here.
    """
    lengths = {(row["prompt_tokens"], row["tokens"]) for row in rows if row["arm"] == "full"}
    oldest, protected = lowest_need(lambda moment: moment.may_go.astype(np.float32)), Budget().protected_tokens
    shares = [
        hold_at_floor(prompt, tokens, size, kept, protected, oldest).tokens_share(prompt, tokens)
        for prompt, tokens in sorted(lengths)
    ]
    return float(np.mean(shares))


def _field(found: Comparison | None, what: str, arm: str, base: str) -> float:
    if found is None:
        raise ValueError(f"arms {arm!r} and {base!r} have no two problems in common")
    return float(getattr(found, what))


def loss_change(rows: list[Row], arm: str) -> float:
    """Against the full cache with half of the generated pages kept, nats a token."""
    return compared(rows, "loss_change", arm)


def ratio_to_random(rows: list[Row], arm: str) -> float:
    """The change of the loss over that of random pages on the same texts."""
    return compared(rows, "ratio", arm)


def smallest_loss(rows: list[Row]) -> float:
    """Of the full cache over the texts, nats a token."""
    return min(row["loss"] for row in rows if row["arm"] == "full")


def largest_loss(rows: list[Row]) -> float:
    """Of the full cache over the texts, nats a token."""
    return max(row["loss"] for row in rows if row["arm"] == "full")


def recalled(rows: list[Row], arm: str, kept: float = 0.5) -> str:
    """Facts stated once that are still known with that share of the pages kept, ``42 of 52``."""
    (found,) = [r for r in recall(rows, kept) if r.arm == arm]
    return f"{found.right} of {found.asked}"


def recalled_beside(rows: list[Row], arm: str, other: str) -> str:
    """The same for the questions of the texts that another arm has too."""
    texts = {row["text"] for row in rows if row["arm"] == other}
    return recalled([row for row in rows if row["text"] in texts], arm)


def recalled_in_pages(tables: list[list[Row]], arm: str, size: int, kept: float = 0.5) -> str:
    """The same with pages of ``size`` tokens, in the texts of the last table; the others have the full cache's rows."""
    texts = {row["text"] for row in tables[-1]}
    rows = [row for table in tables for row in table if row["text"] in texts]
    return recalled([row for row in rows if row["arm"] == "full" or row["tokens_per_block"] == size], arm, kept)


def gained(rows: list[Row], arm: str, other: str) -> int:
    """Questions that ``arm`` alone answers."""
    return sum(change > 0 for change in _changes(rows, arm, other).values())


def lost(rows: list[Row], arm: str, other: str) -> int:
    """Questions that ``other`` alone answers."""
    return sum(change < 0 for change in _changes(rows, arm, other).values())


def recall_p(rows: list[Row], arm: str, other: str) -> float:
    """Of the same number of answers by both arms: random signs of the texts' differences."""
    by_text: dict[str, int] = {}
    for (text, _), change in _changes(rows, arm, other).items():
        by_text[text] = by_text.get(text, 0) + change
    # In one order: which signs a text draws depends on its place.
    return sign_flip(np.array([by_text[text] for text in sorted(by_text)]))


def _changes(rows: list[Row], arm: str, other: str) -> dict[tuple[str, int], int]:
    """By text and question that the full cache answers: 1 where ``arm`` alone does, -1 where ``other`` alone does."""
    right = {name: _answers(rows, name) for name in ("full", arm, other)}
    asked = [key for key in right[arm].keys() & right[other].keys() if right["full"].get(key)]
    return {key: right[arm][key] - right[other][key] for key in asked}


def _answers(rows: list[Row], arm: str) -> dict[tuple[str, int], bool]:
    chosen = [row for row in rows if row["arm"] == arm and row["min_kept"] == 0.5]
    return {(row["text"], i): question["right"] for row in chosen for i, question in enumerate(row["questions"])}


def recalled_at(rows: list[Row], arm: str, distance: int) -> str:
    """The same for the questions whose fact stood up to so many tokens back, and beyond the next smaller distance."""
    (found,) = [r for r in recall(rows) if r.arm == arm]
    right, asked = found.by_distance[distance]
    return f"{right} of {asked}"


def recalled_behind(rows: list[Row], arm: str, distance: int, kept: float = 0.5) -> str:
    """The same for the questions whose fact stood more than so many tokens back."""
    (found,) = [r for r in recall(rows, kept, (distance,)) if r.arm == arm]
    right, asked = found.by_distance[10**6]
    return f"{right} of {asked}"


def cost_table(tables: list[list[Row]]) -> str:
    """What the default costs beside random pages: the next word at two lengths, facts at two lengths and at a share.

    Args:
      tables: rows of the study, of texts of 8,192 tokens, of facts in 1,280 and in 4,096 tokens, and with three
        quarters kept.
    """
    study, longer, facts, far, more = tables
    lines = ["| what it costs | the default | random pages |", "| --- | ---: | ---: |"]
    for rows, tokens in ((study, 2048), (longer, 8192)):
        found = compare(rows, DEFAULT, BASE, Setting(tokens=tokens))
        assert found is not None
        ours, theirs = (f"{value:+.3f}" for value in (found.loss_change, found.loss_change - found.difference))
        lines.append(
            f"| loss of the next word, nats a token ({found.texts} texts of {tokens:,} tokens) | {ours} | {theirs} |"
        )
    for rows, kept, what in (
        (facts, 0.5, "facts stated once, recalled, in texts of 1,280 tokens"),
        (far, 0.5, "the same in texts of 4,096 tokens"),
        (more, 0.75, "the same in texts of 1,280, three quarters kept"),
    ):
        lines.append(f"| {what} | {recalled(rows, DEFAULT, kept)} | {recalled(rows, BASE, kept)} |")
    return "\n".join(lines)


def largest_recall_p(rows: list[Row]) -> float:
    """Of McNemar's against random pages, over the rankings with redundancy."""
    return max(r.p for r in recall(rows) if r.p is not None and "redundancy" in r.arm)


def of_text(rows: list[Row], text: str, arm: str, what: str) -> float:
    """A field of one text's row with half of the pages kept."""
    return float(select(rows, arm)[text][what])


def by_model(rows: list[Row], model: str, what: str = "ratio", arm: str = DEFAULT) -> float:
    """The same as ``compared`` of the texts that one model wrote."""
    texts = {row["text"] for row in rows if row.get("model") == model}
    return compared([row for row in rows if row["text"] in texts], what, arm)
