"""MemShare for vLLM: pressure instead of preemption, through vLLM's own extension points.

Nothing in vLLM is changed. ``--scheduler-cls``, ``--worker-cls`` and ``--middleware`` name the classes below; modules
that import vLLM are only imported by vLLM itself.
"""

SCHEDULER_CLASS = "trtllm_memshare.vllm.scheduler.MemShareScheduler"
WORKER_CLASS = "trtllm_memshare.vllm.worker.MemShareWorker"
REQUEST_CHECK = "trtllm_memshare.vllm.request_check.RequestCheck"
TESTED = "0.32 to 0.33"
"""Releases of vLLM with which the tests have run (``build_scripts/test_vllm_release.sh``)."""
