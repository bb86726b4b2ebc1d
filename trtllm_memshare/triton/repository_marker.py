"""What a model repository says of itself. The launcher reads it, and needs neither torch nor YAML for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.json_input import read_json

MARKER = "memshare_repository.json"
"""A file of every repository written here; it says which flavour it is."""
_REMEDY = "write the repository again with memshare triton repository --force"


def flavour_of(repository: Path) -> str:
    """``engine`` or ``llmapi``; a repository that somebody else wrote counts as ``engine``."""
    return str(_read(repository)["flavour"])


def can_wait(repository: Path) -> bool:
    """Whether its models wait for their turn in a spare server; those of older versions and of others would load."""
    return bool(_read(repository).get("can_wait"))


def _read(repository: Path) -> dict[str, Any]:
    """What the marker says; raises UserError for a damaged one."""
    marker = repository / MARKER
    if not marker.is_file():
        return {"flavour": "engine"}
    found = read_json(marker, "the model repository", _REMEDY)
    if found.get("flavour") not in ("engine", "llmapi"):
        raise UserError(f"{marker} must say flavour engine or llmapi, got {quote(found.get('flavour'))} ({_REMEDY})")
    return found


def holds_model(repository: Path) -> bool:
    """Whether Triton would find a model: a folder with a ``config.pbtxt``, or with a version of a model alone."""
    folders = (p for p in repository.iterdir() if p.is_dir())
    return any((f / "config.pbtxt").is_file() or any(v.name.isdecimal() for v in f.iterdir()) for f in folders)
