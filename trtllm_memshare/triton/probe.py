"""Whether a deployment works, for container health checks: exit code 0 or 1, and one line that says why.

``--ready``: the server and each of its models would take a request now. ``--live``: the server answers, and its
executor does not stand still with requests in flight; a container that fails this should be started anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request

from trtllm_memshare.triton.local_http import open_local

_STALLED = "memshare_seconds_since_step"


def main() -> None:
    """The command line of ``python -m trtllm_memshare.triton.probe``."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--ready", action="store_true")
    kind.add_argument("--live", action="store_true")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--timeout", type=float, default=3.0, help="of one call, seconds (default: %(default)g)")
    parser.add_argument(
        "--max-stall", type=float, default=120.0, help="seconds without a step that are too many (default: %(default)g)"
    )
    options = parser.parse_args()
    server = f"http://{options.host}:{options.http_port}"
    if options.ready:
        problem = why_not_ready(server, options.timeout)
    else:
        metrics = f"http://{options.host}:{options.metrics_port}/metrics"
        problem = why_not_alive(server, metrics, options.max_stall, options.timeout)
    print(problem or "ok")
    sys.exit(bool(problem))


def why_not_ready(server: str, timeout: float) -> str:
    """Empty if ``server``, an address such as ``http://127.0.0.1:8000``, and all its models are ready."""
    try:
        _get(f"{server}/v2/health/ready", timeout)
        request = urllib.request.Request(f"{server}/v2/repository/index", b"{}", method="POST")
        with open_local(request, timeout=timeout) as response:
            models = json.load(response)
    except (OSError, ValueError) as error:
        return f"the server is not ready: {error}"
    waiting = [m["name"] for m in models if m.get("state") != "READY"]
    if not models or waiting:
        return f"models are not ready: {', '.join(waiting) or 'none is there'}"
    return ""


def why_not_alive(server: str, metrics: str, max_stall_s: float, timeout: float) -> str:
    """Empty if the server answers and its executor made a step in time, or has nothing to do."""
    try:
        _get(f"{server}/v2/health/live", timeout)
        lines = _get(metrics, timeout).splitlines()
    except OSError as error:
        return f"the server does not answer: {error}"
    stalls = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(_STALLED)]
    longest = max(stalls, default=0.0)
    return f"the executor is in one step for {longest:.0f} s" if longest > max_stall_s else ""


def _get(url: str, timeout: float) -> str:
    with open_local(url, timeout=timeout) as response:
        text: str = response.read().decode(errors="replace")
        return text


if __name__ == "__main__":
    main()
