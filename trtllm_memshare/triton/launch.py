"""Starts Triton Inference Server over a model repository and keeps it running; other options go to tritonserver.

A server whose process, or one of whose model processes, dies or stands still is started anew. SIGTERM and Ctrl-C let
requests in flight end first.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from trtllm_memshare.errors import UserError, run_command_line
from trtllm_memshare.triton.repository_marker import can_wait, flavour_of
from trtllm_memshare.triton.runtime import runtime_folder
from trtllm_memshare.triton.server import (
    Ports,
    check_ports,
    find_server,
    server_command,
    server_environment,
)
from trtllm_memshare.triton.server_process import ServerPlan
from trtllm_memshare.triton.supervisor import RestartPolicy, Supervisor


def main(prog: str | None = None, arguments: list[str] | None = None) -> None:
    """The command line of ``memshare triton launch`` and ``build_scripts/launch_triton.py``."""
    defaults, policy = Ports(), RestartPolicy()
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
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
    parser.add_argument(
        "--max-stall",
        type=float,
        default=policy.max_stall_s,
        help="seconds without a step, or without any sign of life of a model process, after which the server is "
        "started anew (default: %(default)g)",
    )
    parser.add_argument(
        "--spare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep a second server that has done its imports and loaded nothing, for a quick start after a crash: "
        "about 0.5 GB of memory (default: yes)",
    )
    options, extra = parser.parse_known_args(arguments)
    if not 0 <= options.drain_seconds <= 86400:
        raise UserError(f"--drain-seconds must be between 0 and 86400, got {options.drain_seconds:g}")
    if not 5 <= options.max_stall <= 86400:
        raise UserError(f"--max-stall must be between 5 and 86400, got {options.max_stall:g}")
    server = find_server(options.tritonserver)
    ports = Ports(options.http_port, options.grpc_port, options.metrics_port)
    check_ports(ports, options.host)
    with runtime_folder() as runtime:

        def command(number: int) -> list[str]:
            return server_command(
                server, options.model_repository, ports, options.host, runtime, options.drain_seconds, extra, number
            )

        to_run = command(0)
        environment = server_environment(server, options.model_repository, runtime)
        print(f"tritonserver: {server.origin}; flavour: {flavour_of(options.model_repository)}")
        print(f"+ {shlex.join(to_run)}", flush=True)
        local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options.host, options.host)
        ready = f"http://{local}:{ports.http}/v2/health/ready"
        plan = ServerPlan(command, environment, ready, runtime, options.spare and can_wait(options.model_repository))
        policy = RestartPolicy(drain_s=options.drain_seconds, max_stall_s=options.max_stall)
        code = Supervisor(plan, policy).run()
    sys.exit(code)


if __name__ == "__main__":
    run_command_line(main)
