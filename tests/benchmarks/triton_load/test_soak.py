"""The parts of the soak and of the comparison: how requests are judged, what is a fault, how rounds are summed up."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from benchmarks.triton_load.clients import Clients, Closing, Ends, ask
from benchmarks.triton_load.cost import Round, summary
from benchmarks.triton_load.crashes import faults_of, growth
from benchmarks.triton_load.server import runtime_name

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp, which tritonclient brings, is not installed")
web = pytest.importorskip("aiohttp.web")

WENT_AWAY = "the model tensorrt_llm went away while it worked on this request (send it again)"
ANSWERS = {
    "whole": b'{"finish_reason":"length","text_output":"a"}',
    "streamed": b'data: {"finish_reason":"","text_output":"a"}\n\ndata: {"finish_reason":"stop","text_output":""}\n\n',
    "told": b'{"error":"%s"}' % WENT_AWAY.encode(),
    "told in a stream": b'data: {"finish_reason":""}\n\ndata: {"error":"%s"}\n\n' % WENT_AWAY.encode(),
    "cut": b'data: {"finish_reason":""}\n\n',
    "cut in a line": b'data: {"finish_re',
    "empty": b"",
    "odd": b'{"something":1}',
    "long": b'data: {"finish_reason":""}\n\n' * 50,
}


async def serve(handler, then):
    """Runs ``then(url)`` beside a server whose every endpoint is ``handler``."""
    app = web.Application()
    app.router.add_post("/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await (site := web.TCPSite(runner, "127.0.0.1", 0)).start()
    try:
        return await then(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("answer", "kind", "end"),
    [
        ("whole", "whole", "answered"),
        ("streamed", "stream", "answered"),
        ("told", "whole", "told why"),
        ("told in a stream", "stream", "told why"),
        ("cut", "stream", "closed"),
        ("cut in a line", "stream", "closed"),
        ("empty", "whole", "closed"),
        ("odd", "whole", "unclear"),
        ("long", "leaves", "client left"),
    ],
)
def test_every_request_ends_in_one_way(answer, kind, end):
    async def handler(request):
        asked = await request.json()
        assert asked.get("stream", False) is (kind != "whole")
        return web.Response(body=ANSWERS[answer], status=400 if answer == "told" else 200)

    async def then(url):
        async with aiohttp.ClientSession() as session:
            return await ask(session, url, kind, {"text_input": "a", "max_tokens": 5})

    found, reason = asyncio.run(serve(handler, then))
    assert found == end
    assert (reason == WENT_AWAY) is (end == "told why")
    assert bool(reason) is (end not in ("answered", "client left"))  # a closed one says how it closed


def test_a_server_that_is_not_there_and_one_that_never_answers():
    over = asyncio.Event()

    async def handler(request):
        await over.wait()  # the server waits for its handlers when it ends
        return web.Response()

    async def then(url):
        timeout = aiohttp.ClientTimeout(total=0.3)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            hung = await ask(session, url, "whole", {"max_tokens": 5})
            over.set()
            return hung[0], (await ask(session, "http://127.0.0.1:1", "whole", {}))[0]

    assert asyncio.run(serve(handler, then)) == ("no end", "closed")


def test_clients_ask_until_the_time_is_up():
    async def handler(request):
        await asyncio.sleep(0.01)
        return web.Response(body=ANSWERS["streamed" if "stream" in request.path else "whole"])

    async def then(url):
        clients = Clients(url, ["a", "b"], 5)
        await clients.run(time.monotonic() + 0.3)
        return clients.ends

    ends = asyncio.run(serve(handler, then))
    assert set(ends.counts) == {"answered"}
    assert ends.counts["answered"] >= 5


def test_memory_of_another_launcher_is_not_counted():
    """Names end in the number of the server and what Triton adds; a folder's own name may hold an underscore."""
    command = ["tritonserver", "--backend-config=python,shm-region-prefix-name=memshare-q_7bajbcs_3_", "--http-port=1"]
    assert runtime_name(command) == "memshare-q_7bajbcs"


def sample(rss: float, before: bool = True, shared: int = 8) -> dict:
    held = {name: {"rss_mb": 10.0, "fds": 5, "threads": 2} for name in "abcde"}
    held["tensorrt_llm"] = {"rss_mb": rss, "fds": 5, "threads": 2}
    return {"before_crash": before, "shared_memory": shared, "held": held}


def judge(ends: Ends | None = None, **changes) -> list[str]:
    found = {
        "recoveries": [{"killed": "ensemble", "ready_after_s": 1.0}], "closed_without_a_crash": 0,
        "restarts_counted": 1.0, "leaked_blocks": 0.0, "samples": [sample(100), sample(101), sample(100)], **changes,
    }  # fmt: skip
    return faults_of(found, ends or Ends(Counter(answered=3)), 1)


def test_a_soak_that_held_has_no_faults():
    assert judge() == []
    assert judge(Ends(Counter(answered=1, closed=4), Counter({WENT_AWAY: 2}))) == []


@pytest.mark.parametrize(
    ("ends", "changes", "fault"),
    [
        (Ends(Counter({"answered": 1, "no end": 2})), {}, "2 requests: no end"),
        (Ends(Counter({"answered": 1, "unclear": 1})), {}, "1 requests: unclear"),
        (Ends(Counter(answered=1), Counter({"bad request": 1})), {}, "untrue reason: bad request"),
        (Ends(), {}, "no request was answered"),
        (
            None,
            {"closed_without_a_crash": 3, "closed_so": {"X": 3}},
            "3 connections closed although no server was dying: {'X': 3}",
        ),
        (None, {"recoveries": [{"killed": "x", "ready_after_s": 11.0}]}, "x: ready after 11.0 s, allowed 10"),
        (None, {"restarts_counted": 4.0}, "4 restarts for 1 crashes"),
        (None, {"leaked_blocks": 7.0}, "7 KV blocks in use without a request"),
        (None, {"leaked_blocks": float("nan")}, "nan KV blocks in use without a request"),
        (None, {"samples": [sample(100), sample(100, shared=40)]}, "shared memory of killed servers was left"),
        (None, {"samples": [sample(100), sample(120)]}, "tensorrt_llm: rss_mb grew 1.20 times"),
    ],
)
def test_each_promise_that_does_not_hold_is_named(ends, changes, fault):
    assert fault in judge(ends, **changes)


def test_growth_looks_at_servers_of_equal_age():
    samples = [sample(100), sample(500, before=False), sample(102), sample(101), sample(900, before=False)]
    assert growth(samples)["tensorrt_llm"] == {"rss_mb": 1.01, "fds": 1.0, "threads": 1.0}


def test_a_closed_connection_belongs_to_the_server_that_served_it():
    """A client may see the end long after its server died; a request that the next server took is no crash's."""
    windows = [(10.0, 12.0), (50.0, 51.0)]
    explained = [Closing(1.0, 11.0, "cut"), Closing(1.0, 30.0, "cut"), Closing(11.0, 11.5, "refused")]
    others = [Closing(1.0, 9.0, "cut"), Closing(12.5, 49.0, "cut"), Closing(51.5, 52.0, "cut")]
    assert Ends(closed=explained + others).closed_outside(windows) == others


def test_clients_say_for_how_long_they_saw_nothing():
    async def handler(request):
        time.sleep(0.3)  # what holds the loop up holds the clients up
        return web.Response(body=ANSWERS["streamed" if "stream" in request.path else "whole"])

    async def then(url):
        clients = Clients(url, ["a"], 1)
        await clients.run(time.monotonic() + 0.1)
        return clients.max_lag_s

    assert asyncio.run(serve(handler, then)) > 0.1


def test_what_triton_adds_is_taken_from_pairs_of_rounds():
    alone = [Round(2.0, 10.0, 50.0, 0.1), Round(4.0, 5.0, 100.0, 0.1), Round(2.0, 10.0, 50.0, 0.1)]
    triton = [Round(3.0, 9.0, 55.0, 0.2), Round(5.0, 4.5, 110.0, 0.2), Round(9.0, 9.0, 55.0, 0.2)]
    found = summary(alone, triton)
    assert (found["ttft_added_ms"], round(found["throughput_ratio"], 6), round(found["cpu_ratio"], 6)) == (1, 0.9, 1.1)
    assert found["executor"]["req_s"] == 10.0
    assert len(found["rounds"]) == 3
