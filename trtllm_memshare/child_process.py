"""Another program that takes this process's place: who stops this one stops it, and its status is this one's.

Its command line is shown without what nobody may read in a log.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_SECRET = re.compile(r"(^|[-_.])(api[-_]?key|key|token|secret|password)$", re.IGNORECASE)
"""Names of what nobody may read in a log: ``--api-key``, ``--hf-token``. Counts are ``tokens``, in the plural."""
_ABBREVIATED = ("--api-key", "--hf-token")  # vLLM's, which takes a beginning of a name for the whole
_HIDDEN = "***"
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # loaded here: between fork and exec nothing should be


def shown_line(line: Sequence[str]) -> str:
    """A command line as it may stand in a log: the values of keys, tokens and passwords are hidden."""
    shown, hides = list[str](), False
    for argument in line:
        name, equals, _ = argument.partition("=")
        is_option = argument.startswith("--")
        if is_option and _is_secret(name):
            hides = not equals  # vLLM takes several keys behind one option
            shown.append(f"{name}={_HIDDEN}" if equals else argument)
        else:
            hides = hides and not argument.startswith("-")
            shown.append(_HIDDEN if hides else argument)
    return " ".join(word if _HIDDEN in word else shlex.quote(word) for word in shown)


def _is_secret(option: str) -> bool:
    beginning = option.replace("_", "-")
    return bool(_SECRET.search(option)) or (len(option) > 5 and any(o.startswith(beginning) for o in _ABBREVIATED))


def shown_options(value: Any) -> Any:
    """Options of a file, as they may stand in a log; see ``shown_line``."""
    if isinstance(value, dict):
        return {k: _HIDDEN if v and _SECRET.search(str(k)) else shown_options(v) for k, v in value.items()}
    return [shown_options(v) for v in value] if isinstance(value, list) else value


def exit_on_sigterm() -> None:
    """From now on SIGTERM ends this process in order, so that its temporary files go; by default it ends at once.

    Once a program runs, ``run_to_end`` hands the signal on instead.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def end_with_parent() -> None:
    """In a child: the kernel kills it when its parent dies, whatever killed that."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_to_end(line: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a program to its end: who stops this process stops the program, which then ends in its own order.

    Args:
      line: the program and its arguments.
      environment: its variables.

    Returns:
      Its status, as a shell says it: 128 and the number of the signal that ended it, if one did.
    """
    running, early = list[subprocess.Popen[bytes]](), list[int]()  # a signal may come while the program is started

    def hand_on(number: int, _: Any) -> None:
        if running:
            running[0].send_signal(number)
        else:
            early.append(number)

    def pause(*_: Any) -> None:  # Ctrl-Z; the shell lets this process go on, and this one the program
        for program in running:
            program.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for program in running:
            program.send_signal(signal.SIGCONT)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, hand_on)
    signal.signal(signal.SIGTSTP, pause)
    # A session of its own: a terminal would send Ctrl-C to both, and servers take a second one for impatience.
    with subprocess.Popen(line, env=environment, start_new_session=True, preexec_fn=end_with_parent) as program:
        running.append(program)
        for sent in early:
            program.send_signal(sent)
        status = program.wait()
    return status if status >= 0 else 128 - status
