"""Finds a Triton server and starts it over a model repository."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import trtllm_memshare
from trtllm_memshare.errors import UserError, quote, shorten
from trtllm_memshare.triton.repository_marker import flavour_of, holds_model
from trtllm_memshare.triton.runtime import (
    PACKAGE_VARIABLE,
    RUNTIME_VARIABLE,
    SERVER_VARIABLE,
    shared_memory_prefix,
)

_STUB = "triton_python_backend_stub"
_SHM_BYTES = 64 << 20  # of each model process; all of it is allocated at the start, and it grows when needed


@dataclass(frozen=True)
class Server:
    """A Triton server on this machine.

    Attributes:
      executable: ``tritonserver``.
      backend_files: what its python backend consists of; empty = the server knows where its backends are.
      library_dirs: for LD_LIBRARY_PATH.
      origin: where it comes from, in words.
    """

    executable: Path
    backend_files: tuple[Path, ...]
    library_dirs: tuple[Path, ...]
    origin: str


@dataclass(frozen=True)
class Ports:
    """TCP ports of the three endpoints."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


def find_server(named: Path | None = None) -> Server:
    """The server that was named, or the one on PATH, or the CPU build inside the nvidia-pytriton wheel.

    Raises:
      UserError: there is none; the message says how to get one.
    """
    if named is not None:
        if not named.is_file():
            raise UserError(f"--tritonserver must name the server's executable, got {named}, which is not a file")
        return Server(named, (), (), f"{named} as asked for")
    if on_path := shutil.which("tritonserver") or _if_file("/opt/tritonserver/bin/tritonserver"):
        return Server(Path(on_path), (), (), f"{on_path} as installed")
    spec = find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "there is no tritonserver on PATH and no nvidia-pytriton wheel (run inside a Triton container, or pip "
            "install '.[triton]')"
        )
    return _server_of_wheel(Path(spec.submodule_search_locations[0]))


def server_command(
    server: Server,
    repository: Path,
    ports: Ports,
    host: str,
    runtime: Path,
    drain_s: float,
    extra: list[str],
    number: int = 0,
) -> list[str]:
    """Arguments that start ``server`` over ``repository``.

    Every model of the repository is loaded, and the model control mode that is left at its default keeps clients from
    loading or unloading any.

    Args:
      runtime: folder of this start; the python backend is laid out in it if the server does not bring its own.
      drain_s: how long requests in flight may take after SIGTERM.
      extra: options for tritonserver.
      number: of the server among the launcher's.

    Raises:
      UserError: the repository is not a folder or holds no model, or an option would blind the supervisor.
    """
    if not repository.is_dir():
        raise UserError(f"no model repository at {repository} (write one with memshare triton repository)")
    if not holds_model(repository):  # Triton would be ready at once, and know no model that a client asks for
        raise UserError(
            f"a model repository must hold at least one model, got {shorten(str(repository))} with none (write one "
            f"with memshare triton repository, and name its --output-dir)"
        )
    for option in extra:
        if option.startswith(("--allow-http", "--model-control-mode", "--exit-timeout-secs")):
            raise UserError(f"{option.partition('=')[0]} belongs to the launcher, got {option} (leave it out)")
    command = [str(server.executable), f"--model-repository={repository.resolve()}"]
    if server.backend_files:
        folder = runtime / "backends" / "python"
        folder.mkdir(parents=True, exist_ok=True)
        for path in server.backend_files:
            if not (folder / path.name).is_symlink():
                (folder / path.name).symlink_to(path)
        command.append(f"--backend-directory={folder.parent}")
        command.append("--allow-gpu-metrics=false")  # a CPU build has none
    for name, port in (("http", ports.http), ("grpc", ports.grpc), ("metrics", ports.metrics)):
        command += [f"--{name}-port={port}", f"--{name}-address={host}"]
    # A name of its own for shared memory: a second server on the machine must not find ours.
    command.append(f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix(runtime, number)}")
    command.append(f"--backend-config=python,shm-default-byte-size={_SHM_BYTES}")
    command.append(f"--exit-timeout-secs={drain_s:.0f}")
    if flavour_of(repository) == "engine":
        # Our configurations are complete; otherwise every model process would be started twice.
        command.append("--disable-auto-complete-config")
    return command + extra


def check_ports(ports: Ports, host: str) -> None:
    """Refuses ports that cannot be listened on. Raises UserError: names the port."""
    for name in ("http", "grpc", "metrics"):
        check_port(f"--{name}-port", host, getattr(ports, name))


def check_port(option: str, host: str, port: int) -> None:
    """Refuses a port that something listens on, and what is no port or address, before anything is loaded.

    Raises:
      UserError: names the port.
    """
    if not host:
        raise UserError("--host must be an address, got none (127.0.0.1, or 0.0.0.0 for all of this machine's)")
    if not 0 <= port <= 65535:
        raise UserError(f"{option} must be between 0 and 65535, got {quote(port)}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{option} {port} on {shorten(host)} cannot be used: {error.strerror} (stop what listens there, or "
                f"choose another one)"
            ) from error
        except (TypeError, ValueError) as error:  # a NUL; a name that has no form in a name server's letters
            raise UserError(
                f"--host must be an address or a host's name, got {quote(host)} (127.0.0.1, or 0.0.0.0 for all of "
                f"this machine's)"
            ) from error


def server_environment(server: Server, repository: Path, runtime: Path) -> dict[str, str]:
    """This process's environment, such that the server's model processes find its libraries and this Python.

    The python backend's stub embeds an interpreter that ignores PYTHONPATH and takes its packages from the first
    ``python3`` on PATH (seen with Triton 2.51), so this one goes to the front. A ``repository`` of the flavour llmapi
    adds the variables that switch sharing on. ``runtime``: the folder where model processes meet.
    """
    sharing: dict[str, str] = {}
    if flavour_of(repository) == "llmapi":
        # Imported here: it needs what reads settings and YAML, and the doctor looks for a server without either.
        from trtllm_memshare.triton.llmapi_repository import llmapi_environment

        sharing = llmapi_environment(repository)
    libraries = [str(p) for p in server.library_dirs]
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(libraries + ([inherited] if inherited else [])),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        RUNTIME_VARIABLE: str(runtime),
        SERVER_VARIABLE: server.executable.resolve().name[:15],
        PACKAGE_VARIABLE: str(Path(trtllm_memshare.__file__).parents[1]),
        **sharing,
    }


def _server_of_wheel(package: Path) -> Server:
    """The wheel's server with the stub of this Python."""
    root = package / "tritonserver"
    stub = root / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / _STUB
    if not stub.is_file():
        raise UserError(
            f"nvidia-pytriton has no stub for Python {sys.version.split()[0]}, expected {stub} (use 3.10 to 3.12)"
        )
    executable = root / "bin" / "tritonserver"
    for path in (executable, stub):
        if not os.access(path, os.X_OK):
            path.chmod(0o755)
    files = (stub, *(p for p in (root / "backends" / "python").iterdir() if p.is_file()))
    libraries = (package.parent / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR")))
    return Server(executable, files, libraries, "the CPU build inside nvidia-pytriton")


def _if_file(path: str) -> str | None:
    return path if Path(path).is_file() else None
