"""What only ``make nightly`` runs: what takes long, and differs in one thing from what runs every time."""

from __future__ import annotations

import os

import pytest

NIGHTLY = os.environ.get("MEMSHARE_NIGHTLY") == "1"
only_nightly = pytest.mark.skipif(not NIGHTLY, reason="takes long: run `make nightly`")


def at_night(*values: object) -> object:
    """One more set of a test's parameters, for the night alone."""
    return pytest.param(*values, marks=only_nightly)
