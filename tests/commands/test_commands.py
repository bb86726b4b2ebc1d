"""The one command line: every command says what comes out, and what is missing is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtllm_memshare.__main__ import COMMANDS, main
from trtllm_memshare.errors import UserError

ROOT = Path(__file__).parents[2]
OURS = ("build", "bench", "explain", "calibrate", "doctor", "serve", "null-pages", "triton", "vllm")


@pytest.mark.parametrize("command", OURS)
def test_help_names_the_command_as_it_was_called(command, capsys):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0  # noqa: PT017 (argparse leaves by an exception)
    assert capsys.readouterr().out.startswith(f"usage: memshare {command} ")


def test_the_list_of_commands_says_what_comes_out(capsys):
    main([])
    printed = capsys.readouterr().out
    for name, (_, purpose) in COMMANDS.items():
        assert f"  {name:<10} {purpose}\n" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["biuld"], r"unknown command biuld \(did you mean build\?\)"),
        (["triton", "lunch"], r"unknown action lunch of memshare triton \(did you mean launch\?\)"),
        (
            ["serve", "--engine-di", "x"],
            r"unknown option --engine-di of memshare serve \(did you mean --engine-dir\?\)",
        ),
        (["serve", "--engine_dir=x"], r"unknown option --engine_dir of memshare serve \(did you mean --engine-dir\?\)"),
        (
            ["triton", "repository", "--engine-dir", "e", "--flavour", "llmapi"],
            r"--flavour llmapi needs --model, .*, in place of --engine-dir \(add --model\)",
        ),
        (["triton", "repository", "--llmapi-model-dir", "m"], "^--llmapi-model-dir is no option of --flavour engine"),
        (
            ["triton", "repository", "--flavour", "llmapi", "--model", "m", "--include-input-in-output"],
            "^--include-input-in-output is no option of --flavour llmapi",
        ),
    ],
)
def test_errors_of_users(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_what_starts_a_repository_is_a_command_that_every_install_has(tmp_path, tiny_checkpoint, capsys):
    engine, repository = str(tmp_path / "engine"), str(tmp_path / "my repository")
    main(["build", "--model-dir", str(tiny_checkpoint), "--output-dir", engine])
    main(["triton", "repository", "--engine-dir", engine, "--output-dir", repository])
    assert capsys.readouterr().out.splitlines()[-1] == f"start it: memshare triton launch '{repository}'"


@pytest.mark.parametrize(
    "command",
    [
        ["trtllm_memshare/__main__.py", "explain", "--prompt", "x"],
        ["benchmarks/inflight_batching.py", "--dataset", "benchmarks/data/demo.jsonl"],
        ["build_scripts/build_engine.py", "--memshare", "--force", "--output-dir", "build/no_torch"],
    ],
    ids=lambda command: command[0],
)
def test_a_python_without_the_packages_says_which_one_and_what_to_do(command):
    """The package is installed, nothing of torch can be imported."""
    block = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", block, *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 2
    assert "needs the package torch" in done.stderr
    assert "make venv" in done.stderr
    assert "Traceback" not in done.stderr


BARE = [["-m", "trtllm_memshare", *c] for c in ([name] for name in COMMANDS)]
BARE += [["-m", "trtllm_memshare", "triton", "repository"], ["-m", "trtllm_memshare", "serve", "--engine-dir", "x"]]
BARE += [
    [path.relative_to(ROOT).as_posix()]
    for folder in ("benchmarks", "build_scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text() and path.stem != "gpu_suite"  # which names what its steps lack
]


@pytest.mark.parametrize("command", BARE, ids=" ".join)
def test_a_python_without_any_package_says_in_one_line_what_to_do(command):
    """``-S`` leaves site-packages out, ``-s`` the user's own."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    line = [sys.executable, "-S", "-s", *command]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if command[2:] in (["triton"], ["vllm"]):
        assert done.returncode in (0, 2)
    else:
        assert done.returncode in (1, 2), done.stdout
        assert "make venv; source .venv/bin/activate" in done.stderr
    assert done.stderr.count("\n") <= 1, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["doctor", "--json"], ["--help"]], ids=" ".join)
def test_output_that_no_disk_takes_is_one_sentence(arguments):
    """Short output is still in Python's buffer when the command has ended."""
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, "-m", "trtllm_memshare", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: cannot write: No space left on device (make room, or write elsewhere)\n"
