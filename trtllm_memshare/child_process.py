"""Another program that takes this process's place: who stops this one stops it, and its status is this one's."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence


def run_to_end(line: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a program to its end: who stops this process stops the program, which then ends in its own order.

    Args:
      line: the program and its arguments.
      environment: its variables.

    Returns:
      Its status, as a shell says it: 128 and the number of the signal that ended it, if one did.
    """
    with subprocess.Popen(line, env=environment) as program:
        for number in (signal.SIGTERM, signal.SIGINT):  # a terminal sends the latter to both
            signal.signal(number, lambda sent, _: program.send_signal(sent))
        status = program.wait()
    return status if status >= 0 else 128 - status
