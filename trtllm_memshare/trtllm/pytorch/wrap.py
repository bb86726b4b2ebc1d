"""``python -m trtllm_memshare serve MODEL ...`` and ``bench``: TensorRT-LLM's own commands with what sharing needs.

Every option goes on to ``trtllm-serve`` or ``trtllm-bench``. Settings of the LLM API that sharing needs are laid over
the user's own file; one that says otherwise is an error, not overwritten.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from trtllm_memshare.child_process import exit_on_sigterm, run_to_end, shown_line, shown_options
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.llm_options import describe_added, merge_options, read_yaml
from trtllm_memshare.trtllm.pytorch.settings import ENABLE, PREFIX, is_enabled, load_settings

_PROGRAMS = {"serve": "trtllm-serve", "bench": "trtllm-bench"}
_FILE_OPTIONS = ("--config", "--extra_llm_api_options")  # two names of one option


def main(command: str, arguments: list[str]) -> None:
    """Runs the command; its exit status is this process's.

    Args:
      command: serve or bench.
      arguments: TensorRT-LLM's, and ``--memshare-config FILE``.

    Raises:
      UserError: wrong settings, a conflict, or TensorRT-LLM is not installed.
    """
    arguments, config = _take_option(arguments, ("--memshare-config",))
    environment = {**os.environ, ENABLE: "1", **({PREFIX + "CONFIG": str(Path(config).resolve())} if config else {})}
    is_enabled(environment)
    settings = load_settings(environment)
    _, backend = _take_option(arguments, ("--backend",))
    if backend not in (None, "pytorch"):
        raise UserError(
            f"--backend must be pytorch to share, got {backend} (leave it out, or run {_PROGRAMS[command]} itself)"
        )
    arguments, user_file = _take_option(arguments, _FILE_OPTIONS)
    own_options, route = read_yaml(Path(user_file)) if user_file else {}, settings.options.route
    llm_options = merge_options(own_options, route)
    program = shutil.which(_PROGRAMS[command])
    if program is None:
        raise UserError(
            f"{_PROGRAMS[command]} is not on PATH (install TensorRT-LLM 1.1 or later, then pip install '.[trtllm]')"
        )
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="memshare-") as folder:
        options_file = Path(folder) / "llm_options.yaml"
        options_file.write_text(yaml.safe_dump(llm_options))
        stats_file = settings.stats_file or Path(folder) / "totals.json"
        if command == "bench":
            environment[PREFIX + "STATS_FILE"] = str(stats_file)
            _remove_earlier(stats_file)
        line = [program, *place_option(command, arguments, str(options_file))]
        print(f"memshare: preset {settings.memshare.preset}{', shadow' if settings.memshare.shadow else ''}")
        print(describe_added(own_options, route))
        print(f"LLM options: {json.dumps(shown_options(llm_options), default=str)}")
        print(f"+ {ENABLE}=1 {shown_line(line)}", flush=True)
        status = run_to_end(line, environment)
        if command == "bench" and status == 0:
            _merge_report(arguments, stats_file)
    sys.exit(status)


def place_option(command: str, arguments: Sequence[str], options_file: str) -> list[str]:
    """The command's arguments with the options file; trtllm-bench takes it behind its subcommand.

    Raises:
      UserError: bench without a subcommand that runs a model, or without an end token.
    """
    option = ["--extra_llm_api_options", options_file]
    if command == "serve":
        return [*arguments, *option]
    if not any(a.partition("=")[0] == "--eos_id" for a in arguments):
        raise UserError(
            "bench needs --eos_id with the model's end token: without it trtllm-bench runs every answer to its full "
            "length, and what follows the end is repetition that no user would see"
        )
    _, policy_asked = _take_option(arguments, ("--scheduler_policy",))  # a flag beats the options file
    if policy_asked not in (None, "max_utilization"):
        raise UserError(
            f"--scheduler_policy must be max_utilization to share, got {policy_asked} (it counts a freed block as "
            f"still needed)"
        )
    for subcommand in ("throughput", "latency"):
        if subcommand in arguments:
            place = arguments.index(subcommand) + 1
            policy = ["--scheduler_policy", "max_utilization"] if subcommand == "throughput" else []
            policy = [] if policy_asked else policy
            return [*arguments[:place], *option, *policy, *arguments[place:]]
    raise UserError(f"bench needs the subcommand throughput or latency, got {shown_line(arguments) or 'nothing'}")


def _take_option(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], str | None]:
    """Arguments without an option, and its value."""
    rest, value, pending = [], None, False
    for argument in arguments:
        name, equals, attached = argument.partition("=")
        if pending:
            value, pending = argument, False
        elif name in names and equals:
            value = attached
        elif name in names:
            pending = True
        else:
            rest.append(argument)
    if pending:
        raise UserError(f"{arguments[-1]} needs a value")
    return rest, value


def _remove_earlier(stats_file: Path) -> None:
    """Removes the totals that an earlier run left: they would be taken for this one's."""
    try:
        stats_file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{PREFIX}STATS_FILE must be a file that can be replaced, got {stats_file}: {error.strerror}"
        ) from error


def _merge_report(arguments: Sequence[str], stats_file: Path) -> None:
    """Adds our totals to trtllm-bench's report under ``memshare`` and prints them."""
    if not stats_file.is_file():
        raise UserError(
            "trtllm-bench ran, but no worker reported sharing (is trtllm-memshare installed in its Python, and did a "
            "line of the log say why MemShare is off?)"
        )
    stats = json.loads(stats_file.read_text())
    _, report = _take_option(arguments, ("--report_json",))
    if report is not None and Path(report).is_file():
        document = json.loads(Path(report).read_text())
        Path(report).write_text(json.dumps({**document, "memshare": stats}, indent=4) + "\n")
        print(f"merged into {report}")
    print(json.dumps(stats))
