"""The study of pages in tables of Markdown: those of its page, filled from its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trtllm_memshare.evaluation.page_arms import ANEW, DEFAULT, FORESEEN
from trtllm_memshare.evaluation.page_study import BY_HEAD, PRESETS
from trtllm_memshare.evaluation.page_table import (
    BASE,
    Comparison,
    Row,
    Setting,
    compare,
    leave_one_out,
    loss_by_position,
    recall,
    select,
)

LABELS = {
    "random": "random pages",
    "random-once": "random pages, one draw a page",
    ANEW: "random pages, one draw a question",
    "attention-redundancy": "attention since written, redundancy of K",
    "attention-redundancy-recency": "attention, redundancy of K, recency",
    "redundancy-k": "redundancy of K",
    "redundancy-v": "redundancy of V",
    "redundancy-signature": "redundancy from signatures",
    "attention-redundancy-signature": "attention since written, redundancy from signatures",
    "redundancy-recency-signature": "redundancy from signatures, recency",
    "surprisal-redundancy": "surprisal, redundancy of K",
    "surprisal-led-signature": "surprisal, redundancy from signatures",
    "surprisal-led-recency-signature": "surprisal, redundancy from signatures, recency",
    "attention-surprisal-redundancy": "attention, surprisal, redundancy of K",
    "rkv": "R-KV by page",
    "snapkv": "SnapKV by page",
    "streaming": "streaming (the oldest go)",
    "paper-alias": "`paper`, aliased",
    "paper-null": "`paper`, null page",
    "aligned": "`aligned` preset",
    "attention-by-head": "attention since written, by token and head",
    FORESEEN: "attention to come, which nobody knows",
    "full": "full cache",
}
_NO_RANKINGS = (BASE, "random-once", ANEW, "full", *PRESETS, BY_HEAD, FORESEEN, "paper-alias", "paper-null")
RANKINGS = [name for name in LABELS if name not in _NO_RANKINGS]
_HALF = Setting()
_FEWEST_TEXTS = 10
_ON_AXES = (BASE, "attention-redundancy")
_BY_POSITION = (BASE, "attention-redundancy", DEFAULT, "paper-null", "paper-alias")


def main_table(rows: list[Row], setting: Setting = _HALF) -> str:
    """All arms that have rows, beside random pages on the same texts.

    ``kept``: generated pages held, as a share of those written, averaged over the steps at which a page is completed.
    """
    unlimited = replace(setting, min_kept=1.0)  # a preset has no budget: it shares what it finds
    settings = {arm: (unlimited, setting) if arm in PRESETS else (setting, None) for arm in LABELS}
    found = [c for arm, of_arm in settings.items() if (c := compare(rows, arm, BASE, *of_arm)) is not None]
    lines = [
        "| what goes | texts | kept | Δ loss | against random pages | p | "
        "KL | against random pages | p | same top token |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for c in sorted(found, key=lambda c: c.ratio):
        lines.append(
            f"| {LABELS[c.arm]} | {c.texts} | {c.memory_share:.0%} | "
            f"{c.loss_change:+.4f} ± {c.loss_error:.4f} | {_difference(c)} | "
            f"{c.divergence:.4f} | {_divergence(c)} | {c.agreement:.1%} |"
        )
    return "\n".join(lines)


def long_table(rows: list[Row], tokens: int, min_kept: float = 0.5) -> str:
    """The same for texts of another length."""
    return main_table(rows, Setting(min_kept, tokens=tokens))


def length_table(tables: list[list[Row]]) -> str:
    """What longer texts cost beside the same texts at the study's length: arms that have ten of both.

    Args:
      tables: rows of several lengths, those of the study's among them.
    """
    rows = [row for table in tables for row in table]
    lengths = sorted({row["tokens"] for row in rows if row["tokens"] > _HALF.tokens})
    lines = [
        f"| tokens, beside {_HALF.tokens:,} | what goes | texts | Δ loss | difference | p | KL | difference | p |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tokens in lengths:
        for arm in LABELS:
            c = compare(rows, arm, arm, Setting(tokens=tokens), _HALF)
            if c is not None and c.texts >= _FEWEST_TEXTS:
                lines.append(
                    f"| {tokens:,} | {LABELS[arm]} | {c.texts} | {c.loss_change:+.4f} | "
                    f"{_difference(c, True)} | {c.divergence:.4f} | {_divergence(c, True)} |"
                )
    return "\n".join(lines)


def axes_table(rows: list[Row]) -> str:
    """Other shares kept and longer pages, each arm beside random pages on its own texts."""
    lines = [
        "| kept | tokens a page | what goes | texts | Δ loss | KL | against random pages | p |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    settings = {(r["min_kept"], r["tokens_per_block"], r["tokens"]) for r in rows if "min_kept" in r}
    for kept, size, tokens in sorted(settings):
        setting = Setting(kept, size, tokens)
        if setting == Setting():
            continue
        for arm in LABELS:
            if (c := compare(rows, arm, BASE, setting)) is not None:
                lines.append(
                    f"| {kept:.0%} | {size} | {LABELS[arm]} | {c.texts} | {c.loss_change:+.4f} ± {c.loss_error:.4f} | "
                    f"{c.divergence:.4f} | {_difference(c)} |"
                )
    return "\n".join(lines)


def answers(rows: list[Row]) -> str:
    """The questions that the study was made for, each with its p-value."""
    lines = [
        "| question | texts | difference of Δ loss | p | difference of KL | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]

    def add(question: str, c: Comparison | None) -> None:
        if c is not None:
            lines.append(
                f"| {question} | {c.texts} | {c.difference:+.4f} ± {c.difference_error:.4f} ({c.ratio:.2f} of it) | "
                f"{p_value(c.p)} | {_divergence(c, always=True)} |"
            )

    chosen = leave_one_out(rows, [arm for arm in RANKINGS if len(select(rows, arm)) == len(select(rows, BASE))])
    if chosen is not None:
        add("the ranking chosen on all other problems, against random pages, 50 % kept", chosen[0])
    for arm, named in (("attention-redundancy", "attention with redundancy"), (DEFAULT, "the default")):
        for kept in (0.25, 0.75):
            add(f"{named} against random pages, {kept:.0%} kept", compare(rows, arm, BASE, Setting(kept)))
    for arm in ("attention-redundancy-recency", "attention-redundancy", "snapkv", "streaming"):
        add(f"the default against {LABELS[arm]}", compare(rows, DEFAULT, arm))
    add("the alias against the null page, `paper`'s choice", compare(rows, "paper-alias", "paper-null"))
    for size in (32, 64):
        for arm in _ON_AXES:
            c = compare(rows, arm, arm, Setting(0.5, size), Setting())
            add(f"pages of {size} against 16, {LABELS[arm]}", c)
    add("random pages, one draw a page, against a new draw each time", compare(rows, "random-once", BASE))
    return "\n".join(lines)


def position_table(rows: list[Row], arms: tuple[str, ...] = _BY_POSITION) -> str:
    """Change of the loss by position, 50 % kept, pages of 16."""
    by_arm = {arm: loss_by_position(select(rows, arm).values()) for arm in arms}
    buckets = sorted({bucket for found in by_arm.values() for bucket in found})
    lines = [f"| from token | {' | '.join(map(str, buckets))} |", f"| --- | {' | '.join('---:' for _ in buckets)} |"]
    for arm, found in by_arm.items():
        cells = [f"{found[b]:+.3f}" if b in found else "-" for b in buckets]
        lines.append(f"| {LABELS[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recall_table(rows: list[Row], min_kept: float = 0.5) -> str:
    """Recall of facts stated once, over all kinds and by kind."""
    found = recall(rows, min_kept)
    kinds = list(found[0].by_kind)
    lines = [
        f"| what goes | recalled | 95 % | {' | '.join(kinds)} | p against random |",
        f"| --- | ---: | --- | {' | '.join('---:' for _ in kinds)} | ---: |",
    ]
    for r in found:
        pairs = [r.by_kind.get(kind) for kind in kinds]
        cells = " | ".join("-" if pair is None else f"{pair[0]}/{pair[1]}" for pair in pairs)
        p = "" if r.p is None or r.arm == "full" else p_value(r.p)
        lines.append(f"| {LABELS[r.arm]} | {r.right} of {r.asked} | {r.low:.2f} to {r.high:.2f} | {cells} | {p} |")
    return "\n".join(lines)


def distance_table(rows: list[Row], min_kept: float = 0.5) -> str:
    """Recall by tokens from the statement to the end of the text; of texts beyond 2,048 tokens by its quarters."""
    tokens = max(row["tokens"] for row in rows)
    quarters = tuple(tokens * part // 4 for part in (1, 2, 3, 4))
    found = recall(rows, min_kept, quarters) if tokens > 2048 else recall(rows, min_kept)
    bounds = sorted({bound for r in found for bound in r.by_distance})
    heads = [f"to {bound}" if bound < 10**6 else "farther" for bound in bounds]
    lines = [f"| what goes | {' | '.join(heads)} |", f"| --- | {' | '.join('---:' for _ in bounds)} |"]
    for r in found:
        pairs = [r.by_distance.get(bound) for bound in bounds]
        cells = ["-" if pair is None else f"{pair[0]}/{pair[1]}" for pair in pairs]
        lines.append(f"| {LABELS[r.arm]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def loops_table(rows: list[Row]) -> str:
    """What a preset holds of endless repeats, and what becomes of the text around them."""
    lines = [
        "| passage | tokens | pages before | written in it | halfway | at its end | "
        "why those of the second half stay | loss before | in it | after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for r in rows:
        losses = (r["loss_change_before"], r["loss_change_in_loop"], r["loss_change_after"])
        lines.append(
            f"| {r['passage']} | {r['passage_tokens']} | {r['pages_before']} | {r['pages_written_in_loop']} | "
            f"{r['pages_held_halfway']} | {r['pages_held_at_its_end']} | "
            f"{', '.join(f'{count} {reason}' for reason, count in r['second_half_stays'].items())} | "
            f"{' | '.join(f'{x:+.4f}' for x in losses)} |"
        )
    return "\n".join(lines)


def _difference(c: Comparison, always: bool = False) -> str:
    if c.arm == BASE and not always:
        return "| "
    return f"{c.difference:+.4f} ± {c.difference_error:.4f} | {p_value(c.p)}"


def _divergence(c: Comparison, always: bool = False) -> str:
    if c.arm == BASE and not always:
        return "| "
    return f"{c.divergence_difference:+.4f} ± {c.divergence_error:.4f} | {p_value(c.divergence_p)}"


def p_value(p: float) -> str:
    """As tables show it."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def summary(rows: list[Row], recall_rows: list[Row]) -> dict[str, Any]:
    """What the page is about in numbers, for the last line of a command."""
    return {
        "texts": len({r["text"] for r in rows}),
        "problems": len({r["problem"] for r in rows}),
        "models": sorted({r["model"] for r in rows}),
        "questions": recall(recall_rows)[0].asked if recall_rows else 0,
    }
