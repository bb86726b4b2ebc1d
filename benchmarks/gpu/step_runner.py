"""Runs commands one after the other under one deadline, keeps what each leaves, and says in a line what it found.

Needs nothing outside the standard library.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK = "ok"
_LEAST_S = 5  # a step with less is not started
_TAIL_LINES = 15  # of a step that failed: the whole of a long output would hide the other steps
_TAIL_WIDTH = 180


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
      limit_s: most seconds it may take.
      missing: why it cannot run, None = it can.
      must_say: pattern that its output must hold beside status 0; where pytest skips every test, it ends well. The last
        match is the step's headline if it has no other.
      says_all: all matches are.
      report: JSON that it writes, taken into the report whether the step ended well or not.
      headline: what of ``report`` is worth a glance; may hold several lines.
      variables: for its environment.
      keeps: files that it writes and that are copied beside the report, whatever became of the step.
      stretches: it may take beyond its limit what the steps before it left over and those after it do not need.
      modules: what it imports, for a hint at what to install.
    """

    name: str
    limit_s: float
    command: list[str]
    missing: str | None = None
    must_say: str | None = None
    report: Path | None = None
    headline: Callable[[dict[str, Any]], str] | None = None
    variables: dict[str, str] = field(default_factory=dict)
    keeps: tuple[Path, ...] = ()
    says_all: bool = False
    stretches: bool = False
    modules: tuple[str, ...] = ()


class Suite:
    """Runs steps and writes the report after each, so that nothing is lost when the time runs out.

    Args:
      work: where logs go.
      out: where the three files of the report go.
      name: of these files.
      cwd: where commands run.
      seconds: for all steps together.
      head: first entries of the report.
      grace_s: between the request to end and the end of a step that is out of time.
    """

    def __init__(
        self, work: Path, out: Path, name: str, cwd: Path, seconds: float, head: dict[str, Any], grace_s: float = 10
    ) -> None:
        self._work, self._out, self._name, self._cwd = work, out, name, cwd
        self._head, self._grace_s = head, grace_s
        self._started, self._seconds = time.monotonic(), seconds
        self._process: subprocess.Popen[bytes] | None = None
        self.rows: list[dict[str, Any]] = []
        for folder in (work, out):
            folder.mkdir(parents=True, exist_ok=True)
        for log in work.glob("*.log"):
            log.unlink()

    def run(self, step: Step, reserved_s: float = 0.0) -> None:
        """Runs a step within its limit and what is left of the time; records how it ended and prints its headline.

        Args:
          reserved_s: for the steps after it, which one that stretches leaves to them.
        """
        left = self._seconds - (time.monotonic() - self._started)
        limit = min(max(step.limit_s, left - reserved_s) if step.stretches else step.limit_s, left)
        row: dict[str, Any] = {"step": step.name, "command": " ".join(step.command)}
        if step.missing is not None:
            row.update(result="not run", note=step.missing)
        elif limit < _LEAST_S:
            row.update(result="no time left", note=f"{max(0.0, left):.0f} s of {self._seconds:.0f} left")
        else:
            print(f"-- {step.name}: at most {limit:.0f} s", flush=True)
            for written in (*step.keeps, *([step.report] if step.report else ())):
                written.unlink(missing_ok=True)  # of an earlier run
            row.update(self._execute(step, limit))
            if step.report is not None and step.report.is_file():
                self._take_report(step, row)
            for kept in filter(Path.is_file, step.keeps):
                shutil.copy(kept, self._out / f"{self._name}_{kept.name}")
        self.rows.append(row)
        self.write()
        print(f"== {step.name}: {row['result']} ({row['note']})", *row.get("tail", ()), sep="\n", flush=True)

    def write(self) -> None:
        """Rewrites the report, the table and the logs' archive."""
        document = {
            **self._head,
            "seconds": round(time.monotonic() - self._started, 1),
            "seconds_allowed": round(self._seconds, 1),
            "steps": self.rows,
        }
        _replace(self.report, json.dumps(document, indent=1) + "\n")
        _replace(self._out / f"{self._name}.txt", self.table() + "\n")
        partial = self._out / f"{self._name}.partial"
        with tarfile.open(partial, "w:gz") as archive:
            for log in sorted(self._work.glob("*.log")):
                archive.add(log, log.name)
        partial.replace(self._out / f"{self._name}_logs.tar.gz")

    def table(self) -> str:
        """A line a step, with its headline; more lines of a headline stand below."""
        lines = []
        for row in self.rows:
            first, *rest = str(row["note"]).splitlines() or [""]
            lines.append(f"{row['step']:<24} {row['result']:<13} {first}")
            lines += [f"{'':<38} {line}" for line in rest]
        return "\n".join(lines)

    @property
    def report(self) -> Path:
        """The JSON of all steps."""
        return self._out / f"{self._name}.json"

    @property
    def has_failed(self) -> bool:
        """Whether a step did not end well or did not run at all."""
        return any(row["result"] != OK for row in self.rows)

    def interrupt(self) -> None:
        """Ends the step that is under way and writes the report, for a process that was told to end."""
        if self._process is not None:
            self._grace_s = min(self._grace_s, 2)
            self._end(self._process)
        self.rows.append({"step": "suite", "command": "", "result": "interrupted", "note": "was told to end"})
        self.write()

    def _take_report(self, step: Step, row: dict[str, Any]) -> None:
        assert step.report is not None
        try:
            row["report"] = json.loads(step.report.read_text())
        except ValueError as error:  # it was ended while it wrote; the steps after it have nothing to do with that
            row.update(result="failed" if row["result"] == OK else row["result"], note=f"{row['note']}; {error}")
            return
        if step.headline is None:
            return
        try:
            figures = step.headline(row["report"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            figures = f"no headline: {type(error).__name__}: {error}"
        row["note"] = figures if row["result"] == OK else f"{row['note']}; {figures}"

    def _execute(self, step: Step, limit: float) -> dict[str, Any]:
        log, started = self._work / f"{step.name}.log", time.monotonic()
        with log.open("wb") as output:
            try:
                process = self._process = subprocess.Popen(
                    step.command, cwd=self._cwd, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env={**os.environ, **step.variables}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:  # such as a program that an earlier step should have built
                return {"result": "failed", "note": f"cannot start: {error}"}
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
                self._end(process)
        self._process = None
        text = log.read_text(errors="replace")
        tail = [line[:_TAIL_WIDTH] for line in text.splitlines()[-_TAIL_LINES:]]
        seconds = round(time.monotonic() - started, 1)
        if status is None:
            return {"result": "timed out", "note": f"limit {limit:.0f} s", "seconds": seconds, "tail": tail}
        if status:
            return {"result": "failed", "note": f"status {status}", "seconds": seconds, "tail": tail}
        found = re.findall(step.must_say, text) if step.must_say else [f"{seconds} s"]
        if not found:
            note = f"status 0, but its output does not say {step.must_say!r}"
            return {"result": "failed", "note": note, "seconds": seconds, "tail": tail}
        return {"result": OK, "note": ", ".join(found) if step.says_all else found[-1], "seconds": seconds}

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Asks the step and what it started to end, then makes them."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            try:
                process.wait(self._grace_s)
            except subprocess.TimeoutExpired:
                continue
            if number == signal.SIGTERM:
                continue  # the leader is gone; its children may be deaf to it


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
