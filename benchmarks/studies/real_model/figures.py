"""Single figures of the study, from its rows, for pages that quote them."""

from __future__ import annotations

from trtllm_memshare.evaluation.page_table import BASE, Row, compare, recall


def loss_change(rows: list[Row], arm: str) -> float:
    """Against the full cache with half of the generated pages kept, nats a token."""
    found = compare(rows, arm, BASE)
    if found is None:
        raise ValueError(f"arm {arm!r} has no two problems")
    return found.loss_change


def ratio_to_random(rows: list[Row], arm: str) -> float:
    """The change of the loss over that of random pages on the same texts."""
    found = compare(rows, arm, BASE)
    if found is None:
        raise ValueError(f"arm {arm!r} has no two problems")
    return found.ratio


def smallest_loss(rows: list[Row]) -> float:
    """Of the full cache over the texts, nats a token."""
    return min(row["loss"] for row in rows if row["arm"] == "full")


def largest_loss(rows: list[Row]) -> float:
    """Of the full cache over the texts, nats a token."""
    return max(row["loss"] for row in rows if row["arm"] == "full")


def recalled(rows: list[Row], arm: str) -> str:
    """Facts stated once that are still known with half of the pages kept, ``42 of 52``."""
    (found,) = [r for r in recall(rows) if r.arm == arm]
    return f"{found.right} of {found.asked}"
