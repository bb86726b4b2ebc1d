"""Starts Triton Inference Server over a model repository; other options go to tritonserver."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.triton.repository import flavour_of
from trtllm_memshare.triton.server import Ports, find_server, server_command, server_environment


def main(command: str | None = None, arguments: list[str] | None = None) -> None:
    """The command line of ``memshare triton launch`` and ``build_scripts/launch_triton.py``."""
    defaults = Ports()
    parser = argparse.ArgumentParser(prog=command, description=__doc__, allow_abbrev=False)
    parser.add_argument("model_repository", type=Path)
    parser.add_argument("--tritonserver", type=Path, help="the executable (default: on PATH, else nvidia-pytriton's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for name in ("http", "grpc", "metrics"):
        parser.add_argument(f"--{name}-port", type=int, default=getattr(defaults, name), help="default: %(default)s")
    options, extra = parser.parse_known_args(arguments)
    server = find_server(options.tritonserver)
    ports = Ports(options.http_port, options.grpc_port, options.metrics_port)
    to_run = server_command(server, options.model_repository, ports, options.host, extra)
    environment = server_environment(server, options.model_repository)
    print(f"tritonserver: {server.origin}; flavour: {flavour_of(options.model_repository)}")
    print(f"+ {shlex.join(to_run)}", flush=True)
    os.execve(to_run[0], to_run, environment)


if __name__ == "__main__":
    run_command_line(main)
