"""The study's table, and figures that pages quote."""

from __future__ import annotations

from benchmarks.studies.fp8_cache.__main__ import ARMS
from benchmarks.studies.real_model import figures
from trtllm_memshare.evaluation.page_table import Comparison, Row, Setting, compare
from trtllm_memshare.report.real_model import p_value

_BYTES = {"bfloat16": 2, "fp8": 1}
_WHOLE = Setting(1.0)


def costs(rows: list[Row]) -> str:
    """Each type and share: changes against the whole cache in float32, p against the whole one in bfloat16.

    Memory is that of generated tokens, the mean over a text.
    """
    lines = [
        "| cache | of the generated pages are kept | memory | Δ loss | p | KL | same top token |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, kept in ARMS:
        c = _compared(rows, name, kept)
        share = c.memory_share * _BYTES[name] / _BYTES["bfloat16"]
        p = "" if (name, kept) == ARMS[0] else p_value(c.p)
        lines.append(
            f"| {name} | {kept:.0%} | {share:.0%} | {c.loss_change:+.4f} ± {c.loss_error:.4f} | {p} | "
            f"{c.divergence:.4f} | {c.agreement:.1%} |"
        )
    return "\n".join(lines)


def cost(rows: list[Row], name: str, kept: float) -> float:
    """Change of the loss of an arm, nats a token."""
    return _compared(rows, name, kept).loss_change


def between(rows: list[Row], what: str, kept: float, other: float) -> float:
    """A field of ``Comparison`` of fp8 with bfloat16 at another share kept."""
    found = compare(rows, "fp8", "bfloat16", Setting(kept), Setting(other))
    if found is None:
        raise ValueError(f"fp8 at {kept:.0%} and bfloat16 at {other:.0%} have no two problems in common")
    return float(getattr(found, what))


def recalled(tables: list[list[Row]], arm: str) -> str:
    """Facts that an arm recalls, of those that the whole cache in bfloat16 does: ``42 of 52``.

    Args:
      tables: rows of facts in bfloat16 and in fp8.
      arm: name of a row's arm, with ``fp8-`` before it for those in fp8.
    """
    return figures.recalled(_joined(tables), arm)


def recall_p(tables: list[list[Row]], arm: str, other: str) -> float:
    """Of the same number of facts by both arms, by signs of texts."""
    return figures.recall_p(_joined(tables), arm, other)


def _joined(tables: list[list[Row]]) -> list[Row]:
    plain, eight = tables
    return [*plain, *({**row, "arm": f"fp8-{row['arm']}"} for row in eight)]


def _compared(rows: list[Row], name: str, kept: float) -> Comparison:
    found = compare(rows, name, "bfloat16", Setting(kept), _WHOLE)
    if found is None:
        raise ValueError(f"{name} at {kept:.0%} has no two problems")
    return found
