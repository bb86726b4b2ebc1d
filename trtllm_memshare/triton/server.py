"""Finds a Triton server and starts it over a model repository."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.llmapi_repository import llmapi_environment
from trtllm_memshare.triton.repository import flavour_of

_STUB = "triton_python_backend_stub"
_SHM_BYTES = 256 << 20


@dataclass(frozen=True)
class Server:
    """A Triton server on this machine.

    Attributes:
      executable: ``tritonserver``.
      backends: its ``--backend-directory``, None = the server's own.
      library_dirs: for LD_LIBRARY_PATH.
      origin: where it comes from, in words.
    """

    executable: Path
    backends: Path | None
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
        return Server(named, None, (), f"{named} as asked for")
    if on_path := shutil.which("tritonserver") or _if_file("/opt/tritonserver/bin/tritonserver"):
        return Server(Path(on_path), None, (), f"{on_path} as installed")
    spec = find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "there is no tritonserver on PATH and no nvidia-pytriton wheel (run inside a Triton container, or pip "
            "install 'trtllm-memshare[triton]')"
        )
    return _server_of_wheel(Path(spec.submodule_search_locations[0]))


def server_command(server: Server, repository: Path, ports: Ports, host: str, extra: list[str]) -> list[str]:
    """Arguments that start ``server`` over ``repository``.

    Raises:
      UserError: the repository is not a folder.
    """
    if not repository.is_dir():
        raise UserError(f"no model repository at {repository} (write one with build_scripts/build_triton_repo.py)")
    command = [str(server.executable), f"--model-repository={repository.resolve()}"]
    if server.backends is not None:
        command.append(f"--backend-directory={server.backends}")
    for name, port in (("http", ports.http), ("grpc", ports.grpc), ("metrics", ports.metrics)):
        command += [f"--{name}-port={port}", f"--{name}-address={host}"]
    # A name of its own for shared memory: a second server on the machine must not find ours.
    command.append(f"--backend-config=python,shm-region-prefix-name=memshare_{ports.http}_")
    command.append(f"--backend-config=python,shm-default-byte-size={_SHM_BYTES}")
    # The model that owns the executor can then be loaded again after its process died; clients may not ask for that.
    command += ["--model-control-mode=explicit", "--load-model=tensorrt_llm"]
    if flavour_of(repository) == "engine":
        command.append("--load-model=ensemble")
    key = f"{secrets.token_hex(16)}={secrets.token_hex(16)}"
    command += [f"--http-restricted-api=model-repository:{key}", f"--grpc-restricted-protocol=model-repository:{key}"]
    if server.backends is not None:
        command.append("--allow-gpu-metrics=false")  # a CPU build has none
    return command + extra


def server_environment(server: Server, repository: Path | None = None) -> dict[str, str]:
    """This process's environment, such that the server's model processes find its libraries and this Python.

    The python backend's stub embeds an interpreter that ignores PYTHONPATH and takes its packages from the first
    ``python3`` on PATH (seen with Triton 2.51), so this one goes to the front. A ``repository`` of the flavour llmapi
    adds the variables that switch sharing on.
    """
    libraries = [str(p) for p in server.library_dirs]
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(libraries + ([inherited] if inherited else [])),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        **(llmapi_environment(repository) if repository is not None and flavour_of(repository) == "llmapi" else {}),
    }


def _server_of_wheel(package: Path) -> Server:
    """The wheel's server with a backend folder that has this Python's stub where the server looks for it."""
    root = package / "tritonserver"
    stub = root / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / _STUB
    if not stub.is_file():
        raise UserError(
            f"nvidia-pytriton has no stub for Python {sys.version.split()[0]}, expected {stub} (use 3.10 to 3.12)"
        )
    backends = Path(tempfile.gettempdir()) / f"memshare-triton-{os.getuid()}-{sys.version_info.minor}"
    target = backends / "python"
    if not (target / _STUB).is_file():
        draft = Path(tempfile.mkdtemp(dir=backends.parent))
        shutil.copytree(root / "backends" / "python", draft / "python")
        shutil.copy2(stub, draft / "python" / _STUB)
        (draft / "python" / _STUB).chmod(0o755)
        if backends.exists():
            shutil.rmtree(backends)
        draft.rename(backends)
    executable = root / "bin" / "tritonserver"
    if not os.access(executable, os.X_OK):
        executable.chmod(0o755)
    libraries = (package.parent / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR")))
    return Server(executable, backends, libraries, "the CPU build inside nvidia-pytriton")


def _if_file(path: str) -> str | None:
    return path if Path(path).is_file() else None
