"""``python -m trtllm_memshare vllm serve MODEL ...`` and ``vllm bench ...``: vLLM's own commands with MemShare.

Every option goes on to vLLM. ``vllm calibrate MODEL`` makes the model's null pages, once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtllm_memshare.child_process import exit_on_sigterm, run_to_end, shown_line
from trtllm_memshare.engine.calibrated_weights import check_weights
from trtllm_memshare.engine.null_page_build import make_null_pages
from trtllm_memshare.errors import UserError, nearest
from trtllm_memshare.json_input import parse_json
from trtllm_memshare.vllm import REQUEST_CHECK, SCHEDULER_CLASS, TESTED, WORKER_CLASS
from trtllm_memshare.vllm.null_pages import load_bands, null_page_file
from trtllm_memshare.vllm.settings import ADDITIONAL_CONFIG_KEY, CONFIG_VARIABLE, parse_settings, read_settings

_BENCHMARKS_WITH_ENGINE = ("throughput", "latency", "startup", "mm-processor")
_OURS = {
    "--memshare-config": "JSON file with settings",
    "--null-pages": "folder that vllm calibrate wrote; without it null entries are skipped",
    "--null-entries": "read, which needs null pages, or skip",
}
_HELP = """serve      vLLM's server, which gives pages up when memory is short
bench      vLLM's benchmark of such an engine: its table
calibrate  a folder with a model's null pages, to be made once

serve and bench take vLLM's own options, which vllm serve --help lists, and:
""" + "\n".join(f"  {option:<18}  {what}" for option, what in _OURS.items())
_TAKEN = ("--scheduler-cls", "--worker-cls")
_ADDITIONAL, _MAX_LENGTH, _CONFIG, _MODEL = "--additional-config", "--max-model-len", "--config", "--model"


def main(command: str, arguments: list[str]) -> None:
    """Runs ``vllm serve``, ``vllm bench`` or ``vllm calibrate``; its exit status is this process's.

    Raises:
      UserError: no such command, wrong settings, a conflict, or vLLM is not installed.
    """
    known = {"serve": _wrap, "bench": _wrap, "calibrate": _calibrate}
    if {"-h", "--help"} & set(arguments) and arguments[0] != "calibrate":
        print(f"usage: memshare {command} {{{','.join(known)}}} ...\n\n{_HELP}")
        return
    if not arguments or arguments[0] not in known:
        got = arguments[0] if arguments else "nothing"
        raise UserError(f"{command} needs serve, bench or calibrate, got {got} ({nearest(got, known)})")
    known[arguments[0]](arguments)


def engine_arguments(arguments: Sequence[str]) -> list[str]:
    """vLLM's arguments with MemShare's classes and settings in them.

    Args:
      arguments: vLLM's, with ours among them.

    Raises:
      UserError: wrong settings, or an option of vLLM that MemShare needs is set otherwise.
    """
    rest, values = _take_options(arguments, (*_OURS, _ADDITIONAL))
    given = {_option_name(argument) for argument in rest}
    for taken in _TAKEN:
        if taken in given:
            raise UserError(f"{taken} is set by MemShare (leave it out, or run vllm itself)")
    parts = sorted(name for name in given if name.startswith(f"{_ADDITIONAL}."))
    if parts:  # vLLM would take them in place of the whole
        raise UserError(f"{_ADDITIONAL} must be one JSON object beside MemShare, got {parts[0]} (write it as JSON)")
    _check_config_file(rest)
    option = "--memshare-config" if values["--memshare-config"] else CONFIG_VARIABLE
    path = values["--memshare-config"] or os.environ.get(CONFIG_VARIABLE)
    settings = read_settings(Path(path), option) if path else {}
    if values["--null-pages"]:
        settings["null_pages"] = str(Path(values["--null-pages"]).resolve())
    if values["--null-entries"]:
        settings["null_entries"] = values["--null-entries"]
    parse_settings(settings, path or "the command line")
    user: Any = parse_json(values[_ADDITIONAL] or "{}", _ADDITIONAL)
    if not isinstance(user, dict):
        raise UserError(f"{_ADDITIONAL} must be a JSON object, got {type(user).__name__}")
    if ADDITIONAL_CONFIG_KEY in user:
        raise UserError(f"{_ADDITIONAL} has {ADDITIONAL_CONFIG_KEY} already (use --memshare-config FILE instead)")
    additional = json.dumps({**user, ADDITIONAL_CONFIG_KEY: settings})
    check = ["--middleware", REQUEST_CHECK] if arguments[0] == "serve" else []
    return [*rest, *check, "--scheduler-cls", SCHEDULER_CLASS, "--worker-cls", WORKER_CLASS, _ADDITIONAL, additional]


def _check_config_file(arguments: Sequence[str]) -> None:
    """Raises UserError if the file of vLLM's ``--config`` sets what ours would replace without a word."""
    path = _take_options(arguments, (_CONFIG,))[1][_CONFIG]
    if path is None or not Path(path).is_file():
        return  # a file that is not there is vLLM's to name
    import yaml  # vLLM brings it

    try:
        settings: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # as is one that is no YAML
    for key in settings if isinstance(settings, dict) else ():
        option = f"--{str(key).replace('_', '-')}"
        if option in _TAKEN:
            raise UserError(f"{path} sets {key}, which is set by MemShare (leave it out, or run vllm itself)")
        if option == _ADDITIONAL:
            raise UserError(f"{path} sets {key}, which MemShare would replace (give it as {_ADDITIONAL} JSON)")


def _wrap(arguments: list[str]) -> None:
    environment = dict(os.environ)
    if arguments[0] == "serve" or (arguments[1:2] and arguments[1] in _BENCHMARKS_WITH_ENGINE):
        ours = engine_arguments(arguments)
        _check_null_pages(ours)
        line = [*_program(), *ours]
        environment.pop(CONFIG_VARIABLE, None)  # what its file says is in the arguments now
    else:  # a sweep starts servers, which may read the variable
        is_client = arguments[1:2] != ["forward"]
        does = "is a client, the server has the settings" if is_client else "has no scheduler, so nothing is given up"
        print(f"memshare: this benchmark {does}")
        line = [*_program(), *arguments]
    exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="memshare-metrics-") as folder:
        if arguments[0] == "serve":
            # The scheduler's process and the API server's write their metrics into one folder.
            environment.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        print(f"+ {shown_line(line)}", flush=True)
        status = run_to_end(line, environment)
    sys.exit(status)


def _check_null_pages(arguments: Sequence[str]) -> None:
    """Raises UserError for null pages that the engine core would refuse half a minute later."""
    rest, values = _take_options(arguments, (_ADDITIONAL, _MAX_LENGTH, _MODEL))
    settings, length = json.loads(values[_ADDITIONAL] or "")[ADDITIONAL_CONFIG_KEY], values[_MAX_LENGTH] or ""
    folder = settings.get("null_pages")
    # A length that is no plain number, as 8k or auto, is left to vLLM.
    load_bands(folder, int(length) if length.isdecimal() else 1)
    model = values[_MODEL] or (rest[1] if len(rest) > 1 else "")
    if folder is not None and Path(model).is_dir():  # of a hub's name the worker knows the files
        check_weights(null_page_file(folder), model, Path(model))


def _program() -> list[str]:
    """vLLM's command line: in this Python if vLLM is here, under whatever name, else on PATH."""
    found = importlib.util.find_spec("vllm")
    if found is not None and found.origin is not None:
        return [sys.executable, "-m", "trtllm_memshare.vllm.launch"]
    program = shutil.which("vllm")
    if program is None:
        raise UserError(f"vllm is not on PATH (install vLLM {TESTED}, or build its environment with make vllm)")
    return [program]


def _calibrate(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="memshare vllm calibrate", description="Makes a model's null pages, once.")
    parser.add_argument("model", help="folder of a Hugging Face checkpoint")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--max-model-len", type=int, required=True, help="positions that need a page, in tokens")
    parser.add_argument(
        "--kv-cache-dtype", "--dtype", default="auto", help="element type of the cache (default: that of the weights)"
    )
    options = parser.parse_args(arguments[1:])
    advice = "vllm serve without --null-pages serves it"
    make_null_pages(options.model, options.output, options.max_model_len, options.kv_cache_dtype, advice)


def _take_options(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """Arguments without some options, and their values."""
    rest: list[str] = []
    values: dict[str, str | None] = dict.fromkeys(names)
    pending = None
    for argument in arguments:
        name, (_, equals, attached) = _option_name(argument), argument.partition("=")
        if pending is not None:
            if argument.startswith("--"):
                break
            values[pending], pending = argument, None
        elif name in names and equals:
            values[name] = attached
        elif name in names:
            pending = name
        else:
            rest.append(argument)
    if pending is not None:
        raise UserError(f"{pending} needs a value")
    return rest, values


def _option_name(argument: str) -> str:
    """An option as vLLM reads it: with dashes, and whole where a beginning of it was written."""
    name, dot, key = argument.partition("=")[0].partition(".")
    if not name.startswith("--"):
        return argument
    name = name.replace("_", "-")
    whole = (option for option in (*_TAKEN, _ADDITIONAL) if len(name) > 2 and option.startswith(name))
    return next(whole, name) + dot + key
