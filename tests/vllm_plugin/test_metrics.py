"""What /metrics says of pressure."""

from fakes.vllm_blocks import Host
from prometheus_client import CollectorRegistry

from trtllm_memshare.vllm.metrics import Metrics
from trtllm_memshare.vllm.update import MemShareUpdate

EXACTLY = {"high_watermark": 1.0, "low_watermark": 1.0}


def report(metrics, registry, host, running):
    metrics.report(host.relief, running)
    names = ("pauses_avoided_total", "requests_at_floor", "bytes_saved_now", "retired_total")
    return [registry.get_sample_value(f"memshare_{name}") for name in names]


def test_what_is_short_is_counted_until_nobody_runs():
    registry, host = CollectorRegistry(), Host(23, min_kept=0.5, **EXACTLY)
    metrics = Metrics(100, registry)
    first = host.add("a", 4, 41)  # 40 computed: its next token opens a block, as that of b does
    running = [first, host.add("b", 4, 41)]
    taken = host.manager.block_pool.get_new_blocks(host.blocks.num_free)
    assert report(metrics, registry, host, running) == [0, 0, 0, 0]
    host.relief.begin_step(running, MemShareUpdate())
    assert report(metrics, registry, host, running) == [1, 0, 200, 2]
    host.relief.make_room([first], host.blocks.num_free + 4, MemShareUpdate())
    given = host.relief.pages("a").num_retired
    assert given == 4  # of 9, five of which stay
    freed = host.relief.totals.retired
    assert report(metrics, registry, host, running) == [1, 1, 100 * freed, freed]
    host.manager.block_pool.free_blocks(taken)
    for name in "ab":
        host.free(name)
        host.relief.remove(name)
    assert report(metrics, registry, host, ()) == [1, 0, 0, freed]


def test_a_shortage_that_floors_leave_is_no_pause_avoided():
    registry, host = CollectorRegistry(), Host(23, min_kept=1.0, **EXACTLY)
    running = [host.add("a", 4, 41), host.add("b", 4, 41)]
    host.manager.block_pool.get_new_blocks(host.blocks.num_free)
    host.relief.begin_step(running, MemShareUpdate())
    assert report(Metrics(100, registry), registry, host, running) == [0, 0, 0, 0]
