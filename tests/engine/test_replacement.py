"""Engine directories under kills, concurrent builders and strange paths: never a broken engine, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from trtllm_memshare.engine import replacement
from trtllm_memshare.engine.engine_dir import read_documents
from trtllm_memshare.engine.replacement import check_target, replace_engine
from trtllm_memshare.errors import UserError


def fill_with(text: str):
    def fill(folder: Path) -> None:
        folder.mkdir()
        (folder / "memshare.json").write_text(text)

    return fill


def read(folder: Path) -> str:
    return (folder / "memshare.json").read_text()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_nothing_but_the_engine_is_left(tmp_path):
    assert replace_engine(tmp_path / "e", False, fill_with("1"), read) == "1"
    assert replace_engine(tmp_path / "e", True, fill_with("2"), read) == "2"
    assert names(tmp_path) == ["e"]


def _build(folder: str, text: str, start, results) -> None:
    start.wait(30)
    try:
        replace_engine(Path(folder) / "e", False, fill_with(text), read)
        results.put(text)
    except UserError as error:
        results.put(f"refused: {error}")


def test_of_several_builders_one_succeeds(tmp_path):
    context = multiprocessing.get_context("fork")
    for round_number in range(5):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        start, results = context.Barrier(4), context.Queue()
        builders = [context.Process(target=_build, args=(str(folder), str(i), start, results)) for i in range(4)]
        for builder in builders:
            builder.start()
        answers = [results.get(timeout=60) for _ in builders]
        for builder in builders:
            builder.join(30)
        winners = [answer for answer in answers if not answer.startswith("refused")]
        assert len(winners) == 1, answers
        assert read(folder / "e") == winners[0]
        assert names(folder) == ["e"]


def test_a_second_builder_is_refused_while_the_first_writes(tmp_path):
    def fill(folder: Path) -> None:
        with pytest.raises(UserError, match=r"another build writes to .*e \(wait for it, or choose another"):
            replace_engine(tmp_path / "e", True, fill_with("2"), read)
        fill_with("1")(folder)

    assert replace_engine(tmp_path / "e", False, fill, read) == "1"


class KilledError(BaseException):
    """Stands for a kill: nothing of ``finally`` is to help."""


def kill_at(monkeypatch, tmp_path: Path, rename_number: int) -> None:
    """A build that is killed just before its n-th rename; clean-up does not run."""
    rename, calls = os.rename, []

    def counted(source, target):
        calls.append(source)
        if len(calls) == rename_number:
            raise KilledError
        if len(calls) > rename_number:
            raise OSError("dead")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", counted)
        patch.setattr(replacement.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises((KilledError, UserError)):
            replace_engine(tmp_path / "e", True, fill_with("new"), read)


def test_leftovers_of_a_kill_before_the_swap_are_cleared(monkeypatch, tmp_path):
    replace_engine(tmp_path / "e", False, fill_with("old"), read)
    kill_at(monkeypatch, tmp_path, 1)
    assert read(tmp_path / "e") == "old"
    assert len(names(tmp_path)) == 2
    replace_engine(tmp_path / "e", True, fill_with("newer"), read)
    assert names(tmp_path) == ["e"]


def test_a_kill_between_the_renames_loses_no_engine(monkeypatch, tmp_path):
    replace_engine(tmp_path / "e", False, fill_with("old"), read)
    kill_at(monkeypatch, tmp_path, 2)
    assert not (tmp_path / "e").exists()
    with pytest.raises(
        UserError, match=r"a build was killed while it replaced it \(move .*\.retired back, or build it"
    ):
        read_documents(tmp_path / "e")
    with pytest.raises(UserError, match="holds an engine already"):  # the old one is back
        replace_engine(tmp_path / "e", False, fill_with("newer"), read)
    assert read(tmp_path / "e") == "old"
    assert names(tmp_path) == ["e"]


def test_leftovers_of_another_engine_stay(tmp_path):
    (tmp_path / ".f.12345678.abc.building").mkdir()
    replace_engine(tmp_path / "e", False, fill_with("1"), read)
    assert names(tmp_path) == [".f.12345678.abc.building", "e"]


def _loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (lambda t: t / ("x" * 300), r"cannot (use|write) .*File name too long"),
        (lambda t: _loop(t) / "e", r"cannot (use|write) .*(symbolic links|Symlink loop)"),
        (_loop, r"cannot (use|write) .*|exists and is no engine"),
        (lambda t: Path("/proc/nowhere/e"), r"cannot write"),
        (lambda t: Path("."), r"is the directory that the command runs in"),
        (lambda t: Path(".."), r"is the directory that the command runs in"),
    ],
)
def test_places_where_no_engine_can_go(tmp_path, monkeypatch, path, message):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=message) as caught:
        replace_engine(path(tmp_path), True, fill_with("1"), read)
    assert len(str(caught.value)) < 500


def test_a_name_of_200_characters_leaves_room_for_its_siblings(tmp_path):
    assert replace_engine(tmp_path / ("x" * 200), False, fill_with("1"), read) == "1"


def test_a_directory_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "e").mkdir()

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot use .*e as a directory: Permission denied"):
        check_target(tmp_path / "e", True)
