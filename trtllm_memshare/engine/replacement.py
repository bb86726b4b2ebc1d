"""Puts an engine directory in its place: whole or not at all, one builder at a time, nothing left behind.

While a build runs, hidden siblings of the target exist::

    .NAME.DIGEST.lock              held by the builder, removed at its end
    .NAME.DIGEST.RANDOM.building   what is being written
    .NAME.DIGEST.RANDOM.retired    the engine that was there, between two renames

A builder that was killed leaves them; the next build of that target clears them away, and puts a retired engine back
where the kill came between the two renames. NAME is cut to 40 characters, so that a long name leaves room for the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from trtllm_memshare.errors import UserError, shorten
from trtllm_memshare.json_input import read_json

_Engine = TypeVar("_Engine")
_ANOTHER = "choose another --output-dir"


@dataclass(frozen=True)
class _Place:
    """A target and its hidden siblings."""

    target: Path

    @property
    def prefix(self) -> str:
        digest = hashlib.sha256(os.fsencode(self.target.name)).hexdigest()[:8]
        return f".{self.target.name[:40]}.{digest}."

    def new(self, kind: str) -> Path:
        return self.target.parent / f"{self.prefix}{uuid.uuid4().hex[:12]}.{kind}"

    def left(self, kind: str) -> list[Path]:
        """Siblings of that kind, oldest first."""
        found = [p for p in self.target.parent.iterdir() if p.name.startswith(self.prefix) and p.suffix == f".{kind}"]
        return sorted(found, key=lambda path: path.stat().st_mtime)

    @property
    def lock(self) -> Path:
        return self.target.parent / f"{self.prefix}lock"


def replace_engine(
    output_dir: Path,
    force: bool,
    fill: Callable[[Path], None],
    read: Callable[[Path], _Engine],
    check: Callable[[_Engine], object] | None = None,
    refuse: Callable[[Path, bool], object] | None = None,
) -> _Engine:
    """Writes an engine directory: all of it, or nothing.

    Fills a hidden sibling and renames it, so that a reader sees the old engine or the new one.

    Args:
      output_dir: where the engine goes.
      force: replace an engine that is there.
      fill: makes the folder it is given, with everything in it.
      read: reads and checks an engine directory of that backend.
      check: called with the new engine before it takes its place; what it raises leaves the old one there.
      refuse: raises UserError for an ``output_dir`` that may not be replaced; None = ``check_target``.

    Raises:
      UserError: the directory exists and ``force`` is False, it is not an engine directory, another build writes to it,
        or the disk refuses.
    """
    refuse = refuse or check_target
    refuse(output_dir, force)
    made: list[Path] = []
    place = _Place(Path())
    try:
        target = output_dir.resolve()
        place = _Place(target)
        made = [parent for parent in target.parents if not parent.exists()]  # nearest first
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(place, output_dir):
            _clear_leftovers(place)
            refuse(output_dir, force)
            _fill_and_swap(place, force, fill, read, check, refuse)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        if isinstance(error, RuntimeError) and "loop" not in str(error):
            raise
        why = getattr(error, "strerror", None) or shorten(str(error))
        raise UserError(f"cannot write {shorten(str(output_dir))}: {why} ({_ANOTHER}, or make room)") from error
    finally:
        if made and not place.target.exists():
            with contextlib.suppress(OSError):  # another process may have put something there
                for parent in made:
                    parent.rmdir()
    return read(output_dir)


def check_target(output_dir: Path, force: bool) -> None:
    """Refuses an output directory that holds something else, or an engine unless ``force``."""
    shown = shorten(str(output_dir))
    try:
        if not output_dir.exists():
            return
        refuse_working_directory(output_dir)
        if output_dir.is_dir() and not any(output_dir.iterdir()):
            return
        is_engine = is_engine_dir(output_dir)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "a loop of symbolic links"
        raise UserError(f"cannot use {shown} as a directory: {why} ({_ANOTHER})") from error
    if not is_engine:
        raise UserError(f"{shown} exists and is no engine directory ({_ANOTHER})")
    if not force:
        raise UserError(f"{shown} holds an engine already (set --force to replace it, or another --output-dir)")


def refuse_working_directory(output_dir: Path) -> None:
    """Raises UserError for a directory that the command runs in: a rename would leave the shell in the old one."""
    target, here = output_dir.resolve(), Path.cwd()
    if target == here or target in here.parents:
        raise UserError(
            f"{shorten(str(output_dir))} is the directory that the command runs in, which cannot be replaced "
            f"({_ANOTHER})"
        )


def is_engine_dir(folder: Path) -> bool:
    """True for an engine, and for one that lost its memshare.json: ``--force`` may mend that too."""
    if (folder / "memshare.json").is_file():
        return True
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} != {"config.json", "model"}:
        return False
    try:
        return {"pretrained_config", "build_config"} <= set(read_json(folder / "config.json", "", ""))
    except UserError:
        return False


def find_retired(engine_dir: Path) -> Path | None:
    """The engine that a killed build has moved aside, for an error to point at; None if there is none."""
    try:
        place = _Place(engine_dir.resolve())
        return next(iter(reversed(place.left("retired"))), None)
    except (OSError, RuntimeError):
        return None


@contextlib.contextmanager
def _only_builder(place: _Place, output_dir: Path) -> Iterator[None]:
    lock = FileLock(place.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another build writes to {output_dir} (wait for it, or {_ANOTHER})") from error
    try:
        yield
    finally:
        # Removed while it is held: whoever opened the old file and comes next finds the target there, and a rename
        # onto an engine fails.
        place.lock.unlink(missing_ok=True)
        lock.release()


def _clear_leftovers(place: _Place) -> None:
    for leftover in place.left("building"):
        shutil.rmtree(leftover, ignore_errors=True)
    retired = place.left("retired")
    if retired and not place.target.exists():
        os.rename(retired.pop(), place.target)
    for leftover in retired:
        shutil.rmtree(leftover, ignore_errors=True)


def _fill_and_swap(
    place: _Place,
    force: bool,
    fill: Callable[[Path], None],
    read: Callable[[Path], _Engine],
    check: Callable[[_Engine], object] | None,
    refuse: Callable[[Path, bool], object],
) -> None:
    target, staging, retired = place.target, place.new("building"), place.new("retired")
    try:
        fill(staging)
        written = read(staging)
        if check is not None:
            check(written)
        refuse(target, force)  # a build may take hours, and somebody may have made the directory by hand
        if target.exists():
            os.rename(target, retired)
        os.rename(staging, target)
    finally:
        if retired.exists() and not target.exists():
            os.rename(retired, target)
        for leftover in (staging, retired):
            shutil.rmtree(leftover, ignore_errors=True)
