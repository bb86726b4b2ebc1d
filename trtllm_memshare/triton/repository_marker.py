"""What a model repository says of itself. The launcher reads it, and needs neither torch nor YAML for that."""

from __future__ import annotations

import json
from pathlib import Path

MARKER = "memshare_repository.json"
"""A file of every repository written here; it says which flavour it is."""


def flavour_of(repository: Path) -> str:
    """``engine`` or ``llmapi``; a repository that somebody else wrote counts as ``engine``."""
    marker = repository / MARKER
    return json.loads(marker.read_text())["flavour"] if marker.is_file() else "engine"


def can_wait(repository: Path) -> bool:
    """Whether its models wait for their turn in a spare server; those of older versions and of others would load."""
    marker = repository / MARKER
    return marker.is_file() and bool(json.loads(marker.read_text()).get("can_wait"))


def holds_model(repository: Path) -> bool:
    """Whether Triton would find a model: a folder with a ``config.pbtxt``, or with a version of a model alone."""
    folders = (p for p in repository.iterdir() if p.is_dir())
    return any((f / "config.pbtxt").is_file() or any(v.name.isdecimal() for v in f.iterdir()) for f in folders)
