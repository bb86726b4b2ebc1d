"""The report that a benchmark leaves: its figures with the command, the date and the machine that made them."""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.machine import describe_machine, one_line


def make_report(figures: dict[str, Any], command: str | None = None) -> dict[str, Any]:
    """``figures`` behind the command (default: this process's), today's date and this machine."""
    return {
        "command": command or " ".join(["python", *_program(), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        **figures,
    }


def document_of_runs(workload: dict[str, Any], earlier: Path | None) -> dict[str, Any]:
    """A document to which runs of one workload are added, those that a file has of it included.

    Raises:
      UserError: the file's runs are of another workload.
    """
    if earlier is None or not earlier.is_file():
        return {"workload": workload, "runs": []}
    document: dict[str, Any] = json.loads(earlier.read_text())
    for name, value in workload.items():
        if (other := document["workload"].get(name)) != value:
            raise UserError(
                f"{earlier} must have runs of the same workload, got {name} {other} in it and {value} now (name "
                f"another file)"
            )
    return document


def _program() -> list[str]:
    """How this process was started: as a file, or as ``-m`` and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]


def publish(report: dict[str, Any], output_json: Path | None) -> None:
    """Prints the machine and, as the last line, the report in JSON; writes it to ``output_json`` if that is given."""
    print(one_line(report["machine"]))
    if output_json is not None:
        write_report(report, output_json)
    print(json.dumps(report))


def write_report(report: dict[str, Any], output_json: Path) -> None:
    """Writes the report; at once or not at all, since a long benchmark writes it again after every row.

    A link is followed. What is no regular file, as ``/dev/null`` or a pipe, is written to: it must not be replaced.
    """
    text, target = json.dumps(report, indent=1) + "\n", Path(os.path.realpath(output_json))
    if target.exists() and not target.is_file():
        target.write_text(text)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text)
    partial.replace(target)
