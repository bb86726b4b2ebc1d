"""The OpenAI-compatible endpoint under the openai client: ``memshare serve --engine-dir`` in a process of its own."""

from __future__ import annotations

import asyncio
import time
import urllib.request

import pytest

from build_scripts.tiny_reasoner.tokenizer import build_tokenizer
from trtllm_memshare.__main__ import main
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.triton.reasoning import ThinkSplitter, ends_inside

openai = pytest.importorskip("openai", reason="the openai client is not installed")

QUESTION = "Q: 51 + 142 + 217 - 254 = ?\n"


@pytest.fixture(scope="module")
def client(openai_server):
    with openai.OpenAI(
        base_url=f"{openai_server.url}/v1", api_key=openai_server.api_key, max_retries=0, timeout=60
    ) as found:
        yield found


@pytest.fixture(scope="module")
def own_text(bundled_model, boundaries):
    """What the executor generates without a server."""
    tokenizer = build_tokenizer(4096)
    executor = Executor(TorchRunner(load_model(bundled_model), 200, 16), make_config("aligned"), boundaries, 2048, 4)

    def generate(prompt: str, params: SamplingParams) -> str:
        handle = executor.submit(tokenizer(prompt)["input_ids"], params)
        executor.run_until_idle()
        return tokenizer.decode(handle.result().token_ids, skip_special_tokens=True)

    return generate


def test_models_and_key(openai_server, client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 2048
    with pytest.raises(openai.NotFoundError, match="there is no model gpt, this server has tiny"):
        client.completions.create(model="gpt", prompt=QUESTION)
    with (
        pytest.raises(openai.AuthenticationError),
        openai.OpenAI(base_url=f"{openai_server.url}/v1", api_key="other") as other,
    ):
        other.models.list()


def test_a_completion_whole_and_streamed(client, own_text):
    expected = own_text(QUESTION, SamplingParams(400, stop_token_ids=(1,)))
    asked = {"model": "tiny", "prompt": QUESTION, "max_tokens": 400, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "stop"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens > 100) == (len(QUESTION), True)
    assert whole.usage.memshare["retired_pages"] >= 0
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected
    assert len(chunks) > 20
    assert chunks[-1].usage == whole.usage


def test_sampling_stop_and_several_prompts(client, own_text):
    sampled = SamplingParams(30, temperature=3.0, top_k=20, top_p=0.95, seed=7, stop_token_ids=(1,))
    asked = {"model": "tiny", "max_tokens": 30, "temperature": 3.0, "top_p": 0.95, "extra_body": {"top_k": 20}}
    two = client.completions.create(prompt=QUESTION, seed=7, n=2, **asked)
    assert [c.index for c in two.choices] == [0, 1]
    assert two.choices[0].text == own_text(QUESTION, sampled)
    assert two.choices[1].text == own_text(QUESTION, sampled.with_seed(8))
    greedy = {"model": "tiny", "temperature": 0, "max_tokens": 200}
    cut = client.completions.create(prompt=[QUESTION, "Q: 1 + 1 = ?\n"], stop=["so 193", "never"], **greedy)
    assert cut.choices[0].text == own_text(QUESTION, SamplingParams(200, stop_token_ids=(1,))).partition("so 193")[0]
    assert [c.index for c in cut.choices] == [0, 1]
    short = {**greedy, "max_tokens": 4}
    assert client.completions.create(prompt=QUESTION, echo=True, **short).choices[0].text.startswith(QUESTION)
    assert len(client.completions.create(prompt=QUESTION, logprobs=1, **short).choices[0].logprobs.token_logprobs) == 4
    with pytest.raises(openai.BadRequestError, match="logprobs are those of the answer's tokens"):
        client.completions.create(prompt=QUESTION, echo=True, logprobs=1, **short)


def test_a_chat_s_thoughts_are_apart_from_its_answer(client, own_text):
    whole = own_text(QUESTION, SamplingParams(1000, stop_token_ids=(1,)))
    thoughts, _, answer = whole.removeprefix("<think>").partition("</think>")
    asked = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    message = client.chat.completions.create(**asked).choices[0].message
    assert (message.role, message.content, message.reasoning_content) == ("assistant", answer, thoughts)
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**asked, stream=True)]
    assert "".join(d.content or "" for d in deltas) == answer
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == thoughts
    assert [d.role for d in deltas if d.role] == ["assistant"]
    parts = [{"type": "text", "text": QUESTION[:5]}, {"type": "text", "text": QUESTION[5:]}]
    logged = client.chat.completions.create(
        **{**asked, "messages": [{"role": "user", "content": parts}]}, max_completion_tokens=5, logprobs=True
    )
    assert len(logged.choices[0].logprobs.content) == 5
    inside = client.chat.completions.create(
        **asked, max_completion_tokens=8, extra_body={"chat_template_kwargs": {"thinks": True}}
    )
    assert inside.choices[0].message.content == ""
    assert inside.choices[0].message.reasoning_content


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "Q" * 201}, "the prompt has 201 tokens, over the limit max_prompt_tokens 200"),
        ({"prompt": "Q" * 100_000}, "over the limit max_prompt_bytes 3200, which is checked before tokenizing"),
        ({"max_tokens": 5000}, "max_tokens must be between 1 and the limit max_output_tokens 2047, got 5000"),
        ({"top_p": 1.5}, "top_p must be between 0 and 1, got 1.5"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported by this server"),
        ({"extra_body": {"best_off": 2}}, "best_off is no field of this endpoint"),
        ({"n": 65}, "n: input should be less than or equal to 64"),
        ({"prompt": ""}, "prompt must not be empty"),
        ({"prompt": [70000]}, "input_ids must lie in the vocabulary"),
        ({"stream": True, "temperature": -1}, "temperature must be between 0 and 100, got -1"),
        ({"extra_body": {"memshare_group": 3}}, "memshare_group needs an engine"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**{"model": "tiny", "prompt": QUESTION, **fields})


def test_many_clients_a_full_queue_and_metrics(openai_server, client):
    server = openai_server.url

    async def ask() -> list:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key=openai_server.api_key, max_retries=0) as many:
            asked = {"model": "tiny", "prompt": QUESTION, "max_tokens": 60, "temperature": 0}
            return await asyncio.gather(*(many.completions.create(**asked) for _ in range(50)), return_exceptions=True)

    answers = asyncio.run(ask())
    refused = [a for a in answers if isinstance(a, openai.InternalServerError)]
    answered = [a for a in answers if not isinstance(a, Exception)]
    assert len(refused) + len(answered) == 50
    assert len(answered) >= 36
    assert all(error.status_code == 503 and "the queue is full" in str(error) for error in refused)
    assert len({a.choices[0].text for a in answered}) == 1
    with client.completions.create(
        model="tiny", prompt=QUESTION, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    ) as left:
        next(iter(left))
    text = urllib.request.urlopen(f"{server}/metrics", timeout=10).read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['memshare_requests_total{outcome="queue_full"}']) == len(refused)
    assert float(values['memshare_requests_total{outcome="completed"}']) >= len(answered)
    deadline = time.monotonic() + 30
    while 'kv_cache_block_type="used"} 0.0' not in text and time.monotonic() < deadline:
        text = urllib.request.urlopen(f"{server}/metrics", timeout=10).read().decode()
    assert 'kv_cache_block_type="used"} 0.0' in text  # the client that left has freed its blocks


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>a</b>\nb</think>\n\nc <think> d", False, ("a</b>\nb", "\n\nc <think> d")),
        ("no thoughts", False, ("", "no thoughts")),
        ("a</think>b", True, ("a", "b")),
        ("<think>cut </thi", False, ("cut </thi", "")),
        ("<thi", False, ("", "<thi")),
        ("\n<think>a", False, ("a", "")),
    ],
)
def test_thoughts_are_found_wherever_the_pieces_are_cut(text, inside, expected, size):
    splitter, found = ThinkSplitter(inside), ["", ""]
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for index, piece in enumerate(pieces):
        for place, part in enumerate(splitter.push(piece, index == len(pieces) - 1)):
            found[place] += part
    assert tuple(found) == expected


def test_a_prompt_may_open_the_thoughts():
    assert ends_inside("user: x\n<think>\n")
    assert not ends_inside("<think>a</think> user")
    assert not ends_inside("")


def test_serve_s_help_says_what_both_servers_are(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: memshare serve" in text
    assert "trtllm-serve with MemShare and all its own options" in text
