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
from typing import Any

import yaml

from trtllm_memshare.child_process import exit_on_sigterm, run_to_end, shown_line, shown_options
from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.trtllm.pytorch.llm_options import describe_added, merge_options, read_yaml
from trtllm_memshare.trtllm.pytorch.settings import ENABLE, PREFIX, is_enabled, load_settings, read_values

_PROGRAMS = {"serve": "trtllm-serve", "bench": "trtllm-bench"}
_FILE_OPTIONS = ("--config", "--extra_llm_api_options")  # two names of one option


def main(command: str, arguments: list[str]) -> None:
    """Runs the command; its exit status is this process's.

    Args:
      command: serve or bench.
      arguments: TensorRT-LLM's, ``--memshare-config FILE``, and ``--null-pages FOLDER`` or ``--null-entries skip``,
        which take preset pressure.

    Raises:
      UserError: wrong settings, a conflict, or TensorRT-LLM is not installed.
    """
    arguments, config = _take_option(arguments, ("--memshare-config",))
    arguments, null_pages = _take_option(arguments, ("--null-pages",))
    arguments, null_entries = _take_option(arguments, ("--null-entries",))
    environment = {**os.environ, ENABLE: "1", **({PREFIX + "CONFIG": str(Path(config).resolve())} if config else {})}
    is_enabled(environment)
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="memshare-") as folder:
        file, origin = Path(folder) / "settings.json", environment.get(PREFIX + "CONFIG", "the command line")
        if null_pages is not None or null_entries is not None:
            file.write_text(json.dumps(with_pressure(read_values(environment), null_pages, null_entries)))
            environment[PREFIX + "CONFIG"] = str(file)
        try:
            status = _run(command, arguments, environment, Path(folder))
        except UserError as error:  # of what the user wrote, not of our copy
            raise UserError(str(error).replace(str(file), origin)) from error
    sys.exit(status)


def with_pressure(values: dict[str, Any], null_pages: str | None, null_entries: str | None) -> dict[str, Any]:
    """A file's settings with ``--null-pages FOLDER`` or ``--null-entries WAY``, which ask for preset pressure.

    Raises:
      UserError: the file has another preset or a route that forgets otherwise, or no null pages are in the folder.
    """
    preset, route = values.get("preset", "pressure"), values.get("route", "overlay")
    option = "--null-pages" if null_pages is not None else "--null-entries"
    if preset != "pressure":
        raise UserError(f"{option} is read by preset pressure, got {quote(preset)} in the settings (keep one)")
    if route != "overlay":
        raise UserError(
            f"{option} is read by route overlay, got {quote(route)} in the settings (leave the option out and set "
            f"preset pressure)"
        )
    added: dict[str, Any] = {"preset": preset}
    if null_entries is not None:
        added["null_entries"] = null_entries
    if null_pages is not None:
        added["null_pages"] = _folder_of_null_pages(null_pages)
    return {**values, **added}


def _folder_of_null_pages(folder: str) -> str:
    # Not above: it imports torch, which the launcher does without for as long as the server runs.
    from trtllm_memshare.engine.null_page_files import KEYS_FILE, read_null_pages

    path, remedy = Path(folder).resolve() / KEYS_FILE, "make it with memshare null-pages MODEL --output FOLDER"
    if not folder or not path.is_file():
        raise UserError(f"--null-pages must be a folder with {KEYS_FILE}, got {quote(folder)} ({remedy})")
    read_null_pages(path, remedy)
    return str(path.parent)


def _run(command: str, arguments: list[str], environment: dict[str, str], folder: Path) -> int:
    """Runs TensorRT-LLM's program; its exit status. ``folder``: for files that it reads meanwhile."""
    settings = load_settings(environment)
    if command == "serve" and (elsewhere := next((a for a in arguments[:1] if a.startswith("disaggregated")), None)):
        raise UserError(f"sharing excludes disaggregated serving, got serve {elsewhere} (run trtllm-serve itself)")
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
    options_file = folder / "llm_options.yaml"
    options_file.write_text(yaml.safe_dump(llm_options))
    stats_file = settings.stats_file or folder / "totals.json"
    if command == "bench":
        environment[PREFIX + "STATS_FILE"] = str(stats_file)
        _remove_earlier(stats_file)
    line = [program, *place_option(command, arguments, str(options_file))]
    print(f"memshare: {settings.title}")
    print(describe_added(own_options, route))
    print(f"LLM options: {json.dumps(shown_options(llm_options), default=str)}")
    print(f"+ {ENABLE}=1 {shown_line(line)}", flush=True)
    status = run_to_end(line, environment)
    if command == "bench" and status == 0:
        _merge_report(arguments, stats_file)
    return status


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
