"""The Triton models' parts without a server: tensors, limits, text, replies, the socket, the repository."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from build_scripts.tiny_reasoner.tokenizer import build_tokenizer
from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.triton import server as triton_server
from trtllm_memshare.triton.client import ServiceClient
from trtllm_memshare.triton.detokenizer import IncrementalDetokenizer, StopWords
from trtllm_memshare.triton.events import QueueFullError, ServiceLostError
from trtllm_memshare.triton.reply import Reply
from trtllm_memshare.triton.repository import RepositoryOptions, write_repository
from trtllm_memshare.triton.request_metrics import RequestMetrics
from trtllm_memshare.triton.runtime import private_dir
from trtllm_memshare.triton.server import Ports, find_server, server_command, server_environment
from trtllm_memshare.triton.service import ExecutorService
from trtllm_memshare.triton.socket_server import SocketServer
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.token_requests import Limits, parse_token_request

LIMITS = Limits(max_prompt_tokens=50, max_output_tokens=100, max_requests=3, vocab_size=80)


def tensors(**arrays) -> RequestTensors:
    return RequestTensors({name: np.asarray(value) for name, value in arrays.items()})


def parse(**arrays):
    defaults = {"input_ids": [[4, 5, 6]], "request_output_len": [[7]]}
    return parse_token_request(tensors(**{**defaults, **arrays}), LIMITS, (1,), exclude_input=True)


def test_defaults_are_greedy_and_the_model_s_stop_token():
    request = parse()
    assert request.input_ids == [4, 5, 6]
    assert (request.params.max_new_tokens, request.params.temperature, request.params.stop_token_ids) == (7, 0.0, (1,))
    assert not request.streaming
    assert not request.echo_input


def test_every_input_reaches_its_parameter():
    request = parse(
        input_lengths=[[2]], end_id=[[9]], min_tokens=[[3]], repetition_penalty=[[1.5]],
        presence_penalty=[[0.5]],
        frequency_penalty=[[0.25]], num_return_sequences=[[2]], return_log_probs=[[True]],
        temperature=[[0.5]], runtime_top_k=[[3]], runtime_top_p=[[0.9]],
        seed=[[2**40]], stop_words_list=[[[7, 8, 9], [2, 3, -1]]], bad_words_list=[[[5], [1]]], streaming=[[True]],
        exclude_input_in_output=[[False]], memshare_group=[[7]],
    )  # fmt: skip
    assert request.input_ids == [4, 5]
    params = request.params
    assert (params.stop_token_ids, params.temperature, params.top_k, params.seed) == ((9,), 0.5, 3, 2**40)
    assert params.top_p == pytest.approx(0.9)
    assert params.stop_sequences == ((7, 8), (9,))
    assert params.bad_words == ((5,),)
    assert (params.min_new_tokens, params.repetition_penalty, params.presence_penalty) == (3, 1.5, 0.5)
    assert (params.frequency_penalty, params.log_probs, request.num_sequences) == (0.25, True, 2)
    assert request.streaming
    assert request.echo_input
    assert (params.min_kept, params.memshare) == (None, True)
    own = parse(memshare_min_kept=[[0.75]], memshare_off=[[True]]).params
    assert (own.min_kept, own.memshare) == (0.75, False)
    assert (request.group, parse().group, parse(memshare_group=[[0]]).group) == (7, None, 0)


@pytest.mark.parametrize(
    ("arrays", "temperature", "top_k", "top_p"),
    [
        ({"temperature": [[0.7]]}, 0.0, 0, 1.0),  # greedy: neither top_k nor top_p
        ({"temperature": [[0.7]], "runtime_top_p": [[0.0]]}, 0.0, 0, 1.0),
        ({"runtime_top_k": [[50]]}, 1.0, 50, 1.0),
        ({"runtime_top_k": [[50]], "runtime_top_p": [[0.0]]}, 1.0, 50, 1.0),
        ({"runtime_top_p": [[1.0]]}, 1.0, 0, 1.0),
        ({"temperature": [[1.0]], "runtime_top_k": [[1]]}, 0.0, 1, 1.0),
        ({"temperature": [[0.0]], "runtime_top_k": [[50]]}, 0.0, 50, 1.0),
    ],
)
def test_sampling_follows_tensorrt_llm_s_rules(arrays, temperature, top_k, top_p):
    params = parse(**arrays).params
    assert (params.temperature, params.top_k, params.top_p) == (temperature, top_k, top_p)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input_ids": np.zeros((1, 0), np.int32)}, "input_ids must hold at least one token"),
        ({"input_ids": [[4] * 51]}, "51 tokens, over the limit max_prompt_tokens 50"),
        ({"input_ids": [[4, 80]]}, r"vocabulary 0..79, got 80"),
        ({"input_ids": [[-1]]}, r"vocabulary 0..79, got -1"),
        ({"input_lengths": [[4]]}, "at most the 3 tokens of input_ids, got 4"),
        ({"request_output_len": [[101]]}, "the limit max_output_tokens 100, got 101"),
        ({"temperature": [[np.nan]]}, "temperature must be between 0 and 100, got nan"),
        ({"runtime_top_p": [[1.5]]}, "runtime_top_p must be between 0 and 1, got 1.5"),
        ({"seed": [[1, 2]]}, r"seed must be one value for each prompt, got shape \[1, 2\]"),
        ({"memshare_group": [[-2]]}, "memshare_group must be at least -1"),
        ({"memshare_min_kept": [[1.5]]}, "memshare_min_kept must be between 0 and 1, got 1.5"),
        ({"end_id": [[80]]}, "end_id must be between -1 and 79, got 80"),
    ],
)
def test_bad_values_are_refused_by_name_and_limit(arrays, message):
    with pytest.raises(UserError, match=message):
        parse(**arrays)


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(UserError, match="text_input must be UTF-8"):
        tensors(text_input=np.array([[b"\xff\xfe"]], np.object_)).texts("text_input")


def test_pieces_of_text_join_to_the_whole_and_no_character_is_cut():
    tokenizer = build_tokenizer(4096)
    ids = tokenizer("Q: 51 + 142 = ?\n")["input_ids"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token], last=index == len(ids) - 1) for index, token in enumerate(ids)]
    assert "".join(pieces) == "Q: 51 + 142 = ?\n"

    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode(errors="replace")

    detokenizer = IncrementalDetokenizer(Bytes())
    assert [detokenizer.push([b]) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert detokenizer.push(["é".encode()[0]], last=True) == "\ufffd"


def test_stop_words_are_held_back_until_they_are_sure():
    words = StopWords(["END", "NDX"])
    assert [words.push(t) for t in ("aE", "N", "x", "EN", "D", "more")] == ["a", "", "ENx", "", "", ""]
    assert words.found
    assert StopWords(["END"]).push("aEN", last=True) == "aEN"
    assert StopWords([]).push("text") == "text"
    overlapping = StopWords(["aab"])
    assert overlapping.push("aaab") == "a"
    assert overlapping.found


class FakeSender:
    """A response sender that dies, as Triton's does, when it is asked after its end."""

    def __init__(self):
        self.sent, self.ended = [], False

    def send(self, response=None, flags=0):
        assert not self.ended, "sent after the end"
        self.sent.append(response)
        self.ended = bool(flags)

    def is_cancelled(self):
        assert not self.ended, "segmentation fault"
        return False


def test_an_ended_reply_is_neither_asked_nor_written_again():
    pb = SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)
    sender = FakeSender()
    reply = Reply(pb, sender)
    reply.send("a")
    assert not reply.is_cancelled()
    reply.end("b")
    reply.end("c")
    reply.send("d")
    assert not reply.is_cancelled()
    assert sender.sent == ["a", "b"]


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


def test_a_service_that_is_not_there_is_named(tmp_path):
    async def use():
        with pytest.raises(ServiceLostError, match="the model tensorrt_llm cannot be reached"):
            await ServiceClient(tmp_path / "nothing.sock").submit(INPUTS)

    asyncio.run(use())


@pytest.fixture(scope="module")
def engine_dir(tiny_checkpoint, tmp_path_factory) -> Path:
    options = BuildOptions(model_dir=tiny_checkpoint, output_dir=tmp_path_factory.mktemp("engine") / "engine",
                           memshare=True, build={"max_seq_len": 128, "max_batch_size": 4})  # fmt: skip
    build_engine(plan_build(options))
    return options.output_dir


def test_a_repository_is_written_whole_or_not_at_all(engine_dir, tmp_path):
    target = tmp_path / "repository"
    options = RepositoryOptions(engine_dir, target)
    write_repository(options)
    config = (target / "tensorrt_llm" / "config.pbtxt").read_text()
    assert f'"{engine_dir.resolve()}"' in config
    assert "$" not in config
    compile((target / "ensemble" / "1" / "model.py").read_text(), "model.py", "exec")
    with pytest.raises(UserError, match=r"there is a model repository at .* already \(add --force"):
        write_repository(options)
    write_repository(RepositoryOptions(engine_dir, target, max_queue_size=5, force=True))
    assert 'key: "max_requests" value: { string_value: "9" }' in (target / "ensemble" / "config.pbtxt").read_text()
    assert os.listdir(tmp_path) == ["repository"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_blocks": 7}, "must hold one request of max_seq_len 128: 8 blocks of 16 tokens, got 7"),
        ({"max_prompt_tokens": 128}, "--max-prompt-tokens must be between 1 and 127, got 128"),
        ({"max_output_tokens": 0}, "--max-output-tokens must be between 1 and 127, got 0"),
        ({"max_queue_size": -1}, "--max-queue-size must not be negative, got -1"),
        ({"max_prompt_bytes": 0}, "--max-prompt-bytes must be at least 1, got 0"),
        ({"cancellation_check_period_ms": 0}, "--cancellation-check-period-ms must be between 10 and 60000, got 0"),
    ],
)
def test_limits_that_cannot_hold_leave_nothing_behind(engine_dir, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        write_repository(RepositoryOptions(engine_dir, tmp_path / "repository", **options))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_is_not_replaced(engine_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and not a repository of this project"):
        write_repository(RepositoryOptions(engine_dir, tmp_path, force=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_server_listens_on_loopback_unless_told_otherwise(tmp_path):
    executable = tmp_path / "tritonserver"
    executable.touch()
    server = find_server(executable)
    runtime = tmp_path / "runtime"
    command = server_command(server, tmp_path, Ports(1, 2, 3), "127.0.0.1", runtime, 90, ["--log-verbose=1"])
    assert [a for a in command if "address" in a] == [f"--{n}-address=127.0.0.1" for n in ("http", "grpc", "metrics")]
    assert command[-1] == "--log-verbose=1"
    assert "--exit-timeout-secs=90" in command
    assert not any("restricted" in a or "control-mode" in a for a in command)  # no key, and nothing to lock
    environment = server_environment(server, tmp_path, runtime)
    assert environment["PATH"].split(":")[0] == str(Path(os.sys.executable).parent)
    with pytest.raises(UserError, match=r"no model repository at .*/nothing"):
        server_command(server, tmp_path / "nothing", Ports(), "127.0.0.1", runtime, 90, [])
    with pytest.raises(UserError, match="--model-control-mode belongs to the launcher"):
        server_command(server, tmp_path, Ports(), "127.0.0.1", runtime, 90, ["--model-control-mode=explicit"])


def test_a_missing_server_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--tritonserver must name the server's executable, got .*/nothing"):
        find_server(tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(triton_server, "find_spec", lambda name: None)
    monkeypatch.setattr(triton_server, "_if_file", lambda path: None)
    with pytest.raises(UserError, match="no tritonserver on PATH and no nvidia-pytriton wheel"):
        find_server()
