"""The executor over its socket: tokens, groups, pressure, refusals, and readers that go away."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.triton.client import ServiceClient
from trtllm_memshare.triton.events import QueueFullError, ServiceLostError
from trtllm_memshare.triton.request_metrics import RequestMetrics
from trtllm_memshare.triton.runtime import private_dir
from trtllm_memshare.triton.service import ExecutorService
from trtllm_memshare.triton.socket_server import SocketServer
from trtllm_memshare.triton.token_requests import Limits

LIMITS = Limits(max_prompt_tokens=50, max_output_tokens=100, max_requests=3, vocab_size=80)


def service_over(executor: Executor) -> ExecutorService:
    return ExecutorService(executor, LIMITS, (), 8, True, RequestMetrics(CollectorRegistry()))


@pytest.fixture
def service(tiny_checkpoint, boundaries):
    executor = Executor(TorchRunner(load_model(tiny_checkpoint), 60, 8), make_config("off"), boundaries, 120, 2)
    with executor:
        yield service_over(executor), executor


INPUTS = {"input_ids": [4, 5, 6], "request_output_len": 20, "streaming": True}


def over_socket(service, tmp_path, use):
    """Runs ``use(client)`` against a server on a socket."""

    async def run():
        path = private_dir(tmp_path / "private") / "executor.sock"
        server = SocketServer(service, path)
        await server.start()
        client = ServiceClient(path)
        result = await use(client)
        await client.close()
        await server.stop()
        return result

    return asyncio.run(run())


async def collect(client, inputs) -> tuple[list[int], list]:
    events = [e async for e in (await client.submit(inputs)).events()]
    return [token for event in events for token in event.token_ids], events


def test_requests_over_the_socket_get_the_executor_s_tokens(service, tmp_path):
    async def use(client):
        together = await asyncio.gather(*(collect(client, INPUTS) for _ in range(3)))
        whole = await collect(client, {**INPUTS, "streaming": False, "return_perf_metrics": True})
        return [*together, whole]

    (first, events), *others = over_socket(service[0], tmp_path, use)
    assert len(first) == 20
    assert all(tokens == first for tokens, _ in others)
    assert [e.finish_reason for e in events if e.finish_reason] == ["length"]
    (last,) = others[-1][1]
    assert last.figures["num_output_tokens"] == 20
    assert last.figures["kv_cache_alloc_total_blocks"] == 3


@pytest.mark.parametrize(("groups", "shares"), [((1, 1), True), ((1, 2), False)])
def test_samples_with_one_group_share_over_the_socket(tiny_checkpoint, boundaries, tmp_path, groups, shares):
    # Within so small a distance only what the other sample wrote at the same place can stand in.
    config = make_config("aligned", scope="group", max_distance=0.001, protected_tokens=8, protected_steps=0)
    executor = Executor(TorchRunner(load_model(tiny_checkpoint), 60, 8), config, boundaries, 120, 2)

    async def use(client):
        inputs = {**INPUTS, "request_output_len": 100, "streaming": False}
        return await asyncio.gather(*(collect(client, {**inputs, "memshare_group": g}) for g in groups))

    with executor:
        (first, _), (second, _) = over_socket(service_over(executor), tmp_path, use)
    assert first == second
    assert (executor.manager.stats().shared > 5) == shares


def test_several_answers_to_one_prompt_share_by_themselves_and_one_may_end_early(tiny_checkpoint, boundaries, tmp_path):
    config = make_config("aligned", scope="group", max_distance=0.001, protected_tokens=8, protected_steps=0)
    executor = Executor(TorchRunner(load_model(tiny_checkpoint), 60, 8), config, boundaries, 120, 2)

    async def use(client):
        asked = {**INPUTS, "request_output_len": 100, "num_return_sequences": 2}
        _, events = await collect(client, {**asked, "streaming": False})
        call, found = await client.submit(asked), []
        async for event in call.events():
            found.append(event)
            if len(found) == 6:
                call.cancel(1)
        return events, found

    with executor:
        whole, cut = over_socket(service_over(executor), tmp_path, use)
    assert sorted((e.sequence_index, len(e.token_ids)) for e in whole) == [(0, 100), (1, 100)]
    assert [e.is_last for e in whole] == [False, True]
    assert executor.manager.stats().shared > 5
    reasons = {e.sequence_index: e.finish_reason for e in cut if e.finish_reason}
    assert reasons == {0: "length", 1: "cancelled"}


def test_a_group_needs_an_engine_of_that_scope(service, tmp_path):
    async def use(client):
        with pytest.raises(UserError, match="has scope group, got scope request"):
            await collect(client, {**INPUTS, "memshare_group": 1})

    over_socket(service[0], tmp_path, use)


def test_a_share_to_keep_needs_an_engine_with_pressure(service, tmp_path):
    async def use(client):
        with pytest.raises(UserError, match=r"memshare_min_kept needs an engine .* preset pressure, got preset off"):
            await collect(client, {**INPUTS, "memshare_min_kept": 0.5})

    over_socket(service[0], tmp_path, use)


def test_requests_choose_their_share_under_pressure_and_hear_what_they_gave_up(tiny_checkpoint, boundaries, tmp_path):
    config = make_config("pressure", retired_becomes="dropped", need="age", min_kept=0.2, protected_tokens=8)
    executor = Executor(TorchRunner(load_model(tiny_checkpoint), 20, 8), config, boundaries, 120, 4)

    async def use(client):
        asked = {**INPUTS, "request_output_len": 90, "streaming": False, "return_perf_metrics": True}
        each = ({"memshare_off": True}, {"memshare_min_kept": 0.3}, {})
        return await asyncio.gather(*(collect(client, {**asked, **own}) for own in each))

    with executor:
        whole, half, default = (e[-1].figures for _, e in over_socket(service_over(executor), tmp_path, use))
    assert whole["memshare_retired_pages"] == 0
    assert whole["memshare_peak_pages"] == 12  # 93 tokens in pages of 8
    assert half["memshare_retired_pages"] + default["memshare_retired_pages"] > 0
    assert min(half["memshare_peak_pages"], default["memshare_peak_pages"]) < 12
    assert "memshare_num_pauses" in default


def test_refusals_keep_their_kind_over_the_socket(service, tmp_path):
    async def use(client):
        with pytest.raises(UserError, match="over the limit max_prompt_tokens 50"):
            await collect(client, {**INPUTS, "input_ids": [4] * 60})
        calls = [await client.submit({**INPUTS, "request_output_len": 90}) for _ in range(4)]
        results = await asyncio.gather(*(drain(c) for c in calls), return_exceptions=True)
        return [type(r) for r in results]

    async def drain(call):
        return [e async for e in call.events()]

    kinds = over_socket(service[0], tmp_path, use)
    assert kinds == [list, list, list, QueueFullError]


@pytest.mark.parametrize("way", ["cancel", "leave", "disconnect"])
def test_a_reader_that_goes_away_frees_the_request(service, tmp_path, way):
    executor = service[1]

    async def use(client):
        call = await client.submit({**INPUTS, "request_output_len": 100})
        events = call.events()
        await anext(events)
        assert executor.status().used_blocks > 0
        if way == "cancel":
            call.cancel(0)
            reasons = [e.finish_reason async for e in events]
            assert reasons[-1] == "cancelled"
        elif way == "leave":
            await events.aclose()
        else:
            await client.close()
        for _ in range(100):
            if executor.status().used_blocks == 0:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the blocks were not freed")

    over_socket(service[0], tmp_path, use)


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1]", b'{"inputs": {}}', b'{"id": "a"}', b'{"id": 1, "cancel": "x"}', b"\xff\xfe", b"[" * 100_000],
    ids=lambda line: line[:10].decode("latin-1"),
)
def test_what_is_no_message_ends_its_connection_alone(service, tmp_path, caplog, line):
    async def use(client):
        others = asyncio.create_task(collect(client, INPUTS))
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "private" / "executor.sock"))
        writer.write(line + b"\n")
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        return await others

    tokens, _ = over_socket(service[0], tmp_path, use)
    assert len(tokens) == 20
    assert "a client of the executor is cut off: UserError: a message must be a JSON object" in caplog.text


def test_a_service_that_is_not_there_is_named(tmp_path):
    async def use():
        with pytest.raises(ServiceLostError, match="the model tensorrt_llm cannot be reached"):
            await ServiceClient(tmp_path / "nothing.sock").submit(INPUTS)

    asyncio.run(use())
