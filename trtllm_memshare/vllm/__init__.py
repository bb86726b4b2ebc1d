"""MemShare for vLLM: pressure instead of preemption, through vLLM's own extension points.

Nothing in vLLM is changed. ``--scheduler-cls``, ``--worker-cls`` and ``--middleware`` name the classes below; modules
that import vLLM are only imported by vLLM itself.
"""

SCHEDULER_CLASS = "trtllm_memshare.vllm.scheduler.MemShareScheduler"
WORKER_CLASS = "trtllm_memshare.vllm.worker.MemShareWorker"
REQUEST_CHECK = "trtllm_memshare.vllm.request_check.RequestCheck"
TESTED = "0.32 to 0.33"
"""Releases of vLLM with which the tests have run (``build_scripts/test_vllm_release.sh``)."""


def is_tested(version: str) -> bool:
    """Whether ``version``, as vLLM tells it (0.33.0, 0.33.1+cpu), is one of ``TESTED``."""
    first, last = (int(release.removeprefix("0.")) for release in TESTED.split(" to "))
    major, minor = (*version.split("."), "")[:2]
    return major == "0" and minor.isdecimal() and first <= int(minor) <= last
