"""What the processes of one server share: a private folder, a turn to begin, signs of life, and an end together.

The launcher makes the folder and names it in the environment. Without the launcher (a bare ``tritonserver`` over the
repository) the model processes meet in a folder of this user, named after the server that is the parent of all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trtllm_memshare.errors import UserError

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "memshare-"

RUNTIME_VARIABLE = "MEMSHARE_RUNTIME_DIR"
SERVER_VARIABLE = "MEMSHARE_SERVER_NAME"
"""What the kernel calls the server: the first 15 characters of its executable's name."""
PACKAGE_VARIABLE = "MEMSHARE_PACKAGE_ROOT"
"""Folder that holds the launcher's package, for the model processes to use the same."""
RESTARTS_VARIABLE = "MEMSHARE_RESTARTS"
"""How often the launcher has started the server anew."""
GATE_VARIABLE = "MEMSHARE_GATE"
"""File that the launcher holds a lock on for as long as a spare server shall load nothing."""


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """A private folder for one server; what killed launchers have left behind is removed first.

    The folder's name begins the names of the server's shared memory. A lock beside that memory says that its launcher
    lives, even to a launcher in another container that sees the memory but not the folder.
    """
    for lock in _SHARED_MEMORY.glob(f"{_PREFIX}*.lock"):
        with contextlib.suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.stem)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))  # mode 700, ours alone
    draft = _SHARED_MEMORY / f"{folder.name}.draft"
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        draft.rename(draft.with_suffix(".lock"))  # another launcher that starts now must not find it unlocked
        yield folder
    finally:
        _remove(folder.name)
        os.close(descriptor)


def _remove(name: str) -> None:
    """Folder, shared memory and lock of a server that has ended."""
    folder = Path(tempfile.gettempdir()) / name
    if folder.is_dir() and folder.lstat().st_uid == os.getuid():
        shutil.rmtree(folder, ignore_errors=True)
    for path in (*_SHARED_MEMORY.glob(f"{name}_*"), _SHARED_MEMORY / f"{name}.lock"):
        path.unlink(missing_ok=True)


def shared_memory_prefix(runtime: Path, number: int) -> str:
    """What the names of a server's shared memory begin with; ``number``: of the server among the launcher's."""
    return f"{runtime.name}_{number}_"


def remove_shared_memory(runtime: Path, number: int) -> None:
    """Frees the shared memory of a server that was killed; Triton frees its own only when it ends by itself."""
    for path in _SHARED_MEMORY.glob(f"{shared_memory_prefix(runtime, number)}*"):
        path.unlink(missing_ok=True)


def wait_for_turn(prepare: Callable[[], object]) -> None:
    """Returns at once in a server that shall load its models; in a spare, when the launcher opens the gate.

    Args:
      prepare: called before the wait: imports, and nothing that would hold much memory or a GPU.
    """
    if gate := os.environ.get(GATE_VARIABLE):
        prepare()
        with open(gate) as file:
            fcntl.flock(file, fcntl.LOCK_SH)


def give_sign_of_life(model: str) -> None:
    """Tells the launcher, if there is one, that the model's process moves."""
    if folder := os.environ.get(RUNTIME_VARIABLE):
        path, now = Path(folder) / f"{model}.alive", time.monotonic()
        path.touch(mode=0o600)
        os.utime(path, (now, now))  # the clock that all processes share and nobody sets


def signs_of_life(runtime: Path) -> dict[str, float]:
    """By model, when it last gave one: seconds of ``time.monotonic``."""
    return {path.stem: path.stat().st_mtime for path in runtime.glob("*.alive")}


def private_dir(path: Path) -> Path:
    """Makes a folder that only this user can enter, or checks the one that is there.

    Raises:
      UserError: it belongs to somebody else, others can enter it, or it is a link.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            f"{path} must be a folder of user {os.getuid()} that nobody else can enter, got owner {found.st_uid} and "
            f"mode {stat.S_IMODE(found.st_mode):o} (remove it)"
        )
    return path


def socket_path() -> Path:
    """Where `ensemble` reaches the executor in the process of `tensorrt_llm`.

    Raises:
      UserError: see ``private_dir``.
    """
    if folder := os.environ.get(RUNTIME_VARIABLE):
        return private_dir(Path(folder)) / "executor.sock"
    own = private_dir(Path(tempfile.gettempdir()) / f"memshare-{os.getuid()}")
    return own / f"executor-{os.getppid()}.sock"


def end_with_parent(end: Callable[[int], None] = os._exit) -> None:
    """Ends this process when its parent, the server, has ended, or has ended already.

    Triton's stub otherwise lives on when the server is killed, and keeps its memory and its GPU. To be called before
    anything that takes long: an orphan has another parent, and sees it only by the name that the launcher has set.

    Args:
      end: called with the exit code.
    """
    parent = os.getppid()
    handle = os.pidfd_open(parent)
    expected = os.environ.get(SERVER_VARIABLE)
    known = not expected or Path(f"/proc/{parent}/comm").read_text().strip() in (expected, "tritonserver")
    if os.getppid() != parent or not known:
        end(1)

    def wait() -> None:
        select.select([handle], [], [])
        end(1)

    threading.Thread(target=wait, name="memshare-parent", daemon=True).start()
