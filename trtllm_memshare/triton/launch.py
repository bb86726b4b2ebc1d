"""Starts Triton Inference Server over a model repository and keeps it running; other options go to tritonserver.

A server whose process, or one of whose model processes, dies is started anew. SIGTERM and Ctrl-C let requests in flight
end first.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from trtllm_memshare.errors import UserError, run_command_line
from trtllm_memshare.triton.repository import flavour_of
from trtllm_memshare.triton.runtime import runtime_folder
from trtllm_memshare.triton.server import (
    Ports,
    check_ports,
    find_server,
    server_command,
    server_environment,
)
from trtllm_memshare.triton.supervisor import RestartPolicy, Supervisor


def main(command: str | None = None, arguments: list[str] | None = None) -> None:
    """The command line of ``memshare triton launch`` and ``build_scripts/launch_triton.py``."""
    defaults, policy = Ports(), RestartPolicy()
    parser = argparse.ArgumentParser(
        prog=command, description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_repository", type=Path)
    parser.add_argument("--tritonserver", type=Path, help="the executable (default: on PATH, else nvidia-pytriton's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for name in ("http", "grpc", "metrics"):
        parser.add_argument(f"--{name}-port", type=int, default=getattr(defaults, name), help="default: %(default)s")
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=policy.drain_s,
        help="how long requests in flight may take after SIGTERM (default: %(default)g)",
    )
    options, extra = parser.parse_known_args(arguments)
    if not 0 <= options.drain_seconds <= 86400:
        raise UserError(f"--drain-seconds must be between 0 and 86400, got {options.drain_seconds:g}")
    server = find_server(options.tritonserver)
    ports = Ports(options.http_port, options.grpc_port, options.metrics_port)
    check_ports(ports, options.host)
    with runtime_folder() as runtime:
        to_run = server_command(
            server, options.model_repository, ports, options.host, runtime, options.drain_seconds, extra
        )
        environment = server_environment(server, options.model_repository, runtime)
        print(f"tritonserver: {server.origin}; flavour: {flavour_of(options.model_repository)}")
        print(f"+ {shlex.join(to_run)}", flush=True)
        local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options.host, options.host)
        ready = f"http://{local}:{ports.http}/v2/health/ready"
        code = Supervisor(to_run, environment, ready, RestartPolicy(drain_s=options.drain_seconds)).run()
    sys.exit(code)


if __name__ == "__main__":
    run_command_line(main)
